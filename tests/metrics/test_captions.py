"""Caption scores against values worked out by hand."""

import math
import os
import random
import signal
import sys

import numpy as np
import pytest

from paddlemix.metrics import captions, ngrams
from paddlemix.metrics.captions import (
    BLEU,
    CaptionScorer,
    agreement,
    bleu_of_counts,
    score_captions,
    tokenize_characters,
    tokenize_words,
    tokenizer_name,
)
from paddlemix.utils.errors import JobFailed, UserError


def test_characters_with_latin_and_digit_runs_whole():
    assert tokenize_characters("红色 T恤,仅售99.5元 iPhone15!") == [
        *"红色",
        "t",
        "恤",
        ",",
        *"仅售",
        "99.5",
        "元",
        "iphone15",
        "!",
    ]
    assert tokenize_characters(" \n ") == []
    assert tokenize_characters("3.") == ["3", "."]


def test_perfect_captions_reach_the_top():
    texts = {"a": "一个红色的杯子", "b": "两只蓝色瓶子吧", "c": "黑猫睡觉了呢"}
    scores = score_captions(texts, {key: [text] for key, text in texts.items()})
    for name in ("CIDEr", "CIDEr-D"):
        assert scores.corpus[name] == pytest.approx(10.0)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores.corpus[name] == pytest.approx(1.0)
    assert scores.ids == ["a", "b", "c"] and all(len(row) == 3 for row in scores.rows.values())


