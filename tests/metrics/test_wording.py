"""Counts of wording that need no model, against cases worked out by hand."""

import numpy as np
import pytest

from paddlemix.metrics import captions
from paddlemix.metrics.captions import tokenize_characters
from paddlemix.metrics.wording import WordList, describe, repeats_itself


@pytest.mark.parametrize(
    "text, repeats",
    [
        ("红色的杯子，放在左侧，红色的杯子。", True),
        ("红色的杯子，放在左侧，红色的瓶子。", False),
        ("杯子，左侧，杯子。", False),  # clauses of two tokens say little
        ("画面上有画面上有画面上有", True),
        ("画面上有画面上有", False),
        ("干干净净的房间，哈哈哈哈", False),
        ("买一送一买一送一买一送一", True),
        # Longer ones would make the time quadratic.
        ("".join(map(chr, range(0x4E00, 0x4E00 + 1000))) * 3, True),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 1001))) * 3, False),
        ("sale sale sale", False),
        ("big sale big sale big sale", True),
        ("", False),
    ],
)
def test_repeated_phrases(text, repeats):
    assert repeats_itself(tokenize_characters(text)) is repeats


@pytest.fixture(scope="module")
def words():
    return WordList()


def test_distinct_by_hand(words):
    def distinct(*captions):
        return describe(captions, [[""]] * len(captions), tokenize_characters, words).distinct

    assert distinct("甲乙甲", "甲乙") == {1: 2 / 5, 2: 2 / 3}
    assert distinct("", "甲") == {1: 1.0, 2: 0.0}


@pytest.mark.parametrize(
    "caption, references, found",
    [
        ("一件红色的T恤", ["一件蓝色的T恤"], [("colour", "红色")]),
        ("一件红色的T恤", ["一件红T恤"], []),
        ("一件红色的T恤", ["蓝色T恤", "大红的衣服"], []),
        ("两只小猫", ["三只小猫"], [("count", "两只")]),
        ("2只小猫", ["两只猫"], []),
        ("一只猫，第三个", ["没有数量"], []),  # one is said of everything, and an ordinal is no count
        ("二十三个人", ["很多人"], []),  # part of a number that is not in the list
        ("仅售3.2个", ["便宜"], []),
        ("一个手机壳", ["一个手机壳"], []),
        ("一个手机壳", ["一部手机"], [("object", "手机壳")]),
        ("一部手机", ["一个手机壳"], []),
        ("两个男孩和男孩", ["两位女子"], [("object", "男孩")]),
        ("米黄色的墙", ["黄墙"], [("colour", "米黄色")]),
        ("米黄的墙", ["黄墙"], []),
        ("", ["红色"], []),
    ],
)
def test_words_that_no_reference_has(words, caption, references, found):
    assert words.unsupported(caption, references) == found


def test_any_number_of_chunks_and_workers_describes_alike(words, monkeypatch):
    rows = [f"{i % 7}只{'红蓝'[i % 2]}色的杯子" * (i % 5) for i in range(40)]
    references = [["两只红色的猫"]] * len(rows)
    found = describe(rows, references, tokenize_characters, words)
    monkeypatch.setattr(captions, "CHUNK_ROWS", 7)
    parts = describe(rows, references, tokenize_characters, words, workers=2)
    for name, values in found.rows.items():
        assert values.tolist() == parts.rows[name].tolist()
    assert parts[1:] == found[1:]


def test_describe_counts_rows(words):
    captions = ["红色的杯子，红色的杯子，红色的瓶子", "", "三只小狗"]
    found = describe(captions, [["蓝色的杯子"], ["猫"], ["三只狗"]], tokenize_characters, words)
    assert found.rows["tokens"].tolist() == [17, 0, 4]
    assert found.rows["repeated phrase"].tolist() == [1, 0, 0]
    assert found.rows["empty"].tolist() == [0, 1, 0]
    assert found.rows["colour not in references"].tolist() == [1, 0, 0]
    assert found.rows["object not in references"].tolist() == [1, 0, 0]
    assert found.rows["count not in references"].sum() == 0
    # Once per row, however often it is said.
    assert found.most["colour"] == [("红色", 1)] and found.most["object"] == [("瓶子", 1)]
    assert all(row.dtype == np.float64 for row in found.rows.values())
