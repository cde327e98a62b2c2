"""The decoder's parts against plain formulas."""

import math

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl import language
from paddlemix.models.mgen_vl.attention import attend
from paddlemix.models.mgen_vl.language import KVCache, ntk_alpha, position_ids_from_mask, rotary_factors, rotate
from paddlemix.utils import compat
from paddlemix.utils.compat import FUSED_ATTENTION_ON_CPU, PADDLE_VERSION
from tests.helpers import make_tiny_model, prompt_ids


def test_attend_is_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 8)).astype("float32") for n in (4, 6, 6))
    bias = np.where(rng.random((2, 1, 4, 6)) < 0.3, -1e30, 0).astype("float32")
    bias[..., 0] = 0
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(8) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    tensors = [paddle.to_tensor(a) for a in (q, k, v, bias)]
    for flash in (False, True)[: 1 + FUSED_ATTENTION_ON_CPU]:
        out = attend(*tensors, use_flash=flash).numpy()
        np.testing.assert_allclose(out, expected.transpose(0, 2, 1, 3).reshape(2, 4, 24), atol=1e-6)


def test_hooks_of_the_layers_inside_run():
    """Without any, layers are not called as such."""
    model, seen = make_tiny_model(), []
    for name, layer in model.named_sublayers():
        if name.endswith(("attn", "mlp", "ln_1", "ln_2", "c_attn", "c_proj", "w1", "in_proj", "c_fc")):
            layer.register_forward_post_hook(lambda layer, inputs, output, name=name: seen.append(name))
    model(paddle.to_tensor([prompt_ids(range(4))]), images=paddle.ones([1, 3, 56, 56]))
    names = [n for n, _ in model.named_sublayers() if n.split(".")[-1] in ("attn", "mlp", "ln_1", "ln_2", "c_attn",
             "c_proj", "w1", "in_proj", "c_fc")]  # fmt: skip
    assert sorted(seen) == sorted(names)


def test_rotation_is_the_complex_formula():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 8)).astype("float32")
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 900, 2, 1]])
    cos, sin = rotary_factors(paddle.to_tensor(positions), 8, 10000.0, [1, 3])
    out = rotate(paddle.to_tensor(x), cos, sin).numpy()
    for row, alpha in enumerate((1, 3)):
        base = 10000.0 * alpha ** (8 / 6)
        angle = np.outer(positions[row], base ** (-np.arange(0, 8, 2) / 8))
        turned = (x[row, ..., :4] + 1j * x[row, ..., 4:]) * np.exp(1j * angle)
        np.testing.assert_allclose(out[row, ..., :4], turned.real, atol=1e-4)
        np.testing.assert_allclose(out[row, ..., 4:], turned.imag, atol=1e-4)


@pytest.mark.parametrize("length, alpha", [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7)])
def test_ntk_alpha(length, alpha):
    assert ntk_alpha(length, 2048) == alpha


def test_positions_skip_padding():
    mask = paddle.to_tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_cache_grows_in_blocks_and_keeps_its_contents():
    cache = KVCache()
    rng = np.random.default_rng(0)
    written = rng.standard_normal((2, 3, 300, 4)).astype("float32")
    key, _ = cache.append(0, paddle.to_tensor(written[:, :, :5]), paddle.to_tensor(written[:, :, :5]))
    assert key.shape[2] == 5
    cache.length = 5
    capacities = set()
    for t in range(5, 300):
        cache.reserve(t + 1)
        step = paddle.to_tensor(written[:, :, t : t + 1])
        keys, values = cache.append(0, step, step + 1)
        cache.length = t + 1
        capacities.add(cache.capacity)
    assert capacities == {128, 256, 384}
    np.testing.assert_array_equal(keys.numpy()[:, :, :300], written)
    np.testing.assert_array_equal(values.numpy()[:, :, 5:300], written[:, :, 5:] + 1)


def test_cached_chunks_equal_one_pass():
    """A prompt fed in pieces of any size gives the logits of one pass, NTK and log-n range included."""
    model = make_tiny_model(seq_length=16)
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 256, (2, 40)))
    for length in (12, 40):
        whole = model(ids[:, :length]).logits.numpy()
        output = model(ids[:, : length - 5], use_cache=True)
        # NTK factors are frozen at prefill, so the pieces must lie in the same range.
        assert ntk_alpha(length - 5, 16) == ntk_alpha(length, 16)
        for start, end in ((length - 5, length - 2), (length - 2, length - 1), (length - 1, length)):
            output = model(ids[:, start:end], past_key_values=output.past_key_values)
            np.testing.assert_allclose(output.logits.numpy(), whole[:, start:end], atol=2e-4)


