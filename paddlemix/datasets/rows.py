"""Rows with images from any supported file, and the bytes of their images.

    TSV     `id \\t base64 \\t caption`, or the path of an image file instead of base64 (tsv.py)
    CSV     a header with the columns image (or path, file_name, …), and optionally id and caption
    JSON    the records of a train.json or val.json, with their ids

A path is relative to the folder of the file that names it, and must stay in that folder. Only plain files are read.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import itertools
import os
from shlex import quote
from typing import IO, Callable, Dict, Iterable, Iterator, List, Optional, Union

from paddlemix.datasets import tsv
from paddlemix.datasets.archives import is_packed, members
from paddlemix.datasets.blocks import FileState, lines_of, read_blocks
from paddlemix.datasets.records import Record, SampleError, parse_record
from paddlemix.datasets.tsv import (
    CAPTION_NOT_UTF8,
    EMPTY_CAPTION,
    EMPTY_IMAGE,
    MAX_ROW_BYTES,
    MISSING_COLUMN,
    NO_CAPTION,
    NO_IMAGE,
    ImagePlace,
    TsvRow,
    check_input,
    check_of,
    check_text,
    cr_alone,
    find_image,
    is_image,
)
from paddlemix.utils.errors import ImageError, UserError
from paddlemix.utils.files import open_plain
from paddlemix.utils.outputs import check_file, keep_apart

BAD_RECORD = "bad record"
SEVERAL_IMAGES = "several images"
TOO_MANY_COLUMNS = "more columns than the header"

_HEAD_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"
# Names of a CSV's columns in other projects.
_COLUMNS = {
    "id": ("id", "image_id"),
    "image": ("image", "image_path", "path", "file_name", "filename", "file"),
    "caption": ("caption", "text"),
}


# ---- which kind


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _without_bom(head: bytes) -> bytes:
    return head[3:] if head.startswith(_BOM) else head


def _begins_json(head: bytes) -> bool:
    head = _without_bom(head).lstrip()
    return head[:1] == b"{" or (head[:1] == b"[" and head[1:].lstrip()[:1] in (b"{", b"]", b""))


def is_json(path: str) -> bool:
    """Whether a file that passed check_input holds JSON records."""
    return _begins_json(_head(path))


def _csv_columns(head: bytes, where: str) -> Optional[Dict[str, int]]:
    """Indices of the columns in a CSV's header, and as "end" their number; None if the first line is not such a header.
    """
    first, _, rest = _without_bom(head).split(b"\n", 1)[0].partition(b"\r")
    if b"\t" in first or b"," not in first:
        return None
    names = [name.strip().lower() for name in next(csv.reader([first.decode("utf-8", "replace")]), [])]
    found = {
        column: names.index(name) for column, known in _COLUMNS.items() for name in reversed(known) if name in names
    }
    if "image" not in found:
        return None
    if rest.strip(b"\r"):
        raise cr_alone(where)
    return {**found, "end": len(names)}


# ---- rows


def read_rows(
    path: str,
    want_caption: bool,
    offset: int = 0,
    first_line: int = 1,
    state: Optional[FileState] = None,
    archives: bool = False,
) -> Iterator[TsvRow]:
    """The rows of a file in order, as from tsv.read_rows: a bad row has an `error`.

    offset, first_line: where to start, and the number of that line (in JSON, of that record). state: the required state
    of the file. archives: accept an archive (see archives.py), read from its start, table by table.

    Raises:
        UserError: as check_input; captions are wanted, and they are in GBK, or a CSV has no column for them; or an
            archive is damaged, or has no table.
        JobFailed: the file changed while it was read.
    """
    check_input(path, archives)
    if archives and is_packed(path):
        return _archived_rows(path, want_caption)
    head, folder = _head(path), os.path.dirname(path)
    if _begins_json(head):
        return _json_rows(path, offset, first_line, state)
    check_text(path, head, want_caption)
    columns = _csv_columns(head, path)
    if columns is None:
        return tsv.read_rows(path, want_caption, offset=offset, first_line=first_line, state=state)
    _check_columns(path, columns, want_caption)
    return _csv_rows(path, _file_lines(path, offset, state), columns, want_caption, folder, offset, first_line)


def _check_columns(name: str, columns: Dict[str, int], want_caption: bool) -> None:
    if want_caption and "caption" not in columns:
        raise UserError(f"{name}: the header names no column caption", "no-caption-column")


def _archived_rows(path: str, want_caption: bool) -> Iterator[TsvRow]:
    """Rows of an archive. Their images cannot be read separately, so their offset is -1."""
    folder, tables = os.path.dirname(path), 0
    with open(path, "rb", buffering=0) as file:
        for member in members(path, file):
            name = f"{path}: {member.name}" if member.name else path
            unpack = f"tar -xOf {quote(path)} {quote(member.name)}" if member.name else f"gzip -dc {quote(path)}"
            blocks = read_blocks(path, file, member.read)
            head = next(blocks, b"")
            check_text(name, head, want_caption, unpack)
            columns = _csv_columns(head, name)
            if _begins_json(head) and not member.name:
                raise UserError(f"{path} holds JSON, not a table of rows")
            if columns is None and b"\t" not in head and member.name:
                blocks.close()
                continue
            tables += 1
            content = itertools.chain([head], blocks)
            if columns is None:
                found = tsv.rows_of(name, content, folder, want_caption)
            else:
                _check_columns(name, columns, want_caption)
                lines = (bytes(memory[begin:end]) for memory, begin, end, _ in lines_of(content, MAX_ROW_BYTES))
                found = _csv_rows(name, lines, columns, want_caption, folder, 0, 1)
            for row in found:
                yield row._replace(image_offset=-1, next_offset=file.tell(), member=member.name)
    if not tables:
        raise UserError(f"{path} holds no table: none of its .txt, .tsv and .csv files has columns")


def most_rows(path: str, lines: int) -> int:
    """An upper bound of the rows of a file with so many lines, for a progress bar."""
    if is_json(path):
        from paddlemix.datasets.json_index import record_bounds

        return len(record_bounds(path))
    return lines if _csv_columns(_head(path), path) is None else lines - 1


def first_prompt(path: str) -> Optional[str]:
    """The prompt of the first record of a JSON file; None for any other file."""
    if not is_json(path):
        return None
    record = next((record for _, _, _, record in _records(path) if isinstance(record, Record)), None)
    return None if record is None else record.turns[0][0]


def _records(path: str, offset: int = 0, state: Optional[FileState] = None) -> Iterator:
    """(begin, end, text, Record or None if unusable) of a JSON file's records from `offset` on."""
    # Not needed for --help, which would load numpy with it.
    from paddlemix.datasets.json_index import record_bounds

    folder = os.path.dirname(os.path.realpath(path))
    with open(path, "rb") as file:
        before = state or FileState.of(file.fileno())
        bounds = record_bounds(path)
        first = int(bounds[:, 0].searchsorted(offset))
        # Numbers in lists take five times the memory of those in an array.
        parts = (bounds[at : at + 1024].tolist() for at in range(first, len(bounds), 1024))
        for begin, end in itertools.chain.from_iterable(parts):
            before.check(path, file.fileno())
            text, record = b"", None
            if end - begin <= MAX_ROW_BYTES + 4096:
                file.seek(begin)
                text = file.read(end - begin)
                try:
                    record = parse_record(text, folder)
                except SampleError:
                    pass
            yield begin, end, text, record


