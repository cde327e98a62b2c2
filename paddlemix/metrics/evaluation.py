"""The whole evaluation of a caption file: scores, wording, intervals, and the difference to another file.

Intervals are percentiles of a bootstrap: rows are drawn with replacement, as many as there are, `resamples` times
(Efron 1979). Both files are drawn the same rows, so the difference is paired. CIDEr's document frequencies stay
those of all references, as if they were known: rows would otherwise have to be scored again for each draw. BLEU is
computed anew from the drawn rows' counts; distinct-n has no interval, since a row that is drawn twice adds nothing new.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.metrics.captions import (
    BLEU,
    SCORES,
    TOKENIZERS,
    CaptionScorer,
    CaptionScores,
    bleu_of_counts,
    check_ids,
    tokenizer_name,
)
from paddlemix.metrics.wording import DISTINCT, EMPTY, KINDS, REPEATED, TOKENS, UNSUPPORTED, Wording, WordList, describe
from paddlemix.utils.progress import Progress

LEVEL = 0.95
RATES = (REPEATED, EMPTY, *UNSUPPORTED.values())
DISTINCT_NAMES = tuple(f"distinct-{n}" for n in DISTINCT)
MEASURES = (*SCORES, TOKENS, *DISTINCT_NAMES, *RATES)

Interval = Optional[Tuple[float, float]]


class Measure(NamedTuple):
    """A value over all rows with its interval; None where there is none."""

    value: float
    interval: Interval

    def to_json(self) -> Dict[str, Any]:
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


class System(NamedTuple):
    """One caption file, evaluated. Everything per row is in the order of `scores.ids`."""

    captions: List[str]
    scores: CaptionScores
    wording: Wording
    measures: Dict[str, Measure]


class Evaluation(NamedTuple):
    """results: the file in question. other, difference: what it is compared with, and results minus other."""

    ids: List[str]
    references: List[Sequence[str]]
    results: System
    other: Optional[System]
    difference: Optional[Dict[str, Measure]]
    settings: Dict[str, Any]

    def to_json(self) -> Dict[str, Any]:
        """All but the rows, as JSON values."""

        def system(one: System) -> Dict[str, Any]:
            return {
                "measures": {name: measure.to_json() for name, measure in one.measures.items()},
                "most frequent words not in references": {
                    kind: [list(pair) for pair in one.wording.most[kind]] for kind in KINDS
                },
            }

        found = {
            "rows": len(self.ids),
            "references": sum(map(len, self.references)),
            "settings": self.settings,
            "results": system(self.results),
        }
        if self.other and self.difference:
            found["other"] = system(self.other)
            found["difference"] = {name: measure.to_json() for name, measure in self.difference.items()}
        return found


def evaluate(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    other: Optional[Mapping[str, str]] = None,
    tokenizer: str = "char",
    resamples: int = 1000,
    seed: int = 0,
    workers: int = 0,
    quiet: bool = True,
    sample: Optional[int] = None,
) -> Evaluation:
    """Evaluate `captions`, and `other` beside it if given, against one or more references per id.

    tokenizer: a name in TOKENIZERS. resamples: draws of the bootstrap, 0 for no intervals. workers: processes
    that score, see CaptionScorer. sample: score that many rows, drawn with `seed`; document frequencies stay those of
    all references.

    Raises:
        UserError: ids that do not agree, or references without text.
    """
    check_ids(captions, references)
    ids = list(references)
    if sample is not None and sample < len(ids):
        ids = [ids[row] for row in sorted(np.random.default_rng(seed).choice(len(ids), sample, replace=False).tolist())]
    scorer = CaptionScorer(references, tokenizer, workers, quiet, ids)
    texts = [references[key] for key in ids]
    words = WordList()
    found = []
    for name, said in (("captions", captions), ("other", other)):
        if said is not None:
            check_ids(said, references)
            rows = {key: said[key] for key in ids}
            scores, rows = scorer.score(rows, name), list(rows.values())
            wording = describe(rows, texts, TOKENIZERS[tokenizer], words, workers=workers, quiet=quiet)
            found.append((rows, scores, wording))
    draws = _draw([_columns(scores, wording) for _, scores, wording in found], resamples, seed, quiet)
    systems = []
    for (rows, scores, wording), drawn in zip(found, draws):
        measures = {}
        for name in MEASURES:
            measures[name] = Measure(_value(name, scores, wording), _interval(drawn.get(name)))
        systems.append(System(rows, scores, wording, measures))
    difference = None
    if other is not None:
        ours, theirs = systems
        difference = {
            name: Measure(
                ours.measures[name].value - theirs.measures[name].value,
                _interval(draws[0][name] - draws[1][name]) if name in draws[0] else None,
            )
            for name in MEASURES
        }
    settings = {
        "tokenizer": tokenizer_name(tokenizer),
        "sample": {"rows": len(ids), "of": len(references), "seed": seed},
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "document_frequencies": "held fixed"},
    }
    return Evaluation(ids, texts, systems[0], systems[1] if other is not None else None, difference, settings)


_MEANS = ("CIDEr", "CIDEr-D", "ROUGE-L", TOKENS, *RATES)


def _value(name: str, scores: CaptionScores, wording: Wording) -> float:
    if name in scores.corpus:
        return scores.corpus[name]
    if name in DISTINCT_NAMES:
        return wording.distinct[DISTINCT[DISTINCT_NAMES.index(name)]]
    return float(wording.rows[name].mean())


def _columns(scores: CaptionScores, wording: Wording) -> np.ndarray:
    """float64 [n, k]: what is averaged over rows, in the order of _MEANS, then the counts of BLEU."""
    means = [scores.rows[name] if name in scores.rows else wording.rows[name] for name in _MEANS]
    return np.concatenate([np.stack(means, axis=1), scores.bleu_counts], axis=1)


def _draw(columns: List[np.ndarray], resamples: int, seed: int, quiet: bool) -> List[Dict[str, np.ndarray]]:
    """Per file, measure → float64 [resamples]: its value over the rows of each draw. Empty without resamples."""
    if resamples == 0:
        return [{} for _ in columns]
    rng = np.random.default_rng(seed)
    n, widths = len(columns[0]), [table.shape[1] for table in columns]
    table = np.concatenate(columns, axis=1)
    sums = np.empty((resamples, table.shape[1]))
    with Progress(resamples, "bootstrap", unit="draw", disable=quiet) as bar:
        for draw in range(resamples):
            times = np.bincount(rng.integers(0, n, n), minlength=n)
            sums[draw] = times.astype(np.float64) @ table
            bar.update()
    found = []
    for part in np.split(sums, np.cumsum(widths)[:-1], axis=1):
        drawn = {name: part[:, column] / n for column, name in enumerate(_MEANS)}
        drawn.update(zip(BLEU, bleu_of_counts(part[:, len(_MEANS) :]).T))
        found.append(drawn)
    return found


def _interval(drawn: Optional[np.ndarray]) -> Interval:
    if drawn is None:
        return None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
