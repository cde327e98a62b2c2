"""Byte offsets of the records in a JSON file, found without parsing or loading it.

`record_bounds` returns an int64 array [n, 2] of byte offsets. It is cached in a small file next to the JSON
(`.train.json.idx`), which is valid as long as the JSON's size and modification time are unchanged; otherwise it is
recomputed at the speed of reading the file, and written if the folder is writable.

Three layouts are distinguished by the first few records:
  lines   one record per line, as convert_labels writes it, with or without the brackets of an array (JSON lines). A
          broken line does not affect other records.
  indent  records over several lines, each starting on a new line with the same indentation, as from json.dump with
          indent. A record ends where the next one starts, so a broken one does not affect others either.
  scan    anything else, such as an array on one line: counts brackets and skips strings. A string ends at a line break
          at the latest (JSON strings contain none), and a missing `}` makes the following records unusable.

Whether a record is valid JSON is checked when it is read (see chatml).
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import struct
from array import array
from typing import IO, Callable, Iterator, List, Optional, Tuple

import numpy as np

from paddlemix.utils.errors import UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress

# Magic with the format's number, size and mtime_ns of the JSON, number of records.
_HEADER = struct.Struct("<8sqqq")
_MAGIC = b"MGENIDX1"
_BLOCK_BYTES = 4 << 20
# Minimum size for a progress bar.
_PROGRESS_FROM_BYTES = 1 << 30
# Lines used to detect the layout, and their maximum size.
_SNIFF_LINES = 16
_SNIFF_LINE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_INDENTED = re.compile(rb"\s*\[\s*?(\n[ \t]+)\{[ \t]*\r?\n")


def index_path(path: str) -> str:
    """The index file of a JSON file: hidden, next to it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.idx")


def _header(path: str, count: int) -> bytes:
    found = os.stat(path)
    return _HEADER.pack(_MAGIC, found.st_size, found.st_mtime_ns, count)


