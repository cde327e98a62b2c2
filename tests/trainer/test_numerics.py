"""Overflow under the loss scaler, and losses that end a run.

float16 does not run on a CPU; the loss scale does: Paddle's own GradScaler is made to believe in a GPU, and gradients
overflow because the loss is multiplied with infinity.
"""

import os
import sys
import types

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.hybrid_parallel_optimizer import HybridParallelClipGrad
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_utils import GroupShardedClipGrad

from paddlemix.trainer import numerics
from paddlemix.trainer.numerics import HOPELESS_STEPS, OverflowCount, gradient_norm
from paddlemix.utils import runtime
from paddlemix.utils.errors import JobFailed
from tests.helpers import refused
from tests.trainer import half_states
from tests.trainer.runs import LORA, run, start


def gpu_scaler(monkeypatch, scale=1024.0):
    """Paddle's GradScaler, working on the CPU's tensors."""
    module = paddle.amp.grad_scaler
    tracer = module._dygraph_tracer()
    place = types.SimpleNamespace(is_gpu_place=lambda: True)

    class Tracer:
        _expected_place = place

        def __getattr__(self, name):
            return getattr(tracer, name)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_dygraph_tracer", Tracer)
        scaler = paddle.amp.GradScaler(init_loss_scaling=scale)
    # What autocast says on a GPU; without it the scaler switches itself off.
    monkeypatch.setattr(module, "amp_global_state", lambda: types.SimpleNamespace(amp_dtype="float16"))
    return scaler


def train(trainer, scaler, bad=(), forward=()):
    """Train with this scaler. In steps `bad` gradients overflow; in steps `forward` the loss is NaN."""
    compute, wrap = trainer.compute_loss, trainer._wrap_model

    def wrap_model(*args, **kwargs):
        # Later than the trainer does it: on the way it asks for the weights in float16.
        wrapped = wrap(*args, **kwargs)
        trainer.do_grad_scaling, trainer.scaler = True, scaler
        return wrapped

    trainer._wrap_model = wrap_model

    def compute_loss(model, inputs, return_outputs=False):
        loss = compute(model, inputs)
        step = trainer.state.global_step + 1
        if step in forward:
            return loss * float("nan")
        if step in bad:
            return Explode.apply(loss)
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()


class Explode(paddle.autograd.PyLayer):
    """The identity with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def history(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_an_overflow_skips_the_step_and_is_counted_and_said(run_keys, log, monkeypatch):
    trainer = start(run_keys(**LORA, max_steps=4, save_strategy="no", lr_scheduler_type="constant"))
    weights = []
    end = trainer.numerics.on_optimizer_end

    def keep(*args, **kwargs):
        weights.append(trainer.model.model.transformer.llm.h[0].attn.c_attn.lora_B.numpy().copy())
        return end(*args, **kwargs)

    monkeypatch.setattr(trainer.numerics, "on_optimizer_end", keep)
    train(trainer, gpu_scaler(monkeypatch), bad=(2, 3))
    assert np.array_equal(weights[0], weights[1]) and np.array_equal(weights[1], weights[2])
    assert not np.array_equal(weights[2], weights[3])
    lines = history(trainer)
    assert [line["loss_scale"] for line in lines] == [1024, 1024, 512, 256]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    warnings = [record.message for record in log.records if "was skipped" in record.message]
    assert warnings == [
        "step 2 overflowed float16 and was skipped; the loss scale falls from 1024 to 512. A few such steps are "
        "normal: the log counts them"
    ]


def test_a_nan_loss_of_a_skipped_step_does_not_spoil_the_log(run_keys, monkeypatch):
    trainer = start(run_keys(**LORA, max_steps=4, logging_steps=2, save_strategy="no"))
    train(trainer, gpu_scaler(monkeypatch), forward=(2,))
    lines = history(trainer)
    assert lines[-1]["skipped_steps"] == 1 and all(np.isfinite(line["loss"]) for line in lines)
    assert lines[0]["loss"] > 1


def test_a_run_of_nan_losses_stops_with_advice(run_keys, tmp_path, monkeypatch):
    trainer = start(run_keys(**LORA, max_steps=20, save_steps=1))
    with refused(JobFailed, "loss", match="5 steps .* step 7.*fp16_opt_level=O1"):
        train(trainer, gpu_scaler(monkeypatch), forward=range(3, 21))
    assert trainer.state.global_step == 6


def test_gradients_that_overflow_at_every_scale_stop_the_run(run_keys, monkeypatch):
    trainer = start(run_keys(**LORA, max_steps=30, save_strategy="no"))
    with refused(JobFailed, "gradients", match="learning_rate"):
        train(trainer, gpu_scaler(monkeypatch, scale=8.0), bad=range(1, 31))
    # 8, 4 and 2 could still fall; five steps at 1 could not.
    assert trainer.state.global_step + 1 == 3 + HOPELESS_STEPS


# skipped, loss is a number, scale; one line per step → how often it was skipped, or "stop"
CASES = [
    ([(False, True, 1024)] * 9, 0),
    ([(True, True, 2.0**-n * 32768) for n in range(15)], 15),
    ([(True, True, 1.0)] * 4 + [(False, True, 1.0)] + [(True, True, 1.0)] * 4, 8),
    ([(True, True, 1.0)] * 5, "stop"),
    ([(True, False, 32768.0)] * 5, "stop"),
    ([(True, False, 32768.0)] * 4 + [(True, True, 2048.0)] + [(True, False, 1024.0)] * 4, 9),
    ([(True, False, 32768.0)] * 3 + [(True, True, 1.0)] * 2, "stop"),
]


@pytest.mark.parametrize("steps, expected", CASES)
def test_when_to_give_up(steps, expected):
    count = OverflowCount()
    if expected == "stop":
        with pytest.raises(JobFailed, match="the last checkpoint is intact"):
            for number, step in enumerate(steps, 1):
                count.step(number, *step)
    else:
        for number, step in enumerate(steps, 1):
            count.step(number, *step)
        assert count.skipped == expected


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_without_a_scale_the_first_bad_loss_ends_the_run(run_keys, bad):
    """The third step's first micro-batch of two, before its gradients reach the weights."""
    trainer = start(run_keys(**LORA, max_steps=4, save_strategy="no", gradient_accumulation_steps=2))
    compute, seen, weights = trainer.compute_loss, [], []

    def compute_loss(model, inputs, return_outputs=False):
        seen.append(1)
        weights.append(trainer.model.model.transformer.llm.h[0].attn.c_attn.lora_B.numpy().copy())
        return compute(model, inputs) * (float(bad) if len(seen) == 5 else 1.0)

    trainer.compute_loss = compute_loss
    with refused(JobFailed, "loss", match=f"{bad} .*step 3.*learning_rate"):
        trainer.train()
    now = trainer.model.model.transformer.llm.h[0].attn.c_attn.lora_B.numpy()
    assert len(seen) == 6 and np.array_equal(now, weights[-1]) and not np.array_equal(now, weights[0])


