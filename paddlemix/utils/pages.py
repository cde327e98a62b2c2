"""Shared by the self-contained HTML pages: the style sheet and the content security policy."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from typing import Dict

_OWN = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_style() -> str:
    """The style sheet of all pages."""
    with open(os.path.join(os.path.dirname(__file__), "page.css"), encoding="utf-8", newline="") as file:
        return file.read()


def policy(page: str) -> str:
    """The content security policy of a page: its own script and style by hash, pictures from data, nothing else."""
    allowed: Dict[str, str] = {"script": "", "style": ""}
    for tag, text in _OWN.findall(page):
        allowed[tag] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    own = "".join(f"{tag}-src{hashes}; " for tag, hashes in allowed.items() if hashes)
    return f"default-src 'none'; {own}img-src data:; base-uri 'none'; form-action 'none'"
