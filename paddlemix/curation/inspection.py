"""Statistics of a set of images and captions of any size, counted in one pass by worker processes.

    rows of the files → facts of each caption (caption_facts.py) and image (image_facts.py) → arrays, 100 bytes a row
                      → numbers and groups of duplicates: a summary, which report.json holds and advice reads

Every caption is read, and every image's header and bytes; only a sample of the images is decoded, unless the facts of
all are in the file beside the data.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.curation.caption_facts import CaptionFacts, caption_facts
from paddlemix.curation.image_facts import (
    FACTS,
    ONE_COLOUR,
    PROBLEMS,
    all_image_facts,
    facts_path,
    facts_record,
    has_captions,
    hash64,
    held_bytes,
    stored_facts,
    usable,
)
from paddlemix.curation.near_duplicates import near_groups, nearest_in
from paddlemix.datasets.rows import find_image_of, is_json, read_rows
from paddlemix.datasets.tsv import TsvRow, check_input
from paddlemix.processors.images import FORMATS
from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.parallel import chunks_of, map_chunks
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import ranked

# Of each row: where to read it again (file, offset, number of the line there), the facts of its caption, hashes of
# caption and id (0: none), and whether the row itself cannot be used.
ROWS = np.dtype([
    ("file", "<u2"), ("start", "<u8"), ("first", "<u4"), ("chars", "<u4"), ("tokens", "<u4"), ("chinese", "<f4"),
    ("latin", "<f4"), ("digits", "<f4"), ("repetition", "<f4"), ("caption", "<u8"), ("id", "<u8"), ("error", "?"),
])  # fmt: skip
PERCENTS = (1, 5, 25, 50, 75, 95, 99, 99.9)
# Characters of the n-grams that are counted, in the captions of the sample.
NGRAMS = (4, 8)
LISTED = 15
# Distinct texts of a kind counted at a time; see Frequent.
MOST_TEXTS = 100_000
_BINS = 40
# Rows by which the number of rows of a file is estimated.
_FIRST_ROWS = 200
# Bits at which near duplicates are also counted, for comparison.
CLOSER = (0, 2, 4)


class Frequent:
    """Counts the most frequent of any number of texts in bounded memory (Misra and Gries).

    A count may be too small by at most `lost`; texts more frequent than that are never missed.
    """

    def __init__(self, most: int = MOST_TEXTS):
        self.most, self.lost, self.counts = most, 0, Counter()

    def add(self, counts: Dict[str, int]) -> None:
        self.counts.update(counts)
        if len(self.counts) > 2 * self.most:
            cut = sorted(self.counts.values())[-self.most - 1]
            self.counts = Counter({text: count - cut for text, count in self.counts.items() if count > cut})
            self.lost += cut

    def listed(self) -> List[Tuple[str, int]]:
        """The most frequent, those of equal count in alphabetical order."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:LISTED]


class Options(NamedTuple):
    """images: rows whose pixels are decoded, about. hash_all: of all rows, kept beside their files. near: bits apart at
    which images are near duplicates."""

    images: int = 20_000
    hash_all: bool = False
    near: int = 6
    seed: int = 0
    workers: int = 0
    quiet: bool = False


