"""The evaluation as a page: one HTML file that asks for nothing from anywhere, see report.html.

The page's data stand in two blocks that are text to the browser: JSON with all but the pictures, and the pictures, one
base64 line after the other. A picture becomes an element only while its row is near the screen. Everything of the data
goes into the page as text nodes; the policy in its head allows the file's own script and style by their hashes and
no request at all.
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
# What the page sorts by and shows of each row.
COLUMNS = (*SCORES, TOKENS)
# JSON inside HTML: nothing that could end the block or begin a tag, and no line ends of JavaScript.
_UNFIT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
# Half characters, which a UTF-8 file cannot hold.
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLACES = re.compile(r"\{\{(policy|data|pictures)\}\}")


def choose_rows(evaluation: Evaluation, limit: int) -> List[int]:
    """Which rows the page shows, in the order of the references: all, or the `limit` of least CIDEr."""
    worst = np.argsort(evaluation.results.scores.rows["CIDEr"], kind="stable")[:limit]
    return sorted(worst.tolist())


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = _SURROGATE.sub("\ufffd", text)
    return "".join(_UNFIT.get(letter, letter) for letter in text) if re.search("[<>&\u2028\u2029]", text) else text


def _row(system: System, row: int) -> List[Any]:
    """What the page needs of one row of one file: caption, scores by COLUMNS, words not in references, flags, wrong
    attributes."""
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
    """Write the page of `rows` of an evaluation, whole or not at all.

    pictures: id → (a WebP file's bytes, or b"" and why there is none); None for a page without pictures.
    gains: id → how much the image helps (tools/score_rows.py), of the rows that have one.
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
        # Shown in per cent; less is better of the latter.
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
