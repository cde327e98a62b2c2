"""Paddle's .pdparams / .pdopt / .pth files: read without ever executing anything, written a tensor at a time.

Such a file is a pickle of names and numpy arrays. paddle.load would run any code in it; the reader here knows the few
constructors that arrays need and refuses the rest by name (unpickle.py). Arrays are views of the mapped file, except
those of pickle protocol 2, which stores them as text to be decoded.

The writer emits the pickle itself, with one tensor in memory at a time, and aligns each array to 64 bytes, so that it
can be used in place. paddle.load of 2.x and 3.x reads the result.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from paddlemix.checkpoint.sink import Sink
from paddlemix.checkpoint.tensors import (
    MAX_NAME,
    NUMPY_TYPES,
    FileBytes,
    MappedFile,
    StoredTensor,
    check_shape,
    check_total,
    size_of,
)
from paddlemix.checkpoint.unpickle import Blob, Buildable, LazyText, Unpickler, make_dict
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.texts import one_line

# Paddle's own entries in a state dict: structured name → parameter name, and arrays cut in pieces (protocols 2 and 3).
NAME_TABLE = "StructuredToParameterName@@"
PIECES = "UnpackBigParamInfor@@"

# numpy's type codes → our names. Paddle stores bfloat16 as uint16, and nothing else as uint16.
_CODES = {kind.str[1:]: name for name, kind in NUMPY_TYPES.items()}
_CODE_OF = {name: code for code, name in _CODES.items()}

# How deep a state may be nested.
_MAX_DEPTH = 64


# ---- the constructors that a file may name, as data


class _Dtype(Buildable):
    """numpy.dtype("f4", False, True) and its state (3, "<", None, None, None, -1, -1, 0)."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        # Only a string is shown: nested lists may be endless.
        if type(code) is not str or code not in _CODES:
            shown = one_line(code) if type(code) is str else "without a name"
            raise WeightsError(f"refused: arrays of type {shown}", "refused", "dtype", shown)
        self.code = code

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 5 or state[2:5] != (None, None, None):
            raise WeightsError("refused: arrays of a compound type", "refused", "dtype")
        if state[1] not in ("<", "|"):
            text = "refused: big-endian arrays; convert them on the machine that wrote them"
            raise WeightsError(text, "refused", "byte-order")


