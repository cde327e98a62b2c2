"""Scores of captions against references, for a million rows in minutes, without Java.

| score | what | range |
|---|---|---|
| CIDEr | mean cosine of TF-IDF n-gram vectors, n = 1…4 (Vedantam et al. 2015, arXiv 1411.5726, eq. 2-3), × 10 | 0…10 |
| CIDEr-D | the same with clipped counts and a penalty on the length difference (§ 8 there), × 10 | 0…10 |
| BLEU-1…4 | n-gram precision with brevity penalty, corpus level (Papineni et al. 2002) | 0…1 |
| ROUGE-L | F-measure of the longest common subsequence, β = 1.2 (Lin 2004) | 0…1 |

The numbers are pycocoevalcap's, which the tests compare with; what it prints as "CIDEr", and most papers with it, is
CIDEr-D. It takes 10 ms and 50 KB a row, so the n-grams of some thousand rows are counted with numpy here, each by a
64-bit hash. IDF comes from the references given, so CIDEr values of different reference sets cannot be compared, and
with a single row they are 0. METEOR is left out: its reference implementation is a Java program.

Shapes: [r] rows, [t] tokens, [g] n-grams of one text each, every distinct n-gram once.
"""

from __future__ import annotations

import itertools
import marshal
import math
import re
from types import ModuleType
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.metrics.ngrams import MAX_N, DocumentFrequencies, NgramCounts, row_key
from paddlemix.utils.errors import UserError
from paddlemix.utils.parallel import map_chunks
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import some

# A run of Latin letters and digits (including the decimal point of a number), or any other single character.
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)+|[A-Za-z0-9\u00c0-\u024f]+|[^\s]")

BLEU = tuple(f"BLEU-{n}" for n in range(1, MAX_N + 1))
SCORES = ("CIDEr", "CIDEr-D", *BLEU, "ROUGE-L")
# Rows scored at once: some 100 MB of n-grams.
CHUNK_ROWS = 2000
# pycocoevalcap's constants: of CIDEr-D's length penalty, and ROUGE-L's weight of recall.
_SIGMA, _BETA = 6.0, 1.2
# Maximum ids named in a message.
SHOWN_IDS = 10


def tokenize_characters(text: str) -> List[str]:
    """One token per character; runs of Latin letters and digits are one token, in lower case; white space is dropped.

    As in Chinese captioning benchmarks (MUGE): no word segmenter, whose version would change the score.
    """
    return _TOKEN.findall(text.lower())


def _jieba() -> ModuleType:
    """jieba, an optional dependency: the contest's platform, where captions are compared too, does not need it."""
    try:
        import jieba
    except ImportError:
        raise UserError("words are split by jieba, which is not installed: pip install jieba", "jieba") from None
    return jieba


def tokenize_words(text: str) -> List[str]:
    """The words that jieba finds with its default dictionary, in lower case; white space is dropped.

    Raises:
        UserError: jieba is not installed.
    """
    import logging

    jieba = _jieba()

    # Otherwise it reports loading its dictionary on stderr.
    jieba.setLogLevel(logging.WARNING)
    return [part for word in jieba.cut(text.lower()) for part in word.split()]


TOKENIZERS: Dict[str, Callable[[str], List[str]]] = {"char": tokenize_characters, "jieba": tokenize_words}


def tokenizer_name(tokenizer: str) -> str:
    """A tokenizer's name to print with a score, with the version of the library that it depends on."""
    if tokenizer != "jieba":
        return tokenizer
    return f"jieba {_jieba().__version__}"


class CaptionScores(NamedTuple):
    """ids: in the order of rows. corpus: score name → value. rows: score name → float64 [n].

    bleu_counts: float64 [n, 10], from whose sums BLEU is computed, see bleu_of_counts.
    """

    ids: List[str]
    corpus: Dict[str, float]
    rows: Dict[str, np.ndarray]
    bleu_counts: np.ndarray


