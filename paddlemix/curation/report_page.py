"""An inspection as a page: one HTML file without scripts or external resources.

Everything of the data goes in escaped. Texts of the page are in the language in use (utils/language.py).
"""

from __future__ import annotations

import base64
import random
from html import escape
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from paddlemix.curation.inspection import Inspection, Overlap, groups_of
from paddlemix.datasets.rows import find_image_of, image_bytes
from paddlemix.datasets.thumbnails import shrink
from paddlemix.datasets.tsv import TsvRow
from paddlemix.utils.errors import ImageError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.language import chosen, tr
from paddlemix.utils.pages import page_style, policy

# Rows of the gallery by kind, groups of duplicates, pictures of each.
RANDOM, EXTREME, GROUPS, MEMBERS = 12, 6, 6, 6
_SIDE = 160
_MOST_CHARS = 1500
# Width and height of a plot.
_W, _H = 240, 84

# Measures: key → (title, factor, digits).
_MEASURES = {
    "chars": ("characters", 1, 0), "tokens": ("tokens", 1, 0), "repetition": ("repetition, %", 100, 1),
    "chinese": ("Chinese, %", 100, 1), "latin": ("Latin, %", 100, 1), "digits": ("digits, %", 100, 1),
    "width": ("width", 1, 0), "height": ("height", 1, 0), "aspect": ("long side / short side", 1, 2),
    "bytes": ("KB", 1 / 1024, 1), "sharpness": ("sharpness", 1, 0),
}  # fmt: skip
_TEXTS = {
    "opening": "Openings", "caption": "Whole captions", "4-gram": "4 characters", "8-gram": "8 characters",
    "style": "Styles", "price": "Prices",
}  # fmt: skip


def _text(value: Any) -> str:
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _say(text: str) -> str:
    return _text(tr(text))


def _panel(title: str, body: str, wide: bool = False) -> str:
    return f'<section class="panel{" wide" * wide}"><h2>{_say(title)}</h2>{body}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """head, rows: already escaped; the first column names the rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(summary: Dict[str, Any], keys: str) -> int:
    """A number of a summary, by its keys with / between them; 0 if it has none."""
    found: Any = summary
    for key in keys.split("/"):
        found = found.get(key, {})
    return found or 0


def _plot(key: str, series: Sequence[Optional[Dict[str, Any]]]) -> str:
    """A histogram, and the outline of the other set's."""
    title, factor, digits = _MEASURES[key]
    found = [one["histogram"] if one else None for one in series]
    low = min(one["from"] for one in found if one)
    high = max(one["to"] for one in found if one)
    # Heights are densities, so that sets of other sizes and ranges compare.
    density = [
        np.array(one["counts"]) / max(sum(one["counts"]), 1) / (one["to"] - one["from"]) if one else np.zeros(1)
        for one in found
    ]
    most = max(one.max() for one in density) or 1.0
    parts = []
    for number, (one, heights) in enumerate(zip(found, density)):
        if one is None:
            continue
        edges = np.linspace(one["from"], one["to"], len(heights) + 1)
        x = (edges - low) / (high - low) * _W
        y = _H - heights / most * (_H - 6)
        if number == 0:
            for i, top in enumerate(y):
                span = f"{edges[i] * factor:.{digits}f} – {edges[i + 1] * factor:.{digits}f}: {one['counts'][i]:,}"
                parts.append(
                    f'<rect class="ours" x="{x[i]:.2f}" y="{top:.2f}" width="{max(x[i + 1] - x[i] - 0.5, 0.3):.2f}" '
                    f'height="{_H - top:.2f}"><title>{span}</title></rect>'
                )
        else:
            outline = "".join(f"L{x[i]:.2f},{top:.2f}H{x[i + 1]:.2f}" for i, top in enumerate(y))
            parts.append(f'<path class="theirs other" d="M{x[0]:.2f},{_H}{outline}V{_H}"/>')
    name = _say(title)
    mean = " / ".join(f"{one['mean'] * factor:.{max(digits, 1)}f}" for one in series if one)
    return (
        f"<figure><figcaption>{name}<span>{_say('mean')} {mean}</span></figcaption>"
        f'<svg viewBox="0 0 {_W} {_H + 14}" role="img" aria-label="{name}">{"".join(parts)}'
        f'<line class="axis" x1="0" x2="{_W}" y1="{_H}" y2="{_H}"/>'
        f'<text x="0" y="{_H + 12}">{low * factor:.{digits}f}</text>'
        f'<text x="{_W}" y="{_H + 12}" text-anchor="end">{high * factor:.{digits}f}</text></svg></figure>'
    )


