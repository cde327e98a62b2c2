"""N-grams of many texts at once, as 64-bit hashes, and their document frequencies in rows of references.

Shapes: [t] tokens, [g] n-grams of one text each, every distinct n-gram once.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Dict, Iterable, List, NamedTuple, Sequence, Tuple

import numpy as np

from paddlemix.utils.parallel import map_chunks
from paddlemix.utils.progress import Progress

MAX_N = 4
# N-grams sorted at once: some 150 MB in each worker.
COUNTED_AT_ONCE = 1 << 22
# Tokens hashed at once.
HASHED_AT_ONCE = 1 << 20
# An odd number with well-mixed bits.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_TOKEN_HASHES: Dict[str, int] = {}


def token_hash(token: str) -> int:
    """64 bits of a token, the same in every process and run."""
    value = _TOKEN_HASHES.get(token)
    if value is None:
        digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = _TOKEN_HASHES[token] = int.from_bytes(digest, "little")
    return value


def ngram_hashes(tokens: np.ndarray, text: np.ndarray, most: int = MAX_N) -> Iterable[Tuple[np.ndarray, np.ndarray]]:
    """For n = 1…most: the hashes of all n-grams (uint64) and the text that each belongs to.

    tokens: uint64 [t], hashes of the tokens of concatenated texts. text: int [t], the text of each token.
    """
    value = tokens
    for n in range(most):
        if n:
            value = value[:-1] * _FACTOR + tokens[n:]
        inside = text[: len(text) - n] == text[n:]
        yield value[inside], text[: len(text) - n][inside]


class DocumentFrequencies:
    """The number of rows of references in which an n-gram occurs: `add` each row, `finish`, then look up.

    N-grams of a single row are not stored, since CIDEr treats 0 as 1. Among 400 million n-grams (1,000,000 rows of 100
    tokens) the probability of a hash collision is 1 in 200.
    """

    def __init__(self):
        self.rows = 0
        self._vocabulary: Dict[str, int] = {}
        # Tokens of all texts, concatenated; the length and the row of each text.
        self._tokens, self._lengths, self._row = array("I"), array("I"), array("I")
        self._unigrams: Counter = Counter()

    def add(self, texts: Sequence[Sequence[str]]) -> None:
        """Add a row: the tokens of each of its references."""
        number, begin = self._vocabulary, len(self._tokens)
        for tokens in texts:
            self._tokens.extend([number.setdefault(token, len(number)) for token in tokens])
            self._lengths.append(len(tokens))
            self._row.append(self.rows)
        self._unigrams.update(set(self._tokens[begin:]))
        self.rows += 1

    def finish(self, workers: int = 0, quiet: bool = True) -> None:
        counted = self._counted(workers, quiet)
        del self._tokens, self._lengths, self._row, self._vocabulary, self._unigrams
        self._hashes, self._counts = (np.concatenate(column) for column in zip(*counted))
        order = np.argsort(self._hashes)
        self._hashes, self._counts = self._hashes[order], self._counts[order]

    def _counted(self, workers: int, quiet: bool) -> List[Tuple[np.ndarray, np.ndarray]]:
        """(hashes, numbers of rows) of the n-grams, in parts."""
        hashes = np.array([token_hash(token) for token in self._vocabulary], dtype=np.uint64)
        tokens, lengths, row = (np.frombuffer(part, np.uint32) for part in (self._tokens, self._lengths, self._row))
        ends = np.cumsum(lengths, dtype=np.int64)
        # Chunks of tokens, cut between rows.
        texts = np.searchsorted(ends, np.arange(0, len(tokens), HASHED_AT_ONCE))
        texts = np.unique(np.searchsorted(row, row[texts]))
        cuts = np.append(ends[texts] - lengths[texts], len(tokens)).tolist()
        # An n-gram of two or more tokens is counted in the part determined by its first two tokens.
        part_of = np.zeros(len(tokens), dtype=np.uint8)
        for begin, end in zip(cuts[:-1], cuts[1:]):
            value = hashes[tokens[begin : end + 1]]
            part_of[begin : begin + len(value) - 1] = (value[:-1] * _FACTOR + value[1:]) >> np.uint64(56)
        parts = min(-(-len(tokens) * (MAX_N - 1) // COUNTED_AT_ONCE) or 1, 256)

        def count(part: int) -> Tuple[np.ndarray, np.ndarray]:
            """A part's n-grams that occur in several rows, and their numbers of rows."""
            low, high = 256 * part // parts, 256 * (part + 1) // parts - 1
            found = []
            for begin, end in zip(cuts[:-1], cuts[1:]):
                own = part_of[begin:end]
                place = begin + np.flatnonzero((own >= low) & (own <= high))
                text = np.searchsorted(ends, place, side="right")
                value = hashes[tokens[place]]
                for n in range(1, MAX_N):
                    inside = place + n < ends[text]
                    place, text, value = place[inside], text[inside], value[inside]
                    value = value * _FACTOR + hashes[tokens[place + n]]
                    # A row counts once for each n-gram.
                    found.append(value[np.unique(row_key(value, row[text]), return_index=True)[1]])
            value, times = np.unique(np.concatenate(found), return_counts=True)
            return value[times > 1], times[times > 1].astype(np.uint32)

        unigrams = np.array(list(self._unigrams.values()), dtype=np.uint32)
        counted = [(hashes[np.array(list(self._unigrams), dtype=np.int64)], unigrams)]
        with Progress(parts, "n-grams", unit="part", disable=quiet or parts == 1) as bar:
            for found in map_chunks(count, range(parts), workers if parts > 1 else 0):
                counted.append(found)
                bar.update()
        return counted

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [g] → float64 [g]: rows that have the n-gram, at least 1."""
        # Sorted, so that lookups in a table of hundreds of MB mostly hit the cache.
        wanted, back = np.unique(hashes, return_inverse=True)
        places = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._counts[places], 1.0)[back]


class NgramCounts(NamedTuple):
    """The distinct n-grams of some texts, all [g], sorted by key: hash of n-gram and row, hash, text, n - 1, and number
    of occurrences in the text."""

    key: np.ndarray
    hash: np.ndarray
    text: np.ndarray
    n: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> NgramCounts:
        tokens = np.array([token_hash(token) for text in texts for token in text], dtype=np.uint64)
        text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        found = list(ngram_hashes(tokens, text))
        value = np.concatenate([one for one, _ in found])
        owner = np.concatenate([one for _, one in found])
        n = np.repeat(np.arange(MAX_N), [len(one) for one, _ in found])
        key, place, times = np.unique(row_key(value, owner), return_index=True, return_counts=True)
        return cls(key, value[place], owner[place], n[place], times.astype(np.float64))

    def sums(self, weights: np.ndarray, texts: int) -> np.ndarray:
        """float64 [texts, MAX_N]: sums of weights [g] by text and n."""
        return np.bincount(self.text * MAX_N + self.n, weights, texts * MAX_N).reshape(texts, MAX_N)


def row_key(value: np.ndarray, row: np.ndarray) -> np.ndarray:
    return value + row.astype(np.uint64) * _FACTOR