def test_bleu_and_rouge_by_hand():
    # "红杯在左" against "红杯在右": 3 of 4 unigrams, 2 of 3 bigrams, 1 of 2 trigrams, no 4-gram; equal
    # lengths.
    scores = score_captions({"a": "红杯在左"}, {"a": ["红杯在右"]})
    assert scores.corpus["BLEU-1"] == pytest.approx(3 / 4)
    assert scores.corpus["BLEU-2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    assert scores.corpus["BLEU-3"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert scores.corpus["BLEU-4"] < 1e-2
    # Longest common subsequence 3: precision = recall = F = 3/4.
    assert scores.corpus["ROUGE-L"] == pytest.approx(3 / 4)


def test_brevity_penalty():
    # All 2 words right, but the reference has 4: exp(1 - 4/2).
    scores = score_captions({"a": "红杯"}, {"a": ["红杯在左"]})
    assert scores.corpus["BLEU-1"] == pytest.approx(math.exp(-1), rel=1e-6)


def test_cider_by_hand():
    # Two rows. 甲 stands in both references, so its IDF is log(2/2) = 0; 乙 and 丙 in one each: log 2. Row a:
    # the unigram vectors are {乙: log 2} and {乙: log 2}, the bigrams 甲乙 and 甲乙: cosine 1 for n = 1, 2,
    # and 0 for n = 3, 4, where there are none: (1 + 1 + 0 + 0) / 4 × 10 = 5. Row b: 甲丁 against 甲丙,
    # nothing in common: 0.
    scores = score_captions({"a": "甲乙", "b": "甲丁"}, {"a": ["甲乙"], "b": ["甲丙"]})
    assert scores.rows["CIDEr"] == pytest.approx([5.0, 0.0])
    assert scores.rows["CIDEr-D"] == pytest.approx([5.0, 0.0])


def test_cider_d_clips_and_punishes_length():
    # "乙乙" against "乙" beside an unrelated row: the unigram vectors {乙: 2 log 2} and {乙: log 2} are
    # parallel, so plain CIDEr gives 1/4 × 10 for n = 1. With clipping it is 2·min(…)… = 1·1 / (2·1) = 1/2,
    # and the length (pycocoevalcap counts it in bigrams: 1 against 0) costs exp(-1² / (2 · 6²)).
    scores = score_captions({"a": "乙乙", "b": "丙"}, {"a": ["乙"], "b": ["丙"]})
    assert scores.rows["CIDEr"][0] == pytest.approx(2.5)
    assert scores.rows["CIDEr-D"][0] == pytest.approx(2.5 * 0.5 * math.exp(-1 / 72))


def test_several_references_take_the_mean_for_cider_and_the_best_for_rouge():
    scores = score_captions({"a": "甲乙", "b": "戊己"}, {"a": ["甲乙", "丙丁"], "b": ["戊己"]})
    assert scores.rows["CIDEr"] == pytest.approx([2.5, 5.0])
    assert scores.rows["ROUGE-L"] == pytest.approx([1.0, 1.0])


def test_an_empty_caption_scores_nothing():
    scores = score_captions({"a": "", "b": "红杯"}, {"a": ["红杯"], "b": ["红杯"]})
    for name, row in scores.rows.items():
        assert row[0] == pytest.approx(0.0, abs=1e-6), name


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_of_the_rows_score_as_pycocoevalcap_scores_all_of_them(monkeypatch, workers):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    monkeypatch.setattr(captions, "CHUNK_ROWS", 7)
    rng = random.Random(5)

    def caption():
        return "".join(rng.choices("甲乙丙丁戊己庚辛壬癸，。", k=rng.randint(1, 25)))

    references = {f"{i}": [caption() for _ in range(1 + i % 3)] for i in range(40)}
    results = {key: caption() for key in reversed(references)}
    results["3"] = ""
    found = CaptionScorer(references, workers=workers).score(results)
    theirs = {key: [" ".join(text) for text in texts] for key, texts in references.items()}
    ours = {key: [" ".join(results[key])] for key in references}
    assert found.ids == list(references)
    mean, each = Cider(4).compute_score(theirs, ours)
    assert found.corpus["CIDEr-D"] == pytest.approx(mean, rel=1e-12)
    np.testing.assert_allclose(found.rows["CIDEr-D"], each, rtol=1e-12)
    mean, each = Rouge().compute_score(theirs, ours)
    assert found.corpus["ROUGE-L"] == pytest.approx(mean, rel=1e-12)
    np.testing.assert_array_equal(found.rows["ROUGE-L"], each)
    corpus, each = Bleu(4).compute_score(theirs, ours, verbose=0)
    np.testing.assert_allclose([found.corpus[name] for name in BLEU], corpus, rtol=1e-12)
    np.testing.assert_allclose([found.rows[name] for name in BLEU], each, rtol=1e-14)
    np.testing.assert_allclose(bleu_of_counts(found.bleu_counts.sum(axis=0)), corpus, rtol=1e-12)


def test_a_worker_that_is_killed_ends_the_scoring_in_words(monkeypatch):
    monkeypatch.setattr(captions, "_rouge_l", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(JobFailed, match="fewer --workers"):
        CaptionScorer({"a": ["红杯"]}, workers=1).score({"a": "红杯"})


def test_document_frequencies_counted_in_parts(monkeypatch):
    """Any number of parts gives the rows that have an n-gram; several references of a row count once."""
    rng = random.Random(3)
    rows = [[rng.choices("甲乙丙丁", k=rng.randint(1, 9)) for _ in range(rng.randint(1, 3))] for _ in range(60)]
    naive = {}
    for row in rows:
        for ngram in {tuple(text[i : i + n]) for text in row for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)}:
            naive[ngram] = naive.get(ngram, 0) + 1

    def hashed(ngram):
        *_, (value, _) = ngrams.ngram_hashes(
            np.array([ngrams.token_hash(token) for token in ngram], np.uint64), np.zeros(len(ngram), int), len(ngram)
        )
        return value[0]

    for at_once in (1 << 24, 100, 7):
        monkeypatch.setattr(ngrams, "COUNTED_AT_ONCE", at_once)
        monkeypatch.setattr(ngrams, "HASHED_AT_ONCE", at_once // 2)
        frequencies = ngrams.DocumentFrequencies()
        for row in rows:
            frequencies.add(row)
        frequencies.finish()
        found = frequencies(np.array([hashed(ngram) for ngram in naive], np.uint64))
        assert found.tolist() == list(naive.values())
    assert frequencies(np.array([5], np.uint64)).tolist() == [1.0]


def test_longest_common_subsequence_against_the_table():
    rng = random.Random(4)
    for _ in range(200):
        one, other = (rng.choices("甲乙丙丁", k=rng.randint(0, 80)) for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, left in enumerate(one):
            for j, right in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
        assert captions._common_subsequence(one, other) == table[-1][-1]


def test_words_of_jieba():
    assert tokenize_words("红色的T恤 仅售99元！") == ["红色", "的", "t", "恤", "仅售", "99", "元", "！"]
    assert tokenizer_name("jieba").startswith("jieba 0.") and tokenizer_name("char") == "char"
    # Two of three words agree.
    assert score_captions({"a": "红色的瓶子"}, {"a": ["红色的杯子"]}, "jieba").corpus["BLEU-1"] == pytest.approx(2 / 3)


def test_ids_must_agree():
    with pytest.raises(UserError, match=r"1 ids have no caption: b; 1 ids have no reference: c"):
        score_captions({"a": "x", "c": "x"}, {"a": ["x"], "b": ["x"]})
    with pytest.raises(UserError, match="no references"):
        score_captions({}, {})
    with pytest.raises(UserError, match="1 ids have no reference with any text: a"):
        score_captions({"a": "x"}, {"a": [" "]})


def test_agreement_is_the_mean_cider_d_against_the_others():
    rows = [["红色的杯子", "红色的大杯子", "一只蓝色的猫"], ["一个词"], [], ["同样", "同样"]]
    found = agreement(rows)
    assert [len(one) for one in found] == [3, 1, 0, 2]
    assert found[0].argmax() in (0, 1) and found[0].argmin() == 2
    assert found[1].tolist() == [0.0] and found[3].tolist() == pytest.approx([5.0, 5.0])  # no 3- and 4-grams
    # With document frequencies, as CaptionScorer scores it.
    texts = ["红色的杯子放在桌上", "红色的大杯子放在地上", "红色的猫坐在桌上"]
    references = {"a": texts[1:], "b": ["蓝色的杯子"], "c": ["桌上"]}
    scorer = CaptionScorer(references)
    wanted = scorer.score({"a": texts[0], "b": "x", "c": "x"}).rows["CIDEr-D"][0]
    assert wanted > 0
    assert agreement([texts], frequencies=scorer._frequencies)[0][0] == pytest.approx(wanted)


def test_empty_texts_agree_with_nothing():
    assert agreement([["", "红色", ""]])[0].tolist() == [0.0, 0.0, 0.0]


def test_without_jieba_its_tokenizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install jieba"):
        tokenize_words("一杯咖啡")