def _json_rows(path: str, offset: int, first: int, state: Optional[FileState]) -> Iterator[TsvRow]:
    folder = os.path.dirname(os.path.realpath(path))
    for number, (begin, end, text, record) in enumerate(_records(path, offset, state), first):
        if record is None:
            yield TsvRow(number, "", b"", begin, 0, None, BAD_RECORD, end)
            continue
        image: Union[bytes, memoryview] = b""
        place = error = None
        at = -1
        if len(record.images) != 1:
            error = SEVERAL_IMAGES if record.images else NO_IMAGE
        elif isinstance(record.images[0], str):
            image = record.images[0].encode("utf-8", "replace")
            # Not found if characters in it are escaped.
            at = text.find(b'"' + image + b'"') + 1 or -1
        else:
            place = ImagePlace.of_source(record.images[0], folder)
        caption, turns = record.turns[0][1], tuple(record.turns)
        at = begin + at if at > 0 else -1
        yield TsvRow(number, record.id, image, at, len(image), caption, error, end, place, turns=turns)


def _file_lines(path: str, offset: int, state: Optional[FileState]) -> Iterator[bytes]:
    """The lines from `offset` on; only the start of those that are too long."""
    with open(path, "rb") as file:
        before = state or FileState.of(file.fileno())
        file.seek(offset)
        for line in iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""):
            before.check(path, file.fileno())
            yield line


