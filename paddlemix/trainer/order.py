"""The order of samples: a permutation per epoch that depends only on the seed, so that a run resumes by index."""

from __future__ import annotations

import math
import zlib
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from paddlemix.datasets.packing import Packs, SampleLengths, group_by_length
from paddlemix.utils.errors import Problem

# Separates the random streams of weighted entries from the others.
_DRAWING_STREAM = 2**31 + 1


class Draw(NamedTuple):
    """An entry of weighted data. samples: its size; first: its first index; count: samples drawn per epoch."""

    samples: int
    first: int
    count: int

    def epoch(self, seed: int, number: int, epoch: int) -> np.ndarray:
        """The samples that entry `number` contributes to an epoch: int64 [count]. Epochs continue through successive
        permutations of the entry, so that all its samples are drawn equally often."""
        begin = epoch * self.count
        passes = range(begin // self.samples, -(-(begin + self.count) // self.samples))
        keys = ([seed, number, one, _DRAWING_STREAM] for one in passes)
        stream = np.concatenate([np.random.default_rng(key).permutation(self.samples) for key in keys])
        return self.first + stream[begin % self.samples :][: self.count]


def plan_draws(sizes: Sequence[int], weights: Sequence[float]) -> Tuple[Draw, ...]:
    """Distribute an epoch of as many samples as there are by weight (largest remainder method)."""
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    for number in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[number] += 1
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    return tuple(map(Draw, sizes, firsts, counts))


class Order(NamedTuple):
    """The sizes of batches, steps, epochs and the run, for the sampler, the log and the dry run.

    samples: records of the training data. batch: samples per card, or sequences with packs. accumulation: batches per
    optimizer step. cards: data-parallel degree. max_steps: overrides epochs unless -1. packs: packed sequences
    (mixtoken). lengths: for batches of similar length. draws: shares of weighted entries. mixing: the entries' mixing
    settings, which a resumed run must share.
    """

    samples: int
    batch: int
    accumulation: int = 1
    seed: int = 42
    cards: int = 1
    drop_last: bool = False
    epochs: float = 1.0
    max_steps: int = -1
    packs: Optional[Packs] = None
    lengths: Optional[SampleLengths] = None
    draws: Tuple[Draw, ...] = ()
    mixing: Tuple[Dict[str, Any], ...] = ()

    @property
    def unit(self) -> str:
        """The unit of batches."""
        return "samples" if self.packs is None else "packed sequences"

    @property
    def count(self) -> int:
        """Total samples or packed sequences."""
        return self.samples if self.packs is None else self.packs.count

    @property
    def _batches(self) -> int:
        per_batch = self.batch * self.cards
        return self.count // per_batch if self.drop_last else math.ceil(self.count / per_batch)

    @property
    def batches_per_step(self) -> int:
        """`accumulation`, or all batches of an epoch if they are fewer."""
        return min(self.accumulation, max(self._batches, 1))

    @property
    def batches(self) -> int:
        """Batches of a card in an epoch, a multiple of the batches per step."""
        return self._batches - self._batches % self.batches_per_step

    @property
    def per_step(self) -> int:
        """Samples or packed sequences in an optimizer step, on all cards."""
        return self.batch * self.cards * self.batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        return max(self.batches // self.batches_per_step, 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps > 0 else int(self.steps_per_epoch * self.epochs)

    @property
    def left_over(self) -> int:
        """Samples or packed sequences left out of each epoch, different ones each time."""
        return max(self.count - self.steps_per_epoch * self.per_step, 0)

    def problems(self) -> List[str]:
        """Reasons why training cannot start."""
        if not self._batches:
            text = f"{self.count} {self.unit} do not fill one batch of {self.batch} on each of {self.cards} cards"
            return [Problem(text, "per_device_train_batch_size")]
        if not self.steps:
            text = f"num_train_epochs={self.epochs} ends before the first optimizer step: raise it, or set max_steps"
            return [Problem(text, "num_train_epochs")]
        return [
            Problem(f"a weight is so small that an epoch of {self.samples} samples draws none of its entry", "weight")
            for draw in self.draws
            if not draw.count
        ]

    def warnings(self) -> List[str]:
        """Deviations from the request."""
        if self.batches_per_step < self.accumulation:
            return [
                f"an epoch has {self._batches} batches ({self.count} {self.unit}, {self.batch} × {self.cards} at a "
                f"time), fewer than gradient_accumulation_steps={self.accumulation}: a step uses all of them"
            ]
        return []

    def settings(self) -> Dict[str, int]:
        """The settings that determine the order of samples, which a resumed run must share."""
        settings = {
            "samples": self.samples,
            "batch": self.batch * self.cards,
            "accumulation": self.accumulation,
            "seed": self.seed,
        }
        if self.drop_last:
            settings["dataloader_drop_last"] = 1
        if self.packs is not None:
            settings.update(mixtoken=self.packs.digest(), sequences=self.packs.count, max_length=self.packs.max_length)
        if self.lengths is not None:
            settings["group_by_modality_length"] = self.lengths.digest()
        if any(self.mixing):
            settings["mixing"] = zlib.crc32(repr(self.mixing).encode())
        return settings


class EpochSampler(DistributedBatchSampler):
    """Batches of indices in an order that depends only on the seed and the epoch.

    Each epoch has a whole number of optimizer steps, so that no gradient of its last batches leaks into the next
    epoch's first step; the samples left out change with the epoch. `start_at` moves to any step without reading
    samples. (A subclass of PaddleNLP's sampler, so that its Trainer leaves skipping to the sampler.)

    rank: this process takes every `order.cards`-th batch. With packs, indices are those of packs.
    """

    def __init__(self, order: Order, rank: int = 0):
        super().__init__(
            range(order.samples),
            order.batch,
            num_replicas=order.cards,
            rank=rank,
            shuffle=True,
            drop_last=order.drop_last,
        )
        self.order = order
        self.first_batch = 0

    def set_epoch(self, epoch: int = 0, consumed_samples: int = 0) -> None:
        """Called by PaddleNLP's Trainer on a resume; not needed after `start_at`."""

    def start_at(self, epoch: int, batch: int) -> None:
        """Start the next iteration at this batch (of this process) of this epoch."""
        self.epoch, self.first_batch = epoch, batch

    def __iter__(self) -> Any:
        order = self.order
        rng = np.random.default_rng([order.seed, self.epoch])
        if order.draws:
            drawn = [draw.epoch(order.seed, number, self.epoch) for number, draw in enumerate(order.draws)]
            indices = rng.permutation(np.concatenate(drawn))
        elif order.lengths is None:
            indices = rng.permutation(order.count)
        else:
            indices = group_by_length(order.lengths, order.batch, order.cards, rng)
        per_step = order.batch * order.cards
        if order.cards > 1:
            # All processes need the same number of batches: the last ones wrap around.
            indices = np.resize(indices, max(len(indices), len(self) * per_step))
        for number in range(self.first_batch, len(self)):
            start = number * per_step + self.local_rank * order.batch
            yield indices[start : start + order.batch].tolist()

    def __len__(self) -> int:
        return self.order.batches
