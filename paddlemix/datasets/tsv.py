"""Rows of the contest's TSV: `id \\t base64 \\t caption`, one row per line, in a file of any size (docs/formats.md).

A row is a physical line (terminated by \\n, \\r\\n or the end of the file) with anything but spaces and tabs. A bad row
raises no exception: it has an `error`, so that the caller can count it, answer it, or skip it. A row may have the path
of an image file instead of base64.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import zlib
from typing import IO, Any, Dict, Iterable, Iterator, NamedTuple, Optional, Tuple, Union

from paddlemix.datasets.archives import GZIP, is_tar
from paddlemix.datasets.blocks import FileState, lines_of, read_blocks
from paddlemix.utils.errors import UserError

# Maximum length of a line, and of a record of a train.json. A 50 MB image fits.
MAX_ROW_BYTES = 64 << 20
# Maximum length of the id of a line that is too long or has no columns.
MAX_ID_BYTES = 200

_MAX_PATH_BYTES = 1024
_TEXT_FILES = (".tsv", ".csv", ".txt", ".json", ".jsonl")

# The values of TsvRow.error, in addition to those of rows.py.
MISSING_COLUMN = "missing column"
NO_IMAGE = "no image"
EMPTY_IMAGE = "empty image"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
LINE_TOO_LONG = "line too long"
IMAGE_IS_URL = "image is a URL"
PATH_LEADS_OUT = "image path leads out of the folder"
# Of rows whose image file is cut short, which predict.py captions and other tools refuse.
TRUNCATED = "truncated image"

_BOM = b"\xef\xbb\xbf"
# Beginnings of files that must be unpacked, and by what.
_PACKED = {
    GZIP: "compressed (gzip); unpack it first, with `tar -xzf` or `gunzip`",
    b"BZh": "compressed (bzip2); unpack it first, with `tar -xjf` or `bunzip2`",
    b"\xfd7zXZ\0": "compressed (xz); unpack it first, with `tar -xJf` or `unxz`",
    b"(\xb5/\xfd": "compressed (zstd); unpack it first, with `tar --zstd -xf` or `unzstd`",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!\x1a\x07": "a RAR archive; unpack it first",
}
# The start of JPEG, PNG, GIF, WebP and TIFF in base64, or of a data URI.
_IMAGE_START = re.compile(rb"/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|data:image/")
_PATH = re.compile(rb"[^\t\r\n]+\.(?:jpe?g|jfif|png|webp|gif|bmp)", re.IGNORECASE)
_URL = re.compile(rb"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Base64 by chance: a column's name, None, nan. The smallest image of any format has 35 characters.
_TOO_SHORT = re.compile(rb"[A-Za-z0-9+/_= -]{1,19}")
# A text quoted by a CSV writer: it contains a doubled quote or a tab. A plain `"…"` may be the text itself.
_QUOTED = re.compile(r'"(?=.*(?:""|\t))((?:[^"]|"")*)"', re.DOTALL)
# Characters that a field of results cannot hold: the separators, and NUL, which marks a power cut in a journal.
_UNFIT = re.compile("[\t\r\n\0]")
# An image of an unknown format: too long and uniform for an id or a caption.
_LONG_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{200}")


class ImagePlace(NamedTuple):
    """The location of an image: base64 text in a file, or with length 0 the file itself. offset, length: bytes. check:
    check_of the text, or None if unknown."""

    file: str
    offset: int = 0
    length: int = 0
    check: Optional[int] = None

    @classmethod
    def of_source(cls, source: Union[Dict[str, Any], Tuple[str, str]], folder: str) -> ImagePlace:
        """From a source of a Record that is not base64; files in references are relative to `folder`."""
        if isinstance(source, tuple):
            return cls(source[1])
        place = source.get("offset", 0), source.get("length", 0), source.get("check")
        return cls(os.path.join(folder, source["file"]), *place)


def check_of(text: Union[bytes, memoryview]) -> int:
    """The CRC-32 of one or two thousand characters spread over a base64 text, to detect another image."""
    return zlib.crc32(bytes(text[:: len(text) // 1024 or 1]))


class TsvRow(NamedTuple):
    """One row.

    line_no: physical line, from 1.
    id: "" if missing; invalid UTF-8 becomes U+FFFD.
    image: the base64 text, a view of the read buffer.
    image_offset, image_length: its position in the file, in bytes; length 0 if missing. Offset -1: not in the file in
    this form.
    caption: None unless requested, and if its column is missing, empty or not UTF-8.
    error: None or one of this module's reasons.
    next_offset: byte offset of the next line (in an archive: bytes read so far).
    place: location of the image if the row only names it; `image` is then that name.
    member: the archive's file with the row. turns: (prompt, answer) of a JSON record; none in a table.
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
    member: str = ""
    turns: Tuple[Tuple[str, str], ...] = ()

    @property
    def prompt(self) -> Optional[str]:
        """The prompt of a JSON record; None in a table."""
        return self.turns[0][0] if self.turns else None

    @property
    def text(self) -> str:
        """The caption, in a table without the quotes of a CSV writer; "" if there is none."""
        caption = self.caption or ""
        return caption if self.turns else unquoted(caption)

    @property
    def line(self) -> str:
        """Its line for files and messages."""
        return f"{self.member}:{self.line_no}" if self.member else str(self.line_no)


