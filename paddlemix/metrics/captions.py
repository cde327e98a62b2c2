"""Scores of captions against references, by pycocoevalcap's pure-Python scorers (no Java anywhere).

| score | what | range |
|---|---|---|
| CIDEr | mean cosine of TF-IDF n-gram vectors, n = 1…4 (Vedantam et al. 2015, arXiv 1411.5726, eq. 2-3), × 10 | 0…10 |
| CIDEr-D | the same with clipped counts and a penalty on the length difference (§ 8 there), × 10 | 0…10 |
| BLEU-1…4 | n-gram precision with brevity penalty, corpus level (Papineni et al. 2002) | 0…1 |
| ROUGE-L | F-measure of the longest common subsequence, β = 1.2 (Lin 2004) | 0…1 |

What pycocoevalcap itself prints as "CIDEr", and most papers with it, is CIDEr-D. IDF comes from the
references given, so CIDEr values of different reference sets cannot be compared, and with a single row they
are 0. METEOR is left out: its only implementation of record is a Java program.

pycocoevalcap holds the n-grams of all rows at once (50 KB a row). Here it gets a few hundred rows at a time, in
several processes if wanted; only how often an n-gram occurs is counted over all references first. The numbers are
the same.
"""

from __future__ import annotations

import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.progress import Progress

# A run of Latin letters and digits (a decimal point inside a number belongs to it), or any other single
# character.
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)+|[A-Za-z0-9\u00c0-\u024f]+|[^\s]")

MAX_N = 4
BLEU = tuple(f"BLEU-{n}" for n in range(1, MAX_N + 1))
SCORES = ("CIDEr", "CIDEr-D", *BLEU, "ROUGE-L")
# Rows that are scored at once: some 10 MB of n-grams.
CHUNK_ROWS = 200
# How many ids a message names.
SHOWN_IDS = 10


def tokenize_characters(text: str) -> List[str]:
    """One token per character, runs of Latin letters and digits whole and in lower case, white space dropped.

    The manner of Chinese captioning benchmarks (MUGE): no word segmenter whose version would change the
    score.
    """
    return _TOKEN.findall(text.lower())


def tokenize_words(text: str) -> List[str]:
    """The words that jieba finds with its own dictionary, in lower case, white space dropped."""
    import logging

    import jieba

    # It reports each loading of its dictionary on stderr otherwise.
    jieba.setLogLevel(logging.WARNING)
    return [part for word in jieba.cut(text.lower()) for part in word.split()]


TOKENIZERS: Dict[str, Callable[[str], List[str]]] = {"char": tokenize_characters, "jieba": tokenize_words}


def tokenizer_name(tokenizer: str) -> str:
    """A tokenizer's name to print with a score; with the version of what it is made of, where that may change it."""
    if tokenizer != "jieba":
        return tokenizer
    import jieba

    return f"jieba {jieba.__version__}"


class CaptionScores(NamedTuple):
    """ids: the rows' order. corpus: score name → value. rows: score name → float64 [n], in the order of ids.

    bleu_counts: float64 [n, 10], what BLEU of any selection of rows is made of, see bleu_of_counts.
    """

    ids: List[str]
    corpus: Dict[str, float]
    rows: Dict[str, np.ndarray]
    bleu_counts: np.ndarray


def list_ids(ids: Sequence[str]) -> str:
    """The first ids and how many more there are, for a message."""
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return ", ".join(ids[:SHOWN_IDS]) + more


