"""safetensors, against the library's own reader and writer, and headers that lie."""

import struct

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights, write_sharded
from tests.checkpoint import files
from tests.checkpoint.files import arrays, entry, safetensors_bytes


def refused(tmp_path, data, code):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    files.refused(path, code)


def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path):
    numpy_side = pytest.importorskip("safetensors.numpy")
    named = arrays()
    items = [(name, dtype, array.shape, lambda a=array: a) for name, (dtype, array) in named.items()]
    assert write_sharded(str(tmp_path / "ours"), items, format="safetensors") == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(str(tmp_path / "ours/model.safetensors"), "numpy") as file:
        assert sorted(file.keys()) == sorted(named) and file.metadata() == {"format": "np"}
        for name, (dtype, array) in named.items():
            assert tuple(file.get_slice(name).get_shape()) == array.shape
            if dtype != "bfloat16":
                np.testing.assert_array_equal(file.get_tensor(name), array)
    with open_weights(str(tmp_path / "ours")) as reader:
        for name, (dtype, array) in named.items():
            assert reader.info(name).dtype == dtype
            np.testing.assert_array_equal(reader.read(name), array)
            assert array.size == 0 or reader.read(name).flags.aligned

    theirs = {name: array for name, (dtype, array) in named.items() if dtype != "bfloat16"}
    numpy_side.save_file(theirs, str(tmp_path / "theirs.safetensors"))
    with open_weights(str(tmp_path / "theirs.safetensors")) as reader:
        assert sorted(reader.keys()) == sorted(theirs)
        for name, array in theirs.items():
            np.testing.assert_array_equal(reader.read(name), array)


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}


def test_the_good_one(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(22)))
    with open_weights(str(tmp_path / "w.safetensors")) as reader:
        assert reader.keys() == ["a", "b"] and reader.total_bytes == 22


@pytest.mark.parametrize(
    "header, size, code",
    [
        ({"a": entry("F32", [2, 2], 0, 16)}, 12, "truncated"),
        ({"a": entry("F32", [2, 2], 0, 16)}, 17, "trailing-bytes"),
        ({"a": entry("F32", [2, 2], 4, 20)}, 20, "gap"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "overlap"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20, "gap"),
        ({"a": entry("F32", [3], 0, 8)}, 8, "data_offsets"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "data_offsets"),
        ({"a": entry("F32", [1 << 40, 1 << 40], 0, 8)}, 8, "shape"),
        ({"a": entry("F32", [1 << 44], 0, 1 << 46)}, 8, "truncated"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, "shape"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "shape"),
        ({"a": entry("F32", [True, 2], 0, 8)}, 8, "shape"),
        ({"a": entry("F8_E4M3", [8], 0, 8)}, 8, "dtype"),
        ({"a": entry(["F32"], [2], 0, 8)}, 8, "dtype"),
        ({"a": dict(entry("F32", [2], 0, 8), extra=1)}, 8, "entry"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, True]}}, 8, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "data_offsets"),
        ({"a": 5}, 0, "entry"),
        ({"": entry("F32", [2], 0, 8)}, 8, "name"),
        ({"x" * 1025: entry("F32", [2], 0, 8)}, 8, "name"),
        ({"__metadata__": 3}, 0, "metadata"),
        (b"[]", 0, "json"),
        (b"{", 0, "json"),
        (b"\xff\xfe", 0, "json"),
        (b'{"a":' * 100_000, 0, "json"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "json"),
        (b'{"a": [' + b"{}," * (1 << 20) + b"0]}", 0, "json"),
        (b'{"a": NaN}', 0, "json"),
        (b'{"a": {}, "a": {}}', 0, "json"),
    ],
)
def test_headers_that_lie(tmp_path, header, size, code):
    refused(tmp_path, safetensors_bytes(header, bytes(size)), code)


def test_sizes_that_lie(tmp_path):
    refused(tmp_path, b"abc", "truncated")
    refused(tmp_path, struct.pack("<Q", 100) + b"{}", "header")
    refused(tmp_path, struct.pack("<Q", 1 << 63) + b"{}", "header")
