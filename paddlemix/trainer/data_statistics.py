"""Statistics of training data from a sample of its records: lengths, labels, images; no pixels are decoded."""

from __future__ import annotations

from collections import Counter
from typing import Any, List, NamedTuple, Tuple

import numpy as np

from paddlemix.datasets.collator import PAD_TO
from paddlemix.processors.images import read_header
from paddlemix.utils.errors import UserError

# Records sampled: percentiles are accurate to a few hundredths of the range, in about a second.
SAMPLE = 400


def padded(tokens: Any) -> Any:
    """Lengths as the collator pads them."""
    return -(-tokens // PAD_TO) * PAD_TO


class DataStatistics(NamedTuple):
    """records: in the dataset; looked_at, failed: in the sample. lengths, labels, images, cut (tokens lost to
    max_length): per valid record. sizes: (width, height) per image. formats: images by format. padding: average
    fraction of a padded batch that is padding."""

    records: int
    looked_at: int
    failed: int
    lengths: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    cut: np.ndarray
    sizes: np.ndarray
    formats: Counter
    padding: float


def data_statistics(dataset: Any, batch_size: int, grouped: bool = False) -> Tuple[DataStatistics, List[str]]:
    """Statistics of records spread evenly over a ChatmlDataset, and the problems found in them.

    grouped: batches hold samples of similar length. Only the headers of images are read.
    """
    count = len(dataset)
    indices = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64))
    rows: List[Tuple[int, int, int, int]] = []
    sizes: List[Tuple[int, int]] = []
    formats: Counter = Counter()
    failures: List[str] = []
    spans_lost = 0
    for index in indices.tolist():
        try:
            encoded, sources = dataset.encoded(index)
            headers = [read_header(source) for source in sources]
        except UserError as error:
            failures.append(f"record {index}: {error}")
            continue
        formats.update(name for name, _ in headers)
        sizes += [size for _, size in headers]
        spans = int((encoded["input_ids"] == dataset.tokenizer.img_start_id).sum())
        spans_lost += spans != len(sources)
        rows.append((len(encoded["input_ids"]), int((encoded["labels"][1:] >= 0).sum()), len(sources), encoded["cut"]))
    lengths, labels, images, cut = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    padding = 0.0
    if len(rows):
        rng = np.random.default_rng(0)
        order = rng.permutation(np.resize(np.arange(len(rows)), max(len(rows), batch_size * 64)))
        order = order[np.argsort(lengths[order], kind="stable")] if grouped else order
        batches = lengths[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size)
        padding = 1 - batches.sum() / (padded(batches.max(axis=1)).sum() * batch_size)
    problems = []
    if failures and not rows:
        problems.append(f"none of the {len(indices)} inspected records is usable; {failures[0]}")
    if spans_lost:
        problems.append(
            f"the images of {spans_lost} of {len(rows)} records have no <img> span in the tokens, so training would "
            "not see them: check chat_template"
        )
    if rows and not images.any():
        problems.append(
            f"none of the {len(rows)} inspected records has an image: the model would learn from text alone"
        )
    shapes = np.array(sizes).reshape(-1, 2)
    looked_at, failed = len(indices), len(failures)
    return DataStatistics(count, looked_at, failed, lengths, labels, images, cut, shapes, formats, padding), problems
