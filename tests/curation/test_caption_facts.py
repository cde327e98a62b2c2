"""Facts of a caption, against cases worked out by hand."""

import pytest

from paddlemix.curation.caption_facts import caption_facts, repetition, style


@pytest.mark.parametrize(
    "text, value",
    [
        ("", 0),
        ("红杯子", 0),
        ("红色的杯子放在左侧", 0),
        ("好好好好好好", 2 / 3),  # three 4-grams, all the same
        ("红色的杯子，红色的杯子", 2 / 7),  # seven 4-grams, of which two come again
        ("买一送一！" * 20, 73 / 77),  # four different ones of 77
        ("a b-c d a b c d", 1 / 5),  # abcdabcd
    ],
)
def test_repetition(text, value):
    assert repetition(text) == pytest.approx(value)
    assert 0 <= repetition(text) <= 1


@pytest.mark.parametrize(
    "text, name",
    [
        ("写实风格，一个圆形金属井盖", "写实"),
        ("整体采用极简主义风格。", "极简主义"),
        ("这是一张小清新风格的海报", "小清新"),
        ("画面为复古的风格", "复古"),
        ("整体风格统一，现代风格", "现代"),
        ("风格多样", ""),
        ("没有说", ""),
    ],
)
def test_style(text, name):
    assert style(text) == name


@pytest.mark.parametrize(
    "text, price",
    [
        ("仅售9元！", "9元"),
        ("原价¥1,299，现价￥ 99.5", "¥1,299"),
        ("满200.50元减", "200.50元"),
        ("九十九元包邮", "九十九元"),
        ("只要五块钱", "五块钱"),
        ("一块红色的布，二元一次方程", ""),
        ("售价3万元", "3万元"),
        ("3个杯子", ""),
    ],
)
def test_price(text, price):
    assert caption_facts(text).price == price


def test_all_of_one_caption():
    found = caption_facts("写实风格 Big 2 杯\u200b<img>子", count_tokens=len)
    # 19 characters, 16 of them no blanks: 写实风格杯子, Bigimg, 2, <> and the invisible one.
    assert found._asdict() == {
        "chars": 19, "tokens": 19, "chinese": 6 / 16, "latin": 6 / 16, "digits": 1 / 16, "repetition": 0.0,
        "opening": "写实风格 B", "style": "写实", "price": "", "control": 1, "tags": 1,
    }  # fmt: skip
    assert caption_facts("杯").tokens is None
    empty = caption_facts("")
    assert (empty.chars, empty.chinese, empty.repetition, empty.opening) == (0, 0, 0, "")
