"""The output file of a weights writer: small writes are buffered, tensors are written at their offsets.

The offset of a tensor is known before its bytes are. Tensors that are copied from another file, or computed in blocks
of rows, are therefore written by a thread pool, in any order, while the writer goes on to the next tensors.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Optional, Tuple

import numpy as np

from paddlemix.checkpoint.tensors import PIECE, FileBytes, Rows, io_threads

_GATHER = 1 << 16
# Errors of copy_file_range where the system does not support it between these files.
_NO_COPY = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)
# Queued jobs: enough to keep all threads busy, few enough that they hold little memory.
_WAITING = 8


class Sink:
    """An unbuffered binary file (`buffering=0`) and its position; leaving the `with` block waits for all writes.

    `progress` is called with the number of tensor bytes written.
    """

    def __init__(self, file, progress: Optional[Callable[[int], None]] = None):
        self._handle = file.fileno()
        self._progress = progress or (lambda n: None)
        self._small = bytearray()
        self._pool = ThreadPoolExecutor(io_threads())
        self._running: Deque[Tuple[Future, int]] = deque()
        self.position = 0

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        try:
            if kind is None:
                self._flush()
                self._wait(0)
        finally:
            self._pool.shutdown()

    def _wait(self, left: int) -> None:
        while len(self._running) > left:
            job, count = self._running.popleft()
            job.result()
            self._progress(count)

    def _later(self, count: int, call: Callable[..., None], *args: Any) -> None:
        """Queue a job that writes `count` bytes."""
        self._running.append((self._pool.submit(call, *args), count))
        self._wait(_WAITING)

    def write(self, data: bytes) -> None:
        self._small += data
        self.position += len(data)
        if len(self._small) >= _GATHER:
            self._flush()

    def _flush(self) -> None:
        _write_at(self._handle, memoryview(self._small), self.position - len(self._small))
        self._small = bytearray()

    def array(self, array: np.ndarray) -> None:
        """Write an array's bytes in C order."""
        self._flush()
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for start in range(0, len(view), PIECE):
            part = view[start : start + PIECE]
            _write_at(self._handle, part, self.position)
            self.position += len(part)
            self._progress(len(part))

    def copy(self, source: FileBytes) -> None:
        """Write a byte range of another file."""
        self._flush()
        for start in range(0, source.length, PIECE):
            count = min(PIECE, source.length - start)
            self._later(count, _copy, source, start, count, self._handle, self.position + start)
        self.position += source.length

    def rows(self, rows: Rows, dtype: np.dtype, shape: Tuple[int, ...]) -> None:
        """Write a tensor of this shape as its rows are computed."""
        self._flush()
        size = dtype.itemsize * int(np.prod(shape[1:]))
        for start in range(0, shape[0], rows.step):
            stop = min(start + rows.step, shape[0])
            expected = (dtype, (stop - start,) + tuple(shape[1:]))
            place = self.position + start * size
            self._later((stop - start) * size, _make, rows, start, stop, expected, self._handle, place)
        self.position += shape[0] * size


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + PIECE], offset + done)


def _make(rows: Rows, start: int, stop: int, expected: Any, handle: int, offset: int) -> None:
    made = np.ascontiguousarray(rows.make(start, stop))
    if (made.dtype, made.shape) != expected:
        raise ValueError(f"rows {start} to {stop} are {made.dtype} {made.shape}, not {expected}")
    _write_at(handle, memoryview(made.reshape(-1).view(np.uint8)), offset)


def _copy(source: FileBytes, start: int, count: int, handle: int, offset: int) -> None:
    """Raises WeightsError if the source was truncated after it was opened."""
    done = 0
    if hasattr(os, "copy_file_range"):
        where = source.file.fileno()
        try:
            while done < count:
                moved = os.copy_file_range(where, handle, count - done, source.offset + start + done, offset + done)
                if moved == 0:
                    break
                done += moved
        except OSError as error:
            # Copy through memory instead.
            if error.errno not in _NO_COPY:
                raise
    if done < count:
        _write_at(handle, memoryview(source.read(start + done, np.empty(count - done, np.uint8))), offset + done)
