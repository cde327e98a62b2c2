"""PyTorch's .bin / .pt files (since version 1.6), read without PyTorch and without executing anything.

Such a file is a zip archive of uncompressed members: data.pkl, a pickle of names and of references to
storages, and one member per storage. The storages are mapped where they lie. Only what a state dict needs is
understood: a function or class beside that is refused by name.
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
    printable,
    size_of,
)
from paddlemix.checkpoint.unpickle import Unpickler, make_dict
from paddlemix.utils.errors import WeightsError

MAGIC = b"PK\x03\x04"
# The pickle and the table of members of a real shard take some 100 KB; zipfile makes 1 KB of each member.
_MAX_PICKLE = 64 << 20
_MAX_DIRECTORY = 4 << 20


# ---- the archive


class _Member(NamedTuple):
    offset: int
    length: int


class _View:
    """A mapped file as zipfile reads it, which takes the table of members into memory as long as its header says."""

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
    """The archive's members by name, each checked to be stored as it is and to lie in the file."""
    try:
        archive = zipfile.ZipFile(_View(file))
    # A table that lies raises nearly anything of these.
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
        raise WeightsError(f"{file.path} is not a whole zip archive; it may be cut short ({error})") from None
    end = file.size - 22 - len(archive.comment)
    if bytes(file.view[end : end + 4]) != b"PK\x05\x06":
        raise WeightsError(f"{file.path}: bytes follow its end")
    members: Dict[str, _Member] = {}
    for info in archive.infolist():
        what = f"{file.path}: member {printable(info.filename)}"
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise WeightsError(f"{what} is compressed or encrypted; PyTorch stores members as they are")
        # The local header may have another extra field than the table.
        offset = info.header_offset
        header = bytes(file.view[offset : offset + 30])
        if len(header) < 30 or header[:4] != MAGIC:
            raise WeightsError(f"{what} lies outside the file")
        data = offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if data + info.file_size > archive.start_dir:
            raise WeightsError(f"{what} lies outside the file")
        if info.filename in members:
            raise WeightsError(f"{what} is in it twice")
        members[info.filename] = _Member(data, info.file_size)
    if min((info.header_offset for info in archive.infolist()), default=0) != 0:
        raise WeightsError(f"{file.path} is not a whole zip archive: it does not begin with a member")
    return members


# ---- what a state dict's pickle may name, as data


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
        raise WeightsError("refused: a reference to something that is not a storage")
    if type(elements) is not int or elements < 0:
        raise WeightsError("broken: a storage of no size")
    return _Storage(storage_type.dtype, key, elements)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise WeightsError("broken: a tensor without a storage")
    shape = check_shape(shape, "a tensor")
    strides = check_shape(strides, "a tensor's strides")
    if len(shape) != len(strides):
        raise WeightsError("broken: a tensor's strides do not fit its shape")
    elements = last = 1
    for n, step in zip(shape, strides):
        elements *= n
        last += (n - 1) * step
    # Overlapping elements (a broadcast scalar, say) could claim any size from a few bytes.
    if elements and (offset + last > storage.elements or elements > storage.elements - offset):
        raise WeightsError(f"a tensor of shape {list(shape)} does not fit its storage")
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise WeightsError("broken: a parameter without a tensor")
    return tensor


_CALLS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): make_dict,
}
_TYPES = {("torch", name): _StorageType(dtype) for name, dtype in TORCH_STORAGES.items()}


# ---- tensors


def _place(
    file: MappedFile, members: Dict[str, _Member], folder: str, tensor: _Tensor, what: str
) -> StoredTensor:
    storage = tensor.storage
    member = members.get(f"{folder}data/{storage.key}")
    if member is None or member.length != size_of(storage.dtype, (storage.elements,)):
        raise WeightsError(f"{what}: its storage is missing or of another size than promised")
    width = NUMPY_TYPES[storage.dtype].itemsize
    start = member.offset + tensor.offset * width
    nbytes = size_of(storage.dtype, tensor.shape)
    in_order = []
    step = 1
    for n in reversed(tensor.shape):
        in_order.append(step)
        step *= n
    if nbytes == 0 or all(
        n == 1 or s == o for n, s, o in zip(tensor.shape, tensor.strides, reversed(in_order))
    ):
        where = FileBytes(file, start, nbytes)
        return StoredTensor(
            storage.dtype, tensor.shape, lambda: file.array(start, storage.dtype, tensor.shape), where
        )

    def strided() -> np.ndarray:
        flat = file.array(start, storage.dtype, (storage.elements - tensor.offset,))
        return np.lib.stride_tricks.as_strided(
            flat, tensor.shape, [s * width for s in tensor.strides], writeable=False
        )

    return StoredTensor(storage.dtype, tensor.shape, strided)


def open_torch_bin(file: MappedFile) -> Dict[str, StoredTensor]:
    """The tensors of a state dict by name. Reads the archive's table and its pickle, not the storages.

    Raises:
        WeightsError: the file names anything but tensors, is broken, or holds something else than tensors by
        name.
    """
    members = _members(file)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"{file.path} is a zip archive, but not one of PyTorch's")
    folder = pickles[0][: -len("data.pkl")]
    order = members.get(folder + "byteorder")
    if order is not None and bytes(file.view[order.offset : order.offset + order.length]) != b"little":
        raise WeightsError(f"{file.path} was written in another byte order")
    member = members[pickles[0]]
    if member.length > _MAX_PICKLE:
        raise WeightsError(f"{file.path}: data.pkl is larger than any state dict's")
    stop = member.offset + member.length
    state = Unpickler(
        file.view, file.path, _CALLS, names=_TYPES, persistent=_storage, start=member.offset, stop=stop
    ).load()
    if type(state) is not dict:
        raise WeightsError(f"{file.path} does not hold tensors by name")
    tensors = {}
    for name, tensor in state.items():
        what = f"{file.path}: {printable(str(name))}"
        if type(name) is not str or not name or len(name) > MAX_NAME or not isinstance(tensor, _Tensor):
            raise WeightsError(f"{what} is not a tensor")
        tensors[name] = _place(file, members, folder, tensor, what)
    check_total(sum(tensor.nbytes for tensor in tensors.values()), file.size, file.path)
    return tensors
