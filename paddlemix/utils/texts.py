"""Helpers for messages."""

from __future__ import annotations

import difflib
import json
from typing import Any, Iterable, Optional, Sequence


def shown(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def nearest(name: str, known: Sequence[str]) -> Optional[str]:
    """The most similar known name, or None."""
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.lower(), known, 1)
    return near[0] if near else None


def some(names: Iterable[str], limit: int = 10, separator: str = ", ") -> str:
    """The first names, and the number of further ones."""
    names = list(names)
    return separator.join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
