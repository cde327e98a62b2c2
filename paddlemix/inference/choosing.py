"""Choosing among several answers to the same question."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from paddlemix.inference.options import CHOICES


def choose(texts: Sequence[str], scores: Sequence[float], how: str) -> int:
    """The index of the best answer, the first one on a tie. texts: at least one.

    scores: mean log-probabilities per token. how: "first", "logprob" (the highest score), or "consensus": minimum
    Bayes risk decoding (Suzgun et al. 2022, "Follow the Wisdom of the Crowd", arXiv 2211.07634) with CIDEr-D, for which
    every n-gram weighs the same.
    """
    if how not in CHOICES:
        raise ValueError(f"{how} is not one of {', '.join(CHOICES)}")
    if how == "first" or len(texts) == 1:
        return 0
    if how == "logprob":
        return int(np.argmax(scores))
    from paddlemix.metrics.captions import agreement, first_best

    return first_best(agreement([texts])[0])