def _csv_rows(
    path: str,
    lines: Iterable[bytes],
    columns: Dict[str, int],
    want_caption: bool,
    folder: str,
    offset: int,
    first_line: int,
) -> Iterator[TsvRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    position = offset

    def texts() -> Iterator[str]:
        nonlocal position
        for number, line in enumerate(lines, first_line):
            if len(line) > MAX_ROW_BYTES:
                raise UserError(f"{path}: line {number} is longer than {MAX_ROW_BYTES >> 20} MB", "line-length")
            position += len(line)
            # File names need not be UTF-8. csv.reader refuses a CR inside a row.
            line = (_without_bom(line) if number == 1 else line).decode("utf-8", "surrogateescape")
            yield line.replace("\r", "")

    reader = csv.reader(texts())
    try:
        for cells in reader:
            # The last line of the row. The first line of the file is the header.
            line_no = first_line - 1 + reader.line_num
            if line_no > 1 and any(cell.strip() for cell in cells):
                yield _csv_row(line_no, cells, columns, want_caption, folder, position)
    except csv.Error as error:
        raise UserError(f"{path}: line {first_line - 1 + reader.line_num}: {error}", "csv") from None


def _csv_row(
    line_no: int, cells: List[str], columns: Dict[str, int], want_caption: bool, folder: str, next_offset: int
) -> TsvRow:
    def cell(name: str) -> Optional[str]:
        return cells[columns[name]].strip() if name in columns and columns[name] < len(cells) else None

    def readable(text: str) -> str:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    image, caption, error, place = cell("image"), None, None, None
    text = b"" if image is None else image.encode("utf-8", "surrogateescape")
    if image is None:
        error = MISSING_COLUMN
    elif not image:
        error = EMPTY_IMAGE
    else:
        place, error = find_image(text, folder, want_caption)
    if want_caption and error is None:
        # Captions are single lines.
        caption = " ".join((cell("caption") or "").split("\n")) or None
        if cell("caption") is None:
            error = NO_CAPTION
        elif caption is None:
            error = EMPTY_CAPTION
        elif any(cells[columns["end"] :]):
            # A caption with a comma and without quotes would be cut there.
            caption, error = None, TOO_MANY_COLUMNS
        elif any("\udc80" <= letter <= "\udcff" for letter in caption):
            caption, error = None, CAPTION_NOT_UTF8
    name = cell("id") or (image if place is not None else "")
    return TsvRow(line_no, readable(name), text, -1, len(text), caption, error, next_offset, place)


# ---- not to be overwritten


def holds_images(path: str) -> bool:
    """Whether a file holds images or records, by its beginning."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    first = None if is_json(path) else next(read_rows(path, want_caption=False), None)
    return first is None or is_image(bytes(first.image[:256]))


def _is_image_file(path: str) -> bool:
    from paddlemix.processors.images import read_header

    try:
        return bool(read_header(_head(path)))
    except ImageError:
        return False


def keep_images(inputs: Iterable[Optional[str]], outputs: Iterable[str]) -> None:
    """Check that outputs can be plain files, and that none is an image, an input, or a file that holds an image of an
    input's records.

    inputs: None for one that was not given.

    Raises:
        UserError: one is.
    """
    inputs, outputs = [path for path in inputs if path is not None], list(outputs)
    for path in outputs:
        check_file(path, plain=True)
    outputs = [path for path in outputs if os.path.isfile(path) and os.path.getsize(path)]
    keep_apart(inputs, outputs)
    for output in filter(_is_image_file, outputs):
        raise UserError(f"{output} is an image: give another output", "overlap")
    for path in inputs if outputs else ():
        if os.path.isfile(path) and is_json(path):
            folder = os.path.dirname(os.path.realpath(path))
            images = (image for *_, record in _records(path) if record is not None for image in record.images)
            places = {ImagePlace.of_source(image, folder).file for image in images if not isinstance(image, str)}
            keep_apart(places, outputs)


# ---- their images


# Where a row's image is, its base64 text, or why there is none.
Found = Union[ImagePlace, bytes, str]


def find_image_of(row: TsvRow, path: str) -> Found:
    """The image of a row of the file `path`, for a worker to read; the reason if the row has none."""
    if row.place is not None:
        return row.place
    if not row.image_length:
        return row.error or EMPTY_IMAGE
    return bytes(row.image) if row.image_offset < 0 else ImagePlace(path, row.image_offset, row.image_length)


def image_bytes(found: Found, read: Optional[Callable[[str, int, int], bytes]] = None) -> bytes:
    """The bytes of an image file. read: see base64_at.

    Raises:
        ImageError: there is none, or it cannot be read.
    """
    # Not needed for --help, which would load numpy with it.
    from paddlemix.processors.images import decode_base64

    if isinstance(found, str):
        raise ImageError(found)
    if isinstance(found, ImagePlace):
        if not found.length:
            return read_image(found.file)
        found = base64_at(read or _read_once, found)
    return decode_base64(found)


def image_text(row: TsvRow) -> Union[bytes, memoryview]:
    """The base64 text of a row's image, read from its place if necessary.

    Raises:
        ImageError: the file is missing, unreadable or too large, or has changed.
    """
    if row.place is None:
        return row.image
    if row.place.length:
        return base64_at(_read_once, row.place)
    return base64.b64encode(read_image(row.place.file))


def read_image(path: str) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it is missing, not a plain file, or too large.
    """
    from paddlemix.processors import images

    with _opened(path) as file:
        data = file.read(images.MAX_BYTES + 1)
    if len(data) > images.MAX_BYTES:
        raise ImageError("image too large", f"{path} is larger than {images.MAX_BYTES >> 20} MB")
    return data


def base64_at(read: Callable[[str, int, int], bytes], place: ImagePlace) -> bytes:
    """The base64 text at a place. read: (file, offset, length) → bytes, fewer at the end of the file.

    Raises:
        ImageError: the file has changed: the range is not a column any more, or another one.
    """
    # One more byte on either side, which must delimit the column.
    before = min(place.offset, 1)
    text = read(place.file, place.offset - before, place.length + before + 1)
    field = text[before : before + place.length]
    ends = text[:before] in (b"", b"\t", b"\n", b"\xbf", b'"')
    ends = ends and text[before + place.length :] in (b"", b"\t", b"\n", b"\r", b'"')
    same = place.check in (None, check_of(field))
    if len(field) < place.length or not ends or not same:
        raise ImageError(
            "changed file", f"{place.file} is not the file it was when the record was made; convert it again"
        )
    return field


def _read_once(path: str, offset: int, length: int) -> bytes:
    with _opened(path) as file:
        return os.pread(file.fileno(), length, offset)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    try:
        with open_plain(path) as file:
            yield file
    except FileNotFoundError:
        raise ImageError("no such file", f"there is no file {path}") from None
    except OSError as error:
        raise ImageError("cannot read the file", f"cannot read {path}: {error.strerror}") from None
