"""Weights files for the tests, made by other programs' rules: pickle's own writer, zipfile, json."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np

from paddlemix.checkpoint import open_weights
from paddlemix.utils.errors import WeightsError
from tests import helpers


def arrays(seed=0):
    """One array per stored type and odd shape, as {name: (dtype, array)}; bfloat16 as uint16."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((17, 9)).astype(np.float32)
    return {
        "a.weight": ("float32", wide),
        "b.weight": ("bfloat16", rng.integers(0, 65536, (3, 5, 7), dtype=np.uint16)),
        "c.weight": ("float16", wide[:4].astype(np.float16)),
        "d.scalar": ("float32", np.array(2.5, np.float32)),
        "e.empty": ("float32", np.empty((0, 4), np.float32)),
        "f.ids": ("int64", rng.integers(-5, 5, (6,))),
        "g.mask": ("bool", np.array([True, False, True])),
        "h.名字": ("uint8", rng.integers(0, 256, (11,), dtype=np.uint8)),
        "i.double": ("float64", rng.standard_normal((2, 2))),
        "j.small": ("int8", np.array([-1, 2], np.int8)),
    }


def pickled(objects, path, protocol=4):
    with open(path, "wb") as file:
        pickle.dump(objects, file, protocol=protocol)
    return str(path)


def torch_pickle(tensors, extra=b""):
    """data.pkl of a state dict. tensors: {name: (storage key, torch type, elements, offset, shape,
    strides)}.
    """
    out = io.BytesIO()

    def text(value):
        data = value.encode()
        out.write(b"X" + struct.pack("<I", len(data)) + data)

    def number(value):
        out.write(b"\x8a\x08" + struct.pack("<q", value))

    out.write(b"\x80\x02}(")
    for name, (key, kind, elements, offset, shape, strides) in tensors.items():
        text(name)
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        text("storage")
        out.write(b"ctorch\n" + kind.encode() + b"\n")
        text(key)
        text("cpu")
        number(elements)
        out.write(b"tQ")
        number(offset)
        for values in (shape, strides):
            out.write(b"(")
            for value in values:
                number(value)
            out.write(b"t")
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")
    out.write(extra + b"u.")
    return out.getvalue()


def torch_zip(path, pickle_bytes, storages, folder="archive", method=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle_bytes)
        archive.writestr(f"{folder}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", b"3\n")
    return str(path)


_TORCH = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "bool": "BoolStorage",
}


def torch_file(path, named):
    """A .bin of {name: (dtype, array)}, one storage each."""
    tensors, storages = {}, {}
    for i, (name, (dtype, array)) in enumerate(named.items()):
        strides = [s // array.itemsize for s in array.strides]
        tensors[name] = (
            str(i),
            _TORCH[dtype],
            array.size,
            0,
            array.shape,
            strides,
        )
        storages[str(i)] = np.ascontiguousarray(array).tobytes()
    return torch_zip(path, torch_pickle(tensors), storages)


def safetensors_bytes(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read_pdparams(path):
    """All arrays of a file by name, as views of it."""
    with open_weights(str(path)) as reader:
        return {name: reader.read(name) for name in reader.keys()}


def refused(path, *about):
    """Opening this file or folder of weights must raise one line that names it, about these codes."""
    with helpers.refused(WeightsError, *about) as caught:
        open_weights(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
