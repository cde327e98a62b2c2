"""One training step with images in simulated half precision: dtypes, range, loss and gradients."""

import contextlib

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl import attention, connector, language, modeling, vision
from tests.half_precision import world
from tests.half_precision.simulator import HALF, Simulation, nearest
from tests.helpers import make_tiny_model

SCALE = 1024.0  # of the loss; float16's gradients vanish without one


def new_model(dtype, flash=False):
    """LoRA over random weights that are half-precision numbers, as a checkpoint has them. Adapters are not 0."""
    model = make_tiny_model(
        3, visual={"n_queries": world.QUERIES}, emb_dropout_prob=0.0, attn_dropout_prob=0.0,
        use_flash_attention=flash,
    )  # fmt: skip
    lora = world.with_lora(model)
    paddle.seed(9)
    for name, parameter in lora.named_parameters():
        drawn = paddle.normal(0.0, 0.02, parameter.shape) if "lora" in name else parameter
        parameter.set_value(nearest(drawn.numpy(), dtype))
    return lora


def gradients(model):
    found = [parameter.grad for parameter in model.parameters() if not parameter.stop_gradient]
    return np.concatenate([gradient.numpy().reshape(-1).astype(np.float64) for gradient in found])


@pytest.fixture(scope="module")
def values():
    return world.batch(6, 5)


@pytest.fixture(scope="module")
def expected(values):
    """(loss, gradients) in float32, by dtype whose grid the weights are on."""
    found = {}
    for dtype in ("float16", "bfloat16"):
        model = new_model(dtype)
        loss = model(**world.tensors(values)).loss
        loss.backward()
        found[dtype] = float(loss), gradients(model)
    return found


class Step:
    """A forward and backward; `dtypes` has what was seen on the way, "half" or "float32"."""

    def __init__(self, values, dtype, level, paddle_3=False, flash=False):
        model = new_model(dtype, flash)
        self.simulation = simulation = Simulation(dtype, paddle_3)
        simulation.decorate(model, level)
        self.dtypes = {}
        base = model.model
        watched = {f"block {i}": block for i, block in enumerate(base.transformer.llm.h)}
        watched.update({f"ViT block {i}": one for i, one in enumerate(base.visual.vit.transformer.resblocks)})
        watched.update({"features": base.visual, "norm": base.transformer.llm.ln_f})
        for name, layer in watched.items():
            layer.register_forward_post_hook(lambda _, __, out, name=name: self.see(name, out))
        with simulation, pytest.MonkeyPatch.context() as patch:
            for module, name in ((vision, "ViT"), (connector, "connector"), (language, "decoder")):
                self.watch(patch, module, "attend", name)
            self.watch(patch, modeling.F, "cross_entropy", "logits in the loss")
            self.watch(patch, modeling, "parallel_matmul", None, "logits")
            self.watch(patch, attention, "softmax_", "scores")
            inputs = world.tensors(values)
            with simulation.autocast(level):
                loss = model(**inputs).loss
            self.see("loss", loss)
            (loss * SCALE).backward()
        self.loss, self.gradients = float(loss), gradients(model) / SCALE

    def see(self, name, *tensors):
        found = {"half" if tensor.dtype == HALF else "float32" for tensor in tensors}
        self.dtypes.setdefault(name, set()).update(found)

    def watch(self, patch, module, function, name, result=None):
        original = getattr(module, function)

        def run(*arguments, **options):
            if name is not None:
                number = {"attend": 3}.get(function, 1)
                for part, tensor in zip("q k v".split() if number == 3 else [""], arguments):
                    self.see(f"{name} {part}".strip(), tensor)
            out = original(*arguments, **options)
            if result is not None:
                self.see(result, out)
            return out

        patch.setattr(module, function, run)


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


CASES = [(dtype, level, paddle_3) for dtype in ("float16", "bfloat16") for level in ("O1", "O2") for paddle_3 in (0, 1)]


@pytest.mark.parametrize("dtype, level, paddle_3", CASES)
def test_loss_and_gradients_are_those_of_float32_and_nothing_overflows(values, expected, dtype, level, paddle_3):
    step = Step(values, dtype, level, bool(paddle_3))
    loss, grads = expected[dtype]
    assert abs(step.loss / loss - 1) < 0.01
    assert cosine(step.gradients, grads) > 0.999
    assert not step.simulation.overflows


@pytest.mark.parametrize("dtype, level, paddle_3", CASES)
def test_fused_attention_gets_half_inputs_everywhere(values, expected, dtype, level, paddle_3):
    step = Step(values, dtype, level, bool(paddle_3), flash=True)
    # The ViT's two layers and the connector without a mask, the decoder's two with one.
    assert step.simulation.fused == [(HALF,) * 3] * 3 + [(HALF,) * 4] * 2
    assert abs(step.loss / expected[dtype][0] - 1) < 0.01
    assert cosine(step.gradients, expected[dtype][1]) > 0.999
    assert not step.simulation.overflows


@pytest.mark.parametrize("dtype, level, paddle_3", CASES)
def test_dtypes_on_the_way(values, dtype, level, paddle_3):
    """At O2 all is half but the softmax, the norms' insides and the loss.

    At O1 the weights are float32, so a bias makes a half product float32 on Paddle 2.6; 3.x adds it in half.
    """
    dtypes = Step(values, dtype, level, bool(paddle_3)).dtypes
    half, wide = {"half"}, {"float32"}
    assert {dtypes.pop(name) == wide for name in ("scores", "logits in the loss", "loss")} == {True}
    assert dtypes.pop("logits") == half
    if level == "O2":
        assert set(map(frozenset, dtypes.values())) == {frozenset(half)}, dtypes
        return
    stream = [name for name in dtypes if name.split()[-1] not in "qkv"]
    assert {name for name in stream if dtypes[name] != wide} == {"features"}
    projected = half if paddle_3 else wide
    assert all(dtypes[f"{part} {one}"] == projected for part in ("ViT", "connector") for one in "qkv")
    # Turned by angles of the residual stream's dtype.
    assert all(dtypes[f"decoder {one}"] == wide for one in "qkv")


@pytest.mark.parametrize("level", ["O2", "generation"])
def test_float16_scores_beyond_its_range_do_not_overflow(level):
    """q · k / √d of 89,000 is no float16 number. The key with the largest score gets all the weight, as in float32."""
    rng = np.random.default_rng(0)
    d = 32
    query, key, value = (nearest(rng.standard_normal((1, 2, 6, d)), "float16") for _ in range(3))
    query[..., 0] = 700.0
    key[..., 0] = np.linspace(-720.0, 720.0, 6)
    assert 700.0 * 720.0 / d**0.5 > 65504
    with Simulation("float16") as simulation:
        inputs = [paddle.to_tensor(one).astype(HALF) for one in (query, key, value)]
        with simulation.autocast(level) if level == "O2" else contextlib.nullcontext():
            out = attention.attend(*inputs)
    assert out.dtype == HALF and not simulation.overflows
    np.testing.assert_array_equal(out.numpy().reshape(1, 6, 2, d), value[:, :, -1:].repeat(6, 2).transpose(0, 2, 1, 3))
