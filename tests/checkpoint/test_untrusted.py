"""Files from strangers execute nothing: `python -m pytest tests/checkpoint/test_untrusted.py`."""

import os
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paddlemix.checkpoint import load_pdparams_object, open_weights, read_pdparams, write_pdparams
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.utils.errors import WeightsError
from tests.checkpoint.files import arrays, pickled, safetensors_bytes, torch_file, torch_pickle, torch_zip


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def attacks(canary: str):
    """Pickle bodies that create the file `canary` when Python's unpickler (or a careless one) reads them."""
    touch = f"touch '{canary}'"
    module, line = "attack_module", f"open({canary!r}, 'w').close()"
    return {
        "reduce": b"cos\nsystem\n" + text(touch) + b"\x85R",
        "reduce by stack": text("posix") + text("system") + b"\x93" + text(touch) + b"\x85R",
        "eval": b"cbuiltins\neval\n" + text(line) + b"\x85R",
        "eval of python 2": b"c__builtin__\neval\n" + text(line) + b"\x85R",
        "exec by an allowed module": b"cnumpy\nf2py\n" + text(line) + b"\x85R",
        "attribute path": text("numpy") + text("os.system") + b"\x93" + text(touch) + b"\x85R",
        "attribute of an allowed name": text("collections") + text("OrderedDict.__class__") + b"\x93)R",
        "getattr": b"cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R",
        "inst": b"(" + text(touch) + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + text(touch) + b"o",
        "newobj": b"csubprocess\nPopen\n" + text(touch) + b"\x85\x81",
        "newobj_ex": b"csubprocess\nPopen\n" + text(touch) + b"\x85}\x92",
        "build": b"ccollections\nOrderedDict\n)R}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + text(touch)
        + b"b",
        "build of a class": b"ccollections\nOrderedDict\n}" + text("__reduce__") + b"NsbN",
        "ext": b"\x82\x01" + text(touch) + b"\x85R",
        "ext2": b"\x83\x01\x00" + text(touch) + b"\x85R",
        "ext4": b"\x84\x01\x00\x00\x00" + text(touch) + b"\x85R",
        "persid": b"Pposix.system\n",
        "binpersid": text(touch) + b"Q",
        "import": f"c{module}\nanything\n".encode(),
        "nested": b"}" + text("a") + b"]}" + text("b") + b"(cos\nsystem\n" + text(touch) + b"\x85Rtsas",
        "pickle in a pickle": b"cpickle\nloads\nC\x04\x80\x04N.\x85R",
        "numpy load": b"cnumpy\nload\n" + text(canary) + b"\x85R",
        "paddle": b"cpaddle.framework.io\nload\n" + text(canary) + b"\x85R",
        "object array": (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
            b"X\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](cos\nsystem\n"
            + text(touch)
            + b"\x85Retb"
        ),
    }


NAMES = sorted(attacks("x"))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path that no test may bring into being, and a module that none may import."""
    path = tmp_path / "canary"
    (tmp_path / "attack_module.py").write_text(f"open({str(path)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield str(path)
    assert not os.path.exists(path), "something in a weights file was executed"
    assert "attack_module" not in sys.modules


def refused(call, *args):
    with pytest.raises(WeightsError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def body(name, canary):
    """A state dict with one good tensor and then the attack."""
    return b"\x80\x04}(" + text("w") + attacks(canary)[name] + b"u."


def test_the_attacks_are_real(tmp_path, canary):
    """Python's own unpickler falls for these; so the files below test something."""
    for name in ("reduce", "eval", "inst", "obj", "import", "nested"):
        with open(tmp_path / "attack", "wb") as file:
            file.write(body(name, canary))
        with open(tmp_path / "attack", "rb") as file:
            try:
                pickle.load(file)
            except (AttributeError, ImportError, TypeError):
                assert name == "import"
        assert os.path.exists(canary), name
        os.unlink(canary)
        sys.modules.pop("attack_module", None)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_weights_file(tmp_path, canary, name):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(body(name, canary))
    message = refused(open_weights, str(tmp_path))
    assert str(path) in message
    refused(read_pdparams, str(path))
    refused(load_pdparams_object, str(path))


@pytest.mark.parametrize("name", NAMES)
def test_in_a_torch_file(tmp_path, canary, name):
    path = torch_zip(tmp_path / "pytorch_model.bin", torch_pickle({}, text("w") + attacks(canary)[name]), {})
    refused(open_weights, path)


