"""Adapters on the model: their formula, the file they are saved in, and which layers take them."""

import json
import os
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.models.lora import adapted_modules, adapter_shapes, apply_lora, load_lora
from paddlemix.utils.errors import ConfigError, WeightsError
from tests.helpers import make_tiny_model, prompt_ids, refused

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]


def inputs():
    images = np.random.default_rng(0).normal(size=[1, 3, 56, 56]).astype("float32")
    return {"input_ids": paddle.to_tensor([prompt_ids(range(40, 60))]), "images": paddle.to_tensor(images)}


def logits(model):
    with paddle.no_grad():
        return model(**inputs()).logits.numpy()


def with_adapters(trainable=(), **changes):
    """A model whose adapters, and what trains beside them, are far from where they start."""
    paddle.seed(1)
    settings = dict({"rank": 4, "alpha": 8, "target_modules": TARGETS, "dropout": 0.1}, **changes)
    model = apply_lora(make_tiny_model(), trainable=trainable, **settings)
    model.eval()
    for tensor in model.model.state_dict().values():
        if not tensor.stop_gradient:
            tensor.set_value(paddle.normal(0.0, 0.2, tensor.shape))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, logits) of a LoRA checkpoint with a part of attn_pool trained whole."""
    folder = str(tmp_path_factory.mktemp("lora"))
    model = with_adapters(trainable=["visual.attn_pool.query", "visual.attn_pool.ln_q.bias"])
    model.save_pretrained(folder)
    return folder, logits(model)


def test_fresh_adapters_change_nothing_and_alone_train():
    base = make_tiny_model()
    before = logits(base)
    model = apply_lora(base, rank=4, alpha=8, target_modules=TARGETS)
    np.testing.assert_array_equal(logits(model), before)
    training = {name for name, tensor in model.model.state_dict().items() if not tensor.stop_gradient}
    assert len(training) == 2 * 2 * 4 and all(".lora_" in name for name in training)


def test_saved_and_loaded_adapters_give_equal_logits(saved):
    folder, expected = saved
    assert np.abs(logits(make_tiny_model()) - expected).max() > 0.1
    np.testing.assert_array_equal(logits(load_lora(make_tiny_model(), folder)), expected)


def test_output_is_the_formula(saved):
    folder, expected = saved
    stored = paddle.load(os.path.join(folder, "lora_model_state.pdparams"), return_numpy=True)
    model = make_tiny_model()
    state = model.state_dict()
    for name, array in stored.items():
        if name.endswith(".lora_A"):
            module = name[: -len(".lora_A")]
            delta = array @ stored[module + ".lora_B"] * (8 / 4)
            state[module + ".weight"].set_value(state[module + ".weight"].numpy() + delta)
        elif not name.endswith(".lora_B"):
            state[name].set_value(array)
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)


def test_file_holds_what_trained_and_nothing_else(saved):
    stored = paddle.load(os.path.join(saved[0], "lora_model_state.pdparams"), return_numpy=True)
    whole = {name for name in stored if ".lora_" not in name}
    assert whole == {"visual.attn_pool.query", "visual.attn_pool.ln_q.bias"}
    assert stored["transformer.llm.h.0.attn.c_attn.lora_A"].shape == (128, 4)
    assert stored["transformer.llm.h.0.attn.c_attn.lora_B"].shape == (4, 384)


def test_reading_executes_nothing(saved, tmp_path):
    import pickle

    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "lora_config.json").write_text(open(os.path.join(saved[0], "lora_config.json")).read())

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / "lora_model_state.pdparams").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(WeightsError):
        load_lora(make_tiny_model(), str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_named(saved, tmp_path, change):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "lora_config.json").write_text(open(os.path.join(saved[0], "lora_config.json")).read())
    stored = paddle.load(os.path.join(saved[0], "lora_model_state.pdparams"))
    name = "transformer.llm.h.1.mlp.w1.lora_A"
    if change == "missing":
        del stored[name]
    elif change == "unexpected":
        name = "transformer.llm.h.9.mlp.w1.lora_A"
        stored[name] = paddle.ones([2])
    else:
        stored[name] = paddle.ones([2, 4])
    paddle.save(stored, str(folder / "lora_model_state.pdparams"))
    with refused(WeightsError, "keys", match=name):
        load_lora(make_tiny_model(), str(folder))


def test_missing_files_are_named(tmp_path, saved):
    with refused(WeightsError, "no-lora-config"):
        load_lora(make_tiny_model(), str(tmp_path))
    (tmp_path / "lora_config.json").write_text(open(os.path.join(saved[0], "lora_config.json")).read())
    with refused(WeightsError, "no-tuned-weights"):
        load_lora(make_tiny_model(), str(tmp_path))


@pytest.mark.parametrize(
    "text, code",
    [
        ("{", "json"),
        ("[]", "json"),
        ({"r": 0}, "r"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"rslora": True}, "rslora"),
        ({"lora_use_mixer": True}, "lora_use_mixer"),
    ],
)
def test_broken_configurations(tmp_path, text, code):
    good = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    path = tmp_path / "lora_config.json"
    path.write_text(text if isinstance(text, str) else json.dumps(dict(good, **text)))
    with refused(WeightsError, code):
        read_lora_config(str(tmp_path))
    path.write_text(json.dumps(dict(good, target_modules=".*c_attn")))
    assert read_lora_config(str(tmp_path))["target_modules"] == [".*c_attn"]


def test_adapters_of_another_model_are_said_to_be_the_folders_fault(tmp_path):
    path = tmp_path / "lora_config.json"
    path.write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": [".*q_proj"]}))
    for module, shapes, says in (
        ("model.layers.0.q_proj", ([128, 4], [4, 128]), "not this model's: 2 unexpected: model.layers.0.q_proj"),
        ("transformer.llm.wte", ([480, 4], [4, 128]), "does not fit the model: .*wte is not a Linear layer"),
    ):
        pair = {f"{module}.lora_{part}": paddle.ones(shape) for part, shape in zip("AB", shapes)}
        paddle.save(pair, str(tmp_path / "lora_model_state.pdparams"))
        with pytest.raises(WeightsError, match=says):
            load_lora(make_tiny_model(), str(tmp_path))


def test_patterns_and_rank_of_a_strangers_configuration_do_no_work(saved, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(saved[0], folder)
    config = json.loads((folder / "lora_config.json").read_text())
    # No expression; one that takes time without end on a long name; one that matches all.
    config.update(target_modules=["(", "(.*.*)*!", ".*"], trainable_modules=["(", ".*"])
    (folder / "lora_config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(load_lora(make_tiny_model(), str(folder))), saved[1])
    config.update(r=1 << 40, scaling=None)
    (folder / "lora_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"of another shape: .*lora_A is \[128, 4\], not \[128, 1099511627776\]"):
        load_lora(make_tiny_model(), str(folder))


def test_targets_are_checked():
    names = make_tiny_model().whole_shapes()
    with refused(ConfigError, "lora_target_modules", match='".[*]q_proj.[*]"'):
        adapted_modules(names, [".*q_proj.*"])
    with refused(ConfigError, "lora_target_modules", match="[(]"):
        adapted_modules(names, ["("])
    with refused(ConfigError, "lora_target_modules", match="[(].*q_proj"):
        adapted_modules(names, ["(", ".*c_attn", ".*q_proj"])
    with refused(ConfigError, "lora_target_modules", match="Linear"):
        apply_lora(make_tiny_model(), rank=4, alpha=8, target_modules=[".*wte"])
    for target in (".*wte", ".*ln_f", ".*conv1", "lm_head"):
        with refused(ConfigError, "lora_target_modules", match="Linear"):
            adapter_shapes(make_tiny_model().whole_shapes(), [target], 4)
    with refused(ConfigError, "freeze_exclude", "lora_target_modules", match="transformer.llm.h.0.attn.c_attn.weight"):
        apply_lora(
            make_tiny_model(),
            rank=4,
            alpha=8,
            target_modules=TARGETS,
            trainable=["transformer.llm.h.0.attn.c_attn.weight"],
        )


CONTAINERS = {
    ".*llm.h.0.mlp": {"transformer.llm.h.0.mlp." + name for name in ("w1", "w2", "c_proj")},
    ".*mlp.*": {
        *(f"transformer.llm.h.{i}.mlp.{name}" for i in (0, 1) for name in ("w1", "w2", "c_proj")),
        *(f"visual.vit.transformer.resblocks.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")),
    },
    ".*llm.*attn.*": {f"transformer.llm.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")},
}


@pytest.mark.parametrize("target", CONTAINERS)
def test_a_container_means_the_linear_layers_in_it(target, tmp_path):
    model = with_adapters(target_modules=[target])
    named = {name[: -len(".lora_A")] for name in model.model.state_dict() if name.endswith(".lora_A")}
    assert named == CONTAINERS[target] == set(adapted_modules(make_tiny_model().whole_shapes(), [target]))
    model.save_pretrained(str(tmp_path))
    np.testing.assert_array_equal(logits(load_lora(make_tiny_model(), str(tmp_path))), logits(model))


def test_every_linear_layer_can_have_adapters_that_learn():
    """Shapes alone say which layers are Linear, and none is used past its adapters."""
    model = apply_lora(make_tiny_model(), rank=2, alpha=2, target_modules=["visual", "transformer"])
    linear = {name for name, layer in make_tiny_model().named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    state = model.model.state_dict()
    assert {name[: -len(".lora_B")] for name in state if name.endswith(".lora_B")} == linear
    model.train()
    ids = inputs()["input_ids"]
    model(**inputs(), labels=ids).loss.backward()
    for name in linear:
        assert float(state[name + ".lora_B"].grad.abs().max()) > 0, name


@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_the_direct_layer_is_paddlenlps(dropout):
    from paddlenlp.peft.lora.lora_layers import LoRALinear

    from paddlemix.models.mgen_vl.tensor_parallel import DirectLoRALinear

    model = make_tiny_model()
    lora = apply_lora(model, rank=4, alpha=16, dropout=dropout, target_modules=[".*attn.c_attn", ".*mlp.w1"])
    layers = [layer for layer in model.sublayers() if isinstance(layer, LoRALinear)]
    assert len(layers) == 4 and all(type(layer) is DirectLoRALinear for layer in layers)
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((2, 3, 128)).astype("float32"))
    for layer in layers:
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32"))
        for training in (True, False):
            lora.train() if training else lora.eval()
            found = []
            for forward in (DirectLoRALinear.forward, LoRALinear.forward):
                paddle.seed(7)
                out = forward(layer, x)
                if training:
                    out.sum().backward()
                    found.append([out.numpy(), layer.lora_A.grad.numpy(), layer.lora_B.grad.numpy()])
                    layer.clear_gradients()
                else:
                    found.append([out.numpy()])
            for ours, theirs in zip(*found):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