def _load_index(path: str) -> Optional[np.ndarray]:
    """The bounds from the index file; None unless it is complete, belongs to this file and is plausible."""
    try:
        with open(index_path(path), "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            count = _HEADER.unpack(header)[3]
            if header != _header(path, count) or os.fstat(file.fileno()).st_size != _HEADER.size + count * 16:
                return None
            bounds = np.fromfile(file, dtype="<i8").reshape(-1, 2)
    except OSError:
        return None
    starts, ends = bounds[:, 0], bounds[:, 1]
    if len(bounds) and (starts[0] < 0 or ends[-1] > os.path.getsize(path) or (ends < starts).any()):
        return None
    return None if (starts[1:] < ends[:-1]).any() else bounds


class IndexWriter:
    """Collects record bounds of a JSON file that is being written, and writes its index once that file is final.

    Bounds are buffered in an unnamed temporary file, so memory is constant.
    """

    def __init__(self, folder: str):
        import tempfile

        self._bounds = tempfile.TemporaryFile(dir=folder)
        self._recent = array("q")
        self.count = 0

    def add(self, start: int, end: int) -> None:
        self._recent.extend((start, end))
        self.count += 1
        if len(self._recent) >= 8192:
            self._flush()

    def _flush(self) -> None:
        self._bounds.write(np.asarray(self._recent, dtype="<i8").tobytes())
        self._recent = array("q")

    def write_for(self, path: str) -> None:
        """Write the index of `path`, which must be final."""
        self._flush()
        self._bounds.seek(0)
        with atomic_write(index_path(path), "wb") as file:
            file.write(_header(path, self.count))
            while True:
                block = self._bounds.read(_BLOCK_BYTES)
                if not block:
                    break
                file.write(block)

    def close(self) -> None:
        self._bounds.close()


@functools.lru_cache(maxsize=None)
def _say_if_cut(path: str, header: bytes) -> None:
    """Once for each state of a file: warn if an array begins in it and does not end."""
    with open(path, "rb") as file:
        first = file.read(64)
        file.seek(max(0, os.path.getsize(path) - 64))
        if first.lstrip(_BOM + b" \t\r\n").startswith(b"[") and not file.read().rstrip().endswith(b"]"):
            logger.warning(f"{path} ends without the ] of its array: is it complete? The records up to there are used")


def record_bounds(path: str) -> np.ndarray:
    """Start and end of each record, int64 [n, 2]; the range holds one record, possibly with white space and commas.

    An array without its end gives a warning: the file was probably not copied in full.

    Raises:
        UserError: the file is missing, not a plain file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a plain file", "not-regular")
        before = _header(path, 0)
        _say_if_cut(path, before)
        bounds = _load_index(path)
        if bounds is not None:
            return bounds
        bounds = scan_records(path)
        if _header(path, 0) != before:
            raise UserError(f"{path} was changed while it was read; start again when it is complete", "changed")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "unreadable") from error
    try:
        with atomic_write(index_path(path), "wb") as file:
            file.write(_header(path, len(bounds)))
            file.write(np.ascontiguousarray(bounds, dtype="<i8").data)
    except OSError as error:
        logger.info(f"the index of {path} is kept in memory only: cannot write next to it ({error.strerror})")
    return bounds


def scan_records(path: str) -> np.ndarray:
    """record_bounds without the index file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        layout, indent = _sniff(file)
        with Progress(size, f"indexing {os.path.basename(path)}", "B", disable=size < _PROGRESS_FROM_BYTES) as bar:
            if layout == "lines":
                return _line_bounds(file, bar.update)
            if layout == "indent":
                return _indent_bounds(file, indent, size, bar.update)
            return _scan_bounds(file, bar.update)


def _sniff(file: IO[bytes]) -> Tuple[str, bytes]:
    """The layout of a file, and for "indent" the prefix of each record: a line break and spaces."""
    good = bad = 0
    file.seek(0)
    if file.read(3) != _BOM:
        file.seek(0)
    for _ in range(_SNIFF_LINES):
        line = file.readline(_SNIFF_LINE_BYTES)
        if not line:
            break
        text = line.strip(b"[], \t\r\n")
        if len(line) == _SNIFF_LINE_BYTES and not line.endswith(b"\n"):
            # Too long to parse: one record with a large image, or the entire array on one line.
            if not _is_one_record(file, file.tell() - len(line)):
                bad += 1
                break
            good += 1
        elif text:
            try:
                text = text.decode("utf-8")
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                bad += 1
                continue
            if isinstance(value, dict) and end < len(text):
                # Several records on a line.
                good = 0
                break
            is_record = isinstance(value, dict)
            good, bad = good + is_record, bad + (not is_record)
    if good and good >= bad:
        return "lines", b""
    file.seek(0)
    indented = _INDENTED.match(file.read(_SNIFF_LINE_BYTES).lstrip(_BOM))
    if indented:
        return "indent", indented.group(1)
    return "scan", b""


def _is_one_record(file: IO[bytes], begin: int) -> bool:
    """Whether the long line at `begin` holds exactly one record. If so, the file is positioned after that line."""
    file.seek(begin)
    first = next(_scan(_blocks(file), begin), None)
    if first is None:
        return False
    end = first[1]
    file.seek(begin)
    position = begin
    while position < end:
        piece = file.readline(min(_BLOCK_BYTES, end - position))
        position += len(piece)
        if piece.endswith(b"\n"):
            return False
    rest = file.readline(256)
    return not rest.strip(b"], \t\r\n")


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while True:
        block = file.read(_BLOCK_BYTES)
        if not block:
            return
        yield block


def _line_bounds(file: IO[bytes], progress: Callable[[int], None]) -> np.ndarray:
    file.seek(0)
    line_starts: List[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    first_bytes: List[np.ndarray] = []
    offset = 0
    at_line_start = True
    for block in _blocks(file):
        values = np.frombuffer(block, dtype=np.uint8)
        starts = np.flatnonzero(values == 10) + 1
        if at_line_start:
            first_bytes.append(values[:1])
        line_starts.append(starts + offset)
        at_line_start = len(starts) > 0 and starts[-1] == len(block)
        first_bytes.append(values[starts[:-1] if at_line_start else starts])
        offset += len(block)
        progress(len(block))
    starts = np.concatenate(line_starts)
    first = np.concatenate(first_bytes) if first_bytes else np.zeros(0, dtype=np.uint8)
    if len(first) < len(starts):
        # The file ends with a line break.
        starts = starts[:-1]
    ends = np.append(starts[1:], offset)
    # Not records: empty lines, and the array's brackets on separate lines.
    blank = (first == 10) | (first == 13)
    bracket = (first == ord("]")) | (np.isin(first, np.frombuffer(b"[ \t", dtype=np.uint8)) & (ends - starts <= 3))
    if len(first) and first[0] == _BOM[0]:
        bracket[0] = ends[0] - starts[0] <= 6
    keep = ~(blank | bracket)
    return np.stack([starts[keep], ends[keep]], axis=1)


def _indent_bounds(file: IO[bytes], indent: bytes, size: int, progress: Callable[[int], None]) -> np.ndarray:
    file.seek(0)
    mark = indent + b"{"
    starts = array("q")
    offset = 0
    carried = b""
    for block in _blocks(file):
        text = carried + block
        found = text.find(mark)
        while found >= 0:
            starts.append(offset + found + len(indent))
            found = text.find(mark, found + len(mark))
        # A mark may span two blocks; less than a full one is carried over, so that none is found twice.
        carried = text[max(0, len(text) - len(mark) + 1) :]
        offset += len(text) - len(carried)
        progress(len(block))
    begin = np.frombuffer(starts, dtype=np.int64)
    return np.stack([begin, np.append(begin[1:], size)], axis=1) if len(begin) else np.zeros((0, 2), dtype=np.int64)


def _scan_bounds(file: IO[bytes], progress: Callable[[int], None]) -> np.ndarray:
    def counted() -> Iterator[bytes]:
        for block in _blocks(file):
            yield block
            progress(len(block))

    file.seek(0)
    bounds = array("q")
    for record in _scan(counted(), 0):
        bounds.extend(record)
    return np.frombuffer(bounds, dtype=np.int64).reshape(-1, 2)


_STRUCTURE = re.compile(rb'[{}\[\]"]')


def _scan(blocks: Iterator[bytes], offset: int) -> Iterator[Tuple[int, int]]:
    """Bounds of the records in a stream of bytes that starts at `offset`: the elements of the outermost array, or the
    outermost objects. The last one may be truncated."""
    depth = 0
    # Depth of records: 1 inside an array, 0 without one.
    base = -1
    start = -1
    in_string = escaped = False
    for block in blocks:
        position = 0
        while position < len(block):
            if in_string:
                if escaped:
                    escaped = False
                    position += 1
                    continue
                end = block.find(b'"', position)
                stop = block.find(b"\n", position, end if end >= 0 else len(block))
                if stop >= 0:
                    # Strings contain no line break; this one is unterminated.
                    in_string = False
                    position = stop + 1
                    continue
                text_end = end if end >= 0 else len(block)
                slashes = 0
                while text_end - slashes > position and block[text_end - slashes - 1] == 92:
                    slashes += 1
                if end < 0:
                    escaped = slashes % 2 == 1
                    position = len(block)
                else:
                    # After an odd number of backslashes, the quote is escaped.
                    in_string = slashes % 2 == 1
                    position = end + 1
                continue
            found = _STRUCTURE.search(block, position)
            if found is None:
                break
            position = found.end()
            token = block[position - 1]
            if token == 34:
                in_string = True
            elif token in b"{[":
                if base < 0:
                    base = 1 if token == 91 else 0
                if depth == base:
                    start = offset + position - 1
                depth += 1
            elif depth > 0:
                depth -= 1
                if depth == base and start >= 0:
                    yield start, offset + position
                    start = -1
        offset += len(block)
    if start >= 0:
        yield start, offset