def clean_id(name: str) -> str:
    """An id for a line of results: tabs, CR and LF become spaces, lone surrogates "?"."""
    return _UNFIT.sub(" ", name).encode("utf-8", "replace").decode("utf-8")


def row_id(row: TsvRow) -> str:
    """The id of a row's line of results: its own, or its line number if it has none."""
    return clean_id(row.id) or str(row.line_no)


def check_text(name: str, head: bytes, want_caption: bool = False, command: str = "") -> None:
    """Check that a table starting with `head` may be UTF-8 text.

    name: for messages. want_caption: captions are needed; then lines in GBK are refused too. command: prints the table;
    none for a plain file.

    Raises:
        UserError: it is an archive, UTF-16 or GBK text; the message has the command to convert it.
    """
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{name} is {kind}")
    if is_tar(head):
        raise UserError(f"{name} is a tar archive; unpack it first, with `tar -xf`")
    start, encoding = head[:16], None
    for codec, zeros, others in (("UTF-16LE", start[1::2], start[::2]), ("UTF-16BE", start[::2], start[1::2])):
        if len(start) == 16 and not any(zeros) and all(others):
            encoding = codec
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    elif want_caption and encoding is None:
        # The last line may be incomplete.
        lines = [line for line in head.split(b"\n")[:-1] if not line.isascii()]
        chinese = sum(not _decodes(line, "utf-8") and _decodes(line, "gb18030") for line in lines)
        encoding = "GB18030" if 2 * chinese > len(lines) else None
    if encoding is not None:
        iconv = f"iconv -f {encoding} -t UTF-8"
        iconv = f"{command} | {iconv}" if command else f"{iconv} {shlex.quote(name)}"
        # The folders inside an archive may not exist here.
        stem, end = os.path.splitext(os.path.basename(name.split(": ")[-1]) if command else name)
        target = shlex.quote(stem + ".utf8" + (end if end in _TEXT_FILES else ".tsv"))
        shown = "GBK" if encoding == "GB18030" else "UTF-16"
        raise UserError(f"{name} is {shown} text, and UTF-8 is needed: {iconv} > {target}", "encoding")


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
        return True
    except UnicodeDecodeError:
        return False


def check_input(path: str, archives: bool = False) -> int:
    """The size in bytes of a readable TSV.

    archives: accept those of archives.py.

    Raises:
        UserError: it is missing, not a plain file, not readable, or not UTF-8 text (an archive, UTF-16).
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path} is a folder, not a plain file: give a file in it", "not-regular")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a plain file", "not-regular")
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "unreadable") from error
    if not (archives and (head.startswith(GZIP) or is_tar(head))):
        check_text(path, head)
    return found.st_size


def short_lines(path: str, file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file.

    Raises:
        UserError: one is longer than MAX_ROW_BYTES.
    """
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{path}: line {number} is longer than {MAX_ROW_BYTES >> 20} MB", "line-length")
        yield line


def _is_image(line: bytes, begin: int, end: int) -> bool:
    """Whether a column certainly is an image, from its start."""
    return _IMAGE_START.match(line, begin, end) is not None or _LONG_BASE64.match(line, begin, end) is not None


def is_image(field: bytes) -> bool:
    """Whether a column certainly is an image, from the start of its base64. (False for short ones of rare formats.)"""
    return _is_image(field, 0, len(field))


def _is_path(line: bytes, begin: int, end: int) -> bool:
    return end - begin <= _MAX_PATH_BYTES and _PATH.fullmatch(line, begin, end) is not None


def path_inside(folder: str, name: str) -> Optional[str]:
    """The path of a file in a folder or below; None if `name` leads out of it."""
    # Without resolving links, which the folder's owner may use.
    path = os.path.normpath(os.path.join(folder, name))
    inside = os.path.relpath(path, folder or ".")
    outside = "\0" in name or inside == os.pardir or inside.startswith(os.pardir + os.sep)
    return None if outside else path


