"""The table of names and shapes."""

import math

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights
from paddlemix.checkpoint.shards import write_pdparams
from paddlemix.models.mgen_vl.parameters import CONSTANTS, check_weights, count, group_of, parameter_shapes
from paddlemix.utils.errors import WeightsError
from tests.helpers import make_tiny_model, refused, tiny_config

CONFIG_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "no_bias": True,
    "visual": {
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
    },
}


def test_counts_of_7b():
    shapes = parameter_shapes(CONFIG_7B)
    assert len(shapes) == 853
    assert count(shapes) == 9_656_935_168
    groups = {}
    for name, shape in shapes.items():
        groups[group_of(name)] = groups.get(group_of(name), 0) + math.prod(shape)
    assert groups["vit"] == 1_842_770_688
    assert groups["attn_pool"] == 76_054_528
    assert groups["ln_post and proj"] == 16_785_408
    assert sum(groups[g] for g in ("llm embeddings", "llm layers", "lm_head")) == 7_721_324_544
    assert groups["attn_pool"] - sum(math.prod(shapes[name]) for name in CONSTANTS) == 75_005_952


@pytest.mark.parametrize("overrides", [{}, {"no_bias": False}, {"visual": {"width": 128, "heads": 4}}])
def test_the_table_is_the_built_model(overrides):
    model = make_tiny_model(**overrides)
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(model.config) == built
    assert parameter_shapes(model.config.to_dict()) == built


def test_constants_are_no_parameters():
    model = make_tiny_model()
    assert CONSTANTS <= set(model.state_dict()) - {name for name, _ in model.named_parameters()}


def test_groups():
    assert group_of("transformer.llm.h.3.attn.c_attn.lora_A") == "lora"
    assert group_of("transformer.llm.ln_f.weight") == "llm layers"
    with pytest.raises(KeyError, match="belongs to no module"):
        group_of("bert.pooler.weight")


def test_lazy_7b_allocates_nothing():
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    model = MGenLMHeadModel.build_lazily(MGenConfig(), "bfloat16")
    assert not any(p._is_initialized() for p in model.parameters())
    assert sum(math.prod(t.shape) for t in model.state_dict().values()) == 9_656_935_168
    assert {str(p.dtype) for p in model.parameters()} == {"paddle.bfloat16"}


def test_tiny_config_reads_as_documented():
    assert tiny_config().n_queries == 4 and tiny_config().image_start_id == 470


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool"])
def test_weights_of_integers_are_refused(tmp_path, dtype):
    """As quantized models have; Paddle would refuse them by an assertion."""
    tensors = {"a": ("float16", np.ones(2, "float16")), "b": (dtype, np.ones(2, dtype))}
    write_pdparams(str(tmp_path / "model_state.pdparams"), tensors)
    with open_weights(str(tmp_path)) as reader:
        with refused(WeightsError, "keys", match=f"1 not floating-point: b is {dtype}$"):
            check_weights(reader, {"a": (2,), "b": (2,)}, "x")
        check_weights(reader, {"a": (2,)}, "x", others=True)
