""".pdparams read and written without executing a pickle, in both of PaddlePaddle's protocols."""

import os
import pickle
import struct

import numpy as np
import pytest

from paddlemix.checkpoint import load_pdparams_object, open_weights, write_pdparams
from paddlemix.checkpoint.tensors import rows_of
from paddlemix.utils.errors import JobFailed, WeightsError
from tests import helpers
from tests.checkpoint import files
from tests.checkpoint.files import arrays, pickled, read_pdparams


def numpy_dict(named):
    return {name: array for name, (_, array) in named.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_what_pickle_writes(tmp_path, protocol):
    named = arrays()
    path = pickled(numpy_dict(named), tmp_path / "w.pdparams", protocol)
    with open_weights(path) as reader:
        assert reader.keys() == list(named)
        assert reader.total_bytes == sum(array.nbytes for _, array in named.values())
        for name, (dtype, array) in named.items():
            info = reader.info(name)
            assert (info.dtype, info.shape, info.nbytes, info.file) == (
                dtype,
                array.shape,
                array.nbytes,
                path,
            )
            np.testing.assert_array_equal(reader.read(name), array)
            assert reader.read(name).shape == array.shape


def test_large_arrays_are_views_of_the_file(tmp_path):
    path = pickled({"w": np.ones((300, 300), np.float32)}, tmp_path / "w.pdparams")
    view = read_pdparams(path)["w"]
    assert not view.flags.owndata and not view.flags.writeable


def test_fortran_order(tmp_path):
    array = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    path = pickled({"w": array}, tmp_path / "w.pdparams")
    with open_weights(path) as reader:
        np.testing.assert_array_equal(reader.read("w"), array)
        assert isinstance(reader.raw("w"), np.ndarray), "its bytes are not the C order's"
        np.testing.assert_array_equal(rows_of(reader.raw("w"), 1, 3, "float32", (4,)), array[1:3])


def test_protocol_2_text_is_decoded_when_read(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8)
    path = pickled({"w": array}, tmp_path / "w.pdparams", 2)
    np.testing.assert_array_equal(read_pdparams(path)["w"], array)
    # One two-byte letter made one-byte: the count no longer fits, which only decoding can tell.
    data = bytearray(open(path, "rb").read())
    at = data.index("\xc2\x80".encode("latin1"), 200)
    data[at : at + 2] = b"ab"
    (tmp_path / "x.pdparams").write_bytes(data)
    with open_weights(str(tmp_path / "x.pdparams")) as reader:
        with helpers.refused(WeightsError, "shape"):
            reader.read("w")
    data[at : at + 2] = b"\xff\xff"
    (tmp_path / "x.pdparams").write_bytes(data)
    with helpers.refused(WeightsError, "text"):
        read_pdparams(str(tmp_path / "x.pdparams"))
    # A short text is at hand when the file is opened, and still decoded no earlier.
    path = pickled({"w": array[:200]}, tmp_path / "y.pdparams", 2)
    np.testing.assert_array_equal(read_pdparams(path)["w"], array[:200])
    data = bytearray(open(path, "rb").read())
    at = data.index(b"\xc2")
    data[at : at + 2] = "ā".encode()
    (tmp_path / "y.pdparams").write_bytes(data)
    with helpers.refused(WeightsError, "text"):
        read_pdparams(path)


def test_arrays_in_pieces(tmp_path):
    whole = np.arange(20, dtype=np.float32)
    state = {
        "w@@.0": whole[:12],
        "w@@.1": whole[12:],
        "b": whole[:2],
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (4, 5), "slices": ["w@@.0", "w@@.1"]}},
        "StructuredToParameterName@@": {"w": "linear_0.w_0"},
    }
    found = read_pdparams(pickled(state, tmp_path / "w.pdparams", 2))
    assert sorted(found) == ["b", "w"]
    np.testing.assert_array_equal(found["w"], whole.reshape(4, 5))
    for entry in (
        None,
        {"OriginShape": (4, 6), "slices": ["w@@.0", "w@@.1"]},
        {"OriginShape": (4, 5), "slices": ["w@@.0", "w@@.7"]},
        {"OriginShape": (4, 5), "slices": ["w@@.0", ["w"]]},
        {"OriginShape": (4, 5), "slices": []},
        {"OriginShape": (4, 6), "slices": ["w@@.0", "w@@.0"]},
    ):
        state["UnpackBigParamInfor@@"] = {"w": entry}
        with pytest.raises(WeightsError):
            read_pdparams(pickled(state, tmp_path / "x.pdparams", 2))


