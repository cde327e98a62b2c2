"""Scores of captions against references, over pycocoevalcap's pure-Python scorers (no Java anywhere).

| score | what | range |
|---|---|---|
| CIDEr | mean cosine of TF-IDF n-gram vectors, n = 1…4 (Vedantam et al. 2015, arXiv 1411.5726, eq. 2-3), × 10 | 0…10 |
| CIDEr-D | the same with clipped counts and a penalty on the length difference (§ 8 there), × 10 | 0…10 |
| BLEU-1…4 | n-gram precision with brevity penalty, corpus level (Papineni et al. 2002) | 0…1 |
| ROUGE-L | F-measure of the longest common subsequence, β = 1.2 (Lin 2004) | 0…1 |

What pycocoevalcap itself prints as "CIDEr", and most papers with it, is CIDEr-D. IDF comes from the
references given, so CIDEr values of different reference sets cannot be compared, and with a single row they
are 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from paddlemix.utils.errors import UserError

# A run of Latin letters and digits (a decimal point inside a number belongs to it), or any other single
# character.
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)+|[A-Za-z0-9\u00c0-\u024f]+|[^\s]")

MAX_N = 4


def tokenize_characters(text: str) -> List[str]:
    """One token per character, runs of Latin letters and digits whole and in lower case, white space dropped.

    The manner of Chinese captioning benchmarks (MUGE): no word segmenter whose version would change the
    score.
    """
    return _TOKEN.findall(text.lower())


TOKENIZERS: Dict[str, Callable[[str], List[str]]] = {"character": tokenize_characters}


class CaptionScores(NamedTuple):
    """ids: the rows' order. corpus: score name → value. rows: score name → float64 [n], in the order of ids."""

    ids: List[str]
    corpus: Dict[str, float]
    rows: Dict[str, np.ndarray]


def check_ids(candidates: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Both sides must name the same rows.

    Raises:
        UserError: lists the ids (the first ten of each kind) that only one side has, or says that there are
        none.
    """
    if not references:
        raise UserError("there are no references to score against")

    def shown(ids: List[str]) -> str:
        return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")

    missing = [key for key in references if key not in candidates]
    unknown = [key for key in candidates if key not in references]
    problems = []
    if missing:
        problems.append(f"{len(missing)} ids have no caption: {shown(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} ids have no reference: {shown(unknown)}")
    if problems:
        raise UserError("; ".join(problems))


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: str = "character",
) -> CaptionScores:
    """Score one caption per id against one or more references per id.

    tokenizer: a name in TOKENIZERS; print it with the scores, they mean nothing without it.

    Raises:
        UserError: the ids of the two sides differ, or an id has no reference with any text.
    """
    check_ids(candidates, references)
    split = TOKENIZERS[tokenizer]
    ids = list(references)
    results, truths = {}, {}
    for key in ids:
        truths[key] = [" ".join(tokens) for tokens in map(split, references[key]) if tokens]
        if not truths[key]:
            raise UserError(f"the references of {key} are empty")
        results[key] = [" ".join(split(candidates[key]))]

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    corpus: Dict[str, float] = {}
    rows: Dict[str, np.ndarray] = {}
    rows["CIDEr"] = _plain_cider([results[key][0] for key in ids], [truths[key] for key in ids])
    corpus["CIDEr"] = float(rows["CIDEr"].mean())
    mean, each = Cider(n=MAX_N).compute_score(truths, results)
    corpus["CIDEr-D"], rows["CIDEr-D"] = float(mean), np.asarray(each, dtype=np.float64)
    values, each = Bleu(MAX_N).compute_score(truths, results, verbose=0)
    for n in range(MAX_N):
        corpus[f"BLEU-{n + 1}"], rows[f"BLEU-{n + 1}"] = float(values[n]), np.asarray(each[n], dtype=np.float64)
    mean, each = Rouge().compute_score(truths, results)
    corpus["ROUGE-L"], rows["ROUGE-L"] = float(mean), np.asarray(each, dtype=np.float64)
    return CaptionScores(ids, corpus, rows)


def _plain_cider(candidates: List[str], references: List[List[str]]) -> np.ndarray:
    """CIDEr without the D: no clipping, no length penalty. One value per row, float64 [n].

    pycocoevalcap has the D variant only; its n-gram counts are used here, so that the two differ in nothing
    else.
    """
    from pycocoevalcap.cider.cider_scorer import cook_refs, cook_test

    cooked = [cook_refs(texts, MAX_N) for texts in references]
    document_frequency: Counter = Counter()
    for row in cooked:
        document_frequency.update({ngram for counts in row for ngram in counts})
    log_rows = math.log(len(cooked))

    def vectors(counts):
        parts: List[Dict[tuple, float]] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            idf = log_rows - math.log(max(1, document_frequency[ngram]))
            parts[len(ngram) - 1][ngram] = count * idf
        return parts, [math.sqrt(sum(value * value for value in part.values())) for part in parts]

    scores = np.zeros(len(candidates))
    for i, (text, row) in enumerate(zip(candidates, cooked)):
        parts, norms = vectors(cook_test(text, MAX_N))
        total = 0.0
        for counts in row:
            other_parts, other_norms = vectors(counts)
            for part, norm, other, other_norm in zip(parts, norms, other_parts, other_norms):
                if norm and other_norm:
                    product = sum(value * other.get(ngram, 0.0) for ngram, value in part.items())
                    total += product / (norm * other_norm)
        scores[i] = 10.0 * total / (MAX_N * len(row))
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
