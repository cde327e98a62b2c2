"""Captions as text: one line, without boxes; and optional post-processing, of which every step is off by default.

All of it sees text only, never the model, so a file of captions can be repaired as well. Imports nothing heavy.

A repair that would leave nothing is left out. The result is one line, empty only for an empty text, and repairing it
once more changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Dict, List, NamedTuple, Optional

# Insides of a regular expression's [ ]: Han, kana and hangul; and with them the marks that Chinese text has.
_HAN = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WIDE = _HAN + "\u3001-\u3003\u3008-\u301f\uff01-\uff65“”‘’…—"
_SENTENCE_MARKS = "。！？!?…"
_CLOSERS = "”’\"'）)》」』】〉]"
# A comma or full stop inside a number ends nothing.
_CLAUSE_MARK = re.compile(r"[，。；！？、…]+|(?:(?<!\d)[,;!?]|[,;!?](?!\d)|\.(?=\s|$))+")
_SENTENCE_END = re.compile(rf"(?:[{_SENTENCE_MARKS}]+|\.(?=\s|$))[{re.escape(_CLOSERS)}]*")
_TRAILING_CLAUSE_MARKS = " ,;:.，；：、—-"

# What a chat model says before it comes to the point, in front of a colon.
_LEAD_INS = ("图片内容描述", "图片内容", "图片描述", "图像描述", "描述", "回答", "答", "assistant", "user")
_LEAD_IN = re.compile(rf"(?:{'|'.join(_LEAD_INS)})\s*[:：]", re.IGNORECASE)
_PICTURE = re.compile(r"Picture \d+:|<img>.*?</img>", re.IGNORECASE)
_AFTER_ECHO = " :：,，。.、;；!！?？-"

# A repeat is the fault of a loop, not a turn of phrase, from this length of a clause on, or at once behind the first.
_CLAUSE_LENGTH = 4
# 非常非常非常, 大大大大: a unit with a Han character in it, so that no price loses its noughts.
_UNIT = rf"(?:[{_HAN}][^\n]|[^{_HAN}\n]{{1,19}}[{_HAN}])[^\n]{{0,18}}?"
_STUTTER = re.compile(rf"({_UNIT})\1{{2,}}|([{_HAN}])\2{{3,}}")

_TO_WIDE = {",": "，", ";": "；", ":": "：", "!": "！", "?": "？", ".": "。"}
_MARK_RUN = re.compile(r" *[,;:!?.](?: *[,;:!?.])* *")

_GROUNDING = re.compile(r"<(box|quad)>(?:[^<]*</\1>|[\d\s(),]*)|</?(?:ref|box|quad)>")

# Each pass makes a text shorter or leaves it, so two or three are all that is ever seen.
_MAX_PASSES = 16


def single_line(text: str) -> str:
    """A text as one line of a results file: line breaks, tabs and other control characters become spaces, runs of
    spaces one."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())


def without_grounding(text: str) -> str:
    """A text without boxes; of `<ref>a cup</ref>` the words stay."""
    return _GROUNDING.sub("", text)


class PostProcessing(NamedTuple):
    """The repairs in the order in which they are made.

    strip_echo: drop the prompt, `Picture 1:` and openings like 图片描述： from the front.
    full_width: ASCII , ; : ! ? . and brackets become full-width beside Chinese text (not inside numbers, names, URLs).
    cut_repeats: keep only the first occurrence of a repeated clause, and of a word that is stuttered.
    max_chars: at most this many characters, cut behind a clause where one ends in the second half.
    end_mark: end at a sentence mark: what follows the last one is dropped if it is the smaller half, else 。 is added.
    """

    strip_echo: bool = False
    full_width: bool = False
    cut_repeats: bool = False
    max_chars: Optional[int] = None
    end_mark: bool = False

    def settings(self) -> Optional[Dict]:
        """What a results' sidecar holds of it: the repairs that are on, or None."""
        return {name: value for name, value in self._asdict().items() if value} or None

    def __call__(self, text: str, prompt: str = "") -> str:
        """The repaired text of one caption. prompt: the question that the model was asked."""
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
    """Without the question and the openings that a chat model puts before its answer, however often."""
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
    """ASCII punctuation as Chinese text has it; the blanks around a mark go with it."""
    text = _wide_brackets(text)

    def widen(found):
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        marks = found.group().replace(" ", "")
        # 好.com, 红色.5: a name or a number goes on.
        goes_on = marks == "." and after.isascii() and after.isalnum() and not found.group().endswith(" ")
        if goes_on or not (_is_wide(before) or _is_wide(after)):
            return found.group()
        return re.sub(r"\.{2,}", "……", marks).translate(str.maketrans(_TO_WIDE))

    return _MARK_RUN.sub(widen, text)


def _is_wide(character: str) -> bool:
    return re.match(f"[{_WIDE}]", character) is not None


def _wide_brackets(text: str) -> str:
    """Pairs of brackets that hold Chinese text, or stand directly beside it."""
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
    """The first of each clause that comes again, and of each stuttered word."""
    text = _STUTTER.sub(lambda found: found.group(1) or found.group(2), text)
    kept: List[List[str]] = []
    said, dropped = set(), False
    for clause, mark in _clauses(text):
        name = "".join(clause.split())
        again = name in said if len(name) >= _CLAUSE_LENGTH else bool(kept) and name == "".join(kept[-1][0].split())
        # A loop that the length limit has cut: 一只猫，一只猫，一只
        begun = dropped and not mark and any(other != name and other.startswith(name) for other in said)
        if kept and (again or begun):
            dropped = True
            if mark.strip() and mark.strip()[0] in _SENTENCE_MARKS + ".":
                kept[-1][1] = mark
            continue
        said.add(name)
        kept.append([clause, mark])
    return "".join(clause + mark for clause, mark in kept).strip()


def _clauses(text: str) -> List[List[str]]:
    """[clause, the marks behind it] in order; the last may have none."""
    clauses, position = [], 0
    for found in _CLAUSE_MARK.finditer(text):
        clauses.append([text[position : found.start()], found.group()])
        position = found.end()
    if text[position:]:
        clauses.append([text[position:], ""])
    return clauses


def limit(text: str, max_chars: int) -> str:
    """At most `max_chars` characters: up to a sentence or clause if one ends in the second half of that, never inside
    a number or a Latin word if it can be helped."""
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
    """Up to the last sentence mark if most of the text is left so; else as it is, with 。 behind it (or . behind text
    without Chinese characters). max_chars: holds with that mark, too."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    if ends and ends[-1] == len(text):
        return text
    if ends and 2 * ends[-1] >= len(text):
        return text[: ends[-1]]
    if max_chars is not None:
        text = text[: max_chars - 1]
    text = text.rstrip(_TRAILING_CLAUSE_MARKS)
    return text and text + ("。" if re.search(f"[{_HAN}]", text) else ".")
