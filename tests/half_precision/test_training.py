"""200 LoRA steps and 60 captions in simulated half precision, against float32.

Run: make test-paddle26 PYTEST_ARGS="tests/half_precision/test_training.py -m slow" (three minutes)
"""

import contextlib

import numpy as np
import paddle
import pytest

from tests.half_precision import world
from tests.half_precision.simulator import Simulation, nearest

pytestmark = pytest.mark.slow

STEPS, ROWS, CAPTIONS = 200, 8, 60


class Tuning:
    """LoRA tuning as the trainer does it at level O2; dtype "float32": without any half precision.

    float16: the loss is scaled, gradients are unscaled where they are, a step with one that is not finite is skipped
    and halves the scale. The optimizer is Paddle's, on float32 masters, of which the weights are roundings.
    """

    def __init__(self, weights, dtype):
        model = world.new_model()
        model.set_state_dict(weights)
        self.model, self.dtype = world.with_lora(model), dtype
        self.half = dtype != "float32"
        self.simulation = Simulation(dtype) if self.half else None
        self.trained = [one for one in self.model.parameters() if not one.stop_gradient]
        self.masters = [paddle.create_parameter(one.shape, "float32") for one in self.trained]
        for master, parameter in zip(self.masters, self.trained):
            master.set_value(parameter)
        if self.half:
            self.simulation.decorate(self.model, "O2")
        self.scale = 32768.0 if dtype == "float16" else 1.0
        self.losses, self.skipped = [], 0
        schedule = paddle.optimizer.lr.LinearWarmup(
            paddle.optimizer.lr.CosineAnnealingDecay(1e-3, STEPS), STEPS // 20, 0.0, 1e-3
        )
        clip = paddle.nn.ClipGradByGlobalNorm(1.0)
        optimizer = paddle.optimizer.AdamW(schedule, beta2=0.99, parameters=self.masters, grad_clip=clip)
        for step in range(STEPS):
            self.step(world.batch(ROWS, [2, step]), optimizer)
            schedule.step()

    def rounded(self, array):
        return nearest(array, self.dtype) if self.half else array

    def step(self, values, optimizer):
        with self.simulation or contextlib.nullcontext():
            inputs = world.tensors(values)
            with self.simulation.autocast("O2") if self.half else contextlib.nullcontext():
                loss = self.model(**inputs).loss
            (loss * self.scale).backward()
        self.losses.append(float(loss))
        gradients = [self.rounded(one.grad.numpy()) for one in self.trained]
        for parameter in self.trained:
            parameter.clear_gradient(False)
        if not all(np.isfinite(one).all() for one in gradients):
            self.scale, self.skipped = self.scale / 2, self.skipped + 1
            return
        for master, gradient in zip(self.masters, gradients):
            master.grad = paddle.to_tensor(self.rounded(gradient / np.float32(self.scale)))
        optimizer.step()
        optimizer.clear_grad(False)
        for master, parameter in zip(self.masters, self.trained):
            parameter.set_value(self.rounded(master.numpy()))

    def held_out_loss(self):
        """Of the masters, in float32, on pictures that no step has seen."""
        for master, parameter in zip(self.masters, self.trained):
            parameter.set_value(master)
        with paddle.no_grad():
            return float(self.model(**world.tensors(world.batch(120, 3))).loss)


def captions(model):
    """Of CAPTIONS new pictures."""
    pixels, _ = world.pictures(CAPTIONS, 4)
    prompt = paddle.to_tensor([world.prompt_ids(b":", world.QUERIES)] * CAPTIONS)
    model.eval()
    ids, _ = model.generate(
        prompt, images=paddle.to_tensor(pixels), decode_strategy="greedy_search", max_new_tokens=40,
        eos_token_id=world.END, pad_token_id=world.END,
    )  # fmt: skip
    return [bytes(row[row < 256].tolist()).decode() for row in ids.numpy()]


@pytest.fixture(scope="module")
def start():
    return world.pretrained()


@pytest.fixture(scope="module")
def float32(start):
    return Tuning(start, "float32")


@pytest.fixture(scope="module")
def expected(float32):
    """Captions of the model that was tuned in float32, in float32."""
    return captions(float32.model.model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_200_lora_steps_end_where_float32_does(start, float32, dtype):
    run = Tuning(start, dtype)
    assert float32.losses[0] > 5 * np.mean(float32.losses[-20:]), "nothing was learnt"
    assert np.mean(run.losses[-20:]) == pytest.approx(np.mean(float32.losses[-20:]), rel=0.02)
    assert run.held_out_loss() == pytest.approx(float32.held_out_loss(), rel=0.02)
    # The scale may begin too high, and what leaves the range then is a gradient.
    assert run.skipped <= 2 and all(name.startswith("gradient of") for name in run.simulation.overflows)


@pytest.mark.parametrize("dtype, equal", [("float16", 58), ("bfloat16", 55)])
def test_captions_are_those_of_float32(float32, expected, dtype, equal):
    assert len(set(expected)) > CAPTIONS // 2, "captions that do not depend on the picture"
    model = world.with_lora(world.new_model())
    model.model.set_state_dict(float32.model.model.state_dict())
    simulation = Simulation(dtype)
    simulation.decorate(model, "O2")
    with simulation:
        found = captions(model.model)
    assert sum(one == other for one, other in zip(found, expected)) >= equal
    assert not simulation.overflows
