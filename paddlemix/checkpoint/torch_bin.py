"""PyTorch's .bin / .pt files (since version 1.6), read without PyTorch and without executing anything.

Such a file is a zip archive of uncompressed members: data.pkl, a pickle of names and of references to storages, and one
member per storage. Storages are memory-mapped in place. Only the constructors of a state dict are understood; any other
function or class is refused by name.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np

from paddlemix.checkpoint.tensors import (
    MAX_NAME,
    NUMPY_TYPES,
    TORCH_STORAGES,
    FileBytes,
    MappedFile,
    StoredTensor,
    check_shape,
    check_total,
    size_of,
)
from paddlemix.checkpoint.unpickle import Unpickler, make_dict
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.texts import one_line

MAGIC = b"PK\x03\x04"
# The pickle and the central directory of a real shard take some 100 KB; zipfile makes 1 KB of each member.
_MAX_PICKLE = 64 << 20
_MAX_DIRECTORY = 4 << 20


# ---- the archive


class _Member(NamedTuple):
    offset: int
    length: int


class _View:
    """A mapped file with the interface zipfile reads; it refuses a central directory of more than _MAX_DIRECTORY."""

    def __init__(self, file: MappedFile):
        self._view, self._at = file.view, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, len(self._view))[whence]
        if self._at < 0:
            raise OSError("a position before the file")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, n: int = -1) -> bytes:
        if n > _MAX_DIRECTORY:
            raise OSError(f"a table of {n:,} bytes")
        found = bytes(self._view[self._at : len(self._view) if n < 0 else self._at + n])
        self._at += len(found)
        return found


def _members(file: MappedFile) -> Dict[str, _Member]:
    """The archive's members by name, each checked to be uncompressed and within the file."""
    try:
        archive = zipfile.ZipFile(_View(file))
    # A malformed directory raises nearly any of these.
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
        raise WeightsError(f"{file.path} is not a complete zip archive; it may be truncated ({error})", "zip") from None
    end = file.size - 22 - len(archive.comment)
    if bytes(file.view[end : end + 4]) != b"PK\x05\x06":
        raise WeightsError(f"{file.path}: bytes follow its end", "trailing-bytes")
    members: Dict[str, _Member] = {}
    for info in archive.infolist():
        what = f"{file.path}: member {one_line(info.filename)}"
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise WeightsError(f"{what} is compressed or encrypted, which PyTorch never does", "compressed")
        # The extra field of the local header may differ from the directory's.
        offset = info.header_offset
        header = bytes(file.view[offset : offset + 30])
        data = offset + 30 + sum(struct.unpack("<HH", header[26:])) if len(header) == 30 else file.size
        if header[:4] != MAGIC or data + info.file_size > archive.start_dir:
            raise WeightsError(f"{what} lies outside the file", "outside")
        if info.filename in members:
            raise WeightsError(f"{what} is in it twice", "duplicate")
        members[info.filename] = _Member(data, info.file_size)
    if min((info.header_offset for info in archive.infolist()), default=0) != 0:
        raise WeightsError(f"{file.path} is not a complete zip archive: it does not begin with a member", "zip")
    return members


# ---- the constructors in the pickle of a state dict, as data


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]


def _storage(reference: Any) -> _Storage:
    kind, storage_type, key, _, elements = reference
    if kind != "storage" or not isinstance(storage_type, _StorageType) or type(key) is not str:
        raise WeightsError("refused: a reference to something that is not a storage", "refused")
    if type(elements) is not int or elements < 0:
        raise WeightsError("broken: a storage without a size", "storage")
    return _Storage(storage_type.dtype, key, elements)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise WeightsError("broken: a tensor without a storage", "storage")
    shape = check_shape(shape, "a tensor")
    strides = check_shape(strides, "a tensor's strides")
    if len(shape) != len(strides):
        raise WeightsError("broken: a tensor's strides do not fit its shape", "strides")
    elements = last = 1
    for n, step in zip(shape, strides):
        elements *= n
        last += (n - 1) * step
    # Overlapping elements (a broadcast scalar, say) could claim any size with a few bytes.
    if elements and (offset + last > storage.elements or elements > storage.elements - offset):
        raise WeightsError(f"a tensor of shape {list(shape)} does not fit its storage", "shape")
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise WeightsError("broken: a parameter without a tensor", "tensor")
    return tensor


_CALLS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): make_dict,
}
_TYPES = {("torch", name): _StorageType(dtype) for name, dtype in TORCH_STORAGES.items()}


# ---- tensors


def _place(file: MappedFile, members: Dict[str, _Member], folder: str, tensor: _Tensor, what: str) -> StoredTensor:
    storage = tensor.storage
    member = members.get(f"{folder}data/{storage.key}")
    if member is None or member.length != size_of(storage.dtype, (storage.elements,)):
        raise WeightsError(f"{what}: its storage is missing or has another size than declared", "storage")
    width = NUMPY_TYPES[storage.dtype].itemsize
    start = member.offset + tensor.offset * width
    nbytes = size_of(storage.dtype, tensor.shape)
    in_order = []
    step = 1
    for n in reversed(tensor.shape):
        in_order.append(step)
        step *= n
    if nbytes == 0 or all(n == 1 or s == o for n, s, o in zip(tensor.shape, tensor.strides, reversed(in_order))):
        where = FileBytes(file, start, nbytes)
        return StoredTensor(storage.dtype, tensor.shape, lambda: file.array(start, storage.dtype, tensor.shape), where)

    def strided() -> np.ndarray:
        flat = file.array(start, storage.dtype, (storage.elements - tensor.offset,))
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, [s * width for s in tensor.strides], writeable=False)

    return StoredTensor(storage.dtype, tensor.shape, strided)


def open_torch_bin(file: MappedFile) -> Dict[str, StoredTensor]:
    """The tensors of a state dict by name. Reads the archive's directory and its pickle, not the storages.

    Raises:
        WeightsError: the file is broken, uses other constructors than tensors need, or is not a dict of tensors.
    """
    members = _members(file)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{file.path} is a zip archive, but not one of PyTorch's", "not-torch")
    folder = pickles[0][: -len("data.pkl")]
    order = members.get(folder + "byteorder")
    if order is not None and bytes(file.view[order.offset : order.offset + order.length]) != b"little":
        raise WeightsError(f"{file.path} is big-endian", "byte-order")
    member = members[pickles[0]]
    if member.length > _MAX_PICKLE:
        raise WeightsError(f"{file.path}: data.pkl is larger than any state dict's", "pickle-size")
    stop = member.offset + member.length
    state = Unpickler(
        file.view, file.path, _CALLS, names=_TYPES, persistent=_storage, start=member.offset, stop=stop
    ).load()
    if type(state) is not dict:
        raise WeightsError(f"{file.path} is not a dict of tensors", "not-a-dict")
    tensors = {}
    for name, tensor in state.items():
        what = f"{file.path}: {one_line(str(name))}"
        if type(name) is not str or not name or len(name) > MAX_NAME or not isinstance(tensor, _Tensor):
            raise WeightsError(f"{what} is not a tensor", "tensor")
        tensors[name] = _place(file, members, folder, tensor, what)
    check_total(sum(tensor.nbytes for tensor in tensors.values()), file.size, file.path)
    return tensors
