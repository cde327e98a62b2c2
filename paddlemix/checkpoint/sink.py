"""Where weights are written to: small pieces are gathered, large ones go straight to the file."""

from __future__ import annotations

import errno
import os
from typing import Callable, Optional

import numpy as np

from paddlemix.checkpoint.tensors import FileBytes
from paddlemix.utils.errors import WeightsError

_GATHER = 1 << 16
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSOCK)
# Bytes per write: often enough for a progress bar, rarely enough to cost nothing.
_STEP = 1 << 26


class Sink:
    """An unbuffered binary file (`buffering=0`) with its position. `progress` is told the bytes of
    tensors written.
    """

    def __init__(self, file, progress: Optional[Callable[[int], None]] = None):
        self._file = file
        self._progress = progress or (lambda n: None)
        self._small = bytearray()
        self.position = 0

    def write(self, data: bytes) -> None:
        self._small += data
        self.position += len(data)
        if len(self._small) >= _GATHER:
            self.flush()

    def flush(self) -> None:
        self._write_all(memoryview(self._small))
        self._small = bytearray()

    def _write_all(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + _STEP])

    def array(self, array: np.ndarray) -> None:
        """Write an array's bytes in C order."""
        self.flush()
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for start in range(0, len(view), _STEP):
            part = view[start : start + _STEP]
            self._write_all(part)
            self.position += len(part)
            self._progress(len(part))

    def copy(self, source: FileBytes) -> None:
        """Write a stretch of another file; the system copies it without a detour through this program.

        Raises:
            WeightsError: the source has become shorter than it was when it was opened.
        """
        self.flush()
        done = 0
        while done < source.length:
            step = min(_STEP, source.length - done)
            moved = self._move(source.file.fileno(), source.offset + done, step)
            if moved == 0:
                raise WeightsError(f"{source.file.path} has been cut short while it was read")
            done += moved
            self.position += moved
            self._progress(moved)

    def _move(self, handle: int, offset: int, count: int) -> int:
        if hasattr(os, "sendfile"):
            try:
                return os.sendfile(self._file.fileno(), handle, offset, count)
            except OSError as error:
                # Not between any two file systems; then through memory.
                if error.errno not in _NO_SENDFILE:
                    raise
        data = os.pread(handle, min(count, 1 << 20), offset)
        self._write_all(memoryview(data))
        return len(data)
