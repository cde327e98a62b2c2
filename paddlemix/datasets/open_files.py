"""Input files that stay open for reading at offsets."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict

from paddlemix.datasets.records import SampleError

MAX_OPEN_FILES = 16


class OpenFiles:
    """Files kept open for reading at offsets, the most recent few; each process opens its own."""

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
        # Opening a pipe would block until it has a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise SampleError(f"{os.path.basename(path)} is not a plain file", "not-regular")
        self._handles[path] = handle
        if len(self._handles) > MAX_OPEN_FILES:
            os.close(self._handles.popitem(last=False)[1])
        return handle

    # __del__ may run at interpreter shutdown, when the module's global `os` is gone.
    def close(self, os=os) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    __del__ = close

    def __reduce__(self):
        # Handles belong to this process; a copy of the dataset opens its own.
        return OpenFiles, ()
