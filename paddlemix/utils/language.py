"""The language of help, the dry run and the reports that are passed through `tr`: English as in the code, or Chinese
from the table zh.json.

The table maps an English text, or a template with {} for values, to the Chinese one, where {} or {0}, {1}, … insert the
same values: unchanged by default, translated with {:t}, as a list of names with {:l}. Texts that are not in the table
stay English.
"""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
from typing import Dict, List, Optional, Pattern, Sequence, Tuple

from paddlemix.utils.errors import UserError

LANGUAGES = ("en", "zh")
_given: Optional[str] = None


def choose(name: Optional[str]) -> None:
    """Set the language: one of LANGUAGES, or None for the locale's."""
    global _given
    if name is not None and name not in LANGUAGES:
        raise UserError(f"--lang: choose from {', '.join(LANGUAGES)}, not {name!r}")
    _given = name


def chosen() -> str:
    """The chosen language; by default that of LC_ALL, LC_MESSAGES or LANG, whichever is set first."""
    if _given is not None:
        return _given
    values = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, values), "").lower().startswith("zh") else "en"


def take(args: Sequence[str]) -> List[str]:
    """The command-line arguments without `--lang NAME` or `--lang=NAME`, which sets the language."""
    left: List[str] = []
    args = list(args)
    while args:
        arg = args.pop(0)
        if arg == "--":
            return [*left, arg, *args]
        name, equals, value = arg.partition("=")
        if name != "--lang":
            left.append(arg)
        elif equals or args:
            choose(value if equals else args.pop(0))
        else:
            raise UserError(f"--lang needs a value: {' or '.join(LANGUAGES)}")
    return left


@functools.lru_cache(maxsize=None)
def table() -> Dict[str, str]:
    """{English text or template: Chinese}."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "zh.json"), encoding="utf-8") as file:
        return json.load(file)


@functools.lru_cache(maxsize=None)
def _templates() -> List[Tuple[Pattern[str], str]]:
    """The templates as patterns, those with the most fixed text first."""
    found = sorted((key for key in table() if "{}" in key), key=lambda key: len(key) - 2 * key.count("{}"))
    patterns = ["(.+?)".join(map(re.escape, key.split("{}"))) for key in found]
    return [(re.compile(pattern, re.DOTALL), table()[key]) for pattern, key in zip(reversed(patterns), reversed(found))]


class _Value(str):
    """The value of a template's {}."""

    def __format__(self, how: str) -> str:
        if how == "l":
            return re.sub(r" and ([\d,]+) more$", r" 等，另有 \1 个", "无" if self == "none" else self)
        return tr(self) if how == "t" else self


def tr(text: str) -> str:
    """`text` in the chosen language. Paragraphs are looked up one by one."""
    if chosen() == "en" or not text:
        return text
    if "\n\n" in text.strip():
        return "\n\n".join(map(tr, text.strip().split("\n\n")))
    if text in table():
        return table()[text]
    if text.startswith("- "):
        return "- " + tr(text[2:])
    for pattern, chinese in _templates():
        found = pattern.fullmatch(text)
        if found:
            return chinese.format(*map(_Value, found.groups()))
    return text


def columns(text: str) -> int:
    """Width of `text` on a terminal, where Chinese characters take two columns."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def tr_row(line: str) -> str:
    """A line of a report, translated as a whole or, for a table row, by cells, which are separated by two or more
    spaces. Cells after the first keep their right edge."""
    translated = tr(line)
    if chosen() == "en" or translated != line:
        return translated
    row = ""
    for cell in re.finditer(r"\S+(?: \S+)*", line):
        text = tr(cell.group())
        gap = cell.start() - columns(row) if not row.strip() else max(2, cell.end() - columns(row) - columns(text))
        row += " " * gap + text
    return row


def wrap(text: str, width: int) -> List[str]:
    """`text` in lines of at most `width` columns. Lines may break between Chinese characters, except before marks."""
    lines = [""]
    for word in re.findall(r"[!-~]+[，。；：、）]*|[^，。；：、）][，。；：、）]*", " ".join(text.split())):
        if columns(lines[-1] + word.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += word if lines[-1] else word.lstrip()
    return [line.rstrip() for line in lines]