def _measures(parts: Sequence[Dict[str, Any]]) -> Tuple[str, str]:
    """(a table of percentiles, plots) of measures of one set or of two."""
    shown = ("1", "5", "50", "95", "99", "99.9")
    rows, plots = [], []
    for key, (title, factor, digits) in _MEASURES.items():
        series = [part["measures"].get(key) for part in parts]
        if not any(series):
            continue
        plots.append(_plot(key, series))
        for number, one in enumerate(series):
            if one:
                values = [one["least"], *(one["percentiles"][percent] for percent in shown), one["most"]]
                name = f'<span class="key key{number}"></span>' * (len(parts) > 1) + _say(title)
                rows.append([name, *(f"{value * factor:,.{digits}f}" for value in values)])
    head = ["", _say("min"), *(f"{percent} %" for percent in shown), _say("max")]
    return _table(head, rows), "".join(plots)


def _lists(captions: Dict[str, Any]) -> str:
    made = []
    for kind, title in _TEXTS.items():
        chips = "".join(
            f'<span class="chip" dir="auto">{_text(text[:80])} {count:,}</span>'
            for text, count in captions["texts"][kind]["listed"]
        )
        if chips:
            made.append(f"<div><b>{_say(title)}</b>{chips}</div>")
    note = tr(f"n-grams are counted in {captions['sampled for n-grams']:,} captions")
    lost = max(one["counts may be too small by"] for one in captions["texts"].values())
    if lost:
        note += "; " + tr(f"counts may be too small by {lost:,}")
    return f'<div class="words">{"".join(made)}</div><p class="note">{_text(note)}</p>'


# ---- rows with pictures


def _picture(row: TsvRow, path: str) -> str:
    try:
        webp = shrink(image_bytes(find_image_of(row, path)), _SIDE)
    except ImageError as error:
        return f'<div class="picture none">{_say(error.reason)}</div>'
    text = base64.b64encode(webp).decode()
    return f'<div class="picture"><img alt="{_text(row.id)}" src="data:image/webp;base64,{text}"></div>'


def _card(found: Inspection, index: int, note: str = "") -> str:
    row, path = found.row(index), found.paths[found.rows[index]["file"]]
    caption = row.text
    shown = caption[:_MOST_CHARS] + "…" * (len(caption) > _MOST_CHARS)
    place = f"{path}:{row.line}" + (f" · {note}" if note else "")
    return (
        f'<article class="panel row">{_picture(row, path)}<div><div class="head"><h3>{_text(row.id)}</h3>'
        f'<span class="place">{_text(place)}</span></div><p class="caption" dir="auto">{_text(shown)}</p></div>'
        "</article>"
    )


def _section(title: str, cards: Iterable[str], columns: int = 1) -> str:
    body = "".join(cards)
    return f'<h2>{_say(title)}</h2><div{" class=pair" * (columns == 2)}>{body}</div>' if body else ""


def _ends(found: Inspection, field: str, most: bool) -> List[int]:
    """The usable rows of most or least in a field, one of each caption."""
    rows = np.flatnonzero(found.good & (found.rows["caption"] != 0))
    values = found.rows[field][rows].astype(np.float64)
    rows = rows[np.argsort(-values if most else values, kind="stable")]
    first = np.unique(found.rows["caption"][rows], return_index=True)[1]
    return rows[np.sort(first)][:EXTREME].tolist()


def _group(found: Inspection, members: np.ndarray) -> str:
    shown = members[:MEMBERS].tolist()
    rows = [found.row(i) for i in shown]
    pictures = "".join(_picture(row, found.paths[found.rows[i]["file"]]) for i, row in zip(shown, rows))
    names = "  ·  ".join(f"{row.id} ({row.line})" for row in rows)
    captions = "".join(
        f'<p class="reference" dir="auto">{_text(row.text[:120])}</p>' for row in rows
    )
    title = _text(tr(f"{len(members):,} rows"))
    return (
        f'<article class="panel group"><div class="head"><h3>{title}</h3>'
        f'<span class="place">{_text(names)}</span></div><div class="strip">{pictures}</div>{captions}</article>'
    )


def _gallery(found: Inspection, seed: int) -> str:
    good = np.flatnonzero(found.good).tolist()
    drawn = sorted(random.Random(seed).sample(good, min(RANDOM, len(good))))
    repeats = [i for i in _ends(found, "repetition", True) if found.rows[i]["repetition"] > 0]
    one_per_copy = np.where(found.exact == np.arange(len(found.exact)), found.group, np.arange(len(found.group)))
    return "".join([
        _section("Copies", (_group(found, members) for members in groups_of(found.exact, GROUPS)), 2),
        _section("Near duplicates", (_group(found, members) for members in groups_of(one_per_copy, GROUPS)), 2),
        _section("Random rows", (_card(found, i) for i in drawn)),
        _section("Longest captions", (
            _card(found, i, tr(f"{found.rows[i]['chars']:,} characters")) for i in _ends(found, "chars", True)
        )),
        _section("Shortest captions", (
            _card(found, i, tr(f"{found.rows[i]['chars']:,} characters")) for i in _ends(found, "chars", False)
        )),
        _section("Most repetitive captions", (
            _card(found, i, tr(f"repetition {found.rows[i]['repetition']:.2f}")) for i in repeats
        )),
    ])  # fmt: skip