class _Array(Buildable):
    """numpy's _reconstruct(ndarray, (0,), b"b") and its state (1, shape, dtype, fortran order, bytes)."""

    code: Optional[str] = None
    nbytes = 0

    def __init__(self, kind: Any, shape: Any, code: Any):
        if kind is not _NDARRAY or shape != (0,):
            raise WeightsError("refused: an array of another class than numpy's", "refused")

    def build(self, state: Any) -> None:
        if self.code is not None:
            raise WeightsError("broken: an array with two states")
        _, shape, dtype, self.fortran, self.data = state
        if not isinstance(dtype, _Dtype):
            raise WeightsError("broken: an array without a type")
        self.shape = check_shape(shape, "an array")
        size = int(dtype.code[1:])
        for n in self.shape:
            size *= n
        if isinstance(self.data, _Encoded):
            # The exact length is checked after decoding.
            fits = self.data.may_have(size)
        else:
            fits = isinstance(self.data, Blob) and self.data.length == size
        if not fits:
            raise WeightsError(f"an array of shape {list(self.shape)} does not fit the bytes stored for it", "shape")
        self.nbytes = size
        self.code = dtype.code

    def load(self, file: MappedFile) -> np.ndarray:
        if self.code is None:
            raise WeightsError(f"{file.path}: an array without data", "broken")
        kind = np.dtype("<" + self.code)
        if self.nbytes == 0:
            return np.empty(self.shape, kind)
        if isinstance(self.data, _Encoded):
            data = self.data.decode(file)
            if len(data) != self.nbytes:
                raise WeightsError(f"{file.path}: an array of shape {list(self.shape)} does not fit its bytes", "shape")
            flat = np.frombuffer(data, kind)
        else:
            flat = np.frombuffer(file.view, kind, self.nbytes // kind.itemsize, self.data.offset)
        return flat.reshape(self.shape[::-1]).T if self.fortran else flat.reshape(self.shape)


class _Encoded:
    """_codecs.encode(text, "latin1"): how protocol 2 writes bytes.

    Encoded on demand only: a file may refer to the same text a million times.
    """

    def __init__(self, text: Any, encoding: Any):
        if encoding != "latin1" or not isinstance(text, (str, LazyText)):
            raise WeightsError("refused: text in an encoding other than latin1", "refused")
        self.text = text

    @property
    def most(self) -> int:
        """Upper bound of its bytes; exact for a short text."""
        return len(self.text) if isinstance(self.text, str) else self.text.length

    def may_have(self, size: int) -> bool:
        """Whether it can have `size` bytes: UTF-8 takes one or two per Latin-1 character."""
        if isinstance(self.text, str):
            return size == len(self.text)
        return self.text.length // 2 <= size <= self.text.length

    def decode(self, file: MappedFile) -> bytes:
        place = ""
        try:
            if isinstance(self.text, str):
                return self.text.encode("latin1")
            start = self.text.offset
            place = f" at byte {start}"
            return str(file.view[start : start + self.text.length], "utf-8").encode("latin1")
        except UnicodeError:
            raise WeightsError(f"{file.path} is broken (an array's text{place})", "text") from None


# The name numpy.ndarray, which a file only passes to _reconstruct.
_NDARRAY = object()


class _Scalar:
    """numpy's scalar(dtype, bytes)."""

    def __init__(self, dtype: Any, data: Any):
        if not isinstance(dtype, _Dtype):
            raise WeightsError("broken: a number without a type")
        self.code, self.data = dtype.code, data


def _empty_bytes(*arguments: Any) -> Blob:
    if arguments:
        raise WeightsError("refused: bytes made from arguments", "refused")
    return Blob(0, 0)


def _named_tensor(pair: Any) -> Any:
    """tuple((name, array)): how paddle.save writes a tensor outside a state dict. The name is not needed."""
    if type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str and isinstance(pair[1], _Array):
        return pair[1]
    raise WeightsError("refused: a tuple made from anything but a tensor's name and values", "refused")


_BUILTINS = ("builtins", "__builtin__")
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_CALLS: Dict[Tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
    ("collections", "OrderedDict"): make_dict,
}
for _module in _NUMPY_CORES:
    _CALLS[_module, "_reconstruct"] = _Array
    _CALLS[_module, "scalar"] = _Scalar
for _module in _BUILTINS:
    _CALLS[_module, "bytes"] = _empty_bytes
    _CALLS[_module, "tuple"] = _named_tensor
_NAMES = {("numpy", "ndarray"): _NDARRAY}


# PyTorch's old format begins with this number, pickled.
_TORCH_BEFORE_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P"


def _parse(file: MappedFile) -> Any:
    if bytes(file.view[:13]) == _TORCH_BEFORE_1_6:
        raise WeightsError(f"{file.path} is of a PyTorch before 1.6; re-save it with a newer one", "old-torch")
    return Unpickler(file.view, file.path, _CALLS, _NAMES).load()


# ---- weights


def _as_stored(file: MappedFile, name: str, array: Any) -> StoredTensor:
    if not isinstance(array, _Array) or array.code is None:
        raise WeightsError(f"{file.path}: {one_line(name)} is not a tensor", "tensor")
    where = None
    if isinstance(array.data, Blob) and (not array.fortran or len(array.shape) < 2):
        where = FileBytes(file, array.data.offset, array.nbytes)
    return StoredTensor(_CODES[array.code], array.shape, lambda: array.load(file), where)


def _join(file: MappedFile, objects: Dict[Any, Any]) -> Dict[str, StoredTensor]:
    """Join arrays that paddle.save cut in pieces. Returns them and removes the pieces from `objects`."""
    table = objects.pop(PIECES, {})
    joined = {}
    broken = WeightsError(f"{file.path} is broken (its table of cut arrays)", "pieces")
    if type(table) is not dict:
        raise broken
    for name, entry in table.items():
        if type(name) is not str or name in objects or type(entry) is not dict:
            raise broken
        shape = check_shape(entry.get("OriginShape"), f"{file.path}: {one_line(name)}")
        slices = entry.get("slices")
        if type(slices) is not list or not slices or not all(type(s) is str and s in objects for s in slices):
            raise broken
        if len(set(slices)) < len(slices):
            raise broken
        pieces = [_as_stored(file, piece, objects.pop(piece)) for piece in slices]
        dtype = pieces[0].dtype
        if any(piece.dtype != dtype for piece in pieces) or sum(p.nbytes for p in pieces) != size_of(dtype, shape):
            raise broken

        def load(pieces=pieces, shape=shape):
            return np.concatenate([piece.load().reshape(-1) for piece in pieces]).reshape(shape)

        joined[name] = StoredTensor(dtype, shape, load)
    return joined


def open_pdparams(file: MappedFile) -> Dict[str, StoredTensor]:
    """The tensors of a state dict by name. Reads the pickle's instructions, not the arrays.

    Raises:
        WeightsError: the file is broken, uses other constructors than arrays need, or is not a dict of tensors.
    """
    objects = _parse(file)
    if type(objects) is not dict:
        raise WeightsError(f"{file.path} is not a dict of tensors", "not-a-dict")
    objects.pop(NAME_TABLE, None)
    tensors = _join(file, objects)
    for name, value in objects.items():
        if type(name) is not str or not name or len(name) > MAX_NAME:
            raise WeightsError(f"{file.path}: {one_line(str(name))} cannot be a tensor's name", "name")
        tensors[name] = _as_stored(file, name, value)
    check_total(sum(tensor.nbytes for tensor in tensors.values()), file.size, file.path)
    return tensors


def load_pdparams_object(path: str) -> Any:
    """Any object of dicts, lists, tuples, numbers, strings and tensors that paddle.save wrote: optimizer, scheduler and
    scaler states. Tensors are numpy arrays (views of the file).

    Raises:
        WeightsError: the file is broken, or holds anything else.
    """
    file = MappedFile(path)
    made: Dict[int, Any] = {}
    keep: List[Any] = []
    promised = 0

    def finish(value: Any, depth: int = 0) -> Any:
        nonlocal promised
        if depth > _MAX_DEPTH:
            raise WeightsError(f"{file.path}: nested too deeply", "too-deep")
        # Shared objects are finished once; otherwise a small file could expand without bound.
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, (_Array, _Encoded)):
            promised += value.nbytes if isinstance(value, _Array) else value.most
            check_total(promised, file.size, file.path)
        if isinstance(value, _Array):
            done: Any = value.load(file)
        elif isinstance(value, LazyText):
            done = str(file.view[value.offset : value.offset + value.length], "utf-8")
        elif isinstance(value, Blob):
            done = bytes(file.view[value.offset : value.offset + value.length])
        elif isinstance(value, _Encoded):
            done = value.decode(file)
        elif isinstance(value, _Scalar):
            done = _number(file, value, finish(value.data, depth + 1))
        elif type(value) is dict:
            done = {key: finish(item, depth + 1) for key, item in value.items() if key != NAME_TABLE}
        elif type(value) is list:
            done = [finish(item, depth + 1) for item in value]
        elif type(value) is tuple:
            done = tuple(finish(item, depth + 1) for item in value)
        elif value is None or type(value) in (bool, int, float, str):
            return value
        else:
            raise WeightsError(f"{file.path}: refused: a bare name among its values", "refused")
        made[id(value)] = done
        keep.append(value)
        return done

    try:
        return finish(_parse(file))
    except UnicodeError:
        raise WeightsError(f"{file.path} is broken (a text)", "text") from None
    finally:
        file.close()