class Inspection:
    """An inspected set. rows: ROWS [n]. facts: FACTS [n]. texts: kind → Frequent. rejected: reason →
    rows. marks: kind → captions with it. captions: whether the set has any. group: int64 [n], the first row of
    each row's near duplicates; exact: the same of copies."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self.rows, self.facts = np.zeros(0, ROWS), np.zeros(0, FACTS)
        self.texts = {kind: Frequent() for kind in ("opening", "style", "price", *map("{}-gram".format, NGRAMS))}
        self.rejected: Counter = Counter()
        self.marks: Counter = Counter()
        self.sampled_captions = 0

    @property
    def readable(self) -> np.ndarray:
        """bool [n]: rows with an image."""
        return self.facts["problem"] == 0

    @property
    def good(self) -> np.ndarray:
        """bool [n]: rows whose image, and caption where there should be one, can be used."""
        return self.readable & ~self.rows["error"]

    @property
    def decoded(self) -> np.ndarray:
        """bool [n]: rows whose image was decoded."""
        return self.readable & ~np.isnan(self.facts["sharpness"])

    def row(self, index: int) -> TsvRow:
        """Read a row again."""
        place = self.rows[index]
        path = self.paths[place["file"]]
        found = read_rows(
            path, self.captions[place["file"]], offset=int(place["start"]), first_line=int(place["first"])
        )
        row = next(found)
        found.close()
        return row

    def caption(self, index: int) -> str:
        return self.row(index).text


def _hash(text: str) -> int:
    return hash64(text.encode("utf-8", "replace")) or 1


def ngrams(text: str, n: int) -> set:
    return {text[at : at + n] for at in range(len(text) - n + 1)}


def _look(chunk: List[Tuple], count_tokens: Optional[Callable[[str], int]]) -> Tuple:
    """In a worker: (ROWS, FACTS, counts by kind of text, marks, sampled captions) of some rows."""
    rows, facts = np.zeros(len(chunk), ROWS), np.zeros(len(chunk), FACTS)
    texts: Dict[str, Counter] = {}
    marks: Counter = Counter()
    sampled = 0
    for at, (file, start, first, name, caption, error, found, pixels) in enumerate(chunk):
        rows[at]["file"], rows[at]["start"], rows[at]["first"], rows[at]["error"] = file, start, first, bool(error)
        rows[at]["id"] = _hash(name) if name else 0
        if found is not None:
            facts[at] = facts_record(found, pixels)
        if caption is None:
            continue
        one: CaptionFacts = caption_facts(caption, count_tokens)
        for field in ("chars", "tokens", "chinese", "latin", "digits", "repetition"):
            rows[at][field] = getattr(one, field) or 0
        rows[at]["caption"] = _hash(caption)
        for kind in ("opening", "style", "price"):
            if getattr(one, kind):
                texts.setdefault(kind, Counter())[getattr(one, kind)] += 1
        marks.update(kind for kind in ("style", "price", "control", "tags") if getattr(one, kind))
        if pixels:
            sampled += 1
            for n in NGRAMS:
                texts.setdefault(f"{n}-gram", Counter()).update(ngrams(caption, n))
    return rows, facts, texts, marks, sampled


def _estimate(path: str, captions: bool) -> float:
    """An estimate of the number of rows of a file."""
    if is_json(path):
        from paddlemix.datasets.json_index import record_bounds

        return len(record_bounds(path))
    number = end = 0
    for number, row in enumerate(read_rows(path, captions), 1):
        end = row.next_offset
        if number == _FIRST_ROWS:
            break
    return number * check_input(path) / end if end else 0


def inspect(paths: Sequence[str], options: Options, count_tokens: Optional[Callable[[str], int]] = None) -> Inspection:
    """Look at all rows of some files.

    count_tokens: text → tokens.

    Raises:
        UserError: a file cannot be read, or there are no rows.
        JobFailed: no row can be used, a file changed meanwhile, a worker was killed, or stored facts are those of
            another file.
    """
    found = Inspection(paths)
    size = sum(map(check_input, paths))
    found.captions = [has_captions(path) for path in paths]
    known = [
        all_image_facts(path, options.workers, options.quiet) if options.hash_all else stored_facts(path)
        for path in paths
    ]
    total = sum(map(_estimate, paths, found.captions))
    share = min(1.0, options.images / total) if total else 0.0
    draw = random.Random(options.seed)

    def rows() -> Iterator[Tuple]:
        for file, path in enumerate(paths):
            start, first = 0, 1
            for row in read_rows(path, found.captions[file]):
                if row.error:
                    found.rejected[row.error] += 1
                caption = None if row.caption is None or row.error else row.text
                image = find_image_of(row, path) if known[file] is None else None
                yield file, start, first, row.id, caption, row.error, image, draw.random() < share
                bar.update(row.next_offset - start)
                start, first = row.next_offset, row.line_no + 1

    pieces: List[Tuple[np.ndarray, np.ndarray]] = []
    with Progress(size, "rows", "B", options.quiet) as bar:
        for part, facts, texts, marks, sampled in map_chunks(
            lambda chunk: _look(chunk, count_tokens),
            chunks_of(rows(), lambda item: held_bytes(item[6])),
            options.workers,
        ):
            pieces.append((part, facts))
            for kind, counts in texts.items():
                found.texts[kind].add(counts)
            found.marks.update(marks)
            found.sampled_captions += sampled
    if not pieces:
        raise UserError(f"{', '.join(paths)}: no rows")
    found.rows, found.facts = map(np.concatenate, zip(*pieces))
    del pieces
    for file, facts in enumerate(known):
        if facts is not None:
            mine = found.rows["file"] == file
            if len(facts) != mine.sum():
                raise JobFailed(f"{facts_path(paths[file])} is not that of {paths[file]}: delete it")
            found.facts[mine] = facts
    broken = found.facts["problem"][~found.rows["error"]]
    found.rejected.update({PROBLEMS[code]: int((broken == code).sum()) for code in np.unique(broken) if code})
    if not found.good.any():
        raise JobFailed(f"no row of {', '.join(paths)} can be used: {ranked(found.rejected)}", "no-rows")
    found.exact = near_groups(found.facts["content"], 0, found.readable)
    found.group = near_groups(found.facts["perceptual"], options.near, usable(found.facts))
    return found


def groups_of(group: np.ndarray, most: int) -> List[np.ndarray]:
    """The rows of the largest groups of several, the largest first."""
    first, size = np.unique(group, return_counts=True)
    order = np.lexsort((first, -size))[:most]
    return [np.flatnonzero(group == first[place]) for place in order if size[place] > 1]


# ---- numbers


def _measure(values: np.ndarray) -> Optional[Dict[str, Any]]:
    """Mean, percentiles, and a histogram that ends at the 99.9th."""
    if not len(values):
        return None
    values = values.astype(np.float64)
    percentiles = np.percentile(values, PERCENTS)
    low, high = float(values.min()), max(float(percentiles[-1]), float(values.min() * (1 + 1e-9)) + 1e-9)
    counts, _ = np.histogram(values.clip(max=high), bins=_BINS, range=(low, high))
    return {
        "mean": float(values.mean()), "least": low, "most": float(values.max()),
        "percentiles": {str(percent): float(value) for percent, value in zip(PERCENTS, percentiles)},
        "histogram": {"from": low, "to": high, "counts": counts.tolist()},
    }  # fmt: skip


def repeats(group: np.ndarray) -> Dict[str, int]:
    """How many groups have several rows, the rows after the first of each, and the size of the largest."""
    size = np.unique(group, return_counts=True)[1]
    largest = int(size.max(initial=1))
    return {"groups": int((size > 1).sum()), "rows beyond the first": int((size - 1).sum()), "largest": largest}


def summary(found: Inspection, near: int) -> Dict[str, Any]:
    """All counts, as in report.json."""
    rows, facts = found.rows, found.facts
    with_caption = rows["caption"] != 0
    captions, readable, decoded = rows[with_caption], facts[found.readable], facts[found.decoded]
    values, place, times = np.unique(captions["caption"], return_index=True, return_counts=True)
    often = np.lexsort((place, -times))[:LISTED]
    places = np.flatnonzero(with_caption)[place]
    ids = rows["id"][rows["id"] != 0]
    formats = {FORMATS[code]: int((readable["format"] == code).sum()) for code in np.unique(readable["format"])}
    texts = {
        kind: {"listed": one.listed(), "counts may be too small by": one.lost} for kind, one in found.texts.items()
    }
    width, height = readable["width"].astype(np.float64), readable["height"].astype(np.float64)
    shown = [(found.caption(int(places[at])), int(times[at])) for at in often if times[at] > 1]
    measures = {name: _measure(captions[name]) for name in ("chars", "chinese", "latin", "digits", "repetition")}
    if captions["tokens"].any():
        measures["tokens"] = _measure(captions["tokens"])
    return {
        "files": found.paths,
        "rows": len(rows),
        "good rows": int(found.good.sum()),
        "rejected": dict(found.rejected.most_common()),
        "ids doubled": int(len(ids) - len(np.unique(ids))),
        "captions": {
            "rows": len(captions),
            "measures": measures,
            "distinct": len(values),
            "with": {kind: found.marks[kind] for kind in ("price", "style", "control", "tags")},
            "texts": {**texts, "caption": {"listed": shown, "counts may be too small by": 0}},
            "sampled for n-grams": found.sampled_captions,
        },
        "images": {
            "readable": len(readable),
            "decoded": len(decoded),
            "formats": formats,
            "measures": {
                "width": _measure(width), "height": _measure(height), "bytes": _measure(readable["bytes"]),
                "aspect": _measure(np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)),
                "sharpness": _measure(decoded["sharpness"]),
            },
            "truncated": int(decoded["truncated"].sum()),
            "one colour": int((decoded["spread"] < ONE_COLOUR).sum()),
            "copies": repeats(found.exact),
            "near duplicates": {"bits apart": near, **repeats(found.group)},
            "near duplicates by bits": {
                str(bits): repeats(near_groups(facts["perceptual"], bits, usable(facts)))["rows beyond the first"]
                for bits in CLOSER
                if bits < near
            },
        },
    }  # fmt: skip


class Overlap(NamedTuple):
    """Which images of one set are in another: rows of the one, rows of the other, bits apart (-1: an exact copy)."""

    rows: np.ndarray
    others: np.ndarray
    apart: np.ndarray

    def to_json(self, found: Inspection, other: Inspection) -> Dict[str, Any]:
        """The numbers, and how many images could be compared."""
        return {
            "exact": int((self.apart < 0).sum()), "near": int((self.apart >= 0).sum()),
            "file": other.paths[0], "decoded here": int(found.decoded.sum()), "decoded there": int(other.decoded.sum()),
        }  # fmt: skip


def overlap(found: Inspection, other: Inspection, near: int) -> Overlap:
    """The images of a set that occur in another, exactly or nearly: near ones among those that were decoded."""
    place = np.full(len(found.rows), -1)
    apart = place.copy()
    mine, theirs = (np.flatnonzero(usable(one.facts)) for one in (found, other))
    at, apart[mine] = nearest_in(found.facts["perceptual"][mine], other.facts["perceptual"][theirs], near)
    place[mine[at >= 0]] = theirs[at[at >= 0]]
    mine, theirs = (np.flatnonzero(one.readable) for one in (found, other))
    at, _ = nearest_in(found.facts["content"][mine], other.facts["content"][theirs], 0)
    place[mine[at >= 0]], apart[mine[at >= 0]] = theirs[at[at >= 0]], -1
    rows = np.flatnonzero(place >= 0)
    return Overlap(rows, place[rows], apart[rows])
