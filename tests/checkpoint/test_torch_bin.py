"""PyTorch's .bin archives, by torch's own rules, and archives that only look like them."""

import struct
import zipfile

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights, torch_bin
from tests.checkpoint.files import arrays, refused, torch_file, torch_pickle, torch_zip


def test_every_type(tmp_path):
    named = arrays()
    path = torch_file(tmp_path / "pytorch_model.bin", named)
    with open_weights(str(tmp_path)) as reader:
        assert reader.keys() == list(named) and reader.files == [path]
        for name, (dtype, array) in named.items():
            assert reader.info(name).dtype == dtype and reader.info(name).shape == array.shape
            np.testing.assert_array_equal(reader.read(name), array)
        assert not reader.read("a.weight").flags.owndata


def test_shared_storages_offsets_and_strides(tmp_path):
    data = np.arange(24, dtype=np.float32)
    pickle_bytes = torch_pickle(
        {
            "whole": ("0", "FloatStorage", 24, 0, (4, 6), (6, 1)),
            "tied": ("0", "FloatStorage", 24, 0, (4, 6), (6, 1)),
            "turned": ("0", "FloatStorage", 24, 0, (6, 4), (1, 6)),
            "part": ("0", "FloatStorage", 24, 7, (2, 3), (6, 1)),
            "scalar": ("0", "FloatStorage", 24, 23, (), ()),
            "ones": ("0", "FloatStorage", 24, 2, (1, 3), (99, 1)),
        }
    )
    path = torch_zip(tmp_path / "w.bin", pickle_bytes, {"0": data.tobytes()})
    with open_weights(path) as reader:
        whole = data.reshape(4, 6)
        for name, wanted in (
            ("whole", whole),
            ("tied", whole),
            ("turned", whole.T),
            ("part", whole[1:3, 1:4]),
            ("scalar", data[23]),
            ("ones", data[None, 2:5]),
        ):
            np.testing.assert_array_equal(reader.read(name), wanted)
        assert isinstance(reader.raw("turned"), np.ndarray) and isinstance(reader.raw("part"), np.ndarray)
        assert not isinstance(reader.raw("ones"), np.ndarray)


@pytest.mark.parametrize(
    "spec, code",
    [
        (("0", "FloatStorage", 4, 1, (4,), (1,)), "shape"),
        (("0", "FloatStorage", 4, 0, (1 << 30,), (0,)), "shape"),
        (("0", "FloatStorage", 4, 0, (3, 3), (1, 1)), "shape"),
        (("0", "FloatStorage", 4, 0, (2,), (1, 1)), "strides"),
        (("0", "FloatStorage", 4, 0, (2,), (-1,)), "shape"),
        (("0", "FloatStorage", 4, -1, (2,), (1,)), "storage"),
        (("0", "FloatStorage", 8, 0, (8,), (1,)), "storage"),
        (("0", "DoubleStorage", 4, 0, (4,), (1,)), "storage"),
        (("../0", "FloatStorage", 4, 0, (4,), (1,)), "storage"),
        (("0", "ComplexFloatStorage", 4, 0, (4,), (1,)), "torch.ComplexFloatStorage"),
        (("0", "FloatStorage", -4, 0, (4,), (1,)), "storage"),
    ],
)
def test_tensors_that_promise_more_than_there_is(tmp_path, spec, code):
    refused(torch_zip(tmp_path / "w.bin", torch_pickle({"w": spec}), {"0": bytes(16)}), code)


def test_tied_tensors_are_few(tmp_path):
    """Each of a thousand tensors shows the same storage: a model of a thousand times the file."""
    whole = ("0", "FloatStorage", 1000, 0, (1000,), (1,))
    data = {"0": bytes(4000)}
    with open_weights(torch_zip(tmp_path / "w.bin", torch_pickle(dict.fromkeys("abc", whole)), data)) as reader:
        assert reader.total_bytes == 12_000
    many = torch_pickle({f"w{i}": whole for i in range(1000)})
    refused(torch_zip(tmp_path / "w.bin", many, data), "size")


