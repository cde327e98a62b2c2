"""Helpers for messages, and for what users write."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from typing import Any, Iterable, Optional, Sequence, Union

from paddlemix.utils.errors import UserError


def shown(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def nearest(name: str, known: Sequence[str]) -> Optional[str]:
    """The most similar known name, or None."""
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.lower(), known, 1)
    return near[0] if near else None


def counted(count: int, noun: str) -> str:
    """"1 row", "2 rows", "1,000 rows"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def one_line(text: str, limit: int = 80) -> str:
    """The first `limit` characters, unprintable ones escaped: names and values in messages may be untrusted."""
    shown = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def some(names: Iterable[str], limit: int = 10) -> str:
    """The first names, and the number of further ones."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def ranked(counts: Counter) -> str:
    """The three most frequent reasons, with their counts."""
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common(3)) or "there are none"


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(size: Union[int, str]) -> int:
    """Bytes of "10GB", "500MB", "4GiB" or a number.

    Raises:
        UserError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"\s*(\d{1,15})\s*([KMG]?i?B?)\s*", str(size), re.IGNORECASE)
    unit = found.group(2).upper() if found else "?"
    if found is None or unit not in _UNITS or int(found.group(1)) == 0:
        raise UserError(f"a size must read like 10GB or 500MB, not {size}", "size")
    return int(found.group(1)) * _UNITS[unit]
