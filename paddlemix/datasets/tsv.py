"""Rows of the contest's TSV: `id \\t base64 \\t caption`, one row per line, in a file of any size (docs/formats.md).

A row is a physical line (ended by \\n or \\r\\n, or by the end of the file) that holds anything but blanks and tabs. A
row never raises: what is wrong with it is in its `error`, so that whoever reads can count it, answer it, or leave it
out, and goes on. In place of base64 a row may have the path of an image file.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from paddlemix.utils.errors import JobFailed, UserError

# The longest line that is read into memory, and the longest record of a train.json. A 50 MB image fits.
MAX_ROW_BYTES = 64 << 20
# Read at a time. Lines are some 50 KB, so few of them cross a border.
BUFFER_BYTES = 1 << 20
# How much of an id is kept of a line that is too long or has no columns.
MAX_ID_BYTES = 200

_MAX_PATH_BYTES = 1024

# The only values of TsvRow.error, beside those of rows.py.
MISSING_COLUMN = "missing column"
NO_IMAGE = "no image"
EMPTY_IMAGE = "empty image"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
LINE_TOO_LONG = "line too long"
IMAGE_IS_URL = "image is a URL"
PATH_LEADS_OUT = "image path leads out of the folder"

_BOM = b"\xef\xbb\xbf"
# How JPEG, PNG, GIF, WebP and TIFF begin in base64, or a data URI.
_IMAGE_START = re.compile(rb"/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|data:image/")
_PATH = re.compile(rb"[^\t\r\n]+\.(?:jpe?g|jfif|png|webp|gif|bmp)", re.IGNORECASE)
_URL = re.compile(rb"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Base64 by chance: a column's name, None, nan. The smallest image of any format takes 35 letters.
_TOO_SHORT = re.compile(rb"[A-Za-z0-9+/_= -]{1,19}")
# A text that a CSV writer has quoted: with a quote, doubled, or a tab in it. `"…"` alone may be the text itself.
_QUOTED = re.compile(r'"(?=.*(?:""|\t))((?:[^"]|"")*)"', re.DOTALL)
# A field of an unknown image format: too long and too even for an id or a caption.
_LONG_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{200}")
_NOT_TEXT = (
    (b"\x1f\x8b", "is compressed (gzip); unpack it first, with `tar -xzf` or `gunzip`"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
)


class ImagePlace(NamedTuple):
    """Where an image is: base64 text in a file, or with length 0 the file itself. offset, length: bytes."""

    file: str
    offset: int = 0
    length: int = 0

    @classmethod
    def of_reference(cls, image: Dict[str, Any], folder: str) -> ImagePlace:
        """Of a record's "image" object, whose file is relative to `folder`."""
        return cls(os.path.join(folder, image["file"]), image.get("offset", 0), image.get("length", 0))


class TsvRow(NamedTuple):
    """One row.

    line_no: physical line, from 1.
    id: "" where the row has none; bytes that are not UTF-8 become U+FFFD.
    image: the base64 text, a view into the memory that it was read into.
    image_offset, image_length: where it stands in the file, in bytes; length 0 where there is none. Offset -1: it does
    not stand there as it is.
    caption: None unless asked for, and when its column is missing, empty or not UTF-8.
    error: None or one of this module's reasons.
    next_offset: where the next line begins, in bytes.
    place: where the image is, if the row only names it; then `image` is what the row has.
    """

    line_no: int
    id: str
    image: Union[bytes, memoryview]
    image_offset: int
    image_length: int
    caption: Optional[str]
    error: Optional[str]
    next_offset: int
    place: Optional[ImagePlace] = None


