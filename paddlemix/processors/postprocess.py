"""Captions as text: one line, without boxes; and optional post-processing, every step of which is off by default.

It works on text only, so it also applies to files of captions. Imports nothing heavy. A step that would leave nothing
is skipped. The result is one line, empty only for an empty text, and post-processing is idempotent.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Dict, List, NamedTuple, Optional

# Contents of a regular expression's [ ]: Han, kana and hangul; the same and Chinese punctuation.
_HAN = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WIDE = _HAN + "\u3001-\u3003\u3008-\u301f\uff01-\uff65“”‘’…—"
_SENTENCE_MARKS = "。！？!?…"
_CLOSERS = "”’\"'）)》」』】〉]"
# Not a comma or full stop inside a number.
_CLAUSE_MARK = re.compile(r"[，。；！？、…]+|(?:(?<!\d)[,;!?]|[,;!?](?!\d)|\.(?=\s|$))+")
_SENTENCE_END = re.compile(rf"(?:[{_SENTENCE_MARKS}]+|\.(?=\s|$))[{re.escape(_CLOSERS)}]*")
_TRAILING_CLAUSE_MARKS = " ,;:.，；：、—-"

# Lead-ins of a chat model, before a colon.
_LEAD_INS = ("图片内容描述", "图片内容", "图片描述", "图像描述", "描述", "回答", "答", "assistant", "user")
_LEAD_IN = re.compile(rf"(?:{'|'.join(_LEAD_INS)})\s*[:：]", re.IGNORECASE)
_PICTURE = re.compile(r"Picture \d+:|<img>.*?</img>", re.IGNORECASE)
_AFTER_ECHO = " :：,，。.、;；!！?？-"

# Clauses from this length on count as repeated anywhere in the text, shorter ones only directly after each other.
_CLAUSE_LENGTH = 4
# 非常非常非常, 大大大大: a unit contains a Han character, so that prices keep their zeros.
_UNIT = rf"(?:[{_HAN}][^\n]|[^{_HAN}\n]{{1,19}}[{_HAN}])[^\n]{{0,18}}?"
_STUTTER = re.compile(rf"({_UNIT})\1{{2,}}|([{_HAN}])\2{{3,}}")

_TO_WIDE = {",": "，", ";": "；", ":": "：", "!": "！", "?": "？", ".": "。"}
_MARK_RUN = re.compile(r" *[,;:!?.](?: *[,;:!?.])* *")

_GROUNDING = re.compile(r"<(box|quad)>(?:[^<]*</\1>|[\d\s(),]*)|</?(?:ref|box|quad)>")

# A bound; two or three passes are enough in practice.
_MAX_PASSES = 16


def single_line(text: str) -> str:
    """A text as one line of a results file: control characters become spaces, and runs of spaces a single one."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())


def without_grounding(text: str) -> str:
    """A text without boxes; `<ref>a cup</ref>` becomes its words."""
    return _GROUNDING.sub("", text)


class PostProcessing(NamedTuple):
    """The steps, in the order in which they are applied.

    strip_echo: drop the prompt, `Picture 1:` and lead-ins like 图片描述： from the start.
    full_width: ASCII , ; : ! ? . and brackets become full-width next to Chinese text (not inside numbers, names, URLs).
    cut_repeats: keep only the first of repeated clauses and of stuttered words.
    max_chars: at most this many characters, cut after a clause if one ends in the second half.
    end_mark: end with a sentence mark: the text after the last one is dropped if it is the smaller half, else 。 is
    added.
    """

    strip_echo: bool = False
    full_width: bool = False
    cut_repeats: bool = False
    max_chars: Optional[int] = None
    end_mark: bool = False

    def settings(self) -> Optional[Dict]:
        """The enabled steps, for the sidecar of results; None without any."""
        return {name: value for name, value in self._asdict().items() if value} or None

    def __call__(self, text: str, prompt: str = "") -> str:
        """Post-process one caption. prompt: the question it answers."""
        text = " ".join(text.split())
        for _ in range(_MAX_PASSES):
            before, text = text, self._once(text, " ".join(prompt.split()))
            if text == before:
                break
        return text

    def _once(self, text: str, prompt: str) -> str:
        if self.strip_echo:
            text = strip_echo(text, prompt) or text
        if self.full_width:
            text = full_width(text)
        if self.cut_repeats:
            text = cut_repeats(text) or text
        if self.max_chars is not None:
            text = limit(text, self.max_chars)
        if self.end_mark:
            text = end_at_sentence(text, self.max_chars) or text
        return text


