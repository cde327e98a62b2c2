"""train.json and val.json, written by a thread while the next rows are read."""

from __future__ import annotations

import os
import queue
import threading
from typing import IO, List, Optional, Union

from paddlemix.datasets.json_index import IndexWriter

# More at a time would only leave the cache before it is written.
WRITE_BYTES = 512 << 10
# What has been written goes to disk in such portions while rows are read, so that there is no long wait at the end.
_SYNC_BYTES = 128 << 20
# Pieces per system call; Linux takes 1024.
_WRITE_PIECES = 1000


class BackgroundWriter:
    """A thread that writes while the next rows are read and checked. Its error is raised by the next call."""

    def __init__(self) -> None:
        self._tasks: queue.Queue = queue.Queue(maxsize=2)
        self._error: Optional[OSError] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, handle: int, pieces: List[Union[bytes, memoryview]]) -> None:
        """Write the pieces to a file handle, after all before them."""
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
    """A JSON array being written, a record per line, with the index that the reader will want."""

    def __init__(self, file: IO[bytes], index: IndexWriter, writer: BackgroundWriter):
        self._handle = file.fileno()
        self._index = index
        self._writer = writer
        self._pieces: List[Union[bytes, memoryview]] = [b"["]
        self._size = 1
        self._unwritten = 1
        self.count = 0

    def add(self, head: bytes, image: Union[bytes, memoryview] = b"", tail: bytes = b"") -> None:
        """Append the record that the three make up together. `head` begins with the comma and line break before it."""
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
