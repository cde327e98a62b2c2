"""Samples become a padded batch with the places of images and labels."""

import numpy as np
import pytest

from paddlemix.datasets import collator
from paddlemix.datasets.collator import MGenVLCollator


def sample(length, n_images, start=0):
    ids = np.arange(start, start + length, dtype=np.int64)
    return {"input_ids": ids, "labels": -ids, "images": np.full((n_images, 3, 4, 4), start, dtype=np.float32)}


def test_pads_on_the_right_to_a_multiple():
    batch = MGenVLCollator(pad_token_id=7)([sample(9, 1, 100), sample(3, 2, 200)])
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "input_ids": ((2, 16), "int64"),
        "labels": ((2, 16), "int64"),
        "attention_mask": ((2, 16), "int64"),
        "images": ((3, 3, 4, 4), "float32"),
        # Positions whose next one has a label.
        "label_positions": ((8 + 2,), "int64"),
    }
    assert batch["input_ids"][1].tolist() == [200, 201, 202] + [7] * 13
    assert batch["labels"][1].tolist() == [-200, -201, -202] + [-100] * 13
    assert batch["attention_mask"].sum(axis=1).tolist() == [9, 3]
    # Images of all samples in a row, in the order of their spans.
    assert batch["images"][:, 0, 0, 0].tolist() == [100, 200, 200]


@pytest.mark.parametrize("length, padded", [(8, 8), (9, 16), (1, 8)])
def test_padded_length(length, padded):
    batch = MGenVLCollator(0)([sample(length, 1)])
    assert batch["input_ids"].shape == (1, padded)


def test_a_batch_of_texts_has_no_images():
    assert "images" not in MGenVLCollator(0)([sample(3, 0), sample(4, 0)])
    assert MGenVLCollator(0)([sample(3, 0), sample(4, 1, 5)])["images"][0, 0, 0, 0] == 5


def spans(*rows):
    """Rows of ids with image spans of two ids: <img> is 90, </img> 91."""
    made = []
    for ids, n_images in rows:
        ids = np.array(ids, dtype=np.int64)
        labels = np.where(np.arange(len(ids)) >= len(ids) - 2, ids, -100)
        made.append({"input_ids": ids, "labels": labels, "images": np.zeros((n_images, 3, 4, 4), np.float32)})
    return made


def test_places_are_found_on_the_host(monkeypatch):
    monkeypatch.setattr(collator, "PAD_TO", 1)
    collate = MGenVLCollator(0, image_start_id=90, n_queries=2)
    first, second = ([1, 90, 5, 6, 91, 2, 3, 4], 1), ([90, 5, 6, 91, 90, 7, 8, 91, 2, 3], 2)
    batch = collate(spans(first, second))
    np.testing.assert_array_equal(batch["image_positions"], [2, 3, 10 + 1, 10 + 2, 10 + 5, 10 + 6])
    np.testing.assert_array_equal(batch["label_positions"], [5, 6, 10 + 7, 10 + 8])
    # Packed: no label on a sample's first token, and lengths for the host.
    batch = collate([spans(first, second), spans(([1, 2], 0))])
    np.testing.assert_array_equal(batch["image_positions"], [2, 3, 8 + 1, 8 + 2, 8 + 5, 8 + 6])
    np.testing.assert_array_equal(batch["label_positions"], [5, 6, 8 + 7, 8 + 8, 18])
    assert batch["sample_lengths"] == [[8, 10], [2, 0]]
    batch = collate(spans(([1], 0)))
    assert (batch["image_positions"], batch["label_positions"]) == ([], [])
    assert "1 image spans, but 0 images" in collate(spans((first[0], 0)))["failure"]