def test_names_are_told(tmp_path, canary):
    path = tmp_path / "w.pdparams"
    for name, words in (
        ("reduce", "os.system"),
        ("inst", "INST"),
        ("obj", "os.system"),
        ("ext", "EXT1"),
        ("persid", "PERSID"),
        ("binpersid", "BINPERSID"),
        ("newobj", "subprocess.Popen"),
        ("object array", "arrays of type O8"),
    ):
        path.write_bytes(body(name, canary))
        assert words in refused(open_weights, str(path))
    path.write_bytes(b"\x80\x04c" + b"\x1b[31m" * 3 + b"\nx\n.")
    assert "\x1b" not in refused(open_weights, str(path))


def test_in_a_shard_a_lora_and_a_resume(tmp_path, canary):
    base, lora = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    lora.mkdir()
    good = {"w.weight": ("float32", np.ones((2, 2), np.float32))}
    write_pdparams(str(base / "model_state-00001-of-00002.pdparams"), good)
    (base / "model_state-00002-of-00002.pdparams").write_bytes(body("reduce", canary))
    (base / "model_state.pdparams.index.json").write_text(
        '{"metadata": {}, "weight_map": {"w.weight": "model_state-00001-of-00002.pdparams",'
        ' "w": "model_state-00002-of-00002.pdparams"}}'
    )
    assert "00002-of-00002" in refused(open_weights, str(base))

    for name in os.listdir(base):
        (base / name).unlink()
    write_pdparams(str(base / "model_state.pdparams"), good)
    (base / "config.json").write_text("{}")
    (lora / "lora_config.json").write_text('{"r": 1, "lora_alpha": 1, "target_modules": ["w"]}')
    (lora / "lora_model_state.pdparams").write_bytes(body("build", canary))
    refused(merge, str(base), str(lora), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    for name in ("optimizer.pdopt", "scheduler.pdparams", "training_args.bin"):
        (lora / name).write_bytes(body("newobj", canary))
        refused(load_pdparams_object, str(lora / name))


def test_training_arguments_are_refused_by_their_class(tmp_path):
    import argparse

    path = pickled(argparse.Namespace(a=1), tmp_path / "training_args.bin")
    assert "argparse.Namespace" in refused(load_pdparams_object, path)


# ---- fuzzing: whatever the bytes, the outcome is a WeightsError or readable tensors

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")),
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255), st.sampled_from("sid")), max_size=6)


def edited(data: bytes, edits) -> bytes:
    data = bytearray(data)
    for at, value, kind in edits:
        at %= len(data) + 1
        if kind == "s":
            data[at : at + 1] = bytes([value])
        elif kind == "i":
            data[at:at] = bytes([value])
        else:
            del data[at : at + value]
    return bytes(data)


def read_all(path):
    try:
        with open_weights(path) as reader:
            for name in reader.keys():
                assert reader.read(name).nbytes <= 1 << 20
    except WeightsError as error:
        assert "\n" not in str(error)


@FUZZ
@given(edits=EDITS, protocol=st.sampled_from([2, 3, 4]))
def test_fuzz_pdparams(tmp_path, edits, protocol):
    data = pickle.dumps({name: array for name, (_, array) in arrays().items()}, protocol)
    (tmp_path / "w.pdparams").write_bytes(edited(data, edits))
    read_all(str(tmp_path / "w.pdparams"))
    try:
        load_pdparams_object(str(tmp_path / "w.pdparams"))
    except WeightsError:
        pass


@FUZZ
@given(
    data=st.lists(
        st.sampled_from([bytes([i]) for i in range(256)] + [text("w"), b"cnumpy\ndtype\n"]), max_size=40
    )
)
def test_fuzz_instructions(tmp_path, data):
    (tmp_path / "w.pdparams").write_bytes(b"\x80\x04" + b"".join(data) + b".")
    read_all(str(tmp_path / "w.pdparams"))


@FUZZ
@given(edits=EDITS)
def test_fuzz_torch(tmp_path, edits):
    data = open(torch_file(tmp_path / "good.bin", arrays()), "rb").read()
    (tmp_path / "w.bin").write_bytes(edited(data, edits))
    read_all(str(tmp_path / "w.bin"))


@FUZZ
@given(edits=EDITS)
def test_fuzz_safetensors(tmp_path, edits):
    header = {
        "__metadata__": {"format": "np"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }
    (tmp_path / "w.safetensors").write_bytes(edited(safetensors_bytes(header, bytes(22)), edits))
    read_all(str(tmp_path / "w.safetensors"))
