"""The lengths in tokens of all records of a JSON file, cached in a file next to it.

`.train.json.len` is valid as long as size and modification time of the JSON, vocabulary, chat template and max_length
are unchanged; otherwise it is recomputed, and written if the folder is writable.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from typing import Any, Callable, Iterator, Optional, Tuple

import numpy as np

from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger
from paddlemix.utils.parallel import map_chunks
from paddlemix.utils.progress import Progress
from paddlemix.utils.runtime import physical_cores

# Magic with the format's number, size and mtime_ns of the JSON, number of records, key.
_HEADER = struct.Struct("<8sqqq32s")
_MAGIC = b"MGENLEN3"
# From here on, a progress bar and worker processes are worthwhile.
_MANY_RECORDS = 20_000
_CHUNK = 2_000
# With more, reading the file is the bottleneck.
_MOST_PROCESSES = 16

# (row) → (tokens, whether there is an image). May raise anything for unusable records.
Measure = Callable[[int], Tuple[int, bool]]


def lengths_path(path: str) -> str:
    """The cache file of a JSON file: hidden, next to it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.len")


def lengths_key(tokenizer: Any, template: Any, max_length: int, *asked: Any) -> bytes:
    """32 bytes that change if the lengths of the same records may change. asked: replacement of their prompts."""
    ranks = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    digest = hashlib.sha256(b"\n".join(token for token, _ in ranks))
    digest.update(repr((len(ranks), tokenizer.n_queries, tuple(template), max_length, *asked)).encode())
    return digest.digest()


def cached_lengths(path: str, key: bytes, count: int, measure: Measure) -> Tuple[np.ndarray, np.ndarray]:
    """Tokens, int64 [count], and has_image, bool [count], of the records of a JSON file.

    count: number of records. measure: returns one of them; if it raises, the record has length 0.
    """
    with _one_at_a_time(path):
        stored = _load(path, key, count)
        if stored is None:
            stored = _measure_all(measure, count, os.path.basename(path))
            try:
                with atomic_write(lengths_path(path), "wb") as file:
                    file.write(_header(path, key, count))
                    file.write(stored.data)
            except OSError as error:
                logger.info(f"lengths of {path} are kept in memory only: cannot write next to it ({error.strerror})")
    bad = int((stored == 0).sum())
    if bad:
        logger.warning(f"{bad} of {count} records of {path} are unusable; training will skip and count them")
    return (stored >> 1).astype(np.int64), (stored & 1).astype(bool)


@contextlib.contextmanager
def _one_at_a_time(path: str) -> Iterator[None]:
    """Of the processes on this machine, the first computes; the others wait and read its file."""
    with open(path, "rb") as file:
        # Not supported on some network file systems; then each process computes.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _header(path: str, key: bytes, count: int) -> bytes:
    found = os.stat(path)
    return _HEADER.pack(_MAGIC, found.st_size, found.st_mtime_ns, count, key)


def _load(path: str, key: bytes, count: int) -> Optional[np.ndarray]:
    try:
        with open(lengths_path(path), "rb") as file:
            if file.read(_HEADER.size) != _header(path, key, count):
                return None
            stored = np.fromfile(file, dtype="<u4")
    except OSError:
        return None
    return stored if len(stored) == count else None


def _measure_all(measure: Measure, count: int, name: str) -> np.ndarray:
    """uint32 [count]: twice the tokens, plus one with an image; 0 for unusable records."""

    def measured(rows: range) -> np.ndarray:
        stored = np.zeros(len(rows), dtype="<u4")
        for number, row in enumerate(rows):
            try:
                tokens, has_image = measure(row)
                stored[number] = 2 * tokens + has_image
            except Exception:  # reported when the record is read
                continue
        return stored

    chunks = (range(begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))
    small = count < _MANY_RECORDS
    processes = 0 if small else min(physical_cores(), _MOST_PROCESSES)
    pieces = [np.zeros(0, dtype="<u4")]
    with Progress(total=count, desc=f"lengths of {name}", unit="record", disable=small) as bar:
        for piece in map_chunks(measured, chunks, processes, "mixtoken and group_by_modality_length false"):
            pieces.append(piece)
            bar.update(len(piece))
    return np.concatenate(pieces)
