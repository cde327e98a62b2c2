"""Facts of one caption, for statistics and curation."""

from __future__ import annotations

import re
from typing import Callable, NamedTuple, Optional

from paddlemix.datasets.cleaning import INVISIBLE, SPACES

# Characters of an opening: what captions by one annotator or model begin with ("这张图片展示").
OPENING_CHARS = 6
# Characters of the n-grams that repetition counts.
REPETITION_N = 4

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]")
_DIGIT = re.compile(r"\d")
_NO_WORD = re.compile(r"[\W_]+")
# Two characters name most styles.
_STYLE = re.compile("([\u4e00-\u9fff]{2}主义|小清新|[\u4e00-\u9fff]{2})的?风格")
# Words before 风格 that do not name a style.
_NO_STYLE = frozenset("一种 这种 那种 各种 整体 设计 画面 图片 图像 广告 视觉 不同 多种 统一 独特".split())
_NUMBER, _NUMERAL = r"\d+(?:[.,]\d+)*", "[一二两三四五六七八九十百千万零]"
# 二元 is no price, 十元 is.
_PRICE = re.compile(rf"[¥￥$]\s?{_NUMBER}|{_NUMBER}\s?(?:[万亿]?元|块钱)|(?:{_NUMERAL}{{2,}}|十)元|{_NUMERAL}+块钱")
_TAG = re.compile(r"</?[A-Za-z|!][^<>]{0,200}>")


class CaptionFacts(NamedTuple):
    """tokens: None without a tokenizer. chinese, latin, digits: shares (0…1) of the characters that are not blank.
    repetition: see repetition(). opening: the first OPENING_CHARS. style: see style(). price: the first price as it is
    written, or "". control: invisible and control characters. tags: `<…>` like markup or special tokens."""

    chars: int
    tokens: Optional[int]
    chinese: float
    latin: float
    digits: float
    repetition: float
    opening: str
    style: str
    price: str
    control: int
    tags: int


def repetition(text: str) -> float:
    """The share (0…1) of a text's 4-grams of characters that occurred earlier in it, without marks and blanks.

    0 for a text that never repeats four characters, 0.5 for one that says everything twice, near 1 for a loop.
    """
    text = _NO_WORD.sub("", text)
    count = len(text) - REPETITION_N + 1
    return 1 - len({text[at : at + REPETITION_N] for at in range(count)}) / count if count > 0 else 0.0


def style(text: str) -> str:
    """The first style that a text names ("写实风格" → "写实"), or ""."""
    return next((name for name in _STYLE.findall(text) if name not in _NO_STYLE), "")


def caption_facts(text: str, count_tokens: Optional[Callable[[str], int]] = None) -> CaptionFacts:
    """The facts of a caption. count_tokens: text → tokens, such as `lambda text: len(tokenizer.plain_ids(text))`."""
    letters = len(SPACES.sub("", text)) or 1
    price = _PRICE.search(text)
    return CaptionFacts(
        len(text),
        count_tokens(text) if count_tokens else None,
        len(_CHINESE.findall(text)) / letters,
        len(_LATIN.findall(text)) / letters,
        len(_DIGIT.findall(text)) / letters,
        repetition(text),
        text[:OPENING_CHARS],
        style(text),
        price.group() if price else "",
        len(INVISIBLE.findall(text)),
        len(_TAG.findall(text)),
    )
