"""safetensors files: eight bytes of length, a JSON header, then the arrays end to end.

The reader maps the file and checks the header against the file's size before using anything.
"""

from __future__ import annotations

import functools
import json
import struct
from typing import Any, Dict, List, Tuple

from paddlemix.checkpoint.tensors import (
    MAX_NAME,
    SAFETENSORS_TYPES,
    FileBytes,
    MappedFile,
    StoredTensor,
    check_shape,
    size_of,
)
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.json_files import strict_json
from paddlemix.utils.texts import one_line

# The 7B's header has 100 KB.
MAX_HEADER = 32 << 20

_NAME_OF = {name: theirs for theirs, name in SAFETENSORS_TYPES.items()}
_ALIGN = 64


def open_safetensors(file: MappedFile) -> Dict[str, StoredTensor]:
    """The tensors of a file by name; reads the header only.

    Raises:
        WeightsError: a header that is too large, not JSON or malformed; an unknown dtype; offsets that overlap, leave
        gaps, leave the file or do not fit the shape; bytes after the last tensor.
    """
    path = file.path
    if file.size < 8:
        raise WeightsError(f"{path} is too short for a safetensors file", "truncated")
    (length,) = struct.unpack("<Q", bytes(file.view[:8]))
    if length > MAX_HEADER or 8 + length > file.size:
        raise WeightsError(f"{path} is broken: its header would have {length} bytes", "header")
    header = strict_json(bytes(file.view[8 : 8 + length]), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path} is broken: its metadata is not an object", "metadata")
    start = 8 + length
    tensors = {}
    spans = []
    for name, entry in header.items():
        what = f"{path}: {one_line(name)}"
        if not name or len(name) > MAX_NAME:
            raise WeightsError(f"{what} cannot be a tensor's name", "name")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise WeightsError(f"{what} is not described by dtype, shape and data_offsets", "entry")
        dtype = SAFETENSORS_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise WeightsError(f"{what} is of type {one_line(str(entry['dtype']))}, which is not supported", "dtype")
        shape = check_shape(entry["shape"], what)
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
            raise WeightsError(f"{what}: its data_offsets are not two positions", "data_offsets")
        begin, end = offsets
        if end - begin != size_of(dtype, shape):
            raise WeightsError(f"{what}: shape {list(shape)} does not fit its offsets", "shape", "data_offsets")
        if start + end > file.size:
            raise WeightsError(f"{what} lies outside the file, which is truncated or broken", "truncated")
        spans.append((begin, end, name))
        load = functools.partial(file.array, start + begin, dtype, shape)
        tensors[name] = StoredTensor(dtype, shape, load, FileBytes(file, start + begin, end - begin))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            kind = "overlap" if begin < at else "gap"
            raise WeightsError(f"{path} is broken: {kind} in the offsets before {one_line(name)}", kind)
        at = end
    if start + at != file.size:
        raise WeightsError(f"{path}: {file.size - start - at} bytes follow its end", "trailing-bytes")
    return tensors


def header(plan: List[Tuple[str, str, Tuple[int, ...]]]) -> bytes:
    """What precedes the arrays of a file with these tensors (name, dtype, shape), in this order."""
    table: Dict[str, Any] = {"__metadata__": {"format": "np"}}
    at = 0
    for name, dtype, shape in plan:
        end = at + size_of(dtype, shape)
        table[name] = {"dtype": _NAME_OF[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    data = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    data += b" " * (-(8 + len(data)) % _ALIGN)
    return struct.pack("<Q", len(data)) + data