def test_a_pattern_of_ones_own_is_two_samples_in_one_row():
    model = make_tiny_model()
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (1, 7)), rng.integers(0, 256, (1, 5))
    pattern = np.zeros((1, 1, 12, 12), dtype="int64")
    pattern[..., :7, :7] = np.tril(np.ones((7, 7)))
    pattern[..., 7:, 7:] = np.tril(np.ones((5, 5)))
    positions = np.concatenate([np.arange(7), np.arange(5)])[None]
    packed = model(
        paddle.to_tensor(np.concatenate([a, b], 1)),
        attention_mask=paddle.to_tensor(pattern),
        position_ids=paddle.to_tensor(positions),
    ).logits.numpy()
    np.testing.assert_allclose(packed[:, :7], model(paddle.to_tensor(a)).logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(packed[:, 7:], model(paddle.to_tensor(b)).logits.numpy(), atol=1e-5)


def test_steps_know_the_prompts_mask():
    """Without a mask of their own, past the capacity that the prompt left and in chunks, rows padded or not."""
    model = make_tiny_model(seq_length=40)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 256, (2, 140)), np.ones((2, 140), dtype="int64")
    mask[1, :7] = 0
    whole = model(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask)).logits.numpy()
    # NTK factors are frozen at prefill: as many as the whole has.
    output = model(paddle.to_tensor(ids[:, :120]), attention_mask=paddle.to_tensor(mask[:, :120]), use_cache=True)
    for start, end in [(120, 123), *((t, t + 1) for t in range(123, 140))]:
        output = model(paddle.to_tensor(ids[:, start:end]), past_key_values=output.past_key_values)
        np.testing.assert_allclose(output.logits.numpy(), whole[:, start:end], atol=2e-4, err_msg=str(start))


def test_a_fused_norm_is_the_formula(monkeypatch):
    """The kernel is for GPUs; the CPU has it on Paddle 3 alone. On 2.6 the call is seen, and its place in the model."""
    rng = np.random.default_rng(0)
    x, added, weight = (rng.standard_normal(shape).astype("float32") for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    calls = []

    def formula(x, weight, bias, epsilon, axis, residual=None):
        calls.append((bias, axis, residual is not None))
        whole = x if residual is None else x + residual
        return whole * paddle.rsqrt((whole * whole).mean(-1, keepdim=True) + epsilon) * weight, whole

    def check():
        for residual in (None, paddle.to_tensor(added)):
            normed, whole = compat.fused_rms_norm(paddle.to_tensor(x), paddle.to_tensor(weight), 1e-6, residual)
            expected = x if residual is None else x + added
            np.testing.assert_allclose(whole.numpy(), expected, atol=1e-6)
            expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-6) * weight
            np.testing.assert_allclose(normed.numpy(), expected, atol=1e-5)

    if PADDLE_VERSION >= (3, 0):
        check()
    monkeypatch.setattr(compat, "_fused_rms_norm", formula)
    check()
    assert calls == [(None, 2, False), (None, 2, True)]

    model = make_tiny_model()
    ids = paddle.to_tensor(rng.integers(0, 256, (2, 9)))
    plain = model(ids).logits.numpy()
    assert len(calls) == 2, "a CPU takes the plain form"
    monkeypatch.setattr(language, "norm_is_fused", lambda x: not paddle.is_grad_enabled())
    model(ids)
    assert len(calls) == 2, "with gradients, too"
    with paddle.no_grad():
        np.testing.assert_allclose(model(ids).logits.numpy(), plain, atol=1e-5)
    # Two norms in each of two blocks, the second with the attention's output added; and the last one.
    assert [added for *_, added in calls[2:]] == [False, True, False, True, False]


def test_rms_by_one_kernel_is_the_formula_with_its_gradient():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((3, 4, 24)), rng.standard_normal((3, 4, 24))
    values[0, 0] = 0.0  # padding
    found = []
    for formula in (compat.over_rms, lambda x, eps: x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps)):
        x = paddle.to_tensor(values.astype("float32"), stop_gradient=False)
        y = formula(x, 1e-3)
        (y * paddle.to_tensor(weights.astype("float32"))).sum().backward()
        found.append((y.numpy(), x.grad.numpy()))
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_recompute_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = make_tiny_model()
        model.train()
        if recompute:
            model.recompute_enable()
        ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 256, (2, 9)))
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-6, err_msg=name)


def test_tensor_parallel_actions_cover_the_decoder():
    from paddlemix.models.mgen_vl.language import MGenPretrainedModel

    model = make_tiny_model()
    model.config.tensor_parallel_degree = 2
    split = MGenPretrainedModel._get_tensor_parallel_mappings(model.config)
    assert "transformer.llm.wte.weight" in split and "lm_head.weight" in split
    assert {f"transformer.llm.h.{i}.attn.c_attn.weight" for i in range(2)} <= set(split)
    assert {name for name in split if ".lora_" not in name} <= set(model.state_dict())
