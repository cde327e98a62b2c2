"""What must stay float32 under mixed precision does. Run: pytest tests/models/test_full_precision.py

The CPU has no autocast, so what can be seen here is where it is switched off: at level O2 it turns the inputs of
nearly every operator into half precision, also those that were made float32 just before.
"""

import contextlib

import numpy as np
import paddle
import pytest
from paddle.base import core, framework

from paddlemix.models.mgen_vl import attention, connector, language, modeling
from paddlemix.utils.compat import autocast_is_on
from paddlemix.utils.runtime import full_precision
from tests.helpers import make_tiny_model, prompt_ids


@contextlib.contextmanager
def autocast():
    """Level O2 as on a GPU, as far as it can be asked for; the CPU's operators do not heed it."""
    tracer = framework._dygraph_tracer()
    tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O2, "bfloat16"
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O0, "float32"


@pytest.fixture
def calls(monkeypatch):
    """(function, dtype of its input, whether autocast was on) of each watched call."""
    found = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(first, *args, **kwargs):
            found.append((name, str(first.dtype).replace("paddle.", ""), autocast_is_on()))
            return original(first, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(attention.F, "softmax_")
    watch(modeling.F, "cross_entropy")
    watch(connector.F, "interpolate")
    watch(paddle, "rsqrt")
    watch(paddle, "scatter")
    watch(language, "rotary_factors")
    return found


def test_the_region_switches_autocast_off_and_on_again():
    assert not autocast_is_on()
    with autocast():
        with full_precision():
            assert not autocast_is_on()
        assert autocast_is_on()
    with full_precision():
        assert not autocast_is_on()


def test_softmax_norms_rotary_angles_and_loss_are_float32_under_o2(calls):
    model = make_tiny_model()
    ids = paddle.to_tensor([prompt_ids(range(8))])
    with autocast():
        model(ids, images=paddle.ones([1, 3, 56, 56]), labels=ids)
    names = {name for name, _, _ in calls}
    assert names == {"softmax_", "cross_entropy", "interpolate", "rsqrt", "rotary_factors", "scatter"}
    assert all(dtype == ("int64" if name == "rotary_factors" else "float32") for name, dtype, _ in calls)
    assert not any(on for _, _, on in calls)
    # Both towers' attention: 2 layers of the ViT, the connector, 2 of the decoder.
    assert sum(name == "softmax_" for name, _, _ in calls) == 5


def test_attention_of_half_inputs_softmaxes_in_float32(calls):
    """float16 scores near 2048 are 2 apart; in float32 they are told apart."""
    rng = np.random.default_rng(0)
    query, key, value = (paddle.to_tensor(rng.standard_normal((1, 2, 3, 8)).astype("float32")) for _ in range(3))
    offset = 2048.0 + paddle.to_tensor([0.0, 0.25, 0.5])
    out = attention.attend(query, key, value, bias=offset.reshape([1, 1, 1, 3]))
    assert [(name, dtype) for name, dtype, _ in calls] == [("softmax_", "float32")]
    scores = np.einsum("bhtd,bhsd->bhts", query.numpy(), key.numpy()) / np.sqrt(8) + np.array([0, 0.25, 0.5])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bhsd->bthd", weights, value.numpy()).reshape(1, 3, 16)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-3)
