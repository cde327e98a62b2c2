"""Which samples share a sequence or a batch, planned from their lengths in tokens alone.

Packing (`mixtoken`) puts several samples one after another into a sequence of at most max_length tokens. Length
grouping (`group_by_modality_length`) keeps a sample per row, and makes batches of rows of like length. Both are
functions of the lengths and a seed: a run that is resumed, or split over cards, finds the same plan without reading a
sample. A million lengths take about a second.
"""

from __future__ import annotations

import zlib
from typing import Any, List, NamedTuple, Tuple, Union

import numpy as np

from paddlemix.datasets.collator import Failure, Sample

# Samples packed among each other: enough that little room is lost, few enough that the order stays random.
PACK_WINDOW = 512
# Batches whose samples are sorted among each other.
GROUP_WINDOW = 64
# Sets the packing's random stream apart from those of the epochs, which are numbered.
_PACKING_STREAM = 2**31


class SampleLengths(NamedTuple):
    """tokens: int64 [n], 0 for a record that cannot be used; has_image: bool [n]."""

    tokens: np.ndarray
    has_image: np.ndarray

    def digest(self) -> int:
        """A number for exactly these lengths."""
        return zlib.crc32(self.has_image.tobytes(), zlib.crc32(self.tokens.tobytes()))


class Packs(NamedTuple):
    """Every sample in one pack. members: int64 [n], sample numbers, pack by pack; starts: int64 [packs + 1]."""

    members: np.ndarray
    starts: np.ndarray
    max_length: int

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    def samples(self, pack: int) -> Tuple[int, ...]:
        """The samples of a pack, in the order of their sequence."""
        return tuple(self.members[self.starts[pack] : self.starts[pack + 1]].tolist())

    def digest(self) -> int:
        """A number for exactly these packs."""
        return zlib.crc32(self.starts.tobytes(), zlib.crc32(self.members.tobytes()))


class PackedDataset:
    """A dataset whose items are packs of another one's samples: a list of them each, without those that fail, as
    another might not fit into their room. If all of a pack fail, the next good sample is alone in its place."""

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

    The samples are shuffled by `seed` and cut into windows; in each, from the longest down, a sample goes to the first
    sequence that has room (first-fit decreasing; Johnson 1973). The packs are those of every epoch, whose order is a
    permutation of them: so an epoch holds each sample once, and all epochs are equally long.

    tokens: int64 [n], each at most max_length. Records that cannot be used (length 0) go along and cost no room.

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

    # All windows at once, a sample of each at a time. One sequence more than any window uses stays empty, so that a
    # sample always finds room.
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
    """An order of all samples, int64 [n], whose batches hold samples of like length.

    Each stretch of batch_size × processes samples makes the batches of one step, a process after another. Samples with
    and without an image are kept apart, but for what fills no batch of either: that comes last. The samples of a step
    are dealt so that every process has as much to do. Batches of short and of long samples come in random order.
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
    # Every second round of dealing goes the other way, or the last process would always get the longest.
    steps[:, 1::2] = steps[:, 1::2, ::-1].copy()
    return np.concatenate([steps.transpose(0, 2, 1).reshape(-1), left])
