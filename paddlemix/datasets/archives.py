"""Tables inside .gz, .tar or .tar.gz files, read as a stream: nothing is unpacked to disk.

Archives are untrusted. Memory is bounded by the headers that tarfile may read between two files (_MAX_HEADERS), time by
the expansion of an archive (_MAX_RATIO) and its number of files (_MAX_FILES).
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from typing import IO, Iterator

from paddlemix.utils.errors import UserError

# Of each file's name, times and attributes; a name takes some hundred bytes.
_MAX_HEADERS = 1 << 20
# Base64 of JPEGs expands 1.3 times, captions with paths 20 times, zeros 1,000 times.
_MAX_RATIO, _FREE_BYTES = 200, 64 << 20
_MAX_FILES = 100_000
_SKIP_BYTES = 1 << 20
TABLES = (".txt", ".tsv", ".csv", "")

GZIP = b"\x1f\x8b"


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return head[257:262] == b"ustar"


def is_packed(path: str) -> bool:
    """Whether a file is one that `members` reads."""
    with open(path, "rb") as file:
        head = file.read(512)
    return head.startswith(GZIP) or is_tar(head)


class _Stream:
    """The content of an archive's file, forwards only, as tarfile reads it; `take` reads what is in the files."""

    def __init__(self, path: str, file: IO[bytes]):
        self._path, self._size = path, os.fstat(file.fileno()).st_size
        packed = file.read(2) == GZIP
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if packed else file
        self._position = self._headers = 0
        self._head = b""
        self._head = self.take(512)
        self._position = 0
        # An empty tar archive is zeros.
        self.is_tar = is_tar(self._head) or bool(self._head) and not any(self._head)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        data, self._head = self._head[:size], self._head[size:]
        try:
            if len(data) < size:
                data += self._file.read(size - len(data))
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self._path} is damaged or cut short ({error}): fetch it again", "damaged") from None
        self._position += len(data)
        if self._position > _FREE_BYTES + _MAX_RATIO * self._size:
            text = f"{self._path} expands to over {_MAX_RATIO} times its size: unpack it, if you trust it"
            raise UserError(text, "ratio")
        return data

    def read(self, size: int) -> bytes:
        self._headers += size
        if self._headers > _MAX_HEADERS:
            text = f"{self._path}: the names and attributes of a file in it take over {_MAX_HEADERS >> 20} MB"
            raise UserError(text, "headers")
        return self.take(size)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a file of negative size")
        while self._position < position and self.take(min(_SKIP_BYTES, position - self._position)):
            pass

    def next_file(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        self._headers = 0
        # What tarfile has read it keeps.
        tar.members, tar.pax_headers = [], {}
        return tar.next()


class Member:
    """A file in an archive. name: "" for the only one of a .gz file; characters that steer a terminal are "?"."""

    def __init__(self, name: str, stream: _Stream, size: float):
        self.name = "".join(letter if letter.isprintable() else "?" for letter in name)[:200]
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        """The next `size` bytes of it, fewer at its end."""
        data = self._stream.take(int(min(size, self._left)))
        self._left -= len(data)
        return data


def members(path: str, file: IO[bytes]) -> Iterator[Member]:
    """The files of an archive that may be tables, by their names; each is read before the next one is asked for.

    file: of that path, opened without a buffer.

    Raises:
        UserError: the archive is damaged, or expands to more than a table can.
    """
    stream = _Stream(path, file)
    if not stream.is_tar:
        yield Member("", stream, float("inf"))
        return
    count = 0
    try:
        tar = tarfile.TarFile(fileobj=stream, mode="r")
        found = stream.next_file(tar)
        while found is not None:
            count += 1
            if count > _MAX_FILES:
                raise UserError(f"{path} holds more than {_MAX_FILES:,} files: unpack it, and give the table", "files")
            name = os.path.basename(found.name)
            if found.isreg() and not found.issparse() and not name.startswith("."):
                if os.path.splitext(name)[1].lower() in TABLES:
                    yield Member(found.name, stream, found.size)
            found = stream.next_file(tar)
        # To the checksum behind it.
        while stream.take(_SKIP_BYTES):
            pass
    except UserError:
        raise
    except Exception as error:  # tarfile's parser raises almost any exception on a broken header
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again", "damaged") from None