def check_ids(candidates: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Check that both sides have the same ids.

    Raises:
        UserError: lists the ids (the first ten of each kind) that only one side has; or there are none.
    """
    if not references:
        raise UserError("there are no references to score against", "no-references")
    missing = [key for key in references if key not in candidates]
    unknown = [key for key in candidates if key not in references]
    problems = []
    if missing:
        problems.append(f"{len(missing)} ids have no caption: {some(missing, SHOWN_IDS)}")
    if unknown:
        problems.append(f"{len(unknown)} ids have no reference: {some(unknown, SHOWN_IDS)}")
    if problems:
        raise UserError("; ".join(problems), "ids")


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str = "char"
) -> CaptionScores:
    """Score one caption per id against one or more references per id, in this process.

    tokenizer: a name in TOKENIZERS; print it with the scores, which depend on it.

    Raises:
        UserError: the ids of the two sides differ, or an id has no reference with any text.
    """
    check_ids(candidates, references)
    return CaptionScorer(references, tokenizer).score(candidates)


class CaptionScorer:
    """Scores any number of caption files against the same references, whose n-grams are counted once.

    references: one or more per id. tokenizer: a name in TOKENIZERS. workers: processes that score (0: this one), see
    map_chunks. quiet: show no progress. sample: ids to score (default: all); document frequencies always come from all
    references.

    Raises:
        UserError: there are no references, or an id has none with any text.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        tokenizer: str = "char",
        workers: int = 0,
        quiet: bool = True,
        sample: Optional[Sequence[str]] = None,
    ):
        check_ids(references, references)
        self.ids = list(references if sample is None else sample)
        self.workers, self.quiet = workers, quiet
        self._split = TOKENIZERS[tokenizer]
        self._references = references
        empty = []
        self._frequencies = DocumentFrequencies()
        with Progress(len(references), "references", disable=quiet) as bar:
            for key, row in references.items():
                texts = [tokens for tokens in map(self._split, row) if tokens]
                if not texts:
                    empty.append(key)
                self._frequencies.add(texts)
                bar.update()
        if empty:
            raise UserError(f"{len(empty)} ids have no reference with any text: {some(empty, SHOWN_IDS)}", "ids")
        self._frequencies.finish(workers, quiet)

    def score(self, candidates: Mapping[str, str], desc: str = "captions") -> CaptionScores:
        """One caption per id.

        Raises:
            UserError: the ids are not those of the references.
            JobFailed: a worker was killed.
        """
        check_ids(candidates, dict.fromkeys(self.ids))
        # Columns: CIDEr, CIDEr-D, ROUGE-L, BLEU-1…4, then the counts.
        names = ("CIDEr", "CIDEr-D", "ROUGE-L", *BLEU)
        table = np.empty((len(names) + 2 * MAX_N + 2, len(self.ids)))
        texts = ((candidates[key], self._references[key]) for key in self.ids)
        done = 0
        with Progress(len(self.ids), desc, disable=self.quiet) as bar:
            for part in map_chunks(self._score_rows, packed_chunks(texts), self.workers):
                table[:, done : done + len(part)] = part.T
                done += len(part)
                bar.update(len(part))
        rows = dict(zip(names, table))
        counts = table[len(names) :].T
        corpus = {name: float(rows[name].mean()) for name in SCORES}
        corpus.update(zip(BLEU, bleu_of_counts(counts.sum(axis=0)).tolist()))
        return CaptionScores(list(self.ids), corpus, {name: rows[name] for name in SCORES}, counts)

    def _score_rows(self, chunk: bytes) -> np.ndarray:
        """(caption, references) of some rows, packed → float64 [r, 7 scores + 10 counts of BLEU]."""
        rows = marshal.loads(chunk)
        captions = [self._split(caption) for caption, _ in rows]
        references = [[tokens for tokens in map(self._split, texts) if tokens] for _, texts in rows]
        rouge = [_rouge_l(caption, texts) for caption, texts in zip(captions, references)]
        cider, cider_d, bleu_counts = _compare(captions, references, self._frequencies)
        return np.column_stack([cider, cider_d, rouge, bleu_of_counts(bleu_counts), bleu_counts])


def packed_chunks(rows: Iterable[Tuple[str, Sequence[str]]]) -> Iterator[bytes]:
    """(caption, references) of CHUNK_ROWS rows at a time, for marshal.loads in a worker.

    Pickle, as a pool would use it, leaves a UTF-8 copy in each text for as long as the text lives.
    """
    rows = iter(rows)
    for chunk in iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), []):
        yield marshal.dumps(chunk)


