"""Training samples from train.json files: each record is found by an index, and read and decoded when it is asked for.

A record (SPEC §3): {"id": …, "conversations": [[prompt, caption], …], "image": …}. "image" is base64 text, a reference
{"file", "offset", "length"} to base64 text in another file (beside the JSON, or relative to its folder), or a list of
these; it may be missing. A prompt may hold its images itself, as `<img>path or base64</img>`.

Record text comes from anywhere, so it is bounded before it is parsed, and whatever is wrong with a record costs that
record alone: the next good one takes its place.

    bytes [start, end) → Record → ids and labels [t]   (processors.mgen_vl_processing)
                                → pixel values [n, 3, S, S]   (processors.images)
"""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import re
import stat
from bisect import bisect_right
from collections import OrderedDict
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from paddlemix.datasets.entries import Entry
from paddlemix.datasets.json_index import record_bounds
from paddlemix.datasets.lengths import cached_lengths, lengths_key
from paddlemix.datasets.packing import SampleLengths
from paddlemix.datasets.tsv import MAX_ROW_BYTES
from paddlemix.processors.images import decode_base64, open_image
from paddlemix.processors.mgen_vl_processing import (
    NAMED_IMAGE,
    ChatTemplate,
    LengthCounter,
    count_images,
    encode_example,
    place_images,
)
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.log import logger

# A record of captions has a few dozen brackets and commas. Parsed, `[],[],[],…` takes twenty times its bytes, so a
# record with more of them is refused unparsed.
MAX_STRUCTURE = 200_000
MAX_NUMBER_DIGITS = 20
MAX_IMAGES = 64
# Far more than max_length tokens hold; what is shortened is tokenised first.
MAX_TEXT_CHARS = 200_000
# So many bad records in a row are no accident.
MAX_FAILURES_IN_A_ROW = 1000
LOG_EVERY = 1000
# A longer text between <img> and </img> is base64 without a look for such a file.
MAX_PATH_CHARS = 1024
MAX_OPEN_FILES = 16

_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(UserError):
    """This record cannot be used; the message says why, in a few words."""


class Record(NamedTuple):
    """A checked record: its id, (prompt, answer) per turn, and where its images come from, in the order of the text.

    A source is base64 text, a reference dict, or ("path", name). Prompts that held images hold empty `<img></img>`.
    """

    id: str
    turns: List[Tuple[str, str]]
    images: List[Any]


def _short_int(digits: str) -> int:
    # int() takes time with the square of the length, on Pythons without a limit of their own.
    if len(digits) > MAX_NUMBER_DIGITS:
        raise SampleError("a number is too long")
    return int(digits)