def check_ids(candidates: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Both sides must name the same rows.

    Raises:
        UserError: lists the ids (the first ten of each kind) that only one side has, or says that there are
        none.
    """
    if not references:
        raise UserError("there are no references to score against")
    missing = [key for key in references if key not in candidates]
    unknown = [key for key in candidates if key not in references]
    problems = []
    if missing:
        problems.append(f"{len(missing)} ids have no caption: {list_ids(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} ids have no reference: {list_ids(unknown)}")
    if problems:
        raise UserError("; ".join(problems))


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: str = "char",
) -> CaptionScores:
    """Score one caption per id against one or more references per id, in this process.

    tokenizer: a name in TOKENIZERS; print it with the scores, they mean nothing without it.

    Raises:
        UserError: the ids of the two sides differ, or an id has no reference with any text.
    """
    check_ids(candidates, references)
    return CaptionScorer(references, tokenizer).score(candidates)


class CaptionScorer:
    """Scores any number of caption files against the same references, whose n-grams are counted once.

    references: one or more per id. tokenizer: a name in TOKENIZERS. workers: processes that score (0: this one).
    They are forked, so not where Paddle runs. quiet: show no progress.

    Raises:
        UserError: there are no references, or an id has none with any text.
    """

    def __init__(
        self, references: Mapping[str, Sequence[str]], tokenizer: str = "char", workers: int = 0, quiet: bool = True
    ):
        check_ids(references, references)
        self.ids = list(references)
        self.workers, self.quiet = workers, quiet
        self._split = TOKENIZERS[tokenizer]
        self._references: List[List[str]] = []
        empty = []
        counted = _NgramCounts(len(self.ids))
        with Progress(len(self.ids), "references", disable=quiet) as bar:
            for key in self.ids:
                texts = [" ".join(tokens) for tokens in map(self._split, references[key]) if tokens]
                if not texts:
                    empty.append(key)
                self._references.append(texts)
                counted.add(texts)
                bar.update()
        if empty:
            raise UserError(f"{len(empty)} ids have no reference with any text: {list_ids(empty)}")
        counted.finish()
        self._counted = counted

    def score(self, candidates: Mapping[str, str], desc: str = "captions") -> CaptionScores:
        """One caption per id.

        Raises:
            UserError: the ids are not those of the references.
            JobFailed: a worker was killed.
        """
        check_ids(candidates, dict.fromkeys(self.ids))
        with Progress(len(self.ids), desc, disable=self.quiet) as bar:
            parts = []
            for part in self._parts(self._chunks(candidates)):
                parts.append(part)
                bar.update(len(part))
        table = np.concatenate(parts)
        # Columns: CIDEr, CIDEr-D, ROUGE-L, BLEU-1…4, then the counts.
        names = ("CIDEr", "CIDEr-D", "ROUGE-L", *BLEU)
        rows = {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(names)}
        counts = table[:, len(names) :]
        corpus = {name: float(rows[name].mean()) for name in SCORES}
        corpus.update(zip(BLEU, bleu_of_counts(counts.sum(axis=0)).tolist()))
        return CaptionScores(list(self.ids), corpus, {name: rows[name] for name in SCORES}, counts)

    def _chunks(self, candidates: Mapping[str, str]) -> Iterator[Tuple[List[str], List[List[str]]]]:
        for begin in range(0, len(self.ids), CHUNK_ROWS):
            ids = self.ids[begin : begin + CHUNK_ROWS]
            yield [" ".join(self._split(candidates[key])) for key in ids], self._references[begin : begin + CHUNK_ROWS]

    def _parts(self, chunks: Iterator[Tuple[List[str], List[List[str]]]]) -> Iterator[np.ndarray]:
        if self.workers == 0:
            for chunk in chunks:
                yield _score_rows(chunk, self._counted)
            return
        # Forked children have the counts without a copy.
        global _COUNTED
        _COUNTED = self._counted
        # A Pool would wait for ever for a process that was killed.
        with ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork")) as pool:
            try:
                yield from pool.map(_score_rows, chunks)
            except BrokenProcessPool:
                why = "a process that scores was killed, mostly for want of memory; fewer --workers need less"
                raise JobFailed(why) from None


# The counts that _score_rows uses in a worker.
_COUNTED: Optional[_NgramCounts] = None


class _NgramCounts:
    """In how many of `rows` rows of references an n-gram occurs.

    Kept by the n-gram's 64-bit hash: of 25 million n-grams (100,000 rows of 65 tokens), two share one with a
    probability of 1 in 60,000. N-grams of a single row are not kept, since CIDEr takes 0 for 1.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self._found: List[np.ndarray] = []

    def add(self, texts: List[str]) -> None:
        from pycocoevalcap.cider.cider_scorer import precook

        ngrams = {hash(ngram) for text in texts for ngram in precook(text, MAX_N)}
        self._found.append(np.fromiter(ngrams, dtype=np.int64, count=len(ngrams)))

    def finish(self) -> None:
        hashes, counts = np.unique(np.concatenate(self._found), return_counts=True)
        self._found = []
        several = counts > 1
        self._hashes, self._counts = hashes[several], counts[several]

    def __call__(self, ngrams: List[tuple]) -> Dict[tuple, float]:
        """n-gram → rows that have it, at least 1."""
        if not len(self._hashes):
            return dict.fromkeys(ngrams, 1.0)
        wanted = np.fromiter(map(hash, ngrams), dtype=np.int64, count=len(ngrams))
        places = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        counts = np.where(self._hashes[places] == wanted, self._counts[places], 1)
        return dict(zip(ngrams, counts.astype(np.float64).tolist()))


def _score_rows(chunk: Tuple[List[str], List[List[str]]], counted: Optional[_NgramCounts] = None) -> np.ndarray:
    """Tokenised captions and references of some rows → float64 [rows, 7 scores + 10 counts of BLEU]."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    counted = counted or _COUNTED

    class Scorer(CiderScorer):
        # compute_cider sets it to the log of its own number of rows; these are a part of them.
        ref_len = property(lambda self: np.log(float(counted.rows)), lambda self, value: None)

    captions, references = chunk
    cider, bleu, rouge = Scorer(n=MAX_N), BleuScorer(n=MAX_N), Rouge()
    for pair in zip(captions, references):
        cider += pair
        bleu += pair
    ngrams = set().union(*cider.ctest, *(counts for row in cider.crefs for counts in row))
    cider.document_frequency = counted(list(ngrams))
    _, bleu_rows = bleu.compute_score(option="closest")
    bleu_counts = [
        [*row["correct"], *row["guess"], row["testlen"], _closest(row["reflen"], row["testlen"])] for row in bleu.ctest
    ]
    columns = [
        _plain_cider(cider),
        cider.compute_cider(),
        [rouge.calc_score([caption], row) for caption, row in zip(captions, references)],
        *bleu_rows,
    ]
    return np.concatenate([np.array(columns, dtype=np.float64).T, np.array(bleu_counts, dtype=np.float64)], axis=1)


def _closest(lengths: List[int], length: int) -> int:
    return min((abs(one - length), one) for one in lengths)[1]


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1…4 of a corpus from sums over its rows.

    counts: float64 [..., 10]: right n-grams (n = 1…4), all n-grams (n = 1…4), tokens, and tokens of the reference
    that is closest in length. Returns float64 [..., 4]. Zeros are handled as pycocoevalcap does.
    """
    small, tiny = 1e-9, 1e-15
    right, guessed = counts[..., :MAX_N], counts[..., MAX_N : 2 * MAX_N]
    precision = (right + tiny) / (guessed + small)
    score = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, MAX_N + 1))
    ratio = (counts[..., 2 * MAX_N] + tiny) / (counts[..., 2 * MAX_N + 1] + small)
    return score * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))[..., None]