def test_archives_that_are_not_torchs(tmp_path):
    empty = torch_pickle({})
    path = tmp_path / "w.bin"
    refused(torch_zip(path, empty, {}, method=zipfile.ZIP_DEFLATED), "compressed")
    refused(torch_zip(path, empty, {}, byteorder=b"big"), "byte-order")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(path, "not-torch")
    refused(torch_zip(path, b"\x80\x02N.", {}), "not-a-dict")
    refused(torch_zip(path, b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", {}), "tensor")
    refused(torch_zip(path, b"\x80\x02NQ.", {}), "broken")
    refused(torch_zip(path, b"\x80\x02(NNNNNtQ.", {}), "refused")
    refused(torch_zip(path, b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.", {}), "tensor")


def test_parameters_are_tensors(tmp_path):
    inner = torch_pickle({"w": ("0", "FloatStorage", 2, 0, (2,), (1,))})
    at = inner.index(b"ctorch._utils")
    wrapped = inner[:at] + b"ctorch._utils\n_rebuild_parameter\n" + inner[at:-2] + b"\x88N\x87Ru."
    path = torch_zip(tmp_path / "w.bin", wrapped, {"0": np.array([3, 4], np.float32).tobytes()})
    with open_weights(path) as reader:
        assert reader.read("w").tolist() == [3, 4]


def test_cut_short_or_with_bytes_behind(tmp_path):
    data = open(torch_file(tmp_path / "good.bin", arrays()), "rb").read()
    path = tmp_path / "bad.bin"
    for length in range(10, len(data) - 1, 211):
        path.write_bytes(data[:length])
        refused(path, "zip")
    path.write_bytes(data + b"x")
    refused(path, "trailing-bytes")
    # Bytes in front of the archive shift every offset.
    path.write_bytes(b"PK\x03\x04" + data)
    refused(path, "zip")


def test_directories_that_lie(tmp_path):
    data = open(torch_file(tmp_path / "good.bin", arrays()), "rb").read()
    first = data.index(b"PK\x01\x02")
    path = tmp_path / "bad.bin"

    def patched(at, value):
        changed = bytearray(data)
        changed[at : at + len(value)] = value
        path.write_bytes(changed)
        return path

    refused(patched(first, b"XXXX"), "zip")
    refused(patched(first + 42, struct.pack("<I", 0xFFFFFF)), "outside")
    refused(patched(first + 20, struct.pack("<II", 1 << 30, 1 << 30)), "outside")
    refused(patched(first + 8, b"\x01"), "compressed")
    refused(patched(first + 20, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)), "outside")
    refused(patched(len(data) - 22 + 12, struct.pack("<I", 1 << 30)), "zip")
    # Two members of one name.
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"1")
            archive.writestr("a/data.pkl", b"2")
    refused(path, "duplicate")


def test_a_table_of_members_beyond_any_state_dicts(tmp_path, monkeypatch):
    path = torch_file(tmp_path / "w.bin", arrays())
    monkeypatch.setattr(torch_bin, "_MAX_DIRECTORY", 200)
    refused(path, "zip")


def test_zip64(tmp_path, monkeypatch):
    """Large checkpoints keep sizes and offsets in zip64 fields; force them for a small one."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    named = {"w": ("float32", np.arange(200, dtype=np.float32)), "v": ("float32", np.ones(50, np.float32))}
    path = torch_file(tmp_path / "w.bin", named)
    assert b"PK\x06\x06" in open(path, "rb").read()
    with open_weights(path) as reader:
        np.testing.assert_array_equal(reader.read("w"), named["w"][1])
        np.testing.assert_array_equal(reader.read("v"), named["v"][1])


def test_the_golden_torch_pickle(shared):
    with open_weights(str(shared / "goldens/tiny_model_bin")) as torch_reader:
        with open_weights(str(shared / "goldens/tiny_model/hf_checkpoint")) as reader:
            assert sorted(torch_reader.keys()) == sorted(reader.keys())
            for name in reader.keys():
                assert torch_reader.info(name).dtype == reader.info(name).dtype
                np.testing.assert_array_equal(torch_reader.read(name), reader.read(name))
