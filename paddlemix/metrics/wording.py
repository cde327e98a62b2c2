"""Properties of captions measured without a language model: length, diversity, repetition, emptiness, and words that
are not in the references.

The last is only a cheap signal of hallucination: words.json lists Chinese colours, counts and objects of ads, and a
caption is flagged if it names one that none of its references names. It may be right where the references are silent,
and wrong with words that are not in the list.
"""

from __future__ import annotations

import json
import marshal
import os
import re
from collections import Counter, defaultdict
from typing import Dict, Iterable, List, NamedTuple, Sequence, Set, Tuple

import numpy as np

from paddlemix.metrics.captions import packed_chunks
from paddlemix.metrics.ngrams import ngram_hashes, token_hash
from paddlemix.utils.parallel import map_chunks
from paddlemix.utils.progress import Progress

WORDS_FILE = os.path.join(os.path.dirname(__file__), "words.json")
KINDS = ("colour", "count", "object")
DISTINCT = (1, 2)
# Words listed per kind, the most frequent first.
_LISTED = 10

_MARKS = re.compile(r"[^\w\s]+|\s+")
# A phrase of two or more tokens, three times in a row. (Tokens are single characters here, see repeats_itself.) The
# time is the product of the longest phrase and the length of the text.
_STUCK = re.compile(r"(.{2,1000}?)\1\1", re.DOTALL)
_LEAST_CLAUSE_TOKENS = 3


def repeats_itself(tokens: Sequence[str]) -> bool:
    """Whether a clause of three or more tokens occurs twice, or 2 to 1000 tokens occur three times in a row.

    Clauses are separated by punctuation marks. Ordinary doubling (干干净净, 哈哈哈) does not count.
    """
    letters: Dict[str, str] = {}
    text = "".join(letters.setdefault(token, chr(0x100000 + len(letters))) for token in tokens)
    seen: Set[Tuple[str, ...]] = set()
    clause: List[str] = []
    for token in [*tokens, "。"]:
        if not _MARKS.fullmatch(token):
            clause.append(token)
            continue
        key = tuple(clause)
        if len(key) >= _LEAST_CLAUSE_TOKENS and key in seen:
            return True
        seen.add(key)
        clause = []
    return _STUCK.search(text) is not None


def distinct_ngrams(rows: Iterable[Sequence[str]], n: int) -> Tuple[np.ndarray, int]:
    """The distinct n-grams of some captions, as sorted hashes (uint64), and the total number of n-grams."""
    rows = list(rows)
    tokens = np.array([token_hash(token) for row in rows for token in row], dtype=np.uint64)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    *_, (found, _) = ngram_hashes(tokens, owner, n)
    return np.unique(found), len(found)


class WordList:
    """The word lists of words.json, and the claims that captions make with them.

    A group's words of two or more characters are claims if a caption contains them; any of the group's words in a
    reference, single characters included, supports the claim. One (一个) is never a claim: it is too common.
    """

    def __init__(self):
        with open(WORDS_FILE, encoding="utf-8") as file:
            lists = json.load(file)
        # Word → (kind, the words that support it); a word in several groups is supported by each.
        self._support: Dict[str, Tuple[str, Set[str]]] = {}
        for kind, groups in (("colour", lists["colours"]), ("object", lists["objects"])):
            for group in groups:
                for word in group:
                    if len(word) > 1:
                        self._support.setdefault(word.lower(), (kind, set()))[1].update(map(str.lower, group))
        self._by_first: Dict[str, List[str]] = defaultdict(list)
        for word in sorted(self._support, key=len, reverse=True):
            self._by_first[word[0]].append(word)
        self._number = {name: number for number, names in lists["numerals"].items() for name in names}
        numerals = "|".join(sorted(map(re.escape, self._number), key=len, reverse=True))
        measures = "|".join(map(re.escape, lists["measure_words"]))
        # Not part of a longer number, and not an ordinal (第二个).
        self._count = re.compile(rf"(?<![第\d.〇零一二两三四五六七八九十百千万])({numerals})(?:{measures})")

    def _named(self, text: str) -> Iterable[str]:
        """Words of the list in a text, the longest at each position."""
        position = 0
        while position < len(text):
            for word in self._by_first.get(text[position], ()):
                if text.startswith(word, position):
                    yield word
                    position += len(word)
                    break
            else:
                position += 1

    def unsupported(self, caption: str, references: Sequence[str]) -> List[Tuple[str, str]]:
        """(kind, word) of each claim in a caption that none of its references supports, in order, once each."""
        caption, referenced = caption.lower(), "\n".join(references).lower()
        found = {}
        for word in self._named(caption):
            kind, support = self._support[word]
            if not any(other in referenced for other in support):
                found[word] = kind
        claims = list(self._count.finditer(caption))
        if claims:
            numbers = {self._number[match.group(1)] for match in self._count.finditer(referenced)}
            for match in claims:
                if self._number[match.group(1)] not in numbers:
                    found[match.group()] = "count"
        return [(kind, word) for word, kind in found.items()]


class Wording(NamedTuple):
    """rows: measure → float64 [n]; a rate is its mean. distinct: n → distinct n-grams / all n-grams of all captions (Li
    et al. 2016, arXiv 1510.03055), 0 without any. unsupported: per row (kind, word). most: kind → [(word, rows)], the
    most frequent first."""

    rows: Dict[str, np.ndarray]
    distinct: Dict[int, float]
    unsupported: List[Sequence[Tuple[str, str]]]
    most: Dict[str, List[Tuple[str, int]]]


TOKENS, REPEATED, EMPTY = "tokens", "repeated phrase", "empty"
UNSUPPORTED = {kind: f"{kind} not in references" for kind in KINDS}


def describe(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    split,
    words: WordList,
    workers: int = 0,
    quiet: bool = True,
) -> Wording:
    """Measure captions. references: those of each row. split: a tokenizer of metrics.captions.TOKENIZERS. workers,
    quiet: see CaptionScorer."""
    names = (TOKENS, REPEATED, EMPTY, *UNSUPPORTED.values())
    table = np.empty((len(captions), len(names)))
    unsupported: List[Sequence[Tuple[str, str]]] = []
    different = {n: np.empty(0, np.uint64) for n in DISTINCT}
    total = dict.fromkeys(DISTINCT, 0)

    def look(chunk: bytes):
        rows = marshal.loads(chunk)
        tokens = [split(caption) for caption, _ in rows]
        claims = [words.unsupported(caption, row) or () for caption, row in rows]
        kinds = [{kind for kind, _ in row} for row in claims]
        columns = [
            [len(row) for row in tokens],
            [repeats_itself(row) for row in tokens],
            [not row for row in tokens],
            *([kind in row for row in kinds] for kind in KINDS),
        ]
        return np.array(columns, np.float64).T, claims, {n: distinct_ngrams(tokens, n) for n in DISTINCT}

    with Progress(len(captions), "wording", disable=quiet) as bar:
        for part, claims, ngrams in map_chunks(look, packed_chunks(zip(captions, references)), workers):
            table[len(unsupported) : len(unsupported) + len(part)] = part
            unsupported.extend(claims)
            for n, (found, count) in ngrams.items():
                different[n] = np.union1d(different[n], found)
                total[n] += count
            bar.update(len(part))
    tally = {kind: Counter(word for row in unsupported for found, word in row if found == kind) for kind in KINDS}
    return Wording(
        {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(names)},
        {n: len(different[n]) / total[n] if total[n] else 0.0 for n in DISTINCT},
        unsupported,
        {kind: counts.most_common(_LISTED) for kind, counts in tally.items()},
    )