def _plain_cider(scorer) -> List[float]:
    """CIDEr without the D: no clipping, no length penalty. One value per row of a CiderScorer.

    pycocoevalcap has the D variant only; its n-gram counts are used here, so that the two differ in nothing
    else.
    """
    log_rows = float(scorer.ref_len)
    idf = {ngram: log_rows - math.log(rows) for ngram, rows in scorer.document_frequency.items()}

    def vectors(counts):
        parts: List[Dict[tuple, float]] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            parts[len(ngram) - 1][ngram] = count * idf[ngram]
        return parts, [math.sqrt(sum(value * value for value in part.values())) for part in parts]

    scores = []
    for test, references in zip(scorer.ctest, scorer.crefs):
        parts, norms = vectors(test)
        total = 0.0
        for counts in references:
            other_parts, other_norms = vectors(counts)
            for part, norm, other, other_norm in zip(parts, norms, other_parts, other_norms):
                if norm and other_norm:
                    product = sum(value * other.get(ngram, 0.0) for ngram, value in part.items())
                    total += product / (norm * other_norm)
        scores.append(10.0 * total / (MAX_N * len(references)))
    return scores


class AttributeScores(NamedTuple):
    """attributes: name → share of rows where it is right. mean: the mean of those. all_right: share of rows where
    every attribute is."""

    attributes: Dict[str, float]
    mean: float
    all_right: float


def attribute_accuracy(
    found: Sequence[Mapping[str, Optional[str]]], truth: Sequence[Mapping[str, str]]
) -> AttributeScores:
    """Exact comparison of attributes read from captions with the true ones, row by row.

    found, truth: one mapping of attribute name → value per row, in the same order; None or a missing name is
    wrong.

    Raises:
        ValueError: different numbers of rows, or none.
    """
    if len(found) != len(truth) or not truth:
        raise ValueError(f"{len(found)} rows of attributes to compare with {len(truth)} true ones")
    names = list(truth[0])
    right = np.array([[row.get(name) == true[name] for name in names] for row, true in zip(found, truth)])
    per_attribute = {name: float(share) for name, share in zip(names, right.mean(axis=0))}
    return AttributeScores(per_attribute, float(right.mean()), float(right.all(axis=1).mean()))
