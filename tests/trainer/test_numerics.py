"""Overflow and bad losses. Run: pytest tests/trainer/test_numerics.py

float16 does not run on a CPU; the loss scale does: Paddle's own GradScaler is made to believe in a GPU, and gradients
overflow because the loss is multiplied with infinity.
"""

import types

import numpy as np
import paddle
import pytest

from paddlemix.trainer import numerics
from paddlemix.trainer.numerics import HOPELESS_STEPS, OverflowCount, gradient_norm
from paddlemix.utils.errors import JobFailed
from tests.trainer.runs import LORA, start


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
    with pytest.raises(JobFailed, match="5 steps in a row .*, the last one step 7: the loss is no number.*O1"):
        train(trainer, gpu_scaler(monkeypatch), forward=range(3, 21))
    assert trainer.state.global_step == 6


def test_gradients_that_overflow_at_every_scale_stop_the_run(run_keys, monkeypatch):
    trainer = start(run_keys(**LORA, max_steps=30, save_strategy="no"))
    with pytest.raises(JobFailed, match="gradients overflow float16 even at loss scale 1.*lower learning_rate"):
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


def test_without_a_scale_the_first_bad_loss_ends_the_run():
    numerics.Numerics.check_loss(3.0, 1)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(JobFailed, match="in step 7: lower learning_rate"):
            numerics.Numerics.check_loss(loss, 7)


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
