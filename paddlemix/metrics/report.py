"""The evaluation as a page: one self-contained HTML file, see report.html.

Its data are in two inert text blocks: JSON with everything except the pictures, and the pictures, one base64 line each.
A picture becomes an element only while its row is near the viewport. All data are inserted as text nodes; the content
security policy allows only the file's own script and style, by their hashes, and no requests.
"""

from __future__ import annotations

import base64
import json
import os
import re
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from paddlemix.metrics.captions import SCORES
from paddlemix.metrics.evaluation import RATES, SHARES, Evaluation, System
from paddlemix.metrics.wording import EMPTY, REPEATED, TOKENS
from paddlemix.utils.files import atomic_write
from paddlemix.utils.pages import page_style, policy

TEMPLATE = os.path.join(os.path.dirname(__file__), "report.html")
# Columns that the page shows and sorts by.
COLUMNS = (*SCORES, TOKENS)
# Escapes for JSON inside HTML: characters that could end the block or start a tag, and JavaScript line terminators.
_UNFIT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
# Lone surrogates, which UTF-8 cannot encode.
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACES = re.compile(r"\{\{(policy|data|pictures)\}\}")


def choose_rows(evaluation: Evaluation, limit: int) -> List[int]:
    """Indices of the rows to show, in the order of the references: all, or the `limit` rows with the lowest CIDEr."""
    worst = np.argsort(evaluation.results.scores.rows["CIDEr"], kind="stable")[:limit]
    return sorted(worst.tolist())


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _SURROGATE.sub("\ufffd", text)
    return "".join(_UNFIT.get(letter, letter) for letter in text) if re.search("[<>&\u2028\u2029]", text) else text


def _row(system: System, row: int) -> List[Any]:
    """One row of one file: caption, scores by COLUMNS, words not in references, flags, wrong attributes."""
    values = {**system.scores.rows, **system.wording.rows}
    flags = [name for name in (REPEATED, EMPTY) if values[name][row]]
    return [
        system.captions[row],
        [round(float(values[name][row]), 4) for name in COLUMNS],
        [word for _, word in system.wording.unsupported[row]],
        flags,
        list(system.attributes.wrong[row]) if system.attributes is not None else [],
    ]


def write_report(
    path: str,
    evaluation: Evaluation,
    rows: Sequence[int],
    pictures: Optional[Mapping[str, Tuple[bytes, str]]],
    gains: Optional[Mapping[str, float]] = None,
) -> None:
    """Write the page of `rows` of an evaluation, atomically.

    pictures: id → (WebP bytes, or b"" and the reason); None for a page without pictures. gains: id → the gain from the
    image (tools/score_rows.py), for the rows that have one.
    """
    with open(TEMPLATE, encoding="utf-8", newline="") as file:
        template = file.read().replace("{{style}}", page_style())
    found = evaluation.to_json()
    places: List[Any] = []
    begin = 0
    shown = []
    for row in rows:
        key = evaluation.ids[row]
        place: Any = None
        if pictures is not None:
            webp, problem = pictures.get(key, (b"", "no picture in the file"))
            place = problem
            if webp:
                length = (len(webp) + 2) // 3 * 4
                place, begin = [begin, length], begin + length + 1
                places.append(webp)
        systems = [_row(one, row) for one in (evaluation.results, *evaluation.others)]
        gain = None if gains is None or key not in gains else round(gains[key], 4)
        shown.append([key, evaluation.references[row], place, systems, gain])
    measures = list(evaluation.results.measures)
    data = {
        "summary": found,
        "measures": measures,
        # Shown in per cent; for the latter, less is better.
        "rates": [*RATES, *(name for name in measures if name.endswith(SHARES))],
        "faults": RATES,
        "columns": COLUMNS,
        "has_pictures": pictures is not None,
        "has_gains": gains is not None,
        "rows": shown,
    }
    with atomic_write(path) as file:
        position = 0
        for match in _PLACES.finditer(template):
            file.write(template[position : match.start()])
            position = match.end()
            if match.group(1) == "policy":
                file.write(policy(template))
            elif match.group(1) == "data":
                file.write(_json(data))
            else:
                for webp in places:
                    file.write(base64.b64encode(webp).decode() + "\n")
        file.write(template[position:])
