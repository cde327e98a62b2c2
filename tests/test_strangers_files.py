"""Each attack in each place where a program reads a file: nothing runs, one line, exit status 2.

The files of a resume have the same test in trainer/test_resume.py.
"""

import json
import os
import sys

import numpy as np
import pytest

import chat
import merge_lora_params
import predict
from paddlemix.checkpoint import write_pdparams
from paddlemix.utils import cli
from tests.checkpoint.files import torch_pickle, torch_zip
from tests.checkpoint.test_untrusted import canary  # noqa: F401
from tests.helpers import image_base64, tiny_config, write_byte_vocabulary
from tests.pickles import attacks, bombs, text
from tools import convert_qwen_vl

GOOD = {"w.weight": ("float32", np.ones((2, 2), np.float32))}
INDEX = {"w.weight": "model_state-00001-of-00002.pdparams", "w": "model_state-00002-of-00002.pdparams"}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(main, *words): the error line of a script's main, which must be all that it leaves."""

    def call(main, *words):
        before = sorted(os.walk(tmp_path))
        monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, words)])
        capfd.readouterr()
        status = cli.run(main)
        lines = capfd.readouterr().err.splitlines()
        assert status == 2 and lines[-1].startswith("error: ") and "Traceback" not in "".join(lines), lines
        assert sorted(os.walk(tmp_path)) == before
        return lines[-1]

    return call


@pytest.fixture(scope="module")
def empty_model(tmp_path_factory):
    """A model folder but for its weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    write_byte_vocabulary(folder)
    return folder


@pytest.fixture
def model(empty_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in os.listdir(empty_model):
        (folder / name).write_bytes((empty_model / name).read_bytes())
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text(f"1\t{image_base64()}\n")
    return path


def in_main_file(model, tmp_path, body):
    (model / "model_state.pdparams").write_bytes(body)


def in_shard(model, tmp_path, body):
    write_pdparams(str(model / INDEX["w.weight"]), GOOD)
    (model / INDEX["w"]).write_bytes(body)
    (model / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": INDEX}))


def in_torch_zip(model, tmp_path, body):
    # Behind its head, b"\x80\x04}(", the body is what torch's pickle holds.
    torch_zip(model / "pytorch_model.bin", torch_pickle({}, body[4:-2]), {})


def in_bare_bin(model, tmp_path, body):
    (model / "pytorch_model.bin").write_bytes(body)


def in_old_torch(model, tmp_path, body):
    # Before PyTorch 1.6: a magic number, and more pickles behind it.
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + body)


def in_safetensors_by_name(model, tmp_path, body):
    (model / "model.safetensors").write_bytes(body)


PLACES = {
    function.__name__[3:].replace("_", " "): function
    for function in (in_main_file, in_shard, in_torch_zip, in_bare_bin, in_old_torch, in_safetensors_by_name)
}


@pytest.fixture
def bodies(canary):  # noqa: F811
    found = {name: b"\x80\x04}(" + text("w") + body + b"u." for name, body in attacks(canary).items()}
    found.update({name: b"\x80\x04}(" + text("w") + body + b"u." for name, body in bombs().items()})
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_models_weights(run, model, rows, tmp_path, bodies, place):
    for number, (name, body) in enumerate(bodies.items()):
        PLACES[place](model, tmp_path, body)
        if number % 2:
            line = run(chat.main, model, "--boxes", tmp_path / "boxes.png")
        else:
            line = run(predict.main, rows, tmp_path / "out.tsv", model)
        assert str(model) in line, name


@pytest.mark.parametrize("place", PLACES)
def test_a_merges_base_and_an_import(run, model, tmp_path, bodies, place):
    lora = tmp_path / "lora"
    lora.mkdir()
    matrix = GOOD["w.weight"]
    write_pdparams(str(lora / "lora_model_state.pdparams"), {"w.lora_A": matrix, "w.lora_B": matrix})
    (lora / "lora_config.json").write_text('{"r": 2, "lora_alpha": 1, "target_modules": ["w"]}')
    for number, body in enumerate(bodies.values()):
        PLACES[place](model, tmp_path, body)
        if number % 2:
            run(convert_qwen_vl.main, model, tmp_path / "out")
        else:
            words = ["--model_name_or_path", model, "--lora_path", lora, "--merge_model_path", tmp_path / "out"]
            run(merge_lora_params.main, *words)


@pytest.mark.parametrize("name", ["lora_model_state.pdparams", "partial_model_state.pdparams"])
def test_what_a_run_left(run, model, tmp_path, bodies, name):
    write_pdparams(str(model / "model_state.pdparams"), GOOD)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "lora_config.json").write_text('{"r": 2, "lora_alpha": 1, "target_modules": ["w"]}')
    for body in bodies.values():
        (lora / name).write_bytes(body)
        words = ["--model_name_or_path", model, "--lora_path", lora, "--merge_model_path", tmp_path / "out"]
        assert name in run(merge_lora_params.main, *words)


def test_the_adapters_that_a_run_begins_with(tmp_path, bodies):
    from paddlemix.models.lora import apply_lora, load_lora_weights
    from paddlemix.utils.errors import WeightsError
    from tests.helpers import make_tiny_model

    model = apply_lora(make_tiny_model(), rank=2, alpha=4, target_modules=[".*attn.c_attn"])
    for body in bodies.values():
        (tmp_path / "lora_model_state.pdparams").write_bytes(body)
        with pytest.raises(WeightsError) as caught:
            load_lora_weights(model, str(tmp_path))
        assert "\n" not in str(caught.value)
    os.rename(tmp_path / "lora_model_state.pdparams", tmp_path / "elsewhere")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lora_model_state.pdparams").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="a link that leads out"):
        load_lora_weights(model, str(tmp_path / "lora"))


def test_ids_are_never_paths(tmp_path, monkeypatch, capfd):
    """Ids, captions and prompts with paths in them: nothing is written but the files of the output folder."""
    from tools import convert_labels

    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    ids = ["../../x", "/tmp/x", "..", "a/../../../x", "C:\\x", "x\0y", "~/x", "$(touch x)", "file:///x"]
    source = tmp_path / "in.tsv"
    source.write_text("".join(f"{name}\t{image_base64(seed)}\t{name}\n" for seed, name in enumerate(ids)))
    for images in ("inline", "reference"):
        out = inside / images
        monkeypatch.setattr(sys, "argv", ["convert_labels.py", str(source), str(out), "--images", images, "--quiet"])
        assert cli.run(convert_labels.main) == 0
        capfd.readouterr()
        assert {name.lstrip(".") for name in os.listdir(out)} == {
            "chat_template.json", "ids.tsv", "rejected.tsv", "train.json", "train.json.idx", "val.json", "val.json.idx"
        }  # fmt: skip
        records = sum((json.loads((out / name).read_text("utf-8")) for name in ("train.json", "val.json")), [])
        assert len(records) == len(ids) and not any("x" in str(record["id"]) for record in records)
        if images == "reference":
            assert {record["image"]["file"] for record in records} == {os.path.relpath(source, out)}
    assert sorted(os.listdir(tmp_path)) == ["a", "in.tsv"] and sorted(os.listdir(inside)) == ["inline", "reference"]
