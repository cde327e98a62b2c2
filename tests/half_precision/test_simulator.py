"""The simulator keeps Paddle's rules."""

import numpy as np
import paddle
import pytest
from paddle.amp import amp_lists

from tests.half_precision import simulator
from tests.half_precision.simulator import FLOAT32, HALF, Simulation, autocast_lists, nearest

RNG = np.random.default_rng(0)


def test_rounding_is_to_the_nearest_and_ties_to_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-9, -1 - 2**-8 - 2**-20, 3e38, 1e-37], np.float32)
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, -1 - 2**-7, 3e38, 1e-37], np.float32)
    found = nearest(values, "bfloat16")
    np.testing.assert_array_equal(found[:4], expected[:4])
    np.testing.assert_allclose(found[4:], expected[4:], rtol=2**-6)
    assert np.isinf(nearest([3.4e38], "bfloat16")) and np.isinf(nearest([65520.0], "float16"))
    assert nearest([2.0**-26], "float16") == 0 and np.isnan(nearest([np.nan], "bfloat16"))
    np.testing.assert_array_equal(nearest([1 + 2**-11, 1 + 3 * 2**-11], "float16"), [1, 1 + 2**-9])


def pair():
    """A half and a float32 tensor [4, 4]."""
    half = paddle.to_tensor(nearest(RNG.standard_normal((4, 4)), "float16")).astype(HALF)
    return half, paddle.to_tensor(RNG.standard_normal((4, 4)).astype(np.float32)).astype(FLOAT32)


def test_autocast_casts_by_list_and_promotes_the_rest():
    with Simulation("float16") as simulation:
        half, wide = pair()
        with simulation.autocast("O2"):
            assert paddle.matmul(half, wide).dtype == HALF  # white
            assert paddle.scatter(half, paddle.to_tensor([1]), half[:1]).dtype == FLOAT32  # black
            assert (half + half).dtype == HALF and (half + wide).dtype == (wide * half).dtype == FLOAT32
            assert (half * 2.0).dtype == HALF and (half**2).dtype == HALF
            assert paddle.nn.functional.softmax(half).dtype == HALF
            with paddle.amp.auto_cast(False):
                assert paddle.scatter(half, paddle.to_tensor([1]), half[:1]).dtype == HALF
        with simulation.autocast("O1"):
            assert (half**2).dtype == FLOAT32
            assert paddle.nn.functional.softmax(half).dtype == FLOAT32
        # Without autocast float32 wins in arithmetic, and a product of two dtypes fails as on a GPU.
        assert (half + wide).dtype == FLOAT32
        with pytest.raises((RuntimeError, ValueError)):
            paddle.matmul(half, wide)


@pytest.mark.parametrize("paddle_3", [False, True])
def test_linear_ends_in_float32_at_o1_on_paddle_2_and_in_half_on_paddle_3(paddle_3):
    with Simulation("float16", paddle_3) as simulation, simulation.autocast("O1"):
        half, wide = pair()
        without = paddle.nn.functional.linear(wide, wide)
        with_bias = paddle.nn.functional.linear(wide, wide, wide[0])
        assert without.dtype == HALF and with_bias.dtype == (HALF if paddle_3 else FLOAT32)


def test_results_and_gradients_lie_on_the_grid_and_leaving_it_is_counted():
    x = paddle.to_tensor(nearest(RNG.standard_normal((8, 8)), "float16"), stop_gradient=False)
    with Simulation("float16") as simulation:
        y = x * 1.0
        z = paddle.nn.functional.gelu(y)
        seen = []
        y.register_hook(lambda gradient: seen.append(gradient.numpy()))
        (z * 0.3).sum().backward()
        for values in (z.numpy(), seen[0]):
            np.testing.assert_array_equal(values, nearest(values, "float16"))
        assert not simulation.overflows
        large = z * 1e4
        assert (large * 1e4).isinf().any() and set(simulation.overflows) == {"multiply"}
        assert simulation.underflows["multiply"] == 0
        (z.abs() + 0.1) * 1e-9
        assert simulation.underflows["multiply"] == 64


def test_everything_is_put_back():
    before = (paddle._C_ops.matmul, paddle.Tensor.__add__, paddle.zeros, paddle.Tensor.astype)
    with Simulation("bfloat16"):
        assert paddle.zeros([1], "float32").dtype == FLOAT32
        assert paddle.zeros([1]).astype("bfloat16").dtype == HALF
    assert before == (paddle._C_ops.matmul, paddle.Tensor.__add__, paddle.zeros, paddle.Tensor.astype)
    assert paddle.zeros([1], "float32").dtype == paddle.float32