def parse_record(text: bytes, folder: str = "") -> Record:
    """The record in `text`, one JSON object with blanks, commas or an array's bracket around it.

    folder: where image paths in prompts are looked for, beside the working directory.

    Raises:
        SampleError: it is no JSON, or not a record of the form above.
    """
    text = text.strip(b" \t\r\n,[]\xef\xbb\xbf")
    if sum(map(text.count, (b"[", b"{", b","))) > MAX_STRUCTURE:
        raise SampleError("too many brackets and commas for a record")
    try:
        value = json.loads(text.decode("utf-8"), parse_int=_short_int)
    except UnicodeDecodeError:
        raise SampleError("not UTF-8") from None
    except RecursionError:
        raise SampleError("nested too deeply") from None
    except ValueError as error:
        raise SampleError(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise SampleError("not a JSON object")
    record_id = value.get("id", "")
    if not isinstance(record_id, (str, int)):
        raise SampleError('"id" is not a text')
    turns = _turns(value.get("conversations"))
    given = value.get("image")
    images = given if isinstance(given, list) else [] if given in (None, "") else [given]
    for image in images:
        _check_source(image)
    turns, images = _images_in_prompts(turns, images, folder)
    n_chars = sum(len(text) for turn in turns for text in turn)
    if n_chars > MAX_TEXT_CHARS:
        raise SampleError(f"texts of {n_chars} characters; at most {MAX_TEXT_CHARS} are taken")
    if len(images) > MAX_IMAGES:
        raise SampleError(f"{len(images)} images; at most {MAX_IMAGES} are taken")
    return Record(str(record_id), turns, images)


_IMAGE_TEXT = re.compile(rb'"image"\s*:\s*"')


def _without_image(text: bytes) -> bytes:
    """A record's text with the first bytes of its base64, which is nearly all of it and says nothing of its length.

    Inside a JSON string a quote has a backslash before it, so what is looked for cannot stand in a caption.
    """
    found = _IMAGE_TEXT.search(text)
    if found is None:
        return text
    begin = found.end()
    end = text.find(b'"', begin)
    if end < begin + 64 or b"\\" in text[begin:end]:
        return text
    return text[: begin + 4] + text[end:]


def _turns(value: Any) -> List[Tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise SampleError('"conversations" is not a list of [prompt, caption] pairs')
    turns = []
    for turn in value:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise SampleError('"conversations" is not a list of [prompt, caption] pairs')
        if any(_SURROGATE.search(text) for text in turn):
            raise SampleError("a text holds half a character (a lone surrogate)")
        turns.append((turn[0], turn[1]))
    return turns


def _check_source(image: Any) -> None:
    if isinstance(image, str) and image:
        return
    if isinstance(image, dict):
        file, offset, length = image.get("file"), image.get("offset"), image.get("length")
        # bool is an int to Python, not here.
        if isinstance(file, str) and file and "\0" not in file and type(offset) is type(length) is int:
            if offset >= 0 and 0 < length <= MAX_ROW_BYTES:
                return
        raise SampleError('"image" is no reference: it needs "file", "offset" and "length"')
    raise SampleError('"image" is neither base64 text nor a reference')


def _images_in_prompts(
    turns: List[Tuple[str, str]], images: List[Any], folder: str
) -> Tuple[List[Tuple[str, str]], List[Any]]:
    """Take the images out of prompts that hold them; empty tags take theirs from "image", in order.

    Tags that merely name the images of "image" (as many of both) stand for those.
    """
    contents = [found for prompt, _ in turns for found in NAMED_IMAGE.findall(prompt)]
    if not contents:
        return turns, images
    n_empty = sum(not content for content in contents)
    if len(images) == len(contents):
        sources = images
    elif len(images) == n_empty:
        rest = iter(images)
        sources = [_tag_source(content, folder) if content else next(rest) for content in contents]
    else:
        raise SampleError(f'{len(contents)} <img> tags in the prompts, but {len(images)} images in "image"')
    return [(NAMED_IMAGE.sub("<img></img>", prompt), answer) for prompt, answer in turns], sources


def _tag_source(content: str, folder: str) -> Any:
    if re.match(r"https?://", content, re.IGNORECASE):
        raise SampleError("an image is a URL; training data is read from files only")
    if len(content) <= MAX_PATH_CHARS and "\0" not in content:
        for name in (os.path.join(folder, content), content):
            if os.path.exists(name):
                return ("path", name)
    return content


class _Files:
    """Files kept open for reading at an offset, the latest few; each process opens its own."""

    def __init__(self) -> None:
        self._handles: OrderedDict = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer at the end of the file."""
        pieces = []
        while length:
            piece = os.pread(self._handle(path), length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, path: str) -> int:
        return os.fstat(self._handle(path)).st_size

    def _handle(self, path: str) -> int:
        if path in self._handles:
            self._handles.move_to_end(path)
            return self._handles[path]
        # Opening a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise SampleError(f"{os.path.basename(path)} is not a plain file")
        self._handles[path] = handle
        if len(self._handles) > MAX_OPEN_FILES:
            os.close(self._handles.popitem(last=False)[1])
        return handle

    # At the interpreter's end, when __del__ may be called, the module's own name `os` may be gone already.
    def close(self, os=os) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    __del__ = close

    def __reduce__(self):
        # Handles belong to this process; whoever gets the dataset opens files anew.
        return _Files, ()


class _Part(NamedTuple):
    """One JSON file of a dataset. folder: what references are relative to. bounds: int64 [n, 2]."""

    path: str
    folder: str
    bounds: np.ndarray
    template: ChatTemplate


class Question(NamedTuple):
    """A prompt made of a record, and what the record answers: ids int64 [t], images float32 [n, 3, S, S]."""

    id: str
    ids: np.ndarray
    images: np.ndarray
    answer: str
    template: ChatTemplate


class _Tally:
    """How many samples failed, over all loader workers.

    It lives in memory shared with processes started later, so the training process sees what happens in workers.
    """

    def __init__(self) -> None:
        self._skipped = multiprocessing.Value("q", 0)

    def add(self) -> int:
        with self._skipped.get_lock():
            self._skipped.value += 1
            return self._skipped.value

    @property
    def skipped(self) -> int:
        return self._skipped.value


def find_files(data_files: Union[str, Sequence[str]]) -> List[str]:
    """The files that paths and patterns (*, ?, [ ], **) name: in the order given, those of a pattern sorted by name.

    Raises:
        ConfigError: a file is missing, a pattern matches nothing, or a file is named twice.
    """
    found: List[str] = []
    for name in [data_files] if isinstance(data_files, str) else data_files:
        if os.path.isdir(name):
            raise ConfigError(f"data_files: {name} is a folder; name its files, such as {os.path.join(name, '*.json')}")
        if os.path.exists(name):
            matches = [name]
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not matches:
            kind = "no file matches" if glob.has_magic(name) else "no such file:"
            raise ConfigError(f"data_files: {kind} {name}")
        found += matches
    if not found:
        raise ConfigError("data_files names no file")
    twice = {path for path in found if found.count(path) > 1}
    if twice:
        raise ConfigError(f"data_files: {', '.join(sorted(twice))} is named more than once")
    return found


class ChatmlDataset:
    """Map-style dataset over the records of one or more JSON files.

    data_files: a path, a pattern, or a list of them (see find_files).
    chat_template: a file, a ChatTemplate, or None for the default.
    max_length: longest sample in tokens; texts are shortened to it, image spans never cut.
    label_all_turn_markers: SPEC §3, label scheme (b).

    Raises:
        UserError: a file is missing or unreadable, or there is no record at all.
    """

    def __init__(
        self,
        data_files: Union[str, Sequence[str]],
        chat_template: Union[None, str, ChatTemplate],
        tokenizer: Any,
        image_processor: Any,
        max_length: int = 2048,
        label_all_turn_markers: bool = True,
    ):
        if chat_template is None:
            template = ChatTemplate.default()
        elif isinstance(chat_template, str):
            template = ChatTemplate.from_file(chat_template)
        else:
            template = chat_template
        paths = find_files(data_files)
        self._parts = [
            _Part(path, os.path.dirname(os.path.realpath(path)), record_bounds(path), template) for path in paths
        ]
        self._set_ends()
        if not len(self):
            raise ConfigError(f"no records in {', '.join(paths)}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length = max_length
        self.label_all_turn_markers = label_all_turn_markers
        self._files = _Files()
        self._tally = _Tally()

    def _set_ends(self) -> None:
        self._ends = np.cumsum([len(part.bounds) for part in self._parts]).tolist()

    def extend(self, other: ChatmlDataset) -> None:
        """Append the records of another dataset, with their own chat template; the rest is read as here."""
        self._parts += other._parts
        self._set_ends()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def n_skipped(self) -> int:
        """Failed samples so far, those in loader workers included."""
        return self._tally.skipped

    def _place(self, index: int) -> Tuple[_Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        return part, index - (self._ends[number] - len(part.bounds))

    def record_text(self, index: int) -> bytes:
        """The bytes of a record as they stand in the file, with what little stands around it.

        Raises:
            SampleError: longer than MAX_ROW_BYTES, or the file has become shorter.
        """
        part, row = self._place(index)
        start, end = part.bounds[row].tolist()
        if end - start > MAX_ROW_BYTES + 4096:
            raise SampleError(f"{(end - start) >> 20} MB, more than the {MAX_ROW_BYTES >> 20} MB that are read")
        text = self._files.read(part.path, start, end - start)
        if len(text) < end - start:
            raise SampleError(f"{part.path} has been cut short")
        return text

    def record(self, index: int) -> Record:
        """A record, checked, without its images.

        Raises:
            SampleError: it cannot be used.
        """
        return parse_record(self.record_text(index), self._place(index)[0].folder)

    def lengths(self) -> SampleLengths:
        """The length in tokens of every sample, and whether it has an image, without a look at the image.

        Counted once and kept beside each JSON file (see datasets.lengths). A record that cannot be used has length 0.
        """
        found, first = [], 0
        for part in self._parts:
            counter = LengthCounter(self.tokenizer, part.template, self.max_length)
            key = lengths_key(self.tokenizer, part.template, self.max_length)

            def measure(row: int, counter=counter, first=first, folder=part.folder) -> Tuple[int, bool]:
                record = parse_record(_without_image(self.record_text(first + row)), folder)
                return counter(record.turns, len(record.images)), bool(record.images)

            found.append(cached_lengths(part.path, key, len(part.bounds), measure))
            first += len(part.bounds)
        return SampleLengths(*(np.concatenate(arrays) for arrays in zip(*found)))

    def sample(self, index: int) -> Dict[str, np.ndarray]:
        """Exactly this sample: input_ids, labels int64 [t], images float32 [n, 3, S, S].

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        encoded, images = self.encoded(index)
        return {"input_ids": encoded["input_ids"], "labels": encoded["labels"], "images": self._pixels(images)}

    def _pixels(self, images: List[bytes]) -> np.ndarray:
        size = self.image_processor.image_size
        pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
        for number, data in enumerate(images):
            pixels[number] = self.image_processor(open_image(data))
        return pixels

    def encoded(self, index: int) -> Tuple[Dict[str, np.ndarray], List[bytes]]:
        """This sample before its images are decoded: input_ids and labels int64 [t], and each image's file as bytes.

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        part, _ = self._place(index)
        record = self.record(index)
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
        """What evaluation asks about this sample: its first question, as prediction would.

        Raises:
            UserError: it cannot be used (a SampleError, ImageError, …).
        """
        part, _ = self._place(index)
        record = self.record(index)
        prompt, answer = place_images(record.turns, len(record.images), self.tokenizer.n_queries)[0]
        ids = part.template.encode(self.tokenizer, [(prompt, None)], self.max_length)["input_ids"]
        sources = record.images[: count_images(prompt)]
        images = self._pixels([self._image_bytes(source, part.folder) for source in sources])
        return Question(record.id, ids, images, answer, part.template)

    def _image_bytes(self, source: Any, folder: str) -> bytes:
        if isinstance(source, str):
            return decode_base64(source)
        if isinstance(source, tuple):
            path = source[1]
            if self._files.size(path) > MAX_ROW_BYTES:
                raise SampleError(f"{path} is larger than the {MAX_ROW_BYTES >> 20} MB that are read")
            return self._files.read(path, 0, MAX_ROW_BYTES)
        path, offset, length = os.path.join(folder, source["file"]), source["offset"], source["length"]
        # One byte more on either side: a column of a TSV has its ends there, unless the file has changed since.
        before = min(offset, 1)
        text = self._files.read(path, offset - before, length + before + 1)
        field = text[before : before + length]
        ends = text[:before] in (b"", b"\t", b"\n", b"\xbf") and text[before + length :] in (b"", b"\t", b"\n", b"\r")
        if len(field) < length or not ends:
            raise SampleError(f"{path} is not the file it was when the record was made; convert it again")
        return decode_base64(field)

    def __getitem__(self, index: Union[int, Tuple[int, ...]]) -> Any:
        """The sample at `index`, or the next good one after it (from the end, the search goes on at the beginning).

        A tuple of indices gives a list: their samples without those that fail, as another might not fit into their
        room in a packed sequence; if all fail, one good sample.

        When MAX_FAILURES_IN_A_ROW records, or all there are, fail, the sample is empty and has "failure": the message
        as bytes. In Paddle's loader an error becomes another one or, without workers, an endless wait; so the message
        goes with the batch, and whoever takes that raises it (collator.raise_failure).
        """
        if isinstance(index, tuple):
            samples = [self._sample_or_reason(one, "left out")[0] for one in index]
            return [sample for sample in samples if sample is not None] or [self[(index[-1] + 1) % len(self)]]
        self._place(index)
        tries = min(len(self), MAX_FAILURES_IN_A_ROW)
        for step in range(tries):
            sample, reason = self._sample_or_reason((index + step) % len(self), "the next good one takes its place")
            if sample is not None:
                return sample
        message = f"no good sample among {tries} in a row, from record {index} on; the last one: {reason}"
        nothing = np.zeros(0, dtype=np.int64)
        return {
            "input_ids": nothing,
            "labels": nothing,
            "images": np.zeros((0, 3, 1, 1), dtype=np.float32),
            "failure": np.frombuffer(message.encode("utf-8", "replace"), dtype=np.uint8),
        }

    def _sample_or_reason(self, index: int, consequence: str) -> Tuple[Optional[Dict[str, np.ndarray]], str]:
        """The sample, or None and why not; a failure is counted, and logged with its consequence."""
        try:
            return self.sample(index), ""
        except Exception as error:  # of whatever kind: one sample must not end a run of hours
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        skipped = self._tally.add()
        if skipped == 1 or skipped % LOG_EVERY == 0:
            logger.warning(f"sample {self._name(index)} cannot be used: {reason}; {consequence} ({skipped} so far)")
        return None, reason

    def _name(self, index: int) -> str:
        """The id of a record, which may be unreadable, and where it stands."""
        part, row = self._place(index)
        start, end = part.bounds[row].tolist()
        try:
            head = self._files.read(part.path, start, min(end - start, 512))
        except (OSError, SampleError):
            head = b""
        found = re.search(rb'"id"\s*:\s*("?)([^",}\r\n]{1,100})', head)
        label = found.group(2).decode("utf-8", "replace") if found else "without an id"
        return f"{label} (record {row} of {part.path})"


def build_dataset(entries: Sequence[Entry], tokenizer: Any, image_processor: Any, settings: Any) -> ChatmlDataset:
    """The dataset of a config's `dataset.train` or `dataset.eval`: its entries, one at least, one after the other.

    settings: has max_length and label_all_turn_markers.

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
        )
        if built is None:
            built = dataset
        else:
            built.extend(dataset)
    return built
