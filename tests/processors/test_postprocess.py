"""Optional repairs of captions, each by itself."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.processors.postprocess import (
    PostProcessing,
    cut_repeats,
    end_at_sentence,
    full_width,
    limit,
    strip_echo,
)

PROMPT = "请描述图片内容"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("请描述图片内容：一只猫", "一只猫"),
        ("请描述图片内容 请描述图片内容。一只猫", "一只猫"),
        ("Picture 1: <img>a.jpg</img> 请描述图片内容 一只猫", "一只猫"),
        ("图片描述：一只猫", "一只猫"),
        ("Assistant: 回答: 一只猫", "一只猫"),
        ("描述性的一只猫", "描述性的一只猫"),
        ("一只猫，请描述图片内容", "一只猫，请描述图片内容"),
    ],
)
def test_strip_echo(text, expected):
    assert strip_echo(text, PROMPT) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("红色,蓝色;好!", "红色，蓝色；好！"),
        ("红色 , 蓝色. 绿色", "红色，蓝色。绿色"),
        ("价格:3.5元,买1,000件", "价格：3.5元，买1,000件"),
        ("Nike, Adidas", "Nike, Adidas"),
        ("官网www.a.com, 好", "官网www.a.com，好"),
        ("杯子(红色)和(USD 5)", "杯子（红色）和（USD 5）"),
        ("a (b) c", "a (b) c"),
        ("等等... 好", "等等……好"),
        ("好.com", "好.com"),
        ("12:30开始", "12:30开始"),
        ("“好”,“坏”", "“好”，“坏”"),
    ],
)
def test_full_width(text, expected):
    assert full_width(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("一只猫在睡觉，一只猫在睡觉，一只猫在睡觉。", "一只猫在睡觉。"),
        ("一只大猫，一条大狗，一只大猫，一条大狗，一只大", "一只大猫，一条大狗，"),
        ("红，红，蓝，红", "红，蓝，红"),
        ("非常非常非常好", "非常好"),
        ("大大大大的字", "大的字"),
        ("谢谢，哈哈", "谢谢，哈哈"),
        ("售价10000元，尺码XXXXL", "售价10000元，尺码XXXXL"),
        ("1000000元大奖，电话8888888", "1000000元大奖，电话8888888"),
        ("5折起5折起5折起", "5折起"),
        ("卖1,000元，送2,000元", "卖1,000元，送2,000元"),
        ("a red cup, a red cup, a red cup", "a red cup,"),
    ],
)
def test_cut_repeats(text, expected):
    assert cut_repeats(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("一只猫。", "一只猫。"),
        ("他说：“好！”", "他说：“好！”"),
        ("图中有一只黑色的猫在睡觉。旁边是", "图中有一只黑色的猫在睡觉。"),
        ("好！图中有一只黑色的猫在睡觉，旁边是", "好！图中有一只黑色的猫在睡觉，旁边是。"),
        ("一只猫，", "一只猫。"),
        ("a cat,", "a cat."),
        ("价格3.5元", "价格3.5元。"),
        ("，", ""),
    ],
)
def test_end_at_sentence(text, expected):
    assert end_at_sentence(text) == expected


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("一只猫", 3, "一只猫"),
        ("一只猫。一条狗，一匹马", 9, "一只猫。一条狗，"),
        ("一只猫。一条狗，一匹马", 7, "一只猫。"),
        ("一只猫在看着", 4, "一只猫在"),
        ("品牌是Adidas的", 6, "品牌是"),
        ("Adidas", 3, "Adi"),
    ],
)
def test_limit(text, most, expected):
    assert limit(text, most) == expected


def test_together_and_off():
    text = "请描述图片内容:一只黑猫,一只黑猫,旁边有 盆花"
    assert PostProcessing()(text, PROMPT) == text
    everything = PostProcessing(strip_echo=True, full_width=True, cut_repeats=True, max_chars=8, end_mark=True)
    assert everything(text, PROMPT) == "一只黑猫。"
    # A repair that would leave nothing is left out.
    assert everything(PROMPT, PROMPT) == "请描述图片内容。"
    assert everything("，", PROMPT) == "，"
    assert everything("", PROMPT) == ""


def test_settings():
    assert PostProcessing().settings() is None
    assert PostProcessing(cut_repeats=True, max_chars=50).settings() == {"cut_repeats": True, "max_chars": 50}


# Few characters, so that marks, repeats and echoes meet often; and any text at all.
_WORDS = [PROMPT, "一只大猫", "描述：", "Picture 1:", "<img>x</img>"]
_PIECES = st.sampled_from([*"，。、！…,.;:!?()（）“” \t\n123aB猫狗大红", *_WORDS])
_TEXTS = st.one_of(st.lists(_PIECES, max_size=40).map("".join), st.text(max_size=60))
_REPAIRS = st.builds(
    PostProcessing,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 30),
    st.booleans(),
)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(_TEXTS, _REPAIRS)
def test_whatever_the_text(text, repair):
    done = repair(text, PROMPT)
    assert bool(done) == bool(text.strip())
    assert len(done.splitlines()) <= 1 and "\t" not in done and done == done.strip()
    assert repair.max_chars is None or len(done) <= repair.max_chars
    assert repair(done, PROMPT) == done


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["0", "00", "8", "1", "元", "只", "大奖"]), max_size=30).map("".join))
def test_a_number_is_no_stutter(text):
    """Numbers go only with the words that are said again."""
    numbers = re.findall("[0-9]+", text)
    assert all(number in numbers for number in re.findall("[0-9]+", cut_repeats(text)))


@pytest.mark.parametrize("unit", ["猫", "一只猫，", "(", "()", ",;", "a", "描述：", "一只大猫，两"])
def test_long_texts_take_no_time(unit):
    """Quadratic time would show as a hang of the suite."""
    everything = PostProcessing(True, True, True, 100, True)
    assert len(everything(unit * 10000, PROMPT)) <= 100
