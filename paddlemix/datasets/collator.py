"""Collating samples of different lengths and image counts into a batch.

Shapes: B samples, T padded length, N images, S image side.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from paddlemix.processors.mgen_vl_processing import IGNORE_INDEX, image_positions, label_positions
from paddlemix.utils.errors import UserError

# Rows are padded to a multiple of this.
PAD_TO = 8


# input_ids [t] and labels [t] int64, images [n, 3, S, S] float32 (n may be 0).
Sample = Dict[str, np.ndarray]


class Failure(NamedTuple):
    """Replaces a sample that cannot be read, with the reason.

    Paddle's loader replaces exceptions by others or, without workers, waits forever. So the batch carries the reason as
    "failure" to the training process, which calls raise_failure.
    """

    reason: str


def raise_failure(batch: Dict[str, Any]) -> None:
    """Raise UserError if a batch carries a Failure."""
    if "failure" in batch:
        raise UserError(batch["failure"])


class MGenVLCollator:
    """Pads samples to the longest of the batch, rounded up to a multiple of PAD_TO.

    pad_token_id: pads input_ids on the right; padding is masked and has no labels. image_start_id, n_queries: of the
    image spans; with them a batch has image_positions.
    """

    def __init__(self, pad_token_id: int, image_start_id: int = -1, n_queries: int = 0):
        self.pad_token_id = pad_token_id
        self.image_start_id, self.n_queries = image_start_id, n_queries

    def __call__(self, samples: Sequence[Any]) -> Dict[str, Any]:
        """samples: per row a Sample, or a list of packed ones.

        Returns input_ids, labels, attention_mask [B, T] int64, and images [N, 3, S, S] in the order of their spans,
        missing if the batch has none. Packed rows also have sample_lengths, a list of K numbers per row (0 where it has
        fewer samples), and no label on a sample's first token, which the previous sample would have to predict.
        label_positions and image_positions (int64, [] if empty) are computed here, since the model would have to
        synchronise with the device for them. A Failure makes no row; its reason becomes the batch's "failure".
        """
        packed = any(isinstance(row, list) for row in samples)
        rows = [row if isinstance(row, list) else [row] for row in samples]
        failures = [sample.reason for row in rows for sample in row if isinstance(sample, Failure)]
        rows = [[sample for sample in row if not isinstance(sample, Failure)] for row in rows]
        lengths = [[len(sample["input_ids"]) for sample in row] for row in rows]
        longest = max(1, *map(sum, lengths))
        padded = -(-longest // PAD_TO) * PAD_TO
        shape = (len(rows), padded)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        if packed:
            # Lists stay on the host; the loader converts arrays to tensors.
            most = max(1, *map(len, lengths))
            batch["sample_lengths"] = [counts + [0] * (most - len(counts)) for counts in lengths]
        images: List[np.ndarray] = []
        for number, row in enumerate(rows):
            begin = 0
            for sample, length in zip(row, lengths[number]):
                place = number, slice(begin, begin + length)
                batch["input_ids"][place] = sample["input_ids"]
                batch["labels"][place] = sample["labels"]
                batch["attention_mask"][place] = 1
                if packed and length:
                    batch["labels"][number, begin] = IGNORE_INDEX
                begin += length
                if len(sample["images"]):
                    images.append(sample["images"])
        places = {"label_positions": label_positions(batch["labels"])}
        if images:
            batch["images"] = np.concatenate(images) if len(images) > 1 else images[0]
        if self.n_queries and not failures:
            n_images = len(batch.get("images", ()))
            try:
                spans = image_positions(batch["input_ids"], n_images, self.image_start_id, self.n_queries)
                places["image_positions"] = spans
            except UserError as error:
                failures.append(str(error))
        # The loader cannot convert empty arrays to tensors.
        batch.update({name: indices if len(indices) else [] for name, indices in places.items()})
        if failures:
            batch["failure"] = failures[0]
        return batch
