"""Converting the contest's TSV, or a table of images, to train.json, val.json and chat_template.json, row by row.

    TsvRow → checks in this order: columns, base64, caption (cleaned, counted), image (verify), duplicate
           → record n = 0, 1, 2, … of the accepted rows: val.json if n % val_every == 0, train.json otherwise

Memory is constant, except for `dedupe`, which stores a 16-byte hash per accepted row (100 MB for a million rows, in
Python's set).

Image texts are processed by whole-string operations: at 50 KB a row, anything per character would take longer than
reading and writing the file. Checks of base64 text:
  inline      all of it, so that it can be copied into JSON. URL-safe, wrapped or data-URI text becomes plain base64.
  reference   up to 16 KB all of it, of longer texts the first and last 1 KB (checking all takes as long as copying).
              Errors in between show when the image is decoded.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections import Counter, deque
from typing import IO, Deque, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

from paddlemix.datasets.archives import is_packed
from paddlemix.datasets.caption_files import InOrder, new_captions
from paddlemix.datasets.cleaning import INVISIBLE, SPACES, mend_caption
from paddlemix.datasets.doubts import Doubts
from paddlemix.datasets.records import MAX_TEXT_CHARS
from paddlemix.datasets.rows import (
    Found,
    find_image_of,
    image_bytes,
    image_text,
    is_json,
    keep_images,
    read_rows,
)
from paddlemix.datasets.tsv import (
    EMPTY_CAPTION,
    MISSING_COLUMN,
    TRUNCATED,
    TsvRow,
    check_input,
    is_image,
    row_id,
)
from paddlemix.datasets.writing import RecordText, encode_json, record_files
from paddlemix.processors.content import NAMED_IMAGE
from paddlemix.processors.images import decode_base64, open_image, read_header
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, ChatTemplate
from paddlemix.utils.errors import ImageError, JobFailed, UserError
from paddlemix.utils.files import atomic_write, only_writer
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_folder, nearest_folder
from paddlemix.utils.parallel import chunks_of, map_chunks
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import ranked

# Reasons of rejected rows, in addition to those of tsv.py and processors.images.
BAD_BASE64 = "bad base64"
TOO_SHORT = "caption too short"
TOO_LONG = "caption too long"
DUPLICATE = "duplicate"
DECODER_DIED = "image decoder died"
NO_NEW_CAPTION = "no new caption"
EXCHANGED = "image and caption exchanged"

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_EXACT_BYTES = 16 << 10
_ENDS_BYTES = 1 << 10
# Prefixes that contain the size of most images, and of almost all.
_HEADER_BASE64_BYTES = (1 << 10, 8 << 10)
_PROGRESS_BYTES = 8 << 20
# Maximum bytes of rows in memory whose images are being decoded.
_HELD_BYTES = 64 << 20


# --- base64 ---


def _is_plain_base64(text: Union[bytes, memoryview], all_of_it: bool) -> bool:
    """Whether text is standard base64 on one line. all_of_it: False checks only both ends of long texts."""
    padding = 2 if text[-2:] == b"==" else 1 if text[-1:] == b"=" else 0
    if len(text) % 4 == 1 or (padding and len(text) % 4):
        return False
    body = text[: len(text) - padding]
    if not all_of_it and len(body) > _EXACT_BYTES:
        body = bytes(body[:_ENDS_BYTES]) + bytes(body[-_ENDS_BYTES:])
    return not bytes(body).translate(None, _ALPHABET)


def header_problem(text: bytes) -> Optional[str]:
    """Why the image in base64 `text` cannot be used, from its header; None if it is fine."""
    try:
        for enough in _HEADER_BASE64_BYTES:
            if len(text) > enough:
                try:
                    read_header(decode_base64(text[:enough]))
                    return None
                except ImageError:
                    pass  # The size may come after a long preview or colour profile: read more, then all of it.
        read_header(decode_base64(text))
        return None
    except ImageError as error:
        return error.reason


def decode_problem(found: Found) -> Optional[str]:
    """Why an image cannot be used, from decoding all of it. Truncated images are refused too."""
    try:
        return TRUNCATED if open_image(image_bytes(found)).info["truncated"] else None
    except ImageError as error:
        return error.reason


# --- rows ---


class Options(NamedTuple):
    """See tools/convert_labels.py --help. max_chars 0: the limit of training."""

    prompt: str = DEFAULT_PROMPT
    val_every: int = 20
    clean: bool = False
    dedupe: bool = False
    min_chars: int = 1
    max_chars: int = 0
    verify: str = "none"
    images: str = "inline"
    workers: int = 1
    captions: Optional[str] = None
    # Of `captions`: the caption of rows without one.
    fallback: Optional[str] = None


class Checked(NamedTuple):
    """A row with the texts for its record, or the reason why it is rejected.

    image: base64 text, read from the file if the row only names it.
    """

    row: TsvRow
    image: Union[bytes, memoryview]
    caption: str
    reason: Optional[str]


def _read(path: str, options: Options) -> Iterator[TsvRow]:
    """The rows of IN, with the captions of the file `options.captions`, if given, instead of their own."""
    rows = read_rows(path, want_caption=options.captions is None, archives=True)
    if options.captions is None:
        yield from rows
        return
    new = InOrder(options.captions, new_captions(options.captions, options.fallback))
    for row in rows:
        caption = new.take(row_id(row))
        if row.error is None:
            row = row._replace(caption=caption, error=None if caption and not caption.isspace() else NO_NEW_CAPTION)
        yield row
    new.end()


def _exchanged(row: TsvRow) -> bool:
    """Whether the caption column holds the image."""
    text = (row.caption or "")[:256]
    # A caption that repeats a character is also long and without spaces.
    return is_image(text.encode()) and len(set(text)) > 12


def check_row(row: TsvRow, options: Options) -> Checked:
    """All checks that need only this row, except decoding its image.

    The image of the result is plain base64 if options.images is "inline", else the row's own text.
    """
    # Before the image: an id may look like base64, as hashes do.
    reason = EXCHANGED if _exchanged(row) else row.error
    if reason:
        return Checked(row, b"", "", reason)
    try:
        image = image_text(row)
    except ImageError as error:
        return Checked(row, b"", "", error.reason)
    inline = options.images == "inline" or row.image_offset < 0
    if row.place is None and not _is_plain_base64(image, all_of_it=inline):
        try:
            data = decode_base64(row.image)
        except ImageError:
            return Checked(row, b"", "", BAD_BASE64)
        if inline:
            image = base64.b64encode(data)
    caption = row.text
    if options.clean:
        caption = mend_caption(caption)
        if not caption:
            return Checked(row, b"", "", EMPTY_CAPTION)
    if len(caption) < options.min_chars:
        return Checked(row, b"", "", TOO_SHORT)
    # The limit of training.
    most = MAX_TEXT_CHARS - len(options.prompt)
    if len(caption) > min(options.max_chars or most, most):
        return Checked(row, b"", "", TOO_LONG)
    reason = header_problem(bytes(image)) if options.verify == "header" else None
    return Checked(row, image, caption, reason)


def _decode_task(places: List[Found]) -> List[Optional[str]]:
    """In a worker: the problems of these images."""
    return [decode_problem(place) for place in places]


def _decode_checked(stream: Iterable[Checked], path: str, workers: int) -> Iterator[Checked]:
    """The same rows in the same order, with a reason if their image cannot be decoded."""
    waiting: Deque[List[Checked]] = deque()
    held = 0

    def size(item: Checked) -> int:
        return max(item.row.image_length, len(item.image))

    def images() -> Iterator[List[Found]]:
        nonlocal held
        for batch in chunks_of(stream, size):
            waiting.append(batch)
            held += sum(map(size, batch))
            yield [find_image_of(item.row, path) for item in batch if item.reason is None]

    def full() -> bool:
        return held > _HELD_BYTES

    for found in map_chunks(_decode_task, images(), workers, lost=DECODER_DIED, full=full):
        problems = iter(found)
        for item in waiting.popleft():
            held -= size(item)
            yield item if item.reason else item._replace(reason=next(problems))


class _NothingAccepted(Exception):
    """No row was accepted: only rejected.tsv is written."""


class Result(NamedTuple):
    """The result of a conversion. rejected: rows per reason. warnings: possible mistakes in the input."""

    n_train: int
    n_val: int
    rejected: Counter
    warnings: List[str]


OUTPUTS = ("train.json", "val.json", "chat_template.json", "ids.tsv", "rejected.tsv")


def convert(path: str, out_dir: str, options: Options, disable_progress: bool = False) -> Result:
    """Convert the rows of `path` (see rows.py) into the files OUTPUTS in `out_dir`, which are renamed together at the
    end.

    ids.tsv maps records to rows (record id, the row's id, line number); rejected.tsv lists rejected rows (line number,
    the row's id, reason).

    Raises:
        UserError: the input cannot be read or would be overwritten, or the disk has no room for its images.
        JobFailed: no row was accepted (only rejected.tsv is written then), the disk is full, or the input changed
            while it was read.
    """
    size = check_input(path, archives=True)
    if options.images == "reference" and is_packed(path):
        raise UserError(
            f"{path} is compressed or an archive, where no image can be read by itself: "
            "unpack it first, or leave out --images reference"
        )
    if is_json(path):
        text = f"{path} is JSON, as this command writes it, not a table of rows: give the TSV or CSV"
        raise UserError(text, "json-input")
    if os.path.isfile(out_dir):
        raise UserError(f"OUT_DIR {out_dir} is a file: the order is IN OUT_DIR", "argument-order")
    shown = len(NAMED_IMAGE.findall(options.prompt))
    if shown > 1:
        raise UserError(f"--prompt shows {shown} images as <img>…</img>, but each row has one")
    check_folder(out_dir)
    keep_images([path, options.captions], [os.path.join(out_dir, name) for name in OUTPUTS])
    old, ids = (os.path.join(out_dir, name) for name in ("train.json", "ids.tsv"))
    if os.path.isfile(old) and os.path.getsize(old):
        rows = "unknown number of rows"
        if os.path.isfile(ids):
            with open(ids, "rb") as file:
                rows = f"{sum(1 for _ in file):,} rows"
        logger.warning("train.json and val.json in %s (%s) will be replaced", out_dir, rows)
    rejected: Counter = Counter()
    doubts = Doubts()
    try:
        free = shutil.disk_usage(nearest_folder(out_dir)).free
        # With --dedupe the size is not known in advance.
        if options.images == "inline" and not options.dedupe and free < size:
            raise UserError(
                f"{out_dir} has {free / 1e9:.1f} GB free, and train.json would hold the images of {path} "
                f"({size / 1e9:.1f} GB): --images reference leaves them there",
                "disk",
            )
        with only_writer(out_dir), Progress(size, "convert", "B", disable_progress) as bar, atomic_write(
            os.path.join(out_dir, "rejected.tsv")
        ) as reject_file:
            try:
                counts = _convert(path, out_dir, options, rejected, doubts, reject_file, bar)
            except _NothingAccepted:
                if not rejected:
                    raise JobFailed(f"no usable row in {path}: it is empty", "empty") from None
                counts = None
    except OSError as error:
        raise JobFailed(f"cannot write to {out_dir}: {error.strerror}", "disk") from error
    if counts is None:
        total = sum(rejected.values())
        why = f"all {total} rows were rejected ({ranked(rejected)}; see {os.path.join(out_dir, 'rejected.tsv')})"
        if rejected[MISSING_COLUMN] == total:
            why += "; columns are separated by tabs, or by commas in a CSV whose header names image and caption"
        raise JobFailed(f"no usable row in {path}: {why}", "all-rejected")
    return Result(counts[0], counts[1], rejected, doubts.warnings(*counts, options.val_every))


def _convert(
    path: str,
    out_dir: str,
    options: Options,
    rejected: Counter,
    doubts: Doubts,
    reject_file: IO[str],
    bar: Progress,
) -> Tuple[int, int]:
    """The numbers of training and validation records. Keeps no output if it raises."""
    stream: Iterable[Checked] = (check_row(row, options) for row in _read(path, options))
    if options.verify == "decode":
        stream = _decode_checked(stream, path, options.workers)
    names = [os.path.join(out_dir, name) for name in ("train.json", "val.json")]
    text, prompt = RecordText(names[0], path, options.images == "reference"), encode_json(options.prompt)
    seen: Set[bytes] = set()
    accepted = done = 0

    def tell_counts() -> None:
        bar.note(f"{accepted} rows, {sum(rejected.values())} rejected")

    with atomic_write(os.path.join(out_dir, "ids.tsv")) as ids:
        with record_files(names) as arrays:
            for row, image, caption, reason in stream:
                if row.next_offset - done >= _PROGRESS_BYTES:
                    bar.reach(row.next_offset)
                    done = row.next_offset
                    tell_counts()
                if reason is None and options.dedupe:
                    digest = hashlib.sha1(image)
                    digest.update(b"\t" + caption.encode())
                    key = digest.digest()[:16]
                    if key in seen:
                        reason = DUPLICATE
                    seen.add(key)
                row_id = row.id if row.id.isprintable() else SPACES.sub(" ", INVISIBLE.sub("", row.id))
                if reason is not None:
                    rejected[reason] += 1
                    reject_file.write(f"{row.line}\t{row_id}\t{reason}\n")
                    continue
                array = arrays[bool(options.val_every) and accepted % options.val_every == 0]
                doubts.look(row, caption)
                array.add(*text(f"identity_{accepted}", f"[[{prompt}, {encode_json(caption)}]]", row, image))
                ids.write(f"identity_{accepted}\t{row_id}\t{row.line}\n")
                accepted += 1
            if not accepted:
                raise _NothingAccepted
            ChatTemplate.default().save(out_dir)
            tell_counts()
            bar.reach(os.path.getsize(path))
    return arrays[0].count, arrays[1].count
