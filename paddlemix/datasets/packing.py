"""Packing samples into sequences, and grouping them by length, from their lengths in tokens alone.

Packing (`mixtoken`) concatenates several samples into a sequence of at most max_length tokens. Length grouping
(`group_by_modality_length`) keeps one sample per row, and makes batches of rows of similar length. Both depend only on
the lengths and a seed, so that a resumed or distributed run gets the same plan without reading samples. A million
lengths take about a second.
"""

from __future__ import annotations

import zlib
from typing import Any, List, NamedTuple, Tuple, Union

import numpy as np

from paddlemix.datasets.collator import Failure, Sample

# Samples packed together: enough to fill sequences well, few enough to keep the order random.
PACK_WINDOW = 512
# Batches whose samples are sorted together.
GROUP_WINDOW = 64
# Separates the random stream of packing from those of the epochs, which are numbered.
_PACKING_STREAM = 2**31


class SampleLengths(NamedTuple):
    """tokens: int64 [n], 0 for unusable records; has_image: bool [n]."""

    tokens: np.ndarray
    has_image: np.ndarray

    def digest(self) -> int:
        """A checksum of these lengths."""
        return zlib.crc32(self.has_image.tobytes(), zlib.crc32(self.tokens.tobytes()))


class Packs(NamedTuple):
    """A partition of all samples. members: int64 [n], sample indices, pack by pack; starts: int64 [packs + 1]."""

    members: np.ndarray
    starts: np.ndarray
    max_length: int

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    def samples(self, pack: int) -> Tuple[int, ...]:
        """The samples of a pack, in order."""
        return tuple(self.members[self.starts[pack] : self.starts[pack + 1]].tolist())

    def digest(self) -> int:
        """A checksum of these packs."""
        return zlib.crc32(self.starts.tobytes(), zlib.crc32(self.members.tobytes()))


class PackedDataset:
    """A dataset whose items are packs: lists of another dataset's samples, without failed ones, since a replacement
    might not fit. If all samples of a pack fail, the next good sample replaces the pack."""

    def __init__(self, dataset: Any, packs: Packs):
        self.dataset, self.packs = dataset, packs

    def __len__(self) -> int:
        return self.packs.count

    @property
    def n_skipped(self) -> int:
        return self.dataset.n_skipped

    @property
    def n_shortened(self) -> int:
        return self.dataset.n_shortened

    def __getitem__(self, pack: int) -> List[Union[Sample, Failure]]:
        members = self.packs.samples(pack)
        found = [self.dataset.attempt(index, "left out") for index in members]
        good = [sample for sample in found if not isinstance(sample, Failure)]
        return good or [self.dataset.good_after(members[-1], found[-1])]


def plan_packs(tokens: np.ndarray, max_length: int, seed: int, window: int = PACK_WINDOW) -> Packs:
    """Pack samples into sequences of at most max_length tokens.

    The samples are shuffled by `seed` and cut into windows; in each, samples go from the longest down to the first
    sequence with enough room (first-fit decreasing; Johnson 1973). All epochs use the same packs in another order, so
    that an epoch has each sample once, and all epochs have the same length.

    tokens: int64 [n], each at most max_length. Unusable records (length 0) take no room.

    Raises:
        ValueError: a sample is longer than max_length.
    """
    n = len(tokens)
    if n and tokens.max() > max_length:
        raise ValueError(f"a sample of {tokens.max()} tokens does not fit into {max_length}")
    windows = -(-n // window)
    order = np.full(windows * window, -1, dtype=np.int64)
    order[:n] = np.random.default_rng([seed, _PACKING_STREAM]).permutation(n)
    order = order.reshape(windows, window)
    sizes = np.where(order >= 0, tokens[order], 0) if n else order
    longest_first = np.argsort(-sizes, axis=1, kind="stable")
    order, sizes = (np.take_along_axis(values, longest_first, axis=1) for values in (order, sizes))

    # All windows at once, one sample of each at a time. One extra sequence per window stays empty, so that a sample
    # always finds room.
    room = np.full((windows, window + 1), max_length, dtype=np.int64)
    bins = np.empty_like(order)
    rows = np.arange(windows)
    used = 0
    for column in range(window if windows else 0):
        size = sizes[:, column]
        chosen = (room[:, : used + 1] >= size[:, None]).argmax(axis=1)
        room[rows, chosen] -= size
        bins[:, column] = chosen
        used = max(used, int(chosen.max()) + 1)

    real = order >= 0
    sequence = (bins + rows[:, None] * (window + 1))[real]
    by_sequence = np.argsort(sequence, kind="stable")
    sequence = sequence[by_sequence]
    starts = np.flatnonzero(np.append(True, sequence[1:] != sequence[:-1])) if n else np.zeros(0, dtype=np.int64)
    return Packs(order[real][by_sequence], np.append(starts, n).astype(np.int64), max_length)


def group_by_length(lengths: SampleLengths, batch_size: int, processes: int, rng: np.random.Generator) -> np.ndarray:
    """An order of all samples, int64 [n], with batches of similar length.

    Each run of batch_size × processes samples makes the batches of one step, process by process. Samples with and
    without an image are separated, except for the remainders, which come last. The samples of a step are distributed
    evenly over processes. Batches of short and of long samples come in random order.
    """
    per_step = batch_size * processes
    order = rng.permutation(len(lengths.tokens))
    groups, rest = [np.zeros((0, per_step), dtype=np.int64)], []
    for kind in (True, False):
        part = order[lengths.has_image[order] == kind]
        whole = len(part) - len(part) % per_step
        rest.append(part[whole:])
        part = part[:whole]
        window = np.arange(whole) // (per_step * GROUP_WINDOW)
        groups.append(part[np.lexsort((lengths.tokens[part], window))].reshape(-1, per_step))
    left = np.concatenate(rest)
    if len(left) >= per_step:
        groups.append(left[None, :per_step])
        left = left[per_step:]
    steps = np.concatenate(groups)
    steps = steps[rng.permutation(len(steps))].reshape(-1, batch_size, processes)
    # Alternate the direction, or the last process would always get the longest.
    steps[:, 1::2] = steps[:, 1::2, ::-1].copy()
    return np.concatenate([steps.transpose(0, 2, 1).reshape(-1), left])
