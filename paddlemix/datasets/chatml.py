"""Training samples from train.json files: records are located by an index, and read and decoded on access.

A bad record never affects others: it is replaced by the next good one.

    bytes [start, end) → Record (records.py) → ids and labels [t]   (processors.mgen_vl_processing)
                                             → pixel values [n, 3, S, S]   (processors.images)
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import random
import re
from bisect import bisect_right
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from paddlemix.datasets.collator import Failure, Sample
from paddlemix.datasets.entries import Entry
from paddlemix.datasets.json_index import record_bounds
from paddlemix.datasets.lengths import cached_lengths, lengths_key
from paddlemix.datasets.open_files import OpenFiles
from paddlemix.datasets.packing import SampleLengths
from paddlemix.datasets.records import Record, SampleError, parse_record, without_image
from paddlemix.datasets.rows import image_bytes, is_json
from paddlemix.datasets.tsv import MAX_ROW_BYTES, ImagePlace
from paddlemix.processors.content import NAMED_IMAGE, as_text, count_images, with_images
from paddlemix.processors.images import decode_base64, open_image
from paddlemix.processors.mgen_vl_processing import (
    ChatTemplate,
    LengthCounter,
    encode_example,
    place_images,
)
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.log import logger

# Consecutive bad records after which reading gives up.
MAX_FAILURES_IN_A_ROW = 1000
LOG_EVERY = 1000


class _Part(NamedTuple):
    """One JSON file of a dataset. folder: base of relative references. bounds: int64 [n, 2]. kept: indices of the
    records used, None for all. prompts: those of its entry, drawn by seed."""

    path: str
    folder: str
    bounds: np.ndarray
    template: ChatTemplate
    kept: Optional[np.ndarray] = None
    prompts: Tuple[str, ...] = ()
    seed: int = 0

    @property
    def records(self) -> int:
        return len(self.bounds if self.kept is None else self.kept)

    def asked(self, row: int, record: Record) -> Record:
        """A record with the prompt of its entry, if any. Records without an image keep their question."""
        if not self.prompts or not record.images:
            return record
        prompt = random.Random(f"{self.seed} {row}").choice(self.prompts)
        (question, answer), *later = record.turns
        if any(NAMED_IMAGE.search(text) for text, _ in later):
            # Images are placed before the first prompt only if no prompt shows where they belong.
            missing = len(NAMED_IMAGE.findall(question)) - len(NAMED_IMAGE.findall(prompt))
            prompt = as_text(with_images(prompt, missing))
        return record._replace(turns=[(prompt, answer), *later])


class Source(NamedTuple):
    """An entry of a dataset. records: in its files; samples: in the dataset."""

    entry: Entry
    records: int
    samples: int


class Question(NamedTuple):
    """A record's prompt and answer: ids int64 [t], images float32 [n, 3, S, S]."""

    id: str
    ids: np.ndarray
    images: np.ndarray
    answer: str
    template: ChatTemplate


class _Tally:
    """A counter shared with loader workers that are started later."""

    def __init__(self) -> None:
        self._count = multiprocessing.Value("q", 0)

    def add(self) -> int:
        with self._count.get_lock():
            self._count.value += 1
            return self._count.value

    @property
    def count(self) -> int:
        return self._count.value


def find_files(data_files: Union[str, Sequence[str]]) -> List[str]:
    """The files named by paths and patterns (*, ?, [ ], **), in the order given; those of a pattern sorted by name.

    Raises:
        ConfigError: a file is missing, a pattern matches nothing, or a file is named twice.
    """
    found: List[str] = []
    for name in [data_files] if isinstance(data_files, str) else data_files:
        if os.path.isdir(name):
            files = os.path.join(name, "*.json")
            raise ConfigError(f"data_files: {name} is a folder; name its files, such as {files}", "data_files")
        if os.path.exists(name):
            matches = [name]
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not matches:
            kind = "no file matches" if glob.has_magic(name) else "no such file:"
            raise ConfigError(f"data_files: {kind} {name}", "data_files")
        found += matches
    if not found:
        raise ConfigError("data_files names no file", "data_files")
    twice = [path for path, times in Counter(found).items() if times > 1]
    if twice:
        raise ConfigError(f"data_files: {', '.join(sorted(twice))} is named more than once", "data_files")
    return found


