"""Shared by all weights formats: dtype names, tensor descriptions, conversion, and mapped files.

A bfloat16 array is a numpy uint16 array of the same bits, with the dtype name "bfloat16" kept separately, since numpy
has no such type.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from dataclasses import dataclass
from typing import Callable, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np

from paddlemix.utils.errors import WeightsError
from paddlemix.utils.files import open_plain
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import physical_cores

# dtype → the little-endian numpy type of its bits, its name in safetensors, its storage class in PyTorch.
_TYPES = {
    "float64": ("<f8", "F64", "DoubleStorage"),
    "float32": ("<f4", "F32", "FloatStorage"),
    "float16": ("<f2", "F16", "HalfStorage"),
    "bfloat16": ("<u2", "BF16", "BFloat16Storage"),
    "int64": ("<i8", "I64", "LongStorage"),
    "int32": ("<i4", "I32", "IntStorage"),
    "int16": ("<i2", "I16", "ShortStorage"),
    "int8": ("i1", "I8", "CharStorage"),
    "uint8": ("u1", "U8", "ByteStorage"),
    "bool": ("?", "BOOL", "BoolStorage"),
}
NUMPY_TYPES: Dict[str, np.dtype] = {name: np.dtype(kind) for name, (kind, _, _) in _TYPES.items()}
SAFETENSORS_TYPES = {theirs: name for name, (_, theirs, _) in _TYPES.items()}
TORCH_STORAGES = {theirs: name for name, (_, _, theirs) in _TYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")

# Limits of what a header may claim. A 7B checkpoint has under a thousand tensors and names under 100 characters.
MAX_NAME = 1024
MAX_DIMS = 32
MAX_ELEMENTS = 1 << 48
# Tied tensors share their bytes. Without a limit a file of 3 MB could declare 100,000 tensors of 1 MB each.
MAX_SHARING = 4

# Elements converted at a time: few enough for scratch arrays in the cache, enough that threads do not contend for
# Python's lock.
_CHUNK = 1 << 19

# Bytes that a thread reads or writes at a time.
PIECE = 1 << 24

# The largest finite values.
_MAX = {"float64": np.inf, "float32": 3.4028234e38, "float16": 65504.0, "bfloat16": 3.3895313e38}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor without its values. `file` is the path of its file."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True)
class FileBytes:
    """A byte range of a mapped file: a tensor that need not be parsed."""

    file: MappedFile
    offset: int
    length: int

    def read(self, start: int, into: np.ndarray) -> np.ndarray:
        """Fill an array in C order with the bytes from `start` on, and return it. Thread-safe.

        Raises:
            WeightsError: the file was truncated after it was opened.
        """
        left = memoryview(into.reshape(-1).view(np.uint8))
        while left:
            count = os.preadv(self.file.fileno(), [left], self.offset + start)
            if count == 0:
                raise WeightsError(f"{self.file.path} was truncated while it was read", "truncated")
            left, start = left[count:], start + count
        return into


class Rows(NamedTuple):
    """A tensor that is computed `step` rows at a time by make(start, stop), which must be thread-safe."""

    step: int
    make: Callable[[int, int], np.ndarray]


def rows_of(
    stored: Union[FileBytes, np.ndarray], start: int, stop: int, dtype: str, rest: Tuple[int, ...]
) -> np.ndarray:
    """Rows start to stop of a tensor [n, *rest] as stored. Thread-safe.

    Raises:
        WeightsError: the file was truncated after it was opened.
    """
    if not isinstance(stored, FileBytes):
        return stored[start:stop]
    kind = NUMPY_TYPES[dtype]
    return stored.read(start * kind.itemsize * math.prod(rest), np.empty((stop - start, *rest), kind))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a format's parser returns it.

    load: returns the array, a view of the mapped file where the format allows. where: its bytes in the file if they
    are in C order, else None.
    """

    dtype: str
    shape: Tuple[int, ...]
    load: Callable[[], np.ndarray]
    where: Optional[FileBytes] = None

    @property
    def nbytes(self) -> int:
        return size_of(self.dtype, self.shape)


def io_threads() -> int:
    """Threads that read, convert and write tensors; memory bandwidth limits their use."""
    return min(4, physical_cores())


