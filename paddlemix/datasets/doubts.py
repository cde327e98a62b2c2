"""Warnings about rows that a conversion accepts although they look wrong."""

from __future__ import annotations

import re
from collections import Counter
from typing import Dict, List

from paddlemix.datasets.tsv import TsvRow, unquoted

# Text that occurs in captions and not in ids.
_WORDS = re.compile("[\u4e00-\u9fff]{4}")


class Doubts:
    """Collects suspicious but usable rows."""

    def __init__(self) -> None:
        self._count: Counter = Counter()
        # The first line of each kind.
        self._first: Dict[str, str] = {}

    def look(self, row: TsvRow, caption: str) -> None:
        """caption: the row's, in its record."""
        text = row.caption or ""
        if text.startswith('"'):
            if unquoted(text) != text:
                self._add("unquoted", row)
            elif text.count('"') % 2:
                self._add("unclosed", row)
        if "\t" in caption:
            self._add("tabs", row)
        if _WORDS.search(row.id) and not _WORDS.search(caption) and len(caption) < len(row.id):
            self._add("exchanged", row)

    def _add(self, kind: str, row: TsvRow) -> None:
        self._count[kind] += 1
        self._first.setdefault(kind, row.line)

    def warnings(self, n_train: int, n_val: int, val_every: int) -> List[str]:
        found = []
        kinds = ("unquoted", "unclosed", "exchanged", "tabs")
        unquoted_, unclosed, exchanged, tabs = (self._count[kind] for kind in kinds)
        if unquoted_:
            found.append(
                f"{unquoted_} captions were quoted as in CSV (the first in line {self._first['unquoted']}): the quotes "
                "were taken off"
            )
        if unclosed:
            found.append(
                f"{unclosed} captions open a quote that their line does not close (the first in line "
                f"{self._first['unclosed']}): if a CSV writer made this of line breaks, they are cut there; write the "
                "file without quoting and line breaks, or as CSV with a header"
            )
        if 2 * exchanged > n_train + n_val:
            found.append(
                f"{exchanged} rows have an id that reads like a caption, and a caption that does not: the columns are "
                "id, image, caption; are two of them exchanged?"
            )
        if 2 * tabs > n_train + n_val:
            found.append(
                f"{tabs} captions hold a tab: what follows the image is the caption, with all further columns; the "
                "columns are id, image, caption"
            )
        if not n_train:
            found.append("train.json is empty: all rows went to val.json; give more rows, or --val_every 0")
        if not n_val:
            found.append(
                "val.json is empty (--val_every 0): leave it out of the run's dataset.eval"
                if not val_every else "val.json is empty"
            )
        return found
