"""Cleaning captions: wrong encodings, control characters, white space and repeated punctuation."""

from __future__ import annotations

import re

# Control characters and invisible marks; joiners stay, since emoji need them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
SPACES = re.compile(r"\s+")
_DOUBLED = re.compile(r"([。，、；：！？,;:!?])(?:\s?\1)+")
# A comma before another mark.
_COMMA_BEFORE_MARK = re.compile(r"[，、,](?=[。，、；：！？;:!?])")
# Texts that ftfy leaves unchanged, as most captions are: ASCII without & (HTML), Chinese characters, full-width marks,
# curly quotes, … and —.
_PLAIN = re.compile(
    "(?! )[ -%'-~\u2014\u2018\u2019\u201c\u201d\u2026\u3001-\u301f\u4e00-\u9fff\uff01-\uff5e\uffe5]+(?<! )"
)
_MARKS_IN_A_ROW = re.compile("[。，、；：！？,;:!?] ?[。，、；：！？,;:!?]")


def mend_caption(text: str) -> str:
    """A caption with mojibake repaired (ftfy), and control characters and repeated punctuation removed.

    Full-width punctuation and curly quotes, which are correct in Chinese, stay; so do "……", "——" and "...".
    """
    if not _PLAIN.fullmatch(text):
        import ftfy

        text = ftfy.fix_text(text, fix_character_width=False, uncurl_quotes=False)
    elif "  " not in text and not _MARKS_IN_A_ROW.search(text):
        return text
    text = SPACES.sub(" ", INVISIBLE.sub("", text)).strip()
    text = _DOUBLED.sub(r"\1", text)
    while True:
        # Removing a comma may make two marks adjacent.
        shorter = _DOUBLED.sub(r"\1", _COMMA_BEFORE_MARK.sub("", text))
        if shorter == text:
            return text
        text = shorter
