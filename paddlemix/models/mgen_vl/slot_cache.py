"""The cache of the decoding engine: a ring buffer of columns shared by the rows of all slots.

Shapes: A slots, B rows of a group, T prompt tokens, S columns of the ring, H heads, d head width.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import paddle

from paddlemix.models.mgen_vl.language import MASKED, KVCache


class PromptCache(KVCache):
    """Keys and values of a group's prompts: one [B, H, T, d] each per layer."""

    def append(self, layer, key, value):
        self.keys.append(key)
        self.values.append(value)
        return key, value


class SlotCache:
    """The ring: one [A, H, S, d] buffer each for keys and values per layer.

    columns: S. cursor: the next column to write. lengths: int64 [A], the columns owned by each slot's row.
    """

    BLOCK = 64

    def __init__(self, slots: int):
        self.keys, self.values = [], []
        self.lengths = np.zeros(slots, dtype=np.int64)
        self.columns = self.cursor = 0

    def put(self, slot: int, prompts: PromptCache, row: int, length: int) -> None:
        """Copy a prompt into a slot: the last `length` columns of a row of its group."""
        self.lengths[slot] = length
        self.fit()
        if not self.keys:
            for kept, group in ((self.keys, prompts.keys), (self.values, prompts.values)):
                for tensor in group:
                    _, H, _, d = tensor.shape
                    kept.append(paddle.zeros([len(self.lengths), H, self.columns, d], tensor.dtype))
            # The first row starts at the first column, so that the ring can grow without rotation.
            self.cursor = length
        T = prompts.keys[0].shape[2]
        # In two parts if it wraps around.
        first = min(self.cursor, length)
        for kept, group in ((self.keys, prompts.keys), (self.values, prompts.values)):
            for buffer, tensor in zip(kept, group):
                if first:
                    buffer[slot, :, self.cursor - first : self.cursor] = tensor[row, :, T - first :]
                if first < length:
                    buffer[slot, :, self.columns - (length - first) :] = tensor[row, :, T - length : T - first]

    def fit(self) -> None:
        """Resize for the longest row and one more token; shrinks when a quarter of the columns is unused."""
        needed = int(self.lengths.max()) + 1
        needed += -needed % self.BLOCK
        if self.columns < needed or self.columns - needed >= max(2 * self.BLOCK, self.columns // 4):
            self._lay_out(needed)

    def _lay_out(self, columns: int) -> None:
        """Resize the ring to `columns`, keeping the newest ones, which then start at the first column."""
        kept = min(columns, self.columns)
        begin = self.cursor - kept
        # From `begin` to the cursor, possibly wrapped around.
        ranges = [(begin, self.cursor)] if begin >= 0 else [(begin + self.columns, self.columns), (0, self.cursor)]
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                A, H, _, d = buffer.shape
                # On the CPU a slice is a copy.
                parts = [buffer] if ranges[0] == (0, self.columns) else [buffer[:, :, a:b] for a, b in ranges if a < b]
                if columns > kept:
                    parts.append(paddle.zeros([A, H, columns - kept, d], buffer.dtype))
                buffers[i] = paddle.concat(parts, axis=2) if len(parts) > 1 else parts[0]
        self.columns, self.cursor = columns, kept % columns

    def append(self, layer: int, key, value):
        """Write [A, H, 1, d] into the next column and return the buffers."""
        self.keys[layer][:, :, self.cursor : self.cursor + 1] = key
        self.values[layer][:, :, self.cursor : self.cursor + 1] = value
        return self.keys[layer], self.values[layer]

    def bias(self) -> np.ndarray:
        """Attention bias of a step: float32 [A, 1, 1, S], MASKED where a slot's row does not own the column."""
        age = (self.cursor - np.arange(self.columns)) % self.columns
        return np.where(age <= self.lengths[:, None], np.float32(0), np.float32(MASKED))[:, None, None]

    def advance(self, slots: Sequence[int]) -> None:
        """Move to the next column after a step; the rows in `slots` own the one just written."""
        self.lengths[slots] += 1
        self.cursor = (self.cursor + 1) % self.columns

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these slots, in this order."""
        chosen = paddle.to_tensor(np.array(slots, dtype=np.int64))
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = paddle.index_select(buffer, chosen)
        self.lengths = self.lengths[slots]
