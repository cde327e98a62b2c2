"""Confidence intervals of scores and differences between two results."""

import json
import sys

import numpy as np
import pytest

from paddlemix.metrics import evaluation
from paddlemix.metrics.evaluation import MEASURES, evaluate
from paddlemix.utils import parallel
from paddlemix.utils.errors import UserError

REFERENCES = {"a": ["红杯在左边"], "b": ["两只蓝瓶子"], "c": ["黑猫睡觉了", "一只黑猫"], "d": ["灯在桌子上"]}
GOOD = {key: texts[0] for key, texts in REFERENCES.items()}
BAD = {"a": "红杯在右边", "b": "两只蓝瓶子", "c": "白色的狗狗", "d": ""}


def test_everything_is_there_and_goes_into_json():
    found = evaluate(GOOD, REFERENCES, [BAD], resamples=200)
    assert tuple(found.results.measures) == MEASURES == tuple(found.differences[0])
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (value["rows"], value["references"]) == (4, 5)
    assert value["results"]["measures"]["BLEU-1"]["value"] == pytest.approx(1.0)
    assert value["others"][0]["measures"]["empty"] == {"value": 0.25, "interval": [0.0, 0.75]}
    assert value["others"][0]["difference"]["empty"]["value"] == -0.25
    assert value["settings"]["bootstrap"]["document_frequencies"] == "held fixed"
    assert value["others"][0]["most frequent words not in references"] == {
        "colour": [["白色", 1]], "count": [], "object": [["狗狗", 1]],
    }  # fmt: skip
    assert value["results"]["measures"]["distinct-1"]["interval"] is None


def test_the_difference_is_paired():
    # Each row is better by the same amount, so whichever rows are drawn, the difference is the same.
    references = {str(i): ["甲" * (i + 2)] for i in range(6)}
    long, short = ({key: text[0] + end for key, text in references.items()} for end in ("甲乙", ""))
    found = evaluate(long, references, [short], resamples=50)
    assert found.differences[0]["tokens"].value == 2.0
    assert found.differences[0]["tokens"].interval == pytest.approx((2.0, 2.0))
    low, high = found.results.measures["tokens"].interval
    assert high > low + 1
    same = evaluate(long, references, [long], resamples=50)
    (none,) = same.differences
    assert all(measure.value == 0 and measure.interval in (None, (0.0, 0.0)) for measure in none.values())


def test_intervals_are_those_of_the_mean():
    # 400 rows, half of them empty: the mean's standard deviation is 1 / (2 √400) = 0.025.
    references = {str(i): ["甲乙丙"] for i in range(400)}
    captions = {key: "甲乙丙" if int(key) % 2 else "" for key in references}
    low, high = evaluate(captions, references, resamples=2000).results.measures["empty"].interval
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_bleu_of_a_draw_is_that_of_its_rows(monkeypatch):
    """Against the corpus score of the drawn rows, each under a name of its own."""
    drawn = []

    class Draws:
        def integers(self, low, high, size):
            drawn.append(np.random.RandomState(len(drawn)).randint(low, high, size))
            return drawn[-1]

    seen = []
    monkeypatch.setattr(evaluation.np.random, "default_rng", lambda seed: Draws())
    monkeypatch.setattr(evaluation, "_interval", lambda values: seen.append(values))
    found = evaluate(BAD, REFERENCES, resamples=3)
    ids, values = list(REFERENCES), seen[MEASURES.index("BLEU-2")]
    for rows, value in zip(drawn, values):
        names = {f"{place}": ids[row] for place, row in enumerate(rows)}
        captions, references = ({k: side[v] for k, v in names.items()} for side in (BAD, REFERENCES))
        again = evaluate(captions, references, resamples=0)
        assert value == pytest.approx(again.results.measures["BLEU-2"].value, rel=1e-9)
    # CIDEr keeps the document frequencies of all rows: the mean of the rows as they are.
    rows = found.results.scores.rows["CIDEr"]
    np.testing.assert_allclose(seen[MEASURES.index("CIDEr")], [rows[some].mean() for some in drawn])


def test_seeds_repeat_and_no_draws_mean_no_intervals():
    def intervals(**given):
        return [measure.interval for measure in evaluate(BAD, REFERENCES, **given).results.measures.values()]

    assert intervals(resamples=30, seed=1) == intervals(resamples=30, seed=1)
    assert intervals(resamples=30, seed=1) != intervals(resamples=30, seed=2)
    assert set(intervals(resamples=0)) == {None}


def test_the_other_file_must_have_the_same_rows():
    with pytest.raises(UserError, match="1 ids have no caption: d"):
        evaluate(GOOD, REFERENCES, [{key: "x" for key in "abc"}])


def test_a_sample_scores_its_rows_as_all_rows_do():
    references = {str(i): [f"第{i}张图有{i % 3}只猫"] for i in range(30)}
    captions = {key: texts[0][:-1] + "狗" for key, texts in references.items()}
    every, some = evaluate(captions, references, resamples=0), evaluate(captions, references, resamples=0, sample=7)
    assert len(some.ids) == 7 and some.settings["sample"] == {"rows": 7, "of": 30, "seed": 0}
    rows = [every.ids.index(key) for key in some.ids]
    assert rows == sorted(rows)
    for name, values in some.results.scores.rows.items():
        np.testing.assert_array_equal(values, every.results.scores.rows[name][rows])
    assert evaluate(captions, references, resamples=0, sample=7, seed=1).ids != some.ids
    assert evaluate(captions, references, resamples=0, sample=99).ids == every.ids


def test_texts_take_no_more_memory_after_their_evaluation():
    results = {str(row): f"红色的杯子{row}放在左侧" for row in range(30)}
    references = {key: [text + "。"] for key, text in results.items()}
    texts = [*results.values(), *(text for row in references.values() for text in row)]
    before = sum(map(sys.getsizeof, texts))
    evaluate(results, references, resamples=2, workers=1)
    assert sum(map(sys.getsizeof, texts)) == before
    assert parallel._FUNCTION is None
