"""A Qwen-VL checkpoint becomes an MGen-VL folder, and what is refused as another model."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights, write_sharded
from paddlemix.checkpoint.convert import IGNORED, convert_qwen_vl, public_to_ours, transposed
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.utils.errors import UserError, WeightsError
from tests import helpers
from tests.checkpoint.files import torch_file

VISUAL = {
    "image_size": 28,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 128,
    "image_start_id": 314,
}
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "model_type": "qwen",
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 64,
    "seq_length": 256,
    "visual": VISUAL,
}


def public_name(name):
    """The public checkpoint's name of one of our parameters: the map, the other way round and by plain
    words.
    """
    name = name.replace("transformer.llm.", "transformer.").replace("visual.vit.", "visual.")
    return "transformer." + name if name.startswith("visual.") else name


def is_linear(name, shape):
    return len(shape) == 2 and not re.search(r"wte|positional_embedding|pos_embed|query|visual\.proj$", name)


@pytest.fixture(scope="module")
def tensors():
    """A public checkpoint's tensors and ours, by our names."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in parameter_shapes(CONFIG).items()}


def public_tensors(tensors):
    return {
        public_name(name): ("float32", np.ascontiguousarray(a.T) if is_linear(name, a.shape) else a)
        for name, a in tensors.items()
    }


def write_public(folder, named, config=CONFIG, layout="safetensors", limit="10GB"):
    folder.mkdir(exist_ok=True)
    if layout == "bin":
        torch_file(folder / "pytorch_model.bin", named)
    else:
        items = [(name, d, a.shape, lambda a=a: a) for name, (d, a) in named.items()]
        write_sharded(str(folder), items, format="safetensors", max_shard_size=limit)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    (folder / "generation_config.json").write_text(
        '{"chat_format": "chatml", "top_k": 0, "top_p": 0.3, "eos_token_id": 1}'
    )
    (folder / "modeling_qwen.py").write_text("raise SystemExit")
    (folder / "LICENSE").write_text("license")
    return folder


@pytest.mark.parametrize("layout, limit", [("safetensors", "10GB"), ("safetensors", "100KB"), ("bin", None)])
def test_import(tmp_path, tensors, layout, limit):
    source = write_public(tmp_path / "src", public_tensors(tensors), layout=layout, limit=limit)
    result = convert_qwen_vl(str(source), str(tmp_path / "out"), shapes_of=parameter_shapes, progress=False)
    assert result.tensors == len(tensors) and result.ignored == []
    with open_weights(str(tmp_path / "out")) as reader:
        assert reader.keys() == list(tensors), "in the model's own order"
        for name, array in tensors.items():
            np.testing.assert_array_equal(reader.read(name), array, name)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "mgen.tiktoken",
        "model_state.pdparams",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "mgen" and config["llm_pretrained_model_name_or_path"] == "mgen-7b"
    assert config["visual"] == VISUAL and config["dtype"] == "float32" and config["eos_token_id"] == 100
    assert "auto_map" not in config and "torch_dtype" not in config
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["decode_strategy"] == "greedy_search" and generation["eos_token_id"] == 100
    assert generation["top_p"] == 0.3 and generation["top_k"] == 0


def test_dtype_and_shards(tmp_path, tensors):
    from paddlemix.checkpoint import convert_dtype

    source = write_public(tmp_path / "src", public_tensors(tensors))
    convert_qwen_vl(
        str(source),
        str(tmp_path / "out"),
        dtype="bfloat16",
        format="safetensors",
        max_shard_size="50KB",
        shapes_of=parameter_shapes,
        progress=False,
    )
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    with open_weights(str(tmp_path / "out")) as reader:
        for name, array in tensors.items():
            np.testing.assert_array_equal(reader.read(name), convert_dtype(array, "float32", "bfloat16"))


def test_known_buffers_are_left_out_by_name(tmp_path, tensors):
    named = public_tensors(tensors)
    extra = [
        "transformer.rotary_emb.inv_freq",
        "transformer.h.1.attn.masked_bias",
        "transformer.h.0.attn.bias",
    ]
    named.update(dict.fromkeys(extra, ("float32", np.zeros(4, np.float32))))
    source = write_public(tmp_path / "src", named)
    result = convert_qwen_vl(str(source), str(tmp_path / "out"), shapes_of=parameter_shapes, progress=False)
    assert sorted(result.ignored) == sorted(extra) and result.tensors == len(tensors)
    assert not IGNORED.fullmatch("transformer.h.0.attn.c_attn.bias")


def test_what_is_not_a_whole_qwen_vl(tmp_path, tensors):
    def refused(match, change):
        named = {k: v for k, v in dict(public_tensors(tensors), **change).items() if v is not None}
        folder = tmp_path / "src"
        shutil.rmtree(folder, ignore_errors=True)
        write_public(folder, named)
        with helpers.refused(WeightsError, "keys", match=match) as caught:
            convert_qwen_vl(str(folder), str(tmp_path / "out"), shapes_of=parameter_shapes, progress=False)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    one = ("float32", np.zeros((3, 5), np.float32))
    flat = ("float32", np.zeros(3, np.float32))
    refused("1 unknown: transformer.h.0.attn.extra", {"transformer.h.0.attn.extra": one})
    refused("1 missing: lm_head.weight", {"lm_head.weight": None})
    refused(r"lm_head.weight is \[5, 3\], not \[128, 320\]", {"lm_head.weight": one})
    refused("1 of another shape: lm_head.weight is .3., not ", {"lm_head.weight": flat})
    refused("1 unexpected: transformer.llm.h.0.mlp.w1.bias", {"transformer.h.0.mlp.w1.bias": flat})
    refused("unexpected: transformer.llm.h.2.ln_1.weight", {"transformer.h.2.ln_1.weight": flat})