def test_states_of_a_run(tmp_path):
    state = {
        "w_moment1_0": np.ones(3, np.float32),
        "LR_Scheduler": {"last_epoch": 7, "last_lr": 0.5},
        "list": [1, (True, None, "x" * 70_000, b"bytes"), -(1 << 40)],
        "scalar": np.float64(1.5),
        3: "whole-number keys",
        "StructuredToParameterName@@": {},
    }
    for protocol in (2, 3, 4):
        found = load_pdparams_object(pickled(state, tmp_path / "o.pdopt", protocol))
        assert found["LR_Scheduler"] == state["LR_Scheduler"] and found["list"] == state["list"]
        assert found["scalar"] == 1.5 and found[3] == state[3] and "StructuredToParameterName@@" not in found
        np.testing.assert_array_equal(found["w_moment1_0"], np.ones(3))
    with helpers.refused(WeightsError, "dtype", "u4"):
        load_pdparams_object(pickled({"key": np.arange(4, dtype=np.uint32)}, tmp_path / "k.pdopt"))


def test_a_small_file_cannot_grow_without_end(tmp_path):
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    path = pickled({"w": value}, tmp_path / "w.pdopt")
    found = load_pdparams_object(path)["w"]
    assert found[0] is found[1]
    for _ in range(10):
        value = [value, value]
    with helpers.refused(WeightsError, "too-deep"):
        load_pdparams_object(pickled({"w": value}, tmp_path / "w.pdopt"))
    loop = []
    loop.append(loop)
    with helpers.refused(WeightsError, "too-deep"):
        load_pdparams_object(pickled(loop, tmp_path / "w.pdopt"))


def test_writer_is_read_by_pickle_and_aligned(tmp_path):
    named = arrays()
    named["big"] = ("float32", np.empty((0, 1 << 33), np.float32))
    path = str(tmp_path / "w.pdparams")
    write_pdparams(path, named)
    with open(path, "rb") as file:
        loaded = pickle.load(file, encoding="latin1")
    assert list(loaded) == list(named)
    ours = read_pdparams(path)
    for name, (_, array) in named.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].size == 0 or ours[name].ctypes.data % 64 == 0
    # One pickle, and nothing behind it.
    assert open(path, "rb").read()[-1:] == b"."


def test_writer_handles_fortran_arrays_and_no_tensors(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    write_pdparams(str(tmp_path / "w.pdparams"), {"w": ("float32", array)})
    np.testing.assert_array_equal(read_pdparams(str(tmp_path / "w.pdparams"))["w"], array)
    write_pdparams(str(tmp_path / "n.pdparams"), {})
    assert read_pdparams(str(tmp_path / "n.pdparams")) == {}


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    path = tmp_path / "w.pdparams"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="as announced"):
        write_pdparams(str(path), {"w": ("float32", np.zeros(3, np.float64))})
    assert os.listdir(tmp_path) == ["w.pdparams"] and path.read_bytes() == b"old"
    with helpers.refused(JobFailed, "disk"):
        write_pdparams(str(path / "w.pdparams"), {})


