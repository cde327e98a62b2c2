"""Evaluation of a caption file: scores, wording, confidence intervals, and differences to other files.

Intervals are bootstrap percentiles (Efron 1979): `resamples` times, as many rows as there are are drawn with
replacement. The same rows are drawn from all files, so differences are paired. CIDEr's document frequencies stay fixed;
otherwise rows would have to be scored again for each draw. BLEU is computed from the drawn rows' counts; distinct-n has
no interval, since drawing a row twice adds nothing new.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.metrics.attributes import AttributeLists, Attributes, compare_attributes
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

# Suffixes of measures that are shares of rows, where more is better: attributes.
SHARES = (" right",)

Interval = Optional[Tuple[float, float]]


class Measure(NamedTuple):
    """A value over all rows and its interval, if any."""

    value: float
    interval: Interval

    def to_json(self) -> Dict[str, Any]:
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


class System(NamedTuple):
    """One caption file, evaluated. Everything per row is in the order of `scores.ids`."""

    captions: List[str]
    scores: CaptionScores
    wording: Wording
    attributes: Optional[Attributes]
    measures: Dict[str, Measure]


class Evaluation(NamedTuple):
    """results: the evaluated file. others: the files it is compared with. differences: results minus each of them."""

    ids: List[str]
    references: List[Sequence[str]]
    results: System
    others: List[System]
    differences: List[Dict[str, Measure]]
    settings: Dict[str, Any]

    def to_json(self) -> Dict[str, Any]:
        """Everything except the rows, as JSON values."""

        def system(one: System) -> Dict[str, Any]:
            found: Dict[str, Any] = {
                "measures": {name: measure.to_json() for name, measure in one.measures.items()},
                "most frequent words not in references": {
                    kind: [list(pair) for pair in one.wording.most[kind]] for kind in KINDS
                },
            }
            if one.attributes is not None:
                most = {name: [list(pair) for pair in pairs] for name, pairs in one.attributes.most.items()}
                found["most frequent wrong attributes"] = most
            return found

        return {
            "rows": len(self.ids),
            "references": sum(map(len, self.references)),
            "settings": self.settings,
            "results": system(self.results),
            "others": [
                {**system(other), "difference": {name: measure.to_json() for name, measure in difference.items()}}
                for other, difference in zip(self.others, self.differences)
            ],
        }


def evaluate(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    others: Sequence[Mapping[str, str]] = (),
    tokenizer: str = "char",
    resamples: int = 1000,
    seed: int = 0,
    workers: int = 0,
    quiet: bool = True,
    sample: Optional[int] = None,
    attributes: Optional[AttributeLists] = None,
) -> Evaluation:
    """Evaluate `captions` and `others` against one or more references per id.

    tokenizer: a name in TOKENIZERS. resamples: draws of the bootstrap, 0 for no intervals. workers: processes that
    score, see CaptionScorer. sample: score only that many rows, drawn with `seed`; document frequencies come from all
    references. attributes: word lists of attributes to compare.

    Raises:
        UserError: ids that do not match, or references without text.
    """
    check_ids(captions, references)
    ids = list(references)
    if sample is not None and sample < len(ids):
        ids = [ids[row] for row in sorted(np.random.default_rng(seed).choice(len(ids), sample, replace=False).tolist())]
    scorer = CaptionScorer(references, tokenizer, workers, quiet, ids)
    texts = [references[key] for key in ids]
    words = WordList()
    found = []
    for number, texts_of_file in enumerate((captions, *others)):
        check_ids(texts_of_file, references)
        if len(ids) < len(references):
            texts_of_file = {key: texts_of_file[key] for key in ids}
        scores = scorer.score(texts_of_file, f"other {number}" if number else "captions")
        rows = [texts_of_file[key] for key in ids]
        wording = describe(rows, texts, TOKENIZERS[tokenizer], words, workers=workers, quiet=quiet)
        compared = None if attributes is None else compare_attributes(rows, texts, attributes, quiet)
        found.append((rows, scores, wording, compared))
    draws = _draw([_Columns.of(*parts[1:]) for parts in found], resamples, seed, quiet)
    systems = []
    for (rows, scores, wording, compared), drawn in zip(found, draws):
        values = {name: _value(name, scores, wording) for name in MEASURES}
        pairs = {} if compared is None else compared.measures()
        values.update((name, _share(*pair.sum(axis=0))) for name, pair in pairs.items())
        measures = {name: Measure(value, _interval(drawn.get(name))) for name, value in values.items()}
        systems.append(System(rows, scores, wording, compared, measures))
    ours = systems[0].measures
    differences = [
        {
            name: Measure(
                ours[name].value - theirs.measures[name].value,
                _interval(draws[0][name] - drawn[name]) if name in drawn else None,
            )
            for name in ours
        }
        for theirs, drawn in zip(systems[1:], draws[1:])
    ]
    settings = {
        "tokenizer": tokenizer_name(tokenizer),
        "sample": {"rows": len(ids), "of": len(references), "seed": seed},
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "document_frequencies": "held fixed"},
    }
    return Evaluation(ids, texts, systems[0], systems[1:], differences, settings)


_MEANS = ("CIDEr", "CIDEr-D", "ROUGE-L", TOKENS, *RATES)


def _value(name: str, scores: CaptionScores, wording: Wording) -> float:
    if name in scores.corpus:
        return scores.corpus[name]
    if name in DISTINCT_NAMES:
        return wording.distinct[DISTINCT[DISTINCT_NAMES.index(name)]]
    return float(wording.rows[name].mean())


def _share(right: float, counted: float) -> float:
    return float(right / counted) if counted else 0.0


class _Columns(NamedTuple):
    """The data of one file for the bootstrap. table: float64 [n, k]: the measures that are averaged over rows, in the
    order of _MEANS, then the counts of BLEU, then right and counted of each of `shares`."""

    table: np.ndarray
    shares: List[str]

    @classmethod
    def of(cls, scores: CaptionScores, wording: Wording, compared: Optional[Attributes]) -> _Columns:
        means = [scores.rows[name] if name in scores.rows else wording.rows[name] for name in _MEANS]
        pairs = {} if compared is None else compared.measures()
        return cls(np.concatenate([np.stack(means, axis=1), scores.bleu_counts, *pairs.values()], axis=1), list(pairs))


def _draw(columns: List[_Columns], resamples: int, seed: int, quiet: bool) -> List[Dict[str, np.ndarray]]:
    """Per file, measure → float64 [resamples]: its value for each draw. Empty without resamples."""
    if resamples == 0:
        return [{} for _ in columns]
    rng = np.random.default_rng(seed)
    n, widths = len(columns[0].table), [one.table.shape[1] for one in columns]
    table = np.concatenate([one.table for one in columns], axis=1)
    sums = np.empty((resamples, table.shape[1]))
    with Progress(resamples, "bootstrap", unit="draw", disable=quiet) as bar:
        for draw in range(resamples):
            times = np.bincount(rng.integers(0, n, n), minlength=n)
            sums[draw] = times.astype(np.float64) @ table
            bar.update()
    found = []
    for part, one in zip(np.split(sums, np.cumsum(widths)[:-1], axis=1), columns):
        drawn = {name: part[:, column] / n for column, name in enumerate(_MEANS)}
        pairs = part[:, part.shape[1] - 2 * len(one.shares) :]
        drawn.update(zip(BLEU, bleu_of_counts(part[:, len(_MEANS) : part.shape[1] - pairs.shape[1]]).T))
        for number, name in enumerate(one.shares):
            right, counted = pairs[:, 2 * number], pairs[:, 2 * number + 1]
            drawn[name] = np.divide(right, counted, out=np.zeros(resamples), where=counted > 0)
        found.append(drawn)
    return found


def _interval(drawn: Optional[np.ndarray]) -> Interval:
    if drawn is None:
        return None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
