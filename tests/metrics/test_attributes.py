"""Attributes read from captions with lists of words."""

import json

import numpy as np
import pytest

from paddlemix.metrics.attributes import ALL_RIGHT, AttributeLists, compare_attributes
from paddlemix.metrics.evaluation import evaluate
from paddlemix.utils.errors import UserError

LISTS = {
    "side": [["左侧", "左边"], ["中间"], ["右侧", "右边", "right"]],
    "colour": [["红色", "大红"], ["蓝色", "蓝"], ["天蓝"]],
}


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "lists.json").write_text(json.dumps(LISTS, ensure_ascii=False), encoding="utf-8")
    return AttributeLists(str(tmp_path / "lists.json"))


def test_the_longest_word_at_a_place_is_the_value(lists):
    assert lists.values("左边天蓝的杯子，Right") == {"side": {"左侧", "右侧"}, "colour": {"天蓝"}}
    assert lists.values("") == {"side": frozenset(), "colour": frozenset()}


def test_what_counts_and_what_is_right(lists):
    references = [["红色在左侧"], ["蓝色在中间", "蓝的"], ["一只猫"], ["大红在右边"]]
    captions = ["大红，左边", "中间", "红色在左侧", "右侧的蓝色和红色"]
    found = compare_attributes(captions, references, lists)
    np.testing.assert_array_equal(found.counted, [[1, 1], [1, 1], [0, 0], [1, 1]])
    np.testing.assert_array_equal(found.right, [[1, 1], [1, 0], [0, 0], [1, 0]])
    assert found.wrong == [(), ["colour: 蓝色 → nothing"], (), ["colour: 红色 → 红色+蓝色"]]
    assert dict(found.most["colour"]) == {"蓝色 → nothing": 1, "红色 → 红色+蓝色": 1} and found.most["side"] == []
    assert {name: pair.sum(axis=0).tolist() for name, pair in found.measures().items()} == {
        "side right": [3, 3], "colour right": [1, 3], ALL_RIGHT: [1, 3],
    }  # fmt: skip


def test_shares_have_intervals_and_differences(lists):
    references = {str(i): ["红色在左侧" if i % 2 else "一只猫"] for i in range(400)}
    captions = {key: "红色" if int(key) % 4 == 1 else "蓝色" for key in references}
    found = evaluate(captions, references, [dict.fromkeys(references, "红色")], resamples=500, attributes=lists)
    value, (low, high) = found.results.measures["colour right"]
    # 200 rows count, half of them right: a standard deviation of 0.035.
    assert value == 0.5 and low == pytest.approx(0.43, abs=0.02) and high == pytest.approx(0.57, abs=0.02)
    assert found.differences[0]["colour right"].value == -0.5
    assert found.results.measures["side right"].value == 0.0
    assert found.to_json()["results"]["most frequent wrong attributes"]["side"] == [["左侧 → nothing", 200]]
    none = evaluate({"a": "x"}, {"a": ["y"]}, resamples=5, attributes=lists)
    assert none.results.measures["side right"] == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    "text, why",
    [
        ("{}", "names no attribute"),
        ("[]", "JSON object"),
        ('{"side": ["左", "右"]}', "side must be groups of words"),
        ('{"side": [["左"], []]}', "side must be groups of words"),
        ('{"side": [["左", ""]]}', "side must be groups of words"),
        ('{"side": [["左"], ["右", "左"]]}', "has 左 in two groups"),
        (None, "none.json"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, why):
    path = tmp_path / ("none.json" if text is None else "lists.json")
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=why):
        AttributeLists(str(path))