def test_paddle_reads_ours_and_we_read_paddles(tmp_path):
    import paddle

    named = {k: v for k, v in arrays().items() if v[0] in ("float32", "float16", "bfloat16", "int64")}
    ours = str(tmp_path / "ours.pdparams")
    write_pdparams(ours, named)
    loaded = paddle.load(ours)
    assert sorted(loaded) == sorted(named)
    for name, (dtype, array) in named.items():
        assert str(loaded[name].dtype) == f"paddle.{dtype}" and tuple(loaded[name].shape) == array.shape
        np.testing.assert_array_equal(loaded[name].numpy(), array)
    for protocol in (2, 3, 4):
        theirs = str(tmp_path / "theirs.pdparams")
        paddle.save(loaded, theirs, protocol=protocol)
        with open_weights(theirs) as reader:
            assert sorted(reader.keys()) == sorted(named)
            for name, (dtype, array) in named.items():
                assert reader.info(name).dtype == dtype
                np.testing.assert_array_equal(reader.read(name), array)
        # Outside a state dict, Paddle writes a tensor as a tuple of its name and values.
        paddle.save({"nested": [loaded["a.weight"]], "n": 1}, theirs, protocol=protocol)
        found = load_pdparams_object(theirs)
        np.testing.assert_array_equal(found["nested"][0], named["a.weight"][1])


def test_optimizer_states_of_paddle(tmp_path):
    import paddle

    layer = paddle.nn.Linear(4, 3)
    schedule = paddle.optimizer.lr.LinearWarmup(0.1, 10, 0, 0.1)
    optimizer = paddle.optimizer.AdamW(learning_rate=schedule, parameters=layer.parameters())
    layer(paddle.ones([2, 4])).sum().backward()
    optimizer.step()
    path = str(tmp_path / "o.pdopt")
    paddle.save(optimizer.state_dict(), path)
    found, wanted = load_pdparams_object(path), paddle.load(path, return_numpy=True)
    wanted.pop("StructuredToParameterName@@", None)
    assert sorted(found) == sorted(wanted) and found["LR_Scheduler"] == wanted["LR_Scheduler"]
    for name in set(found) - {"LR_Scheduler"}:
        np.testing.assert_array_equal(found[name], wanted[name])


# ---- broken files


def good(tmp_path):
    path = str(tmp_path / "good.pdparams")
    write_pdparams(path, {"w": ("float32", np.ones((4, 4), np.float32)), "b": ("float32", np.ones(4, np.float32))})
    return open(path, "rb").read()


def refused(tmp_path, data, *about):
    path = tmp_path / "bad.pdparams"
    path.write_bytes(data)
    files.refused(path, *about)


def test_cut_short_or_with_bytes_behind(tmp_path):
    data = good(tmp_path)
    for length in range(1, len(data) - 1, 7):
        refused(tmp_path, data[:length])
    refused(tmp_path, data + b"x", "trailing-bytes")