def _pairs(found: Inspection, other: Inspection, shared: Overlap) -> str:
    def pair(row: int, there: int, apart: int) -> str:
        note = tr("an exact copy") if apart < 0 else tr(f"{apart} bits apart")
        return f'<div class="pair">{_card(found, row, note)}{_card(other, there)}</div>'

    # The most distant first: these need a person's judgement most.
    order = np.argsort(-shared.apart, kind="stable")[:EXTREME]
    return _section("In both sets", (pair(*(int(part[at]) for part in shared)) for at in order))


# ---- the page


def write_page(
    path: str,
    found: Inspection,
    numbers: Dict[str, Any],
    seed: int,
    other: Optional[Inspection] = None,
    shared: Optional[Overlap] = None,
) -> None:
    """Write the page of an inspection, whole or not at all. numbers: summary(found), with "advice" and, of two sets,
    "other", the summary of the other one, and "overlap"."""
    both = [numbers] + ([numbers["other"]] if other is not None else [])
    captions, images = ([one[part] for one in both] for part in ("captions", "images"))
    keys = [f'<span class="key key{i}"></span>{_text(", ".join(one["files"]))}' for i, one in enumerate(both)]

    def counts(rows: Sequence[Tuple[str, str]]) -> str:
        """rows: (title, keys of the number in a summary)."""
        head = ["", *(key if len(both) > 1 else "" for key in keys)]
        return _table(head, ([_say(title), *(f"{_number(one, keys_of):,}" for one in both)] for title, keys_of in rows))

    reasons = sorted({reason for one in both for reason in one["rejected"]})
    formats = sorted({name for part in images for name in part["formats"]})
    row_counts = [
        ("rows", "rows"), ("usable", "good rows"), *((reason, f"rejected/{reason}") for reason in reasons),
        ("repeated ids", "ids doubled"), ("captions", "captions/rows"), ("different captions", "captions/distinct"),
        ("with a price", "captions/with/price"), ("with a style", "captions/with/style"),
        ("with control characters", "captions/with/control"), ("with tags", "captions/with/tags"),
    ]  # fmt: skip
    image_counts = [
        ("readable images", "images/readable"), *((name, f"images/formats/{name}") for name in formats),
        ("decoded", "images/decoded"), ("truncated", "images/truncated"), ("of one colour", "images/one colour"),
        ("copies of earlier ones", "images/copies/rows beyond the first"),
        ("near duplicates of earlier ones", "images/near duplicates/rows beyond the first"),
        *(
            (f"the same, at most {bits} bits apart", f"images/near duplicates by bits/{bits}")
            for bits in numbers["images"]["near duplicates by bits"]
        ),
        ("largest group", "images/near duplicates/largest"),
    ]  # fmt: skip
    caption_table, caption_plots = _measures(captions)
    image_table, image_plots = _measures(images)
    advice = "".join(f"<li>{_say(text)}</li>" for text in numbers["advice"])
    panels = [
        _panel("Advice", f"<ul>{advice}</ul>", wide=True),
        _panel("Rows and captions", counts(row_counts)),
        _panel("Images", counts(image_counts)),
        _panel("Length and characters of captions", caption_table, wide=True) if captions[0]["rows"] else "",
        _panel("Size and sharpness of images", image_table, wide=True),
        _panel("Distributions", f'<div class="charts">{caption_plots}{image_plots}</div>', wide=True),
        *(_panel("Most frequent texts", _lists(part), wide=True) for part in captions if part["rows"]),
    ]
    pairs = _pairs(found, other, shared) if other is not None else ""
    language = "zh-CN" if chosen() == "zh" else "en"
    style = f"<style>{page_style()}</style>"
    with atomic_write(path) as file:
        file.write(
            f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy(style)}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta name="color-scheme" content="light dark">\n<title>{_say("What is in the data?")}</title>\n{style}\n'
            f"</head>\n<body>\n<header><div><h1>{_say('What is in the data?')}</h1>"
            f'<p class="facts">{"  ·  ".join(keys)}</p></div></header>\n'
            f'<div class="overview"><div class="summary">{"".join(panels)}</div></div>\n'
            f'<main id="rows">{pairs}{_gallery(found, seed)}</main>\n</body>\n</html>\n'
        )