def check_input(path: str) -> int:
    """The size in bytes of a TSV that can be read.

    Raises:
        UserError: it is missing, not a plain file, not readable, or visibly no UTF-8 text (an archive,
            UTF-16).
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path} is a folder, not a plain file: give the one in it that holds or names the images")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a plain file")
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for magic, why in _NOT_TEXT:
        if head.startswith(magic):
            raise UserError(f"{path} {why}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it first, with `tar -xf`")
    return found.st_size


def _is_image(line: bytes, begin: int, end: int) -> bool:
    """Whether a column is surely an image. (Only its beginning is looked at.)"""
    return _IMAGE_START.match(line, begin, end) is not None or _LONG_BASE64.match(line, begin, end) is not None


def is_image(field: bytes) -> bool:
    """Whether a column is surely an image, from how its base64 begins. (A short one of a rare format may not be.)"""
    return _is_image(field, 0, len(field))


def _is_path(line: bytes, begin: int, end: int) -> bool:
    return end - begin <= _MAX_PATH_BYTES and _PATH.fullmatch(line, begin, end) is not None


def find_image(field: bytes, folder: str, trains: bool) -> Tuple[Optional[ImagePlace], Optional[str]]:
    """(where the image is that a column names, or None; what is wrong with the column).

    folder: of the file. trains: images are not all opened here, so what cannot be one is told by its length.
    """
    if len(field) <= _MAX_PATH_BYTES and _URL.match(field):
        return None, IMAGE_IS_URL
    if _is_path(field, 0, len(field)):
        # As it is written; links inside the folder are its owner's.
        path = os.path.normpath(os.path.join(folder, os.fsdecode(field)))
        inside = os.path.relpath(path, folder or ".")
        if b"\0" in field or inside == os.pardir or inside.startswith(os.pardir + os.sep):
            return None, PATH_LEADS_OUT
        return ImagePlace(path), None
    return None, NO_IMAGE if trains and _TOO_SHORT.fullmatch(field) else None


def unquoted(text: str) -> str:
    """A text as it was before a CSV writer quoted it; any other text as it is."""
    found = _QUOTED.fullmatch(text) if text.startswith('"') else None
    return found.group(1).replace('""', '"') if found else text


def _bare(field: bytes) -> bytes:
    return field[1:-1].replace(b'""', b'"') if len(field) > 1 and field[:1] == field[-1:] == b'"' else field


def _columns(line: bytes, begin: int, end: int, want_caption: bool) -> Tuple[int, int, int, int]:
    """Where the columns stand: (id_end, image_begin, image_end, caption_begin), -1 where there is none.

    Rows without an id (`base64 \\t caption`) are told by how an image begins; otherwise the order decides.
    """
    tab = line.find(b"\t", begin, end)
    if tab < 0:
        return begin if _is_image(line, begin, end) else min(end, begin + MAX_ID_BYTES), -1, -1, -1
    if _IMAGE_START.match(line, begin, tab) and not _IMAGE_START.match(line, tab + 1, end):
        return begin, begin, tab, tab + 1
    second = line.find(b"\t", tab + 1, end)
    if second >= 0:
        return tab, tab + 1, second, second + 1
    if not _is_image(line, tab + 1, end) and _is_image(line, begin, tab):
        return begin, begin, tab, tab + 1
    if want_caption and _is_path(line, begin, tab) and not _is_path(line, tab + 1, end):
        # `path \t caption`: the path is the id, too.
        return tab, begin, tab, tab + 1
    return tab, tab + 1, end, -1


def _parse(
    line: bytes, start: int, stop: int, line_no: int, offset: int, want_caption: bool, folder: str
) -> Optional[TsvRow]:
    """The row in `line[start:stop]`, where start stands at `offset` in the file; None for an empty line."""
    begin = start + 3 if line_no == 1 and line.startswith(_BOM, start, stop) else start
    end = stop
    if end > begin and line[end - 1] == 10:
        end -= 1
    while end > begin and line[end - 1] == 13:
        end -= 1
    if line[begin : min(begin + 1, end)].strip() == b"" and not line[begin:end].strip():
        return None
    id_end, image_begin, image_end, caption_begin = _columns(line, begin, end, want_caption)
    row_id = line[begin:id_end].decode("utf-8", "replace")
    error = caption = place = None
    # A CSV writer that quotes everything.
    quoted = image_end - image_begin > 2 and line[image_begin] == line[image_end - 1] == 34
    if quoted:
        image_begin, image_end = image_begin + 1, image_end - 1
        row_id = _bare(line[begin:id_end]).decode("utf-8", "replace")
    if image_begin < 0:
        error = MISSING_COLUMN
        image_begin = image_end = begin
    elif image_begin == image_end:
        error = EMPTY_IMAGE
    elif want_caption and caption_begin < 0:
        seen = _is_image(line, image_begin, image_end) or _is_path(line, image_begin, image_end)
        error = NO_CAPTION if seen else NO_IMAGE
    elif want_caption:
        try:
            caption = (_bare(line[caption_begin:end]) if quoted else line[caption_begin:end]).decode("utf-8")
            if not caption or caption.isspace():
                caption, error = None, EMPTY_CAPTION
        except UnicodeDecodeError:
            error = CAPTION_NOT_UTF8
    if error is None and image_end - image_begin <= _MAX_PATH_BYTES:
        place, error = find_image(line[image_begin:image_end], folder, want_caption)
    image = memoryview(line)[image_begin:image_end]
    image_offset = offset + image_begin - start
    next_offset = offset + stop - start
    return TsvRow(line_no, row_id, image, image_offset, image_end - image_begin, caption, error, next_offset, place)


def _check_line_ends(path: str, line: bytes, begin: int, end: int) -> None:
    """Raise a UserError if what looks like the first line is rows with CR alone between them."""
    stop = line.find(b"\r", begin, end)
    while 0 <= stop < end - 2:
        tab = line.find(b"\t", stop, min(end, stop + 2 * MAX_ID_BYTES))
        next_stop = line.find(b"\r", stop + 1, end)
        row_before = line.find(b"\t", begin, stop) >= 0
        if row_before and tab >= 0 and not stop < next_stop < tab and _is_image(line, tab + 1, end):
            raise UserError(
                f"{path}: its lines end with CR alone, as on old Macs; make them LF first: "
                f"tr '\\r' '\\n' < {shlex.quote(path)} > {shlex.quote(path + '.lf')}"
            )
        stop = next_stop


class FileState(NamedTuple):
    """What changes when somebody writes to a file or replaces it: bytes, time of the last change in ns, inode, disk."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: Union[str, int]) -> FileState:
        """The state of a path or an open file."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def check(self, path: str, file: int) -> None:
        """Raise JobFailed unless the open file of that path is still in this state."""
        now = FileState.of(file)
        if now != self:
            raise JobFailed(
                f"{path} changed while it was read: it had {self.size:,} bytes and has {now.size:,} now; "
                "give the command again when nothing writes to it any more"
            )


def _blocks(path: str, offset: int, state: Optional[FileState]) -> Iterator[bytes]:
    """What the file holds from `offset` on, in pieces that a thread reads while those before them are gone through.

    Raises:
        JobFailed: the file has changed since it was in `state`, or since it was opened.
    """
    # The thread ends before the file is closed, also where the rows are not read to their end.
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
        file.seek(offset)
        before = state or FileState.of(file.fileno())
        # Two are asked for, so that the thread goes on to the next in the moment in which this one waits for it; later
        # it would have to wait for Python's lock.
        ahead = deque(reader.submit(file.read, BUFFER_BYTES) for _ in range(2))
        while True:
            block = ahead.popleft().result()
            # Looked at for each piece: a row that was cut must not be answered before it is noticed.
            before.check(path, file.fileno())
            if not block:
                return
            ahead.append(reader.submit(file.read, BUFFER_BYTES))
            yield block


def _lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[Tuple[bytes, int, int, int]]:
    """(memory, begin, end, length) of each line with its \\n, length being end - begin. Of a line that is longer than
    max_line_bytes and a buffer, memory may hold the first part only.

    Lines are left where they were read, many in one piece of memory; only one that crosses a border is put together.
    """
    held: List[bytes] = []
    length = 0
    for block in blocks:
        begin, end = 0, block.find(b"\n") + 1
        if held:
            length += end or len(block)
            if length <= max_line_bytes:
                held.append(block[:end] if end else block)
            if not end:
                continue
            line = b"".join(held)
            held = []
            yield line, 0, len(line), length
            begin, end = end, block.find(b"\n", end) + 1
        while end:
            yield block, begin, end, end - begin
            begin, end = end, block.find(b"\n", end) + 1
        if begin < len(block):
            held = [block[begin:]]
            length = len(block) - begin
    if held:
        line = b"".join(held)
        yield line, 0, len(line), length


def read_rows(
    path: str,
    want_caption: bool,
    max_line_bytes: int = MAX_ROW_BYTES,
    offset: int = 0,
    first_line: int = 1,
    state: Optional[FileState] = None,
) -> Iterator[TsvRow]:
    """The rows of a TSV in order, a buffer of them in memory at a time (a row that is kept keeps its buffer).

    want_caption: training rows; a row without a caption then has an error. Otherwise the third column is
    not looked at. A line over `max_line_bytes` is passed over without being held; its row has the error
    "line too long". offset, first_line: where to begin, and the number of that line. state: the file as it must be
    still.

    Raises:
        UserError: as check_input; or lines end with CR alone.
        JobFailed: the file changed while it was read.
    """
    check_input(path)
    blocks, folder = _blocks(path, offset, state), os.path.dirname(path)
    for line_no, (line, begin, end, length) in enumerate(_lines(blocks, max_line_bytes), first_line):
        if line_no == 1:
            _check_line_ends(path, line, begin, end)
        if length > max_line_bytes:
            begin += 3 if line_no == 1 and line.startswith(_BOM) else 0
            id_end = line.find(b"\t", begin, begin + MAX_ID_BYTES)
            row_id = line[begin : max(begin, id_end)].decode("utf-8", "replace")
            row = TsvRow(line_no, row_id, b"", offset, 0, None, LINE_TOO_LONG, offset + length)
        else:
            row = _parse(line, begin, end, line_no, offset, want_caption, folder)
        offset += length
        if row is not None:
            yield row
