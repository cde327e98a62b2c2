"""Writing rows as records (train.json, val.json), in a thread while the next rows are read, or as a TSV."""

from __future__ import annotations

import json
import os
import queue
import threading
from contextlib import ExitStack, contextmanager
from typing import IO, Callable, Iterator, List, Optional, Sequence, Tuple, Union

from paddlemix.datasets.json_index import IndexWriter
from paddlemix.datasets.tsv import ImagePlace, TsvRow, check_of, row_id, unquoted
from paddlemix.utils.files import atomic_write

# Bytes buffered before a write; more would leave the CPU's cache.
WRITE_BYTES = 512 << 10
# Interval of fdatasync during writing, to avoid a long wait at the end.
_SYNC_BYTES = 128 << 20
# Pieces per system call; Linux allows 1024.
_WRITE_PIECES = 1000


class BackgroundWriter:
    """A thread that writes while the next rows are read and checked. Its errors are raised by the next call."""

    def __init__(self) -> None:
        self._tasks: queue.Queue = queue.Queue(maxsize=2)
        self._error: Optional[OSError] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, handle: int, pieces: List[Union[bytes, memoryview]]) -> None:
        """Queue pieces to be written to a file handle."""
        self._check()
        self._tasks.put((handle, pieces))

    def drain(self) -> None:
        """Wait until all is written."""
        self._tasks.join()
        self._check()

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        unsynced = 0
        while True:
            task = self._tasks.get()
            if task is None:
                return
            if self._error is None:
                try:
                    _write_pieces(*task)
                    unsynced += sum(map(len, task[1]))
                    if unsynced >= _SYNC_BYTES:
                        os.fdatasync(task[0])
                        unsynced = 0
                except OSError as error:
                    self._error = error
            del task
            self._tasks.task_done()


def _write_pieces(handle: int, pieces: List[Union[bytes, memoryview]]) -> None:
    for begin in range(0, len(pieces), _WRITE_PIECES):
        group = pieces[begin : begin + _WRITE_PIECES]
        written = os.writev(handle, group)
        rest = memoryview(b"".join(group))[written:] if written < sum(map(len, group)) else b""
        while rest:
            rest = rest[os.write(handle, rest) :]


class JsonArray:
    """Writes a JSON array, a record per line, and its index."""

    def __init__(self, file: IO[bytes], index: IndexWriter, writer: BackgroundWriter):
        self._handle = file.fileno()
        self._index = index
        self._writer = writer
        self._pieces: List[Union[bytes, memoryview]] = [b"["]
        self._size = 1
        self._unwritten = 1
        self.count = 0

    def add(self, head: bytes, image: Union[bytes, memoryview] = b"", tail: bytes = b"") -> None:
        """Append the record head + image + tail. `head` starts with a comma and a line break."""
        if not self.count:
            head = head[1:]
        self._pieces += (head, image, tail) if image else (head,)
        start = self._size + (2 if self.count else 1)
        length = len(head) + len(image) + len(tail)
        self._size += length
        self._index.add(start, self._size)
        self.count += 1
        self._unwritten += length
        if self._unwritten >= WRITE_BYTES or len(self._pieces) >= _WRITE_PIECES:
            big = self._unwritten >= 16 * WRITE_BYTES
            self._flush()
            if big:
                self._writer.drain()

    def finish(self) -> None:
        self._pieces.append(b"\n]\n")
        self._flush()

    def _flush(self) -> None:
        self._writer.put(self._handle, self._pieces)
        self._pieces = []
        self._unwritten = 0


@contextmanager
def record_files(paths: Sequence[str]) -> Iterator[List[JsonArray]]:
    """Arrays of records in these files of one folder, which appear, with their indexes, if the block raises nothing."""
    folder = os.path.dirname(os.path.realpath(paths[0]))
    with ExitStack() as stack:
        indexes = [IndexWriter(folder) for _ in paths]
        for index in indexes:
            stack.callback(index.close)
        with ExitStack() as files:
            outputs = [files.enter_context(atomic_write(path, "wb")) for path in paths]
            # Entered last, so that it has stopped before the files are closed.
            writer = BackgroundWriter()
            files.callback(writer.close)
            arrays = [JsonArray(file, index, writer) for file, index in zip(outputs, indexes)]
            yield arrays
            for array in arrays:
                array.finish()
            writer.drain()
        for path, index in zip(paths, indexes):
            index.write_for(path)


# JSON with Chinese characters as they are.
encode_json = json.JSONEncoder(ensure_ascii=False).encode


class RecordText:
    """The text of records in the file `path` of rows of the file `source`.

    reference: a record says where its image is, if that can be read there by itself; otherwise it holds a copy.
    """

    def __init__(self, path: str, source: str, reference: bool):
        self._folder, self._reference = os.path.dirname(os.path.realpath(path)), reference
        self._source = source, self._file(source)

    def _file(self, path: str) -> str:
        relative = os.path.relpath(os.path.realpath(path), self._folder).replace(os.sep, "/")
        # ASCII: a path need not be UTF-8.
        return f'{{"file": {json.dumps(relative)}'

    def __call__(
        self, name: str, conversations: str, row: TsvRow, image: Union[bytes, memoryview]
    ) -> Tuple[bytes, Union[bytes, memoryview], bytes]:
        """A record as JsonArray.add takes it. conversations: JSON. image: base64 text."""
        start = f',\n{{"id": {encode_json(name)}, "conversations": {conversations}, "image": '
        source, file = self._source
        place = row.place or ImagePlace(source, row.image_offset, row.image_length)
        if not self._reference or place.offset < 0:
            return (start + '"').encode(), image, b'"}'
        file = file if place.file == source else self._file(place.file)
        check = f', "check": {check_of(image)}'
        span = f', "offset": {place.offset}, "length": {place.length}{check}' if place.length else ""
        return f"{start}{file}{span}}}}}".encode(), b"", b""


@contextmanager
def output_rows(
    path: str, source: str, reference: bool, prompt: str
) -> Iterator[Callable[[TsvRow, Union[bytes, memoryview], str], None]]:
    """A function (row, base64 text of its image, caption) that appends rows to `path`: records in a .json, lines
    `id \\t base64 \\t caption` in any other file, which appears if the block raises nothing.

    source, reference: see RecordText. prompt: of rows that are not records.
    """
    if path.endswith(".json"):
        text = RecordText(path, source, reference)
        with record_files([path]) as (array,):

            def add_record(row, image, caption):
                (question, _), *more = row.turns or ((prompt, ""),)
                array.add(*text(row_id(row), encode_json([(question, caption), *more]), row, image))

            yield add_record
    else:
        with atomic_write(path, "wb") as file:

            def add_line(row, image, caption):
                one_line = caption.replace("\r", " ").replace("\n", " ")
                if unquoted(one_line) != one_line:
                    # What looks like the quotes of a CSV writer is the caption's own, and readers would take it away.
                    one_line = '"' + one_line.replace('"', '""') + '"'
                file.writelines((f"{row_id(row)}\t".encode(), image, f"\t{one_line}\n".encode()))

            yield add_line