@pytest.mark.parametrize("saves", ["no", "steps", "epoch"])
def test_what_the_last_step_spoils_is_not_saved(run_keys, tmp_path, saves):
    rate = {"learning_rate": 1e30, "weight_decay": 1e30, "lr_scheduler_type": "constant"}
    keys = run_keys(**LORA, **rate, max_steps=1, save_strategy=saves, save_steps=1)
    with refused(JobFailed, "loss", match="step 1 made .* infinite or NaN: lower learning_rate"):
        run(keys)
    assert "lora_model_state.pdparams" not in [path.name for path in (tmp_path / "out").rglob("*")]



@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_batches_add_no_wait_for_the_device(run_keys, monkeypatch, scaled):
    """How often the trainer's code, ours and PaddleNLP's, asks for a tensor's value: for 3 batches a step as for 1."""
    counts, asking = {}, []

    def counted(original):
        def ask(tensor, *args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename.replace(os.sep, "/")
            if asking and ("paddlemix/trainer/" in caller or "paddlenlp/trainer/" in caller):
                counts[asking[0]] += 1
            return original(tensor, *args, **kwargs)

        return ask

    for name in ("numpy", "item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(paddle.Tensor, name, counted(getattr(paddle.Tensor, name)))
    for batches in (1, 3):
        # Lines at the last step alone, which wait for the loss that they show.
        keys = {"max_steps": 3, "logging_steps": 3, "save_strategy": "no", "gradient_accumulation_steps": batches}
        trainer = start(run_keys(**LORA, overwrite_output_dir=True, **keys))
        asking[:], counts[batches] = [batches], 0
        train(trainer, gpu_scaler(monkeypatch)) if scaled else trainer.train()
        asking.clear()
    assert 3 <= counts[3] == counts[1]


# ---- float32 gradients of half-precision weights


@pytest.fixture
def master_grad_run(run_keys, monkeypatch):
    """A trainer with amp_master_grad as PaddleNLP builds it for float16; the weights stay float32, as at O1."""
    half_states.enabled_scaler(monkeypatch)
    monkeypatch.setattr(runtime, "decide_dtype", lambda requested, *machine: runtime.Choice("float32"))
    monkeypatch.setattr(
        runtime, "decide_precision", lambda *words: runtime.Precision("float16", "float32", False, True)
    )
    monkeypatch.setattr(paddle.amp.grad_scaler, "amp_global_state", lambda: types.SimpleNamespace(amp_dtype="float16"))
    keys = dict(LORA, max_steps=3, save_strategy="no")

    def begin(**changes):
        return start(run_keys(**dict(keys, overwrite_output_dir=True, **changes)))

    return begin


def adapters(trainer):
    return [p.numpy().copy() for p in trainer.model.parameters() if not p.stop_gradient]


@pytest.mark.parametrize("most", [1e-2, 1e3])
def test_master_gradients_are_unscaled_before_clipping(master_grad_run, monkeypatch, most):
    """A loss scale is a power of two: the weights are those of the run without one, bit for bit, clipped or not."""
    scaled = master_grad_run(fp16=True, amp_master_grad=True, max_grad_norm=most)
    assert scaled.scaler.is_enable() and scaled.do_grad_scaling
    scaled.train()
    monkeypatch.undo()
    plain = master_grad_run(max_grad_norm=most)
    plain.train()
    for line, other in zip(history(scaled), history(plain)):
        assert line["grad_norm"] == other["grad_norm"] > 1e-2 and line["loss_scale"] == 32768
    assert all(np.array_equal(a, b) for a, b in zip(adapters(scaled), adapters(plain)))


def test_master_gradients_overflow_is_seen(master_grad_run):
    trainer = master_grad_run(fp16=True, amp_master_grad=True)
    compute, weights = trainer.compute_loss, []

    def compute_loss(model, inputs, return_outputs=False):
        weights.append(adapters(trainer))
        loss = compute(model, inputs)
        return Explode.apply(loss) if trainer.state.global_step == 1 else loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert all(np.array_equal(a, b) for a, b in zip(weights[1], weights[2]))
    assert not any(np.array_equal(a, b) for a, b in zip(weights[2], adapters(trainer)))
    assert all(np.isfinite(a).all() for a in adapters(trainer))
    assert [line["skipped_steps"] for line in history(trainer)] == [0, 1, 1]
    assert [line["loss_scale"] for line in history(trainer)] == [32768, 32768, 16384]


# ---- clipping


class OneCard:
    """Stands for fleet's groups."""

    def __getattr__(self, name):
        return lambda *words: 1


@pytest.mark.parametrize("where", ["one card", "fleet", "sharding stage 2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("norm", [1e-2, 3.0, 1000.0])
def test_half_gradients_are_clipped_by_the_norm_that_is_logged(monkeypatch, dtype, norm, where):
    """Stand-ins for two operators that have no half-precision kernels on the CPU; they round as a GPU's do."""
    square = paddle._C_ops.squared_l2_norm

    def product(x, y):
        return paddle.to_tensor(x.astype("float32").numpy() * y.astype("float32").numpy()).astype(x.dtype)

    def squared(x):
        asked.append(x.dtype)
        return square(x.astype("float32")).astype(x.dtype)

    asked = []
    monkeypatch.setattr(paddle._C_ops, "squared_l2_norm", squared)
    monkeypatch.setattr(paddle, "multiply", product)
    monkeypatch.setattr(paddle.Tensor, "multiply_", lambda x, y: x.set_value(product(x, y)))
    rng, pairs = np.random.default_rng(0), []
    for shape in ([64, 32], [32], [16, 16]):
        parameter = paddle.create_parameter(shape, "float32")
        values = rng.standard_normal(shape).astype("float32")
        parameter.main_grad = paddle.to_tensor(values * norm / 48).astype(dtype)
        pairs.append((parameter, parameter.main_grad))
    logged = float(gradient_norm([parameter for parameter, _ in pairs]))
    assert logged == pytest.approx(norm, rel=0.1)
    # fleet adds a little to what it divides by.
    factor = paddle.to_tensor(1.0 / (max(logged, 1.0) + 1e-6 * (where == "fleet")), "float32").astype(dtype)
    expected = [product(gradient, factor).astype("float32").numpy() for _, gradient in pairs]
    clip = numerics.clip_by_float32_norm(1.0)
    if where == "fleet":
        clip = HybridParallelClipGrad(clip, OneCard())
    if where == "sharding stage 2":
        monkeypatch.setattr(paddle.distributed, "all_reduce", lambda total, group: asked.extend(3 * [total.dtype]))
        clip = GroupShardedClipGrad(clip, "cpu", None)
    clipped = clip(pairs)
    assert asked == 3 * [paddle.float32]
    for (_, gradient), values in zip(clipped, expected):
        assert np.array_equal(gradient.astype("float32").numpy(), values)


def test_no_clipping_is_no_clip():
    assert numerics.clip_by_float32_norm(0.0) is None


# ---- the norm


def test_gradient_norm_is_that_of_all_gradients_unscaled():
    layer = paddle.nn.Linear(3, 2)
    x = paddle.to_tensor([[1.0, -2.0, 0.5]])
    (layer(x).sum() * 64.0).backward()
    expected = np.sqrt(2 * np.sum(x.numpy() ** 2) + 2)
    assert float(gradient_norm(layer.parameters(), 64.0)) == pytest.approx(expected, rel=1e-6)
    assert gradient_norm(paddle.nn.Linear(2, 2).parameters()) is None


def test_the_log_holds_the_norm_before_clipping(run_keys):
    trainer = start(run_keys(max_steps=2, max_grad_norm=1e-3, gradient_accumulation_steps=2))
    norms = []
    step = trainer.numerics.on_optimizer_begin

    def keep(args, state, control, **kwargs):
        squares = [float((p.grad**2).sum()) for p in trainer.model.parameters() if p.grad is not None]
        norms.append(np.sqrt(sum(squares)))
        step(args, state, control, **kwargs)

    trainer.numerics.on_optimizer_begin = keep
    trainer.train()
    assert [line["grad_norm"] for line in history(trainer)] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.01