def find_image(field: bytes, folder: str, trains: bool) -> Tuple[Optional[ImagePlace], Optional[str]]:
    """(location of the image named in a column, or None; the column's error, or None).

    folder: of the file. trains: images are not all opened here, so texts too short for an image are errors.
    """
    if len(field) <= _MAX_PATH_BYTES and _URL.match(field):
        return None, IMAGE_IS_URL
    if _is_path(field, 0, len(field)):
        path = path_inside(folder, os.fsdecode(field))
        return (None, PATH_LEADS_OUT) if path is None else (ImagePlace(path), None)
    return None, NO_IMAGE if trains and _TOO_SHORT.fullmatch(field) else None


def unquoted(text: str) -> str:
    """A text without the quoting of a CSV writer; other texts unchanged."""
    found = _QUOTED.fullmatch(text) if text.startswith('"') else None
    return found.group(1).replace('""', '"') if found else text


def _bare(field: bytes) -> bytes:
    return field[1:-1].replace(b'""', b'"') if len(field) > 1 and field[:1] == field[-1:] == b'"' else field


def _columns(line: bytes, begin: int, end: int, want_caption: bool) -> Tuple[int, int, int, int]:
    """Positions of the columns: (id_end, image_begin, image_end, caption_begin), -1 if missing.

    Rows without an id (`base64 \\t caption`) are recognised by the start of an image; otherwise the order decides.
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
    """The row in `line[start:stop]`, which is at `offset` in the file; None for an empty line."""
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


def cr_alone(name: str) -> UserError:
    """The error for a file whose lines end with CR."""
    return UserError(
        f"{name}: its lines end with CR alone, as on old Macs; make them LF first: "
        f"tr '\\r' '\\n' < {shlex.quote(name)} > {shlex.quote(name + '.lf')}",
        "line-ends",
    )


def _check_line_ends(name: str, line: bytes, begin: int, end: int) -> None:
    """Raise a UserError if the first line consists of rows separated by CR."""
    stop = line.find(b"\r", begin, end)
    while 0 <= stop < end - 2:
        tab = line.find(b"\t", stop, min(end, stop + 2 * MAX_ID_BYTES))
        next_stop = line.find(b"\r", stop + 1, end)
        row_before = line.find(b"\t", begin, stop) >= 0
        if row_before and tab >= 0 and not stop < next_stop < tab and _is_image(line, tab + 1, end):
            raise cr_alone(name)
        stop = next_stop


def read_rows(
    path: str,
    want_caption: bool,
    offset: int = 0,
    first_line: int = 1,
    state: Optional[FileState] = None,
) -> Iterator[TsvRow]:
    """The rows of a TSV in order, with one buffer in memory at a time (a row keeps its buffer alive).

    want_caption: for training; a row without a caption then has an error. Otherwise the third column is ignored. A line
    over MAX_ROW_BYTES is skipped without storing it; its row has the error "line too long". offset, first_line:
    where to start, and the number of that line. state: the required state of the file.

    Raises:
        UserError: as check_input; or lines end with CR alone.
        JobFailed: the file changed while it was read.
    """
    check_input(path)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        blocks = read_blocks(path, file, file.read, state)
        yield from rows_of(path, blocks, os.path.dirname(path), want_caption, offset, first_line)


def rows_of(
    name: str,
    blocks: Iterable[bytes],
    folder: str,
    want_caption: bool,
    offset: int = 0,
    first_line: int = 1,
) -> Iterator[TsvRow]:
    """As read_rows, for the blocks of a table. name: for errors. folder: base of relative image paths.

    Raises:
        UserError: lines end with CR alone.
    """
    for line_no, (line, begin, end, length) in enumerate(lines_of(blocks, MAX_ROW_BYTES), first_line):
        if line_no == 1:
            _check_line_ends(name, line, begin, end)
        if length > MAX_ROW_BYTES:
            begin += 3 if line_no == 1 and line.startswith(_BOM) else 0
            id_end = line.find(b"\t", begin, begin + MAX_ID_BYTES)
            row_id = line[begin : max(begin, id_end)].decode("utf-8", "replace")
            row = TsvRow(line_no, row_id, b"", offset, 0, None, LINE_TOO_LONG, offset + length)
        else:
            row = _parse(line, begin, end, line_no, offset, want_caption, folder)
        offset += length
        if row is not None:
            yield row
