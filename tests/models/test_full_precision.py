"""What must stay float32 under mixed precision does, and what must be half is.

The CPU has no autocast, so what can be seen here is where it is switched off. Elsewhere it turns the inputs of
operators on its half list (matmul) into half precision, those of its float32 list (scatter) into float32, and mixed
ones into float32, with whatever their results meet.
"""

import contextlib

import numpy as np
import paddle
import pytest
from paddle.amp.auto_cast import amp_initialize
from paddle.base import core, framework

from paddlemix.models.mgen_vl import attention, connector, language, modeling
from paddlemix.utils.compat import autocast_dtype, full_precision
from tests.helpers import make_tiny_model, prompt_ids


@contextlib.contextmanager
def autocast(dtype="bfloat16", level="O2"):
    """Autocast as on a GPU, as far as it can be asked for; the CPU's operators do not heed it."""
    tracer = framework._dygraph_tracer()
    tracer._amp_level, tracer._amp_dtype = getattr(core.AmpLevel, level), dtype
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
            found.append((name, str(first.dtype).replace("paddle.", ""), autocast_dtype() is not None))
            return original(first, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(attention, "softmax_")
    watch(modeling.F, "cross_entropy")
    watch(connector.F, "interpolate")
    watch(language, "over_rms")
    watch(paddle, "scatter")
    watch(language, "rotary_factors")
    return found


def test_the_region_switches_autocast_off_and_on_again():
    assert autocast_dtype() is None
    with autocast():
        with full_precision():
            assert autocast_dtype() is None
        assert autocast_dtype() == "bfloat16"
    with full_precision():
        assert autocast_dtype() is None


def test_softmax_norms_rotary_angles_and_loss_are_float32_under_o2(calls):
    model = make_tiny_model()
    ids = paddle.to_tensor([prompt_ids(range(8))])
    with autocast():
        model(ids, images=paddle.ones([1, 3, 56, 56]), labels=ids)
    names = {name for name, _, _ in calls}
    assert names == {"softmax_", "cross_entropy", "interpolate", "over_rms", "rotary_factors", "scatter"}
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


@pytest.mark.parametrize("level", ("O1", "O2"))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_fused_attention_gets_half_inputs_and_a_finite_bias_of_every_row(monkeypatch, level, dtype):
    """float32 inputs have no kernel on Paddle 2.6, mixed ones take the plain form on 3 without a word."""
    seen = []

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, training=True):
        seen.append((query, key, value, attn_mask, autocast_dtype()))
        return paddle.zeros(query.shape)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fused)
    model = make_tiny_model(use_flash_attention=True)
    ids = paddle.to_tensor([prompt_ids(range(8))] * 2)
    with autocast(dtype, level):
        # No mask: one bias for all rows.
        model(ids, images=paddle.ones([2, 3, 56, 56]), labels=ids)
    assert len(seen) == 5  # 2 layers of the ViT, the connector, 2 of the decoder
    for query, key, value, bias, on in seen:
        assert {query.dtype, key.dtype, value.dtype} == {getattr(paddle, dtype)} and on is None
        if bias is not None:
            assert bias.dtype == query.dtype and bias.shape[0] == 2
            values = bias.astype("float32").numpy()
            assert np.isfinite(values).all() and values.min() < -6e4 and values.max() == 0
    assert [bias is not None for *_, bias, _ in seen] == [False, False, False, True, True]


def test_scores_pass_the_end_of_float16(monkeypatch):
    """As a float16 matmul gives them: rounded to its grid, infinite above 65504."""
    matmul = paddle.matmul

    def half_matmul(x, y, **kwargs):
        with np.errstate(over="ignore"):
            return paddle.to_tensor(matmul(x, y, **kwargs).numpy().astype("float16").astype("float32"))

    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, 5, 32)).astype("float16").astype("float32") for _ in range(3))
    query, key = query * 500, key * 500
    scores = np.einsum("bhtd,bhsd->bhts", query.astype("float64"), key) / np.sqrt(32)
    assert np.abs(scores).max() > 65504 * 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), value).reshape(1, 5, 64)
    query, key, value = map(paddle.to_tensor, (query, key, value))
    np.testing.assert_allclose(attention.attend(query, key, value).numpy(), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(attention, "compute_dtype", lambda tensor: paddle.float16)
    monkeypatch.setattr(paddle, "matmul", half_matmul)
    np.testing.assert_allclose(attention.attend(query, key, value).numpy(), expected, rtol=1e-3, atol=1e-3)
    # The guard alone changes nothing in float32.
    monkeypatch.setattr(paddle, "matmul", matmul)
    small = attention.attend(query / 500, key / 500, value).numpy()
    monkeypatch.undo()
    np.testing.assert_allclose(small, attention.attend(query / 500, key / 500, value).numpy(), atol=1e-6)


def test_the_position_table_stays_float32_in_a_bfloat16_run():
    model = make_tiny_model()
    before = model.visual.attn_pool.pos_embed.numpy()
    amp_initialize([model], "bfloat16", None)  # what paddle.amp.decorate does on a GPU
    assert model.lm_head.weight.dtype == paddle.bfloat16
    assert model.visual.attn_pool.pos_embed.dtype == paddle.float32
    np.testing.assert_array_equal(model.visual.attn_pool.pos_embed.numpy(), before)
