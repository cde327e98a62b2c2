"""Conversion between dtypes, memory-mapped files, and the checks of shapes and names."""

import errno
import mmap
import os

import numpy as np
import pytest

from paddlemix.checkpoint import convert_dtype
from paddlemix.checkpoint.tensors import MappedFile, check_shape, own_pages
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.texts import one_line
from tests.helpers import refused


def test_bfloat16_rounds_to_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint64).astype(np.uint32)
    # Ties, and the neighbours of ties.
    ties = (np.arange(4096, dtype=np.uint32) << 19) | 0x8000
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    ours = convert_dtype(values, "float32", "bfloat16")
    assert ours.dtype == np.uint16
    np.testing.assert_array_equal(ours, values.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_bfloat16_of_known_bits():
    """Where ml_dtypes is missing too, as beside Paddle 2.6, whose own cast would cut all of these off."""
    known = {
        0x3F800000: 0x3F80, 0x3F807FFF: 0x3F80, 0x3F808000: 0x3F80, 0x3F808001: 0x3F81, 0x3F818000: 0x3F82,
        0xBF818000: 0xBF82, 0x3FFFFFFF: 0x4000, 0x00018000: 0x0002,
    }  # fmt: skip
    ours = convert_dtype(np.array(list(known), np.uint32).view(np.float32), "float32", "bfloat16")
    assert [hex(bits) for bits in ours.tolist()] == [hex(bits) for bits in known.values()]


def test_nan_and_infinity_survive():
    values = np.array([np.nan, -np.nan, np.inf, -np.inf], np.float32)
    # A NaN whose upper bits alone would be an infinity.
    values = np.append(values, np.array([0x7F800001], np.uint32).view(np.float32))
    back = convert_dtype(convert_dtype(values, "float32", "bfloat16"), "bfloat16", "float32")
    assert np.isnan(back[[0, 1, 4]]).all() and back[2] == np.inf and back[3] == -np.inf
    # float16's last NaN, whose rounding would carry over into the sign.
    last = np.array([0x7FFF], np.uint16).view(np.float16)
    assert np.isnan(convert_dtype(convert_dtype(last, "float16", "bfloat16"), "bfloat16", "float32")).all()
    assert np.isinf(convert_dtype(values[2:4], "float32", "float16")).all()


@pytest.mark.parametrize("src", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dst", ["float32", "float16", "bfloat16", "float64"])
def test_every_pair_keeps_small_numbers(src, dst):
    exact = (np.arange(-40, 40, dtype=np.float32) / 8).reshape(4, 20)
    stored = convert_dtype(exact, "float32", src)
    there = convert_dtype(stored, src, dst)
    assert there.shape == (4, 20)
    np.testing.assert_array_equal(convert_dtype(there, dst, "float32"), exact)
    # A view in another order gives the same numbers.
    np.testing.assert_array_equal(convert_dtype(stored.T, src, dst), there.T)


def test_same_dtype_is_not_copied():
    array = np.zeros(3, np.float32)
    assert convert_dtype(array, "float32", "float32") is array


@pytest.mark.parametrize(
    "value, src, dst",
    [
        (7e4, "float32", "float16"),
        (3.4e38, "float32", "bfloat16"),
        (1e39, "float64", "float32"),
        (1e5, "bfloat16", "float16"),
    ],
)
def test_a_finite_value_never_becomes_infinite(value, src, dst):
    array = convert_dtype(np.array([1.0, value], np.float64), "float64", src)
    with refused(WeightsError, "overflow", match=dst):
        convert_dtype(array, src, dst)


def test_integers_are_not_converted():
    with refused(WeightsError, "dtype"):
        convert_dtype(np.zeros(2, np.int64), "int64", "float32")


@pytest.mark.parametrize("shape", ["3", None, [1.0], [True], [-1], [1 << 40, 1 << 40], [0, 1 << 60], [1] * 33])
def test_shapes_that_are_none(shape):
    with refused(WeightsError, "shape"):
        check_shape(shape, "x")


def test_names_in_an_error_stay_in_one_line():
    assert one_line("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert one_line("模型") == "模型", "a path in a command to be copied"
    assert len(one_line("x" * 500)) == 81


def test_a_mapped_file_must_be_a_file(tmp_path):
    import os

    for path, code in ((tmp_path / "none", "unreadable"), (tmp_path, "not-regular")):
        with refused(WeightsError, code):
            MappedFile(str(path))
    (tmp_path / "empty").write_bytes(b"")
    with refused(WeightsError, "empty"):
        MappedFile(str(tmp_path / "empty"))
    os.mkfifo(tmp_path / "pipe")
    with refused(WeightsError, "not-regular"):
        MappedFile(str(tmp_path / "pipe"))


def test_arrays_outlive_the_file_and_forgotten_bytes_come_back(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    data.tofile(tmp_path / "data")
    file = MappedFile(str(tmp_path / "data"))
    view = file.array(0, "uint8", (1 << 20,))
    assert not view.flags.owndata and not view.flags.writeable
    file.forget(100, 900_000)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        file.fileno()
    del file
    np.testing.assert_array_equal(view, data)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EIO])
def test_a_file_system_without_mappings(tmp_path, monkeypatch, number):
    """Some FUSE: the file is read, and what is given back to the system's cache stays."""
    path = tmp_path / "weights"
    data = np.arange(5000, dtype="<f4")
    path.write_bytes(data.tobytes())

    def refuse(*arguments, **named):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", refuse)
    if number == errno.EIO:
        with refused(WeightsError, "unreadable", match="Input/output error"):
            MappedFile(str(path))
        return
    mapped = MappedFile(str(path))
    array = mapped.array(0, "float32", (5000,))
    mapped.forget(0, mapped.size)
    mapped.close()
    assert np.array_equal(array, data) and own_pages((2, 3), "bfloat16").shape == (2, 3)