@pytest.mark.parametrize(
    "change, key",
    [
        ({"model_type": "mgen"}, "converted"),
        ({"visual": None}, "visual"),
        ({"hidden_size": None}, "hidden_size"),
        ({"visual": {"width": 3}}, "visual.image_size"),
        ({"visual": dict(VISUAL, image_start_id="a")}, "visual.image_start_id"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, tensors, change, key):
    config = {k: v for k, v in dict(CONFIG, **change).items() if v is not None}
    source = write_public(tmp_path / "src", public_tensors(tensors), config)
    with helpers.refused(WeightsError, key):
        convert_qwen_vl(str(source), str(tmp_path / "out"), shapes_of=parameter_shapes, progress=False)


def test_folders_that_do_not_fit(tmp_path, tensors):
    source = write_public(tmp_path / "src", public_tensors(tensors))
    for args, code, kind in (
        ((tmp_path / "none", tmp_path / "out"), "no-folder", UserError),
        ((source, source), "overlap", UserError),
        ((source, source / "qwen.tiktoken/o"), "overlap", UserError),
        ((source, tmp_path), "overlap", UserError),
    ):
        with helpers.refused(kind, code):
            convert_qwen_vl(*map(str, args), shapes_of=parameter_shapes, progress=False)
    with helpers.refused(UserError, "dtype"):
        convert_qwen_vl(str(source), str(tmp_path / "out"), dtype="int8", shapes_of=parameter_shapes, progress=False)
    (tmp_path / "file").write_text("")
    with helpers.refused(UserError, "not-writable"):
        convert_qwen_vl(str(source), str(tmp_path / "file/o"), shapes_of=parameter_shapes, progress=False)
    with helpers.refused(WeightsError, "overflow"):
        named = dict(public_tensors(tensors))
        named["lm_head.weight"] = ("float32", np.full((320, 128), 1e6, np.float32))
        convert_qwen_vl(
            str(write_public(source, named)), str(tmp_path / "out"), dtype="float16", shapes_of=parameter_shapes,
            progress=False,
        )


def test_transposed():
    for shape in ((1, 1), (31, 7), (32, 64), (100, 33), (0, 4)):
        array = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
        result = transposed(array)
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, array.T)


def test_every_public_name_of_the_7b(shared):
    """All 853 parameters are reached, each from the public name that the reference map gives, none twice."""
    table = json.loads((shared / "goldens/hf_to_paddle.json").read_text())
    keys = json.loads((shared / "goldens/keys_7b.json").read_text())
    reached = {}
    for public, target in table.items():
        layers = range(48 if "resblocks" in public else 32) if "{layer}" in public else [0]
        for layer in layers:
            ours = public_to_ours(public.replace("{layer}", str(layer)))
            assert ours == (target["paddle"].replace("{layer}", str(layer)), target["transpose"])
            reached[ours[0]] = ours[1]
    assert set(reached) == set(keys) and len(reached) == 853
    for name, transpose in reached.items():
        assert transpose == is_linear(name, keys[name]), name
    assert public_to_ours("transformer.h.0.attn.c_attn.weight.extra") is None
    assert public_to_ours("x.lm_head.weight") is None


def test_goldens(shared, tmp_path):
    golden = shared / "goldens"
    wanted = np.load(golden / "tiny_model/paddle_weights.npz")
    shutil.copytree(golden / "tiny_model_bin", tmp_path / "bin")
    shutil.copy(golden / "tiny_model/hf_checkpoint/config.json", tmp_path / "bin")
    for i, source in enumerate((golden / "tiny_model/hf_checkpoint", tmp_path / "bin")):
        target = str(tmp_path / f"out{i}")
        convert_qwen_vl(str(source), target, shapes_of=parameter_shapes, progress=False)
        with open_weights(target) as reader:
            assert sorted(reader.keys()) == sorted(wanted.files)
            for name in wanted.files:
                np.testing.assert_array_equal(reader.read(name, "float32"), wanted[name])


@pytest.mark.slow
def test_the_script_gives_a_folder_that_everything_runs_on(tmp_path, tensors, root):
    source = write_public(tmp_path / "src", public_tensors(tensors))
    (source / "qwen.tiktoken").unlink()
    command = [sys.executable, str(root / "tools/convert_qwen_vl.py"), str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(tensors)} tensors written" in done.stdout and "no qwen.tiktoken" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "error: " in again.stderr and "not empty" in again.stderr

    from paddlemix.auto import AutoModelMIX

    model = AutoModelMIX.from_pretrained(str(tmp_path / "out"))
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), tensors["lm_head.weight"])
