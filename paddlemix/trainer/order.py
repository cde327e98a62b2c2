"""The order of samples: a permutation per epoch from the seed alone, so that a resumed run goes on by index."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from paddlemix.datasets.packing import Packs, SampleLengths, group_by_length
from paddlemix.utils.errors import ConfigError

# Said when the steps are counted, by the run and by its plan.
TOO_FEW_EPOCHS = "num_train_epochs={} ends before the first optimizer step: raise it, or set max_steps"


class EpochSampler(DistributedBatchSampler):
    """Batches of indices in an order that depends on the seed and the epoch alone.

    Each epoch holds a whole number of optimizer steps, so that no gradient of its last batches leaks into the next
    epoch's first step; which samples are left out changes with the epoch. `start_at` moves to any step without reading
    a sample. (PaddleNLP's class, so that its Trainer leaves skipping to the sampler.)

    rank, processes: this process takes every `processes`-th batch. packs: a batch holds numbers of these.
    lengths: batches of samples of like length.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        *,
        seed,
        accumulation,
        drop_last=False,
        rank=0,
        processes=1,
        packs: Optional[Packs] = None,
        lengths: Optional[SampleLengths] = None,
    ):
        super().__init__(dataset, batch_size, num_replicas=processes, rank=rank, shuffle=True, drop_last=drop_last)
        self.seed, self.packs, self.lengths = seed, packs, lengths
        self.count = len(dataset) if packs is None else packs.count
        per_step = batch_size * processes
        batches = self.count // per_step if drop_last else math.ceil(self.count / per_step)
        if batches == 0:
            what = "samples" if packs is None else "packed sequences"
            raise ConfigError(f"{self.count} {what} do not fill one batch of {per_step}")
        self.batches = batches - batches % accumulation if batches >= accumulation else batches
        self.first_batch = 0

    def set_epoch(self, epoch=0, consumed_samples=0):
        """PaddleNLP's Trainer calls this when it resumes; `start_at` has said it all by then."""

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin at this batch (of this process) of this epoch."""
        self.epoch, self.first_batch = epoch, batch

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is None:
            order = rng.permutation(self.count)
        else:
            order = group_by_length(self.lengths, self.batch_size, self.nranks, rng)
        per_step = self.batch_size * self.nranks
        if self.nranks > 1:
            # Every process must get as many batches: the last ones begin again at the front.
            order = np.resize(order, max(len(order), self.batches * per_step))
        for number in range(self.first_batch, self.batches):
            start = number * per_step + self.local_rank * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def __len__(self):
        return self.batches