def strip_echo(text: str, prompt: str) -> str:
    """Without the question and lead-ins before the answer, however many."""
    while True:
        found = _LEAD_IN.match(text) or _PICTURE.match(text)
        if found:
            rest = text[found.end() :]
        elif prompt and text.startswith(prompt):
            rest = text[len(prompt) :]
        else:
            return text
        text = rest.lstrip(_AFTER_ECHO)


def full_width(text: str) -> str:
    """ASCII punctuation as full-width marks, without the spaces around them."""
    text = _wide_brackets(text)

    def widen(found):
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        marks = found.group().replace(" ", "")
        # 好.com, 红色.5: not a full stop.
        goes_on = marks == "." and after.isascii() and after.isalnum() and not found.group().endswith(" ")
        if goes_on or not (_is_wide(before) or _is_wide(after)):
            return found.group()
        return re.sub(r"\.{2,}", "……", marks).translate(str.maketrans(_TO_WIDE))

    return _MARK_RUN.sub(widen, text)


def _is_wide(character: str) -> bool:
    return re.match(f"[{_WIDE}]", character) is not None


def _wide_brackets(text: str) -> str:
    """Full-width brackets around or directly next to Chinese text."""
    characters, opened = list(text), []
    for i, character in enumerate(text):
        if character == "(":
            opened.append(i)
        elif character == ")" and opened:
            begin = opened.pop()
            beside = text[max(0, begin - 1) : begin] + text[i + 1 : i + 2]
            if re.search(f"[{_WIDE}]", text[begin:i]) or re.search(f"[{_HAN}]", beside):
                characters[begin], characters[i] = "（", "）"
    return "".join(characters)


def cut_repeats(text: str) -> str:
    """Only the first of repeated clauses and of stuttered words."""
    text = _STUTTER.sub(lambda found: found.group(1) or found.group(2), text)
    kept: List[List[str]] = []
    seen, dropped = set(), False
    for clause, mark in _clauses(text):
        name = "".join(clause.split())
        again = name in seen if len(name) >= _CLAUSE_LENGTH else bool(kept) and name == "".join(kept[-1][0].split())
        # A loop that the length limit has cut: 一只猫，一只猫，一只
        begun = dropped and not mark and any(other != name and other.startswith(name) for other in seen)
        if kept and (again or begun):
            dropped = True
            if mark.strip() and mark.strip()[0] in _SENTENCE_MARKS + ".":
                kept[-1][1] = mark
            continue
        seen.add(name)
        kept.append([clause, mark])
    return "".join(clause + mark for clause, mark in kept).strip()


def _clauses(text: str) -> List[List[str]]:
    """[clause, the marks after it] in order; the last may have none."""
    clauses, position = [], 0
    for found in _CLAUSE_MARK.finditer(text):
        clauses.append([text[position : found.start()], found.group()])
        position = found.end()
    if text[position:]:
        clauses.append([text[position:], ""])
    return clauses


def limit(text: str, max_chars: int) -> str:
    """At most `max_chars` characters: up to a sentence or clause if one ends in the second half, and if possible not
    inside a number or a Latin word."""
    if len(text) <= max_chars:
        return text
    cut = text[:max_chars]
    for marks in (_SENTENCE_END, _CLAUSE_MARK):
        ends = [found.end() for found in marks.finditer(text) if max_chars // 2 < found.end() <= max_chars]
        if ends:
            return cut[: ends[-1]].rstrip(" ")
    if re.match(r"[A-Za-z0-9]", text[max_chars]):
        cut = re.sub(r"(?<=[^A-Za-z0-9])[A-Za-z0-9]+$", "", cut)
    return cut.rstrip(" ") or text[:max_chars]


def end_at_sentence(text: str, max_chars: Optional[int] = None) -> str:
    """Up to the last sentence mark if that keeps most of the text; else with 。 appended (or . without Chinese
    characters). max_chars: includes that mark."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    if ends and ends[-1] == len(text):
        return text
    if ends and 2 * ends[-1] >= len(text):
        return text[: ends[-1]]
    if max_chars is not None:
        text = text[: max_chars - 1]
    text = text.rstrip(_TRAILING_CLAUSE_MARKS)
    return text and text + ("。" if re.search(f"[{_HAN}]", text) else ".")