def test_shapes_that_promise_more_than_there_is(tmp_path):
    data = good(tmp_path)
    shape = b"J\x04\x00\x00\x00J\x04\x00\x00\x00"
    assert data.count(shape) == 1
    refused(tmp_path, data.replace(shape, b"J\x04\x00\x00\x00J\x05\x00\x00\x00"), "shape")
    refused(tmp_path, data.replace(shape, b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f"), "shape")
    refused(tmp_path, data.replace(shape, b"J\x04\x00\x00\x00J\xff\xff\xff\xff"), "shape")
    # The payload itself claims more than the file has.
    huge = data.replace(b"\x8e" + struct.pack("<Q", 64), b"\x8e" + struct.pack("<Q", 1 << 62))
    refused(tmp_path, huge, "truncated")


def test_a_key_twice(tmp_path):
    array = pickle.dumps({"w": 1, "v": 1}, 4)
    refused(tmp_path, array.replace(b"\x01v", b"\x01w"), "duplicate")


@pytest.mark.parametrize(
    "value, about",
    [
        ([1, 2], ["not-a-dict"]),
        ({"w": 3}, ["tensor"]),
        ({"w": "text"}, ["tensor"]),
        ({3: np.zeros(2, np.float32)}, ["name"]),
        ({"x" * 2000: np.zeros(2, np.float32)}, ["name"]),
        ({("a", "b"): np.zeros(2, np.float32)}, ["refused"]),
        ({"w": np.zeros(2, ">f4")}, ["refused", "byte-order"]),
        ({"w": np.zeros(2, np.complex64)}, ["refused", "c8"]),
        ({"w": np.zeros(2, [("a", "f4")])}, ["refused", "dtype"]),
        ({"w": np.array(["a"])}, ["refused", "U1"]),
        ({"w": np.array([{"a": 1}], object)}, ["refused", "O8"]),
        ({"w": {1, 2}}, ["refused", "EMPTY_SET"]),
        ({"w": frozenset([1])}, ["refused", "FROZENSET"]),
        ({"w": 1 << 600}, ["refused"]),
    ],
)
def test_what_is_not_weights(tmp_path, value, about):
    refused(tmp_path, pickle.dumps(value, 4), *about)


@pytest.mark.parametrize(
    "data, code",
    [
        (b"hello world, not a pickle", "protocol"),
        (b"\x80\x09.", "protocol"),
        (b"\x80\x04.", "broken"),
        (b"\x80\x04N" * 2 + b".", "broken"),
        (b"\x80\x04h\x05.", "broken"),
        (b"\x80\x04(.", "not-a-dict"),
        (b"\x80\x04u.", "broken"),
        (b"\x80\x04}(NNu.", "refused"),
        (b"\x80\x04}(X\x01\x00\x00\x00au.", "broken"),
        (b"\x80\x04N(a.", "broken"),
        (b"\x80\x04NNa.", "broken"),
        (b"\x80\x04Nb.", "broken"),
        (b"\x80\x04NNb.", "refused"),
        (b"\x80\x04N)R.", "broken"),
        (b"\x80\x04cnumpy\ndtype\nNR.", "broken"),
        (b"\x80\x04cnumpy\ndtype\n)R.", "broken"),
        (b"\x80\x04c" + b"x" * 3000 + b".", "broken"),
        (b"\x80\x04\xff.", "byte ff"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "old-torch"),
    ],
)
def test_broken_pickles(tmp_path, data, code):
    refused(tmp_path, data, code)


def test_too_many_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.checkpoint.unpickle.MAX_OPCODES", 1000)
    refused(tmp_path, b"\x80\x04" + b"N0" * 2000 + b"}.", "refused")


def test_array_constructors_take_only_what_numpy_gives(tmp_path):
    start = b"\x80\x04}X\x01\x00\x00\x00w"
    make = b"cnumpy.core.multiarray\n_reconstruct\n"
    for data, code in (
        (make + b"cnumpy\ndtype\nK\x00\x85C\x01b\x87R", "refused"),
        (make + b"cnumpy\nndarray\nK\x05\x85C\x01b\x87R", "refused"),
        (make + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R", "tensor"),
        (make + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01)N\x89C\x00tb", "broken"),
        (make + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01tb", "broken"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13\x86R", "refused"),
        (b"c__builtin__\nbytes\nK\x05\x85R", "refused"),
        (b"cbuiltins\ntuple\nNN\x86\x85R", "refused"),
        (b"ccollections\nOrderedDict\n]\x85R", "refused"),
        (b"cnumpy\ndtype\n)\x81", "NEWOBJ"),
    ):
        refused(tmp_path, start + data + b"s.", code)


def test_numbers_and_names_in_states(tmp_path):
    path = tmp_path / "s.pdopt"
    scalar = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
    path.write_bytes(b"\x80\x04" + scalar + b"C\x03abc\x86R.")
    with helpers.refused(WeightsError, "number"):
        load_pdparams_object(str(path))
    path.write_bytes(b"\x80\x04cnumpy\ndtype\n.")
    with helpers.refused(WeightsError, "refused"):
        load_pdparams_object(str(path))
    path.write_bytes(b"\x80\x04X" + struct.pack("<I", 70_000) + b"\xff" * 70_000 + b".")
    with helpers.refused(WeightsError, "text"):
        load_pdparams_object(str(path))