def test_kept_counts_what_the_backward_needs_once():
    weight = paddle.nn.Linear(8, 8, bias_attr=False)
    x = paddle.to_tensor(nearest(RNG.standard_normal((4, 8)), "float16"), stop_gradient=False)
    with Simulation("float16") as simulation:
        with simulation.kept(weight, [("one", weight)]) as kept:
            y = weight(x)
            y * y
    assert kept.layers["one"] == 4 * 8 * 2 and kept.layers[""] == 4 * 8 * 2
    with Simulation("float16") as simulation:
        wide = paddle.nn.Linear(8, 8, bias_attr=False)
        wide.to(dtype="float64")
        with simulation.kept(wide) as kept, simulation.autocast("O1"):
            wide(x)
    assert kept.layers[""] == (4 + 8) * 8 * 2  # the copy of the weight too


def test_fused_attention_equals_the_plain_one_and_refuses_float32():
    shape = [2, 5, 3, 8]
    plain = [paddle.to_tensor(nearest(RNG.standard_normal(shape), "bfloat16"), stop_gradient=False) for _ in range(3)]
    mask = paddle.to_tensor(np.where(np.tri(5), 0, -1e30).astype(np.float32)).reshape([1, 1, 5, 5])

    def run(inputs, function):
        out = function(*inputs)
        gradients = paddle.grad(out, inputs, paddle.ones_like(out) * 0.5 + out.detach())
        return [tensor.numpy() for tensor in (out, *gradients)]

    def math(query, key, value):
        scores = paddle.einsum("bthd,bshd->bhts", query, key) / 8**0.5 + mask
        return paddle.einsum("bhts,bshd->bthd", paddle.nn.functional.softmax(scores), value)

    expected = run(plain, math)
    with Simulation("bfloat16") as simulation:
        fused = paddle.nn.functional.scaled_dot_product_attention
        for found, wanted in zip(run(plain, lambda *qkv: fused(*qkv, attn_mask=mask)), expected):
            np.testing.assert_allclose(found, wanted, atol=2**-7 * np.abs(wanted).max())
        assert simulation.fused == [(HALF,) * 4]
        with pytest.raises(NotImplementedError):
            fused(*plain[:2], plain[2].astype("float32"))


@pytest.mark.any_paddle
def test_paddle_3_differs_from_2_6_in_what_is_recorded():
    """On Paddle 3 its own lists are these; on 2.6 they lack what is recorded."""
    from paddlemix.utils.compat import PADDLE_3

    for dtype in ("float16", "bfloat16"):
        for level in ("O1", "O2"):
            white, black = amp_lists.white_list()[dtype][level], amp_lists.black_list()[dtype][level]
            if PADDLE_3:
                assert simulator.PADDLE_3_WHITE <= white and white - simulator.PADDLE_3_WHITE == WHITE[dtype]
                assert black - simulator.PADDLE_3_BLACK_O1 == black_of_2_6(level)
            else:
                assert white == WHITE[dtype] and black == black_of_2_6(level)
                assert "flash_attn" in autocast_lists(dtype, level, paddle_3=True)[0]


WHITE = {
    "bfloat16": {"conv2d", "einsum", "fused_gemm_epilogue", "matmul", "matmul_v2", "max_pool2d_with_index", "mul"}
}
WHITE["float16"] = WHITE["bfloat16"] | {
    "fake_quantize_dequantize_abs_max", "fake_quantize_dequantize_moving_average_abs_max", "fused_attention",
    "fused_feedforward",
}  # fmt: skip


def black_of_2_6(level):
    names = {"lookup_table", "lookup_table_v2", "scatter"}
    names |= {f"{kind}_interp_v2" for kind in ("linear", "nearest", "bilinear", "bicubic", "trilinear")}
    if level == "O1":
        names |= {
            "acos", "asin", "atanh", "c_softmax_with_cross_entropy", "cosh", "cross_entropy", "cross_entropy2",
            "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "frobenius_norm", "group_norm", "hsigmoid_loss",
            "huber_loss", "layer_norm", "log", "log10", "log2", "log_loss", "log_softmax", "margin_cross_entropy",
            "mean", "nll_loss", "pnorm", "pow", "reciprocal", "reduce_mean", "reduce_prod", "reduce_sum", "renorm",
            "rsqrt", "sigmoid_cross_entropy_with_logits", "sinh", "softmax", "softmax_with_cross_entropy", "softmin",
            "softplus", "square", "tan", "tanh_shrink", "triplet_margin_loss",
        }  # fmt: skip
    return names
