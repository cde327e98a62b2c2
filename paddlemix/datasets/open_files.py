"""Input files that stay open for reading at offsets."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from typing import IO

from paddlemix.datasets.records import SampleError
from paddlemix.utils.files import open_plain

MAX_OPEN_FILES = 16


class OpenFiles:
    """Files kept open for reading at offsets, the most recent few; each process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer at the end of the file."""
        pieces = []
        while length:
            piece = os.pread(self._file(path).fileno(), length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _file(self, path: str) -> IO[bytes]:
        if path not in self._files:
            try:
                self._files[path] = open_plain(path)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise SampleError(f"{os.path.basename(path)} is not a plain file", "not-regular") from None
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def __reduce__(self):
        # A copy of the dataset, as in a loader worker, opens its own files.
        return OpenFiles, ()