class ChatmlDataset:
    """Map-style dataset over the records of one or more JSON files.

    data_files: a path, a pattern, or a list of them (see find_files).
    chat_template: a file, a ChatTemplate, or None for the default.
    max_length: longest sample in tokens; texts are truncated to it, image spans never.
    label_all_turn_markers: labels (b) of docs/formats.md, "Training sequence".
    limit, repeat, prompts: see Entry. seed: of the random choices of limit and prompts.

    Raises:
        UserError: a file is missing or unreadable, or there are no records.
    """

    def __init__(
        self,
        data_files: Union[str, Sequence[str]],
        chat_template: Union[None, str, ChatTemplate],
        tokenizer: Any,
        image_processor: Any,
        max_length: int = 2048,
        label_all_turn_markers: bool = True,
        limit: Optional[int] = None,
        repeat: int = 1,
        prompts: Tuple[str, ...] = (),
        seed: int = 0,
    ):
        if chat_template is None:
            template = ChatTemplate.default()
        elif isinstance(chat_template, str):
            template = ChatTemplate.from_file(chat_template)
        else:
            template = chat_template
        paths = find_files(data_files)
        self._parts = [
            _Part(
                path, os.path.dirname(os.path.realpath(path)), record_bounds(path), template, None, prompts, seed
            )
            for path in paths
        ]
        for part in self._parts:
            if not len(part.bounds) and os.path.getsize(part.path) and not is_json(part.path):
                text = f"{part.path} holds no JSON records: if it is a table, convert it with tools/convert_labels.py"
                raise ConfigError(text, "data_files")
        self._set_ends()
        self.file_records = len(self)
        if limit is not None and limit < len(self):
            chosen = np.sort(np.random.default_rng([seed, limit]).permutation(len(self))[:limit])
            cuts = np.split(chosen, np.searchsorted(chosen, self._ends[:-1]))
            begins = [0, *self._ends[:-1]]
            self._parts = [
                part._replace(kept=rows - begin) for part, rows, begin in zip(self._parts, cuts, begins) if len(rows)
            ]
        self._parts *= repeat
        self._set_ends()
        if not len(self):
            raise ConfigError(
                f"no records in {', '.join(paths)}: convert more rows (tools/convert_labels.py, --val_every), or leave "
                "it out of `dataset`"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.image_processor = image_processor
        self.max_length = max_length
        self.label_all_turn_markers = label_all_turn_markers
        self.sources: List[Source] = []
        self._files = OpenFiles()
        for path in paths:
            # Opened now, also for forked workers: a later conversion replaces the file, at whose offsets other records
            # would be.
            self._files.read(path, 0, 1)
        self._failed, self._cut = _Tally(), _Tally()

    def _set_ends(self) -> None:
        self._ends = np.cumsum([part.records for part in self._parts]).tolist()

    def extend(self, other: ChatmlDataset) -> None:
        """Append the records of another dataset, which keep their chat template."""
        self._parts += other._parts
        self.sources += other.sources
        self._set_ends()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def n_skipped(self) -> int:
        """Failed samples so far, including those in loader workers."""
        return self._failed.count

    @property
    def n_shortened(self) -> int:
        """Samples truncated to max_length so far, including those in loader workers."""
        return self._cut.count

    def _place(self, index: int) -> Tuple[_Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        row = index - (self._ends[number] - part.records)
        return part, row if part.kept is None else int(part.kept[row])

    def _text(self, part: _Part, row: int) -> bytes:
        """The bytes of a record in the file, possibly with a few around it."""
        start, end = part.bounds[row].tolist()
        if end - start > MAX_ROW_BYTES + 4096:
            raise SampleError(f"{(end - start) >> 20} MB, more than the limit of {MAX_ROW_BYTES >> 20} MB", "size")
        text = self._files.read(part.path, start, end - start)
        if len(text) < end - start:
            raise SampleError(f"{part.path} was truncated", "truncated")
        return text

    def record(self, index: int) -> Record:
        """A record, checked, without its images.

        Raises:
            SampleError: it cannot be used.
        """
        part, row = self._place(index)
        return part.asked(row, parse_record(self._text(part, row), part.folder))

    def lengths(self) -> SampleLengths:
        """The length in tokens of every sample, and whether it has an image, without reading images.

        Computed once and cached next to each JSON file (see datasets.lengths). Unusable records have length 0.
        """
        found: Dict[int, Tuple[np.ndarray, ...]] = {}
        for part in self._parts:
            if id(part) in found:  # repeated
                continue
            counter = LengthCounter(self.tokenizer, part.template, self.max_length)
            asked = (part.prompts, part.seed) if part.prompts else ()
            key = lengths_key(self.tokenizer, part.template, self.max_length, *asked)

            def measure(row: int, counter=counter, part=part) -> Tuple[int, bool]:
                record = part.asked(row, parse_record(without_image(self._text(part, row)), part.folder))
                return counter(record.turns, len(record.images)), bool(record.images)

            arrays = cached_lengths(part.path, key, len(part.bounds), measure)
            found[id(part)] = arrays if part.kept is None else tuple(values[part.kept] for values in arrays)
        return SampleLengths(*map(np.concatenate, zip(*(found[id(part)] for part in self._parts))))

    def sample(self, index: int) -> Sample:
        """The sample at `index`: input_ids, labels int64 [t], images float32 [n, 3, S, S].

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        encoded, images = self.encoded(index)
        self._count_cut(index, encoded["cut"])
        return {"input_ids": encoded["input_ids"], "labels": encoded["labels"], "images": self._pixels(images)}

    def _count_cut(self, index: int, tokens: int) -> None:
        if not tokens:
            return
        shortened = self._cut.add()
        if shortened == 1 or shortened % LOG_EVERY == 0:
            logger.warning(
                f"sample {self._name(index)} is {tokens} tokens too long for max_length={self.max_length}: its text is "
                f"cut ({shortened} so far)"
            )

    def _pixels(self, images: List[bytes]) -> np.ndarray:
        size = self.image_processor.image_size
        pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
        for number, data in enumerate(images):
            pixels[number] = self.image_processor(open_image(data))
        return pixels

    def encoded(self, index: int) -> Tuple[Dict[str, Any], List[bytes]]:
        """The sample before decoding images: (the result of encode_example, the bytes of each image file).

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        part, _ = self._place(index)
        record = self.record(index)
        if not any(answer.strip() for _, answer in record.turns):
            raise SampleError("no answer")
        encoded = encode_example(
            self.tokenizer,
            record.turns,
            len(record.images),
            template=part.template,
            max_length=self.max_length,
            label_all_turn_markers=self.label_all_turn_markers,
        )
        return encoded, [self._image_bytes(source, part.folder) for source in record.images]

    def question(self, index: int) -> Question:
        """The sample's first question, as in prediction.

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        part, _ = self._place(index)
        record = self.record(index)
        prompt, answer = place_images(record.turns, len(record.images), self.tokenizer.n_queries)[0]
        encoded = part.template.encode(self.tokenizer, [(prompt, None)], self.max_length)
        self._count_cut(index, encoded["cut"])
        sources = record.images[: count_images(prompt)]
        images = self._pixels([self._image_bytes(source, part.folder) for source in sources])
        return Question(record.id, encoded["input_ids"], images, answer, part.template)

    def _image_bytes(self, source: Any, folder: str) -> bytes:
        if isinstance(source, str):
            return decode_base64(source)
        return image_bytes(ImagePlace.of_source(source, folder), self._files.read)

    def __getitem__(self, index: int) -> Union[Sample, Failure]:
        """The sample at `index`, or the next good one after it (wrapping around at the end)."""
        self._place(index)
        found = self.attempt(index, "the next good one takes its place")
        return self.good_after(index, found) if isinstance(found, Failure) else found

    def good_after(self, index: int, failure: Failure) -> Union[Sample, Failure]:
        """The next good sample after the failed one at `index`; a Failure if MAX_FAILURES_IN_A_ROW records, or all,
        fail."""
        tries = min(len(self), MAX_FAILURES_IN_A_ROW)
        for step in range(1, tries):
            found = self.attempt((index + step) % len(self), "the next good one takes its place")
            if not isinstance(found, Failure):
                return found
            failure = found
        return Failure(f"no good sample among {tries} in a row, from record {index} on; the last one: {failure.reason}")

    def attempt(self, index: int, consequence: str, read: Optional[Callable[[int], Any]] = None) -> Any:
        """The sample at `index`, or a Failure, which is counted and logged with its consequence.

        read: the method that reads it, by default `sample`.
        """
        try:
            return (read or self.sample)(index)
        except Exception as error:  # a single sample must not end the run
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        skipped = self._failed.add()
        if skipped == 1 or skipped % LOG_EVERY == 0:
            logger.warning(f"sample {self._name(index)} cannot be used: {reason}; {consequence} ({skipped} so far)")
        return Failure(reason)

    def _name(self, index: int) -> str:
        """The id of a record, which may be unreadable, and its file and number."""
        part, row = self._place(index)
        start, end = part.bounds[row].tolist()
        try:
            head = self._files.read(part.path, start, min(end - start, 512))
        except (OSError, SampleError):
            head = b""
        found = re.search(rb'"id"\s*:\s*("?)([^",}\r\n]{1,100})', head)
        label = found.group(2).decode("utf-8", "replace") if found else "without an id"
        return f"{label} (record {row} of {part.path})"


def build_dataset(
    entries: Sequence[Entry], tokenizer: Any, image_processor: Any, settings: Any, seed: int = 0
) -> ChatmlDataset:
    """The dataset of a config's `dataset.train` or `dataset.eval`: the concatenation of its entries, at least one.

    settings: has max_length and label_all_turn_markers. seed: of the entries' random choices.

    Raises:
        UserError: an entry's files cannot be used.
    """
    built: Optional[ChatmlDataset] = None
    for entry in entries:
        dataset = ChatmlDataset(
            entry.data_files,
            entry.chat_template,
            tokenizer,
            image_processor,
            max_length=settings.max_length,
            label_all_turn_markers=settings.label_all_turn_markers,
            limit=entry.limit,
            repeat=entry.repeat,
            prompts=entry.prompt,
            seed=seed,
        )
        dataset.sources = [Source(entry, dataset.file_records, len(dataset))]
        if built is None:
            built = dataset
        else:
            built.extend(dataset)
    return built
