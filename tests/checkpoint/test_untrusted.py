"""Files from strangers execute nothing."""

import os
import pickle
import resource
import sys

import numpy as np
import pytest

from paddlemix.checkpoint import load_pdparams_object, open_weights, write_sharded
from paddlemix.utils.errors import WeightsError
from tests.checkpoint.files import pickled, read_pdparams, torch_file, torch_pickle, torch_zip
from tests.pickles import ENDLESS, attacks, bombs, text

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


@pytest.mark.parametrize("name", sorted(bombs()))
def test_bombs(tmp_path, name):
    path = tmp_path / "w.pdparams"
    for data in (b"\x80\x04" + bombs()[name] + b".", b"\x80\x04}" + text("w") + bombs()[name] + b"s."):
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (open_weights, read_pdparams, load_pdparams_object):
            refused(read, str(path))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_text_that_is_asked_for_a_hundred_thousand_times(tmp_path):
    """6 GB, were each of them made: 5 million instructions and 65,000 letters would be 39 GB."""
    path = tmp_path / "w.pdparams"
    pieces = text("a" * 60_000) + b"\x940c_codecs\nencode\n\x940" + text("latin1") + b"\x940"
    path.write_bytes(b"\x80\x04" + pieces + b"](" + b"h\x01h\x00h\x02\x86R" * 100_000 + b"e.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (open_weights, load_pdparams_object):
        refused(read, str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_numbers_as_keys_are_small(tmp_path):
    """Larger ones can be chosen so that each is compared with all before it."""
    path = tmp_path / "w.pdopt"
    for key in (-65_535, 0, 65_535):
        assert load_pdparams_object(pickled({key: 1}, path)) == {key: 1}
    for key in (-65_536, 65_536, 1 + (2**61 - 1) * 5):
        assert "a number beyond" in refused(load_pdparams_object, pickled({key: 1}, path))


def test_a_list_that_grows_without_end_is_not_looked_at(tmp_path):
    """Twice the same list, forty times: a valid state, of which nobody may make a text."""
    (tmp_path / "w").write_bytes(b"\x80\x04" + ENDLESS + b".")
    value = load_pdparams_object(str(tmp_path / "w"))
    assert len(value) == 2 and value[0] is value[1]
    refused(open_weights, str(tmp_path / "w"))


@pytest.mark.parametrize("name", ["w.pdparams", "w.bin", "w.safetensors"])
def test_cut_anywhere_or_with_bytes_behind(tmp_path, name):
    """Every length of a whole file but its own is refused when it is opened."""
    path = tmp_path / name
    one = {"a": ("float32", np.ones((2, 3), np.float32)), "b": ("uint8", np.ones(5, np.uint8))}
    if name == "w.bin":
        torch_file(path, one)
    else:
        (written,) = write_sharded(str(tmp_path / "o"), [
            (key, dtype, array.shape, lambda array=array: array) for key, (dtype, array) in one.items()
        ], format=name[2:])  # fmt: skip
        os.rename(tmp_path / "o" / written, path)
    data = path.read_bytes()
    with open_weights(str(path)) as reader:
        assert sorted(reader.keys()) == ["a", "b"]
    for cut in [data[:length] for length in range(len(data))] + [data + b"\0", data + b".", data + data]:
        path.write_bytes(cut)
        refused(open_weights, str(path))


def test_training_arguments_are_refused_by_their_class(tmp_path):
    import argparse

    path = pickled(argparse.Namespace(a=1), tmp_path / "training_args.bin")
    assert "argparse.Namespace" in refused(load_pdparams_object, path)
