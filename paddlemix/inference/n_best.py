"""All candidates of each row (`predict.py --n_best FILE`), a line of JSON per row:

    {"id": "7", "chosen": 1, "candidates": [{"text": "…", "score": -0.31}, {"text": "…", "score": -0.28}]}

score: mean log-probability per token (for beams PaddleNLP's, with the length penalty). A candidate that ended early has
a note with the reason. A row without an image has no candidates; `chosen` is null for a row without a caption. Texts
are those of the model, before post-processing.

During a run, the lines are in FILE.partial. A row's line is written before its line of results, so a resumed run finds
at most some extra lines here, but for a power cut, which may lose lines of either file.
"""

from __future__ import annotations

import io
import json
import math
import os
from typing import Optional, Tuple

from paddlemix.datasets.tsv import clean_id
from paddlemix.inference.results import PARTIAL, ResultsWriter
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import lock, sync
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import disk_errors


class NBestWriter:
    """Writes the candidates of one run.

    results: of the same run. The lines of the rows that an earlier run has answered are kept; if a power cut lost the
    last of them, `results` drops those rows, too. As a context manager it closes the file; an unfinished one stays.

    Raises:
        UserError: the file is missing, or has other rows than the earlier run.
        JobFailed: it cannot be written.
    """

    def __init__(self, path: str, results: ResultsWriter):
        self._path, self._partial = path, path + PARTIAL
        with disk_errors(path):
            os.makedirs(os.path.realpath(os.path.dirname(path)), exist_ok=True)
            # The run may have been killed after this file was finished and before the results were.
            there = path if os.path.exists(path) and not os.path.exists(self._partial) else self._partial
            rows, whole = _kept(there, results)
            if whole and there == path:
                os.replace(path, self._partial)
            self._file = open(self._partial, "ab", buffering=0)
            lock(self._file, self._partial)
            self._file.truncate(whole)
        if rows < results.done:
            text = "%s has the candidates of %d rows of %d; the others are captioned again"
            logger.warning(text, there, rows, results.done)
            results.keep(rows)

    def write(self, name: str, answer) -> None:
        """Write the line of the next row, unbuffered. name: the row's id. answer: a captioner's Answer.

        Raises:
            JobFailed: the disk is full.
        """
        candidates = []
        for one in answer.candidates:
            score = round(one.score, 6) if math.isfinite(one.score) else None
            candidates.append({"text": one.text, "score": score, **({"note": one.note} if one.note else {})})
        row = {"id": clean_id(name), "chosen": answer.chosen, "candidates": candidates}
        rest = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with disk_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> None:
        """Rename the file to its final name."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
            os.replace(self._partial, self._path)
            sync(os.path.dirname(os.path.abspath(self._path)))

    def __enter__(self) -> NBestWriter:
        return self

    def __exit__(self, *exc_info) -> None:
        if os.fstat(self._file.fileno()).st_size == 0 and os.path.exists(self._partial):
            os.unlink(self._partial)
        self._file.close()


def _kept(path: str, results: ResultsWriter) -> Tuple[int, int]:
    """Rows and bytes of a file's first complete lines, which must belong to the rows of `results`."""
    rows = length = 0
    if not results.done:
        return 0, 0
    with open(path, "rb") if os.path.exists(path) else io.BytesIO(b"\n") as file:
        for (name, _), line in zip(results.done_rows(), file):
            # A power cut can leave blocks of zeros in place of the last lines.
            if not line.endswith(b"\n") or b"\0" in line:
                break
            if line_id(line) != name:
                raise UserError(
                    f"{path} does not hold the candidates of row {rows + 1}, which an earlier run has captioned: "
                    "restore the file, or start over with --restart"
                )
            rows, length = rows + 1, length + len(line)
    return rows, length


def line_id(line: bytes) -> Optional[str]:
    """The id in a line of candidates; None for any other line."""
    try:
        return json.loads(line.decode("utf-8"))["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