def _number(file: MappedFile, scalar: _Scalar, data: Any) -> Any:
    kind = np.dtype("<" + scalar.code)
    if type(data) is not bytes or len(data) != kind.itemsize:
        raise WeightsError(f"{file.path} is broken (a number that does not fit its type)", "number")
    return np.frombuffer(data, kind)[0]


# ---- writing

# Alignment of arrays, for the widest vector instructions.
_ALIGN = 64


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(n: int) -> bytes:
    if n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


class PdparamsWriter:
    """Writes a state dict to a Sink: for each tensor tensor(), its bytes and after_tensor(); then end()."""

    # Memo slots of what every array repeats. Dtypes follow.
    _RECONSTRUCT, _NDARRAY, _DTYPE, _SHAPE0, _CODE = range(5)

    def __init__(self, sink: Sink):
        self._sink = sink
        self._dtypes: Dict[str, int] = {}

        def remember(slot: int) -> bytes:
            return b"q" + bytes([slot]) + b"0"

        self._sink.write(b"\x80\x04")
        # The names are stored in the memo first, so that each array refers to them in two bytes.
        self._sink.write(b"cnumpy.core.multiarray\n_reconstruct\n" + remember(self._RECONSTRUCT))
        self._sink.write(b"cnumpy\nndarray\n" + remember(self._NDARRAY))
        self._sink.write(b"cnumpy\ndtype\n" + remember(self._DTYPE))
        self._sink.write(b"K\x00\x85" + remember(self._SHAPE0))
        self._sink.write(b"C\x01b" + remember(self._CODE))
        self._sink.write(b"}")

    def _dtype(self, dtype: str) -> bytes:
        slot = self._dtypes.get(dtype)
        if slot is not None:
            return b"h" + bytes([slot])
        slot = self._dtypes[dtype] = 5 + len(self._dtypes)
        order = "|" if NUMPY_TYPES[dtype].itemsize == 1 else "<"
        state = b"(K\x03" + _text(order) + b"NNN" + _integer(-1) * 2 + b"K\x00t"
        made = b"h" + bytes([self._DTYPE]) + _text(_CODE_OF[dtype]) + b"\x89\x88\x87R" + state + b"b"
        return made + b"q" + bytes([slot])

    def tensor(self, name: str, dtype: str, shape: Tuple[int, ...]) -> None:
        """Write everything up to the array's bytes, which the caller must write next."""
        head = _text(name)
        head += b"h%ch%ch%ch%c\x87R" % (self._RECONSTRUCT, self._NDARRAY, self._SHAPE0, self._CODE)
        head += b"(K\x01(" + b"".join(map(_integer, shape)) + b"t" + self._dtype(dtype) + b"\x89"
        self._sink.write(head)
        length = size_of(dtype, shape)
        # Padding: NONE POP takes two bytes and does nothing; BININT1 POP takes three.
        gap = -(self._sink.position + 9) % _ALIGN
        if gap == 1:
            gap += _ALIGN
        self._sink.write((b"K\x000" if gap % 2 else b"") + b"N0" * ((gap - 3 * (gap % 2)) // 2))
        self._sink.write(b"\x8e" + struct.pack("<Q", length))

    def after_tensor(self) -> None:
        self._sink.write(b"tbs")

    def end(self) -> None:
        self._sink.write(b".")