def own_pages(shape: Tuple[int, ...], dtype: str) -> np.ndarray:
    """An array in an anonymous mapping of its own.

    numpy asks for huge pages, for which the kernel may have to reclaim its caches: allocating a model that way took
    four times as long as reading it.
    """
    try:
        memory = mmap.mmap(-1, max(1, size_of(dtype, shape)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return np.empty(shape, NUMPY_TYPES[dtype])
    return np.frombuffer(memory, NUMPY_TYPES[dtype], math.prod(shape)).reshape(shape)


def size_of(dtype: str, shape) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * NUMPY_TYPES[dtype].itemsize


def check_shape(shape, what: str) -> Tuple[int, ...]:
    """A shape from a file as a tuple of ints.

    Raises:
        WeightsError: not integers from 0, too many of them, or more elements than any file can hold.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) > MAX_DIMS:
        raise WeightsError(f"{what}: not a shape", "shape")
    elements = 1
    for n in shape:
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise WeightsError(f"{what}: not a shape", "shape")
        elements *= max(n, 1)
        if elements > MAX_ELEMENTS:
            raise WeightsError(f"{what}: the shape declares more elements than a file can hold", "shape")
    return tuple(shape)


def check_total(declared: int, held: int, path: str) -> None:
    """Refuse a file of `held` bytes whose tensors declare more than MAX_SHARING times as many.

    Raises:
        WeightsError: they do.
    """
    if declared > MAX_SHARING * held:
        text = f"{path}: refused: its tensors declare {declared:,} bytes, but it holds {held:,}"
        raise WeightsError(text, "refused", "size")


class MappedFile:
    """A regular file, mapped read-only. Arrays made from it keep the mapping alive.

    Raises:
        WeightsError: missing, empty, or not a regular file.
    """

    def __init__(self, path: str):
        self.path = str(path)
        try:
            self._file = open_plain(self.path)
        except OSError as error:
            code = "not-regular" if error.errno == errno.EINVAL else "unreadable"
            raise WeightsError(f"cannot open {self.path}: {error.strerror}", code) from None
        try:
            self.size = os.fstat(self.fileno()).st_size
            if self.size == 0:
                raise WeightsError(f"{self.path} is empty", "empty")
            self._map, self.view = self._mapped()
        except BaseException:
            self.close()
            raise

    def _mapped(self) -> Tuple[Optional[mmap.mmap], memoryview]:
        """The mapping and its bytes; None and a copy in memory where the file system cannot map (some FUSE)."""
        try:
            found = mmap.mmap(self.fileno(), self.size, access=mmap.ACCESS_READ)
            return found, memoryview(found)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENOTSUP, errno.EACCES):
                raise WeightsError(f"cannot read {self.path}: {error.strerror}", "unreadable") from None
        logger.warning(f"{self.path} cannot be memory-mapped: its {self.size:,} bytes are read into memory")
        data = self._file.read()
        if len(data) != self.size:
            raise WeightsError(f"{self.path} changed while it was read", "changed")
        return None, memoryview(data)

    def fileno(self) -> int:
        return self._file.fileno()

    def array(self, offset: int, dtype: str, shape) -> np.ndarray:
        """A read-only view of the file, possibly unaligned."""
        kind = NUMPY_TYPES[dtype]
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, kind)
        return np.frombuffer(self.view, kind, count, offset).reshape(shape)

    def forget(self, offset: int, length: int) -> None:
        """Release the pages of these bytes; they are read again when touched."""
        if not hasattr(self._map, "madvise"):
            return
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Close the file. The mapping lives as long as arrays over it do."""
        self._file.close()


# ---- conversion


def _widen_bfloat16(chunk: np.ndarray, out: np.ndarray) -> np.ndarray:
    bits = out.view(np.uint32)
    bits[:] = chunk
    bits <<= 16
    return out


def _round_to_bfloat16(chunk: np.ndarray, out: np.ndarray) -> None:
    """Round float32 to nearest, ties to even. Does not preserve NaN (see _check_odd_values)."""
    bits = chunk.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[:] = rounded


def _check_odd_values(before: np.ndarray, after: np.ndarray, dst: str) -> None:
    """A finite value must not become infinite without a word, and a NaN stays one."""
    if dst == "bfloat16":
        nan = np.isnan(before)
        after[nan] = (before[nan].astype(np.float32).view(np.uint32) >> 16) | 0x40
        infinite = (after & 0x7FFF) == 0x7F80
    else:
        infinite = np.isinf(after)
    if np.isfinite(before[infinite]).any():
        raise WeightsError(f"a value is too large for {dst}; use bfloat16 or float32", "overflow")


def convert_dtype(array: np.ndarray, src: str, dst: str, out: Optional[np.ndarray] = None) -> np.ndarray:
    """Convert between float32, float16, bfloat16 and float64. Same dtype: the array itself, uncopied.

    array: any shape, in the numpy type of `src` (uint16 for bfloat16). out: array for the result, of the same size and
    in C order. Rounds to nearest, ties to even.

    Raises:
        WeightsError: a dtype that is not a floating-point type, or a finite value beyond `dst`'s range.
    """
    if src == dst:
        return array
    if src not in FLOATS or dst not in FLOATS:
        raise WeightsError(f"cannot convert {src} to {dst}", "dtype")
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty(flat.shape, NUMPY_TYPES[dst]) if out is None else out.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        part = out[start : start + _CHUNK]
        if src == "bfloat16":
            chunk = _widen_bfloat16(chunk, part if dst == "float32" else np.empty(chunk.shape, np.float32))
        with np.errstate(over="ignore"):
            if dst == "bfloat16":
                _round_to_bfloat16(chunk.astype(np.float32, copy=False), part)
            elif chunk is not part:
                part[:] = chunk
        # False for NaN too.
        if not (chunk.max() <= _MAX[dst] and chunk.min() >= -_MAX[dst]):
            _check_odd_values(chunk, part, dst)
    return out.reshape(np.shape(array))
