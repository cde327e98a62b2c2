"""The model against numbers of the numpy reference in tests/goldens."""

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from tests.goldens import reference
from tests.helpers import tiny_config

ATOL = 1e-4


@pytest.fixture(scope="module")
def golden():
    return np.load(reference.FILE)


def build(**overrides):
    model = MGenLMHeadModel.build_lazily(tiny_config(**overrides))
    values = reference.weights(parameter_shapes(model.config))
    for name, tensor in model.state_dict().items():
        tensor.set_value(values[name])
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def images(model):
    return reference.pixel_values(model.config.to_dict(), 2)


def run(model, ids, images):
    return model(paddle.to_tensor([ids]), images=paddle.to_tensor(images) if len(images) else None).logits.numpy()[0]


def test_features(model, images, golden):
    np.testing.assert_allclose(model.visual(paddle.to_tensor(images)).numpy(), golden["features"], atol=ATOL)


@pytest.mark.parametrize("case", range(3))
def test_logits(model, images, golden, case):
    name, ids, count = reference.cases(model.config.to_dict())[case]
    np.testing.assert_allclose(run(model, ids, images[:count]), golden[name], atol=ATOL)


def test_beyond_the_trained_length(images, golden):
    model = build(seq_length=8)
    _, ids, _ = reference.cases(model.config.to_dict())[1]
    np.testing.assert_allclose(run(model, ids, images[:1]), golden["long"], atol=ATOL)


def test_adapters(images, golden):
    from paddlenlp.peft import LoRAConfig, LoRAModel

    base = build()
    adapters = reference.lora_of(parameter_shapes(base.config))
    config = LoRAConfig(target_modules=[".*c_attn", ".*mlp.w1"], r=3, lora_alpha=6, lora_dropout=0.0)
    model = LoRAModel(base, config)
    tensors = base.state_dict()
    for module, (a, b) in adapters.items():
        tensors[module + ".lora_A"].set_value(a)
        tensors[module + ".lora_B"].set_value(b)
    model.eval()
    _, ids, _ = reference.cases(base.config.to_dict())[1]
    np.testing.assert_allclose(run(model, ids, images[:1]), golden["lora"], atol=ATOL)


def test_the_file_is_what_the_reference_computes(golden, images):
    """A second run of the reference, so that the file cannot drift from its source."""
    config = tiny_config().to_dict()
    name, ids, count = reference.cases(config)[1]
    again = reference.logits(reference.weights(parameter_shapes(config)), config, ids, images[:count])
    np.testing.assert_allclose(again, golden[name], atol=1e-5)
