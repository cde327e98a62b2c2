"""PyTorch's .bin / .pt files (since version 1.6), read without PyTorch and without executing anything.

Such a file is a zip archive of uncompressed members: data.pkl, a pickle of names and of references to
storages, and one member per storage. The storages are mapped where they lie. Only what a state dict needs is
understood: a function or class beside that is refused by name.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np

from paddlemix.checkpoint.tensors import (
    MAX_NAME,
    NUMPY_TYPES,
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
# The pickle and the table of members of a real shard take some 100 KB.
_MAX_DIRECTORY = 64 << 20

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


# ---- the archive


class _Member(NamedTuple):
    offset: int
    length: int


def _find_directory(file: MappedFile) -> Tuple[int, int]:
    """(offset, length) of the archive's table of members."""
    broken = WeightsError(f"{file.path} is not a whole zip archive; it may be cut short")
    tail_start = max(0, file.size - 65557)
    tail = bytes(file.view[tail_start:])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise broken
    if at + 22 + struct.unpack_from("<H", tail, at + 20)[0] != len(tail):
        raise WeightsError(f"{file.path}: bytes follow its end")
    length, offset = struct.unpack_from("<II", tail, at + 12)
    end = tail_start + at
    if (
        offset == 0xFFFFFFFF
        or length == 0xFFFFFFFF
        or (end >= 20 and bytes(file.view[end - 20 : end - 16]) == b"PK\x06\x07")
    ):
        if end < 20 or bytes(file.view[end - 20 : end - 16]) != b"PK\x06\x07":
            raise broken
        (end,) = struct.unpack("<Q", bytes(file.view[end - 12 : end - 4]))
        if end + 56 > file.size or bytes(file.view[end : end + 4]) != b"PK\x06\x06":
            raise broken
        length, offset = struct.unpack("<QQ", bytes(file.view[end + 40 : end + 56]))
    if length > _MAX_DIRECTORY or offset + length != end:
        raise broken
    return offset, length


def _members(file: MappedFile) -> Dict[str, _Member]:
    """The archive's members by name, each checked to be stored as it is and to lie in the file."""
    start, length = _find_directory(file)
    table = bytes(file.view[start : start + length])
    members: Dict[str, _Member] = {}
    at = 0
    while at < length:
        if table[at : at + 4] != b"PK\x01\x02" or at + 46 > length:
            raise WeightsError(f"{file.path} is broken: its table of members")
        flags, method = struct.unpack_from("<HH", table, at + 8)
        packed, size = struct.unpack_from("<II", table, at + 20)
        n_name, n_extra, n_comment = struct.unpack_from("<HHH", table, at + 28)
        (offset,) = struct.unpack_from("<I", table, at + 42)
        name = table[at + 46 : at + 46 + n_name].decode("utf-8", "replace")
        extra = table[at + 46 + n_name : at + 46 + n_name + n_extra]
        at += 46 + n_name + n_extra + n_comment
        packed, size, offset = _wide(extra, packed, size, offset, file.path)
        what = f"{file.path}: member {printable(name)}"
        if flags & 1 or method != 0 or packed != size:
            raise WeightsError(f"{what} is compressed or encrypted; PyTorch stores members as they are")
        if offset + 30 > start or bytes(file.view[offset : offset + 4]) != MAGIC:
            raise WeightsError(f"{what} lies outside the file")
        n_name, n_extra = struct.unpack("<HH", bytes(file.view[offset + 26 : offset + 30]))
        data = offset + 30 + n_name + n_extra
        if data + size > start:
            raise WeightsError(f"{what} lies outside the file")
        if name in members:
            raise WeightsError(f"{what} stands in it twice")
        members[name] = _Member(data, size)
    return members


def _wide(extra: bytes, packed: int, size: int, offset: int, path: str) -> Tuple[int, int, int]:
    """Sizes and offset of a member, from its zip64 field where they do not fit 32 bits."""
    values = [size, packed, offset]
    if 0xFFFFFFFF not in values:
        return packed, size, offset
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field = extra[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            values = [next(wide, -1) if value == 0xFFFFFFFF else value for value in values]
            if -1 not in values:
                return values[1], values[0], values[2]
        at += 4 + length
    raise WeightsError(f"{path} is broken: a member without its size")


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
_TYPES = {("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()}


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
    if member.length > _MAX_DIRECTORY:
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