def _compare(
    captions: List[List[str]],
    references: List[List[List[str]]],
    frequencies: Callable[[np.ndarray], np.ndarray],
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CIDEr [r], CIDEr-D [r] and the counts of BLEU [r, 10] of tokenised captions against tokenised references.

    frequencies: DocumentFrequencies or Uniform.
    """
    rows = len(captions)
    row = np.repeat(np.arange(rows), [len(texts) for texts in references])
    texts = [tokens for row_texts in references for tokens in row_texts]
    ours, theirs = NgramCounts.of(captions), NgramCounts.of(texts)
    log_rows = math.log(float(frequencies.rows))
    our_tfidf = ours.times * (log_rows - np.log(frequencies(ours.hash)))
    their_tfidf = theirs.times * (log_rows - np.log(frequencies(theirs.hash)))
    # The index of a reference's n-gram among the caption's.
    wanted = row_key(theirs.hash, row[theirs.text])
    place = np.searchsorted(ours.key, wanted).clip(max=max(len(ours.key) - 1, 0))
    shared = ours.key[place] == wanted if len(ours.key) else np.zeros(len(wanted), dtype=bool)
    place = place[shared]

    def by_reference(products: np.ndarray) -> np.ndarray:
        weights = np.zeros(len(wanted))
        weights[shared] = products
        return theirs.sums(weights, len(texts))

    norms = np.sqrt(ours.sums(our_tfidf**2, rows))[row] * np.sqrt(theirs.sums(their_tfidf**2, len(texts)))
    norms[norms == 0] = 1.0
    plain = by_reference(our_tfidf[place] * their_tfidf[shared]) / norms
    clipped = by_reference(np.minimum(our_tfidf[place], their_tfidf[shared]) * their_tfidf[shared]) / norms
    our_length = np.array([len(tokens) for tokens in captions])
    their_length = np.array([len(tokens) for tokens in texts])
    # pycocoevalcap measures lengths in bigrams.
    apart = (our_length - 1).clip(0)[row] - (their_length - 1).clip(0)
    clipped *= np.exp(-(apart**2) / (2 * _SIGMA**2))[:, None]
    per_row = np.bincount(row, minlength=rows)
    cider, cider_d = (10.0 * np.bincount(row, one.mean(axis=1), rows) / per_row for one in (plain, clipped))

    most = np.zeros(len(ours.key))
    np.maximum.at(most, place, theirs.times[shared])
    right = ours.sums(np.minimum(ours.times, most), rows)
    guessed = (our_length[:, None] - np.arange(MAX_N)).clip(0)
    closest = [
        min((abs(len(tokens) - length), len(tokens)) for tokens in row_texts)[1]
        for length, row_texts in zip(our_length, references)
    ]
    return cider, cider_d, np.column_stack([right, guessed, our_length, closest])


class Uniform:
    """Document frequencies without references: all n-grams have the same weight."""

    rows = math.e

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        return np.ones(len(hashes))


def agreement(
    rows: Sequence[Sequence[str]], tokenizer: str = "char", frequencies: Optional[DocumentFrequencies] = None
) -> List[np.ndarray]:
    """The agreement of each text of a row with the row's others: its mean CIDEr-D with each of them as the reference.

    The text with the highest value is the row's consensus. frequencies: default Uniform. Returns float64 [n] for each
    row of n texts, 0 for a single text.
    """
    split = TOKENIZERS[tokenizer]
    captions, others = [], []
    for texts in rows:
        tokens = [split(text) for text in texts]
        for number, caption in enumerate(tokens) if len(tokens) > 1 else ():
            captions.append(caption)
            others.append(tokens[:number] + tokens[number + 1 :])
    scores = _compare(captions, others, frequencies or Uniform())[1] if captions else np.zeros(0)
    found, done = [], 0
    for texts in rows:
        count = len(texts) if len(texts) > 1 else 0
        found.append(scores[done : done + count] if count else np.zeros(len(texts)))
        done += count
    return found


def first_best(scores: np.ndarray) -> int:
    """The index of the highest score of agreement; of equal ones, which may be rounded differently, the first."""
    return int(np.argmax(scores >= scores.max() - 1e-9))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, bit-parallel (Hyyrö 2004), with a row in one Python integer."""
    places: Dict[str, int] = {}
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    every = row = (1 << len(one)) - 1
    for token in other:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & every
    return len(one) - bin(row).count("1")


def _rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    lengths = [_common_subsequence(tokens, caption) for tokens in references]
    precision = max(length / float(len(caption) or 1) for length in lengths)
    recall = max(length / float(len(tokens)) for length, tokens in zip(lengths, references))
    if not precision or not recall:
        return 0.0
    return ((1 + _BETA**2) * precision * recall) / float(recall + _BETA**2 * precision)


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1…4 of a corpus from sums over its rows.

    counts: float64 [..., 10]: matching n-grams (n = 1…4), all n-grams (n = 1…4), tokens, and tokens of the reference
    closest in length. Returns float64 [..., 4]. Zeros are handled as in pycocoevalcap.
    """
    small, tiny = 1e-9, 1e-15
    right, guessed = counts[..., :MAX_N], counts[..., MAX_N : 2 * MAX_N]
    precision = (right + tiny) / (guessed + small)
    score = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, MAX_N + 1))
    ratio = (counts[..., 2 * MAX_N] + tiny) / (counts[..., 2 * MAX_N + 1] + small)
    return score * np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))[..., None]
