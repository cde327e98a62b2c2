"""Two processes that share each matrix, against one process, on the CPU."""

import json
import math
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.auto import AutoModelMIX
from paddlemix.checkpoint import open_weights
from paddlemix.models.lora import apply_lora
from paddlemix.models.mgen_vl.parameters import CONSTANTS, parameter_shapes
from tests.trainer.runs import final_weights

pytestmark = pytest.mark.slow

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*h.*mlp.c_proj.*"]
LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_target_modules": TARGETS}
WHOLE = dict.fromkeys(("lora", "lora_rank", "lora_alpha", "lora_dropout", "freeze_include", "freeze_exclude"), ...)


@pytest.fixture
def finished(start_run):
    """Start a run on so many cards that share its matrices, and wait for its good end."""

    def begin(name, cards, **keys):
        if cards > 1:
            keys["tensor_parallel_degree"] = cards
        keys = dict({"max_steps": 3, "lora_dropout": 0.0}, **keys)
        run = start_run(name, cards, "cpu_tensor_parallel" if cards > 1 else None, **keys)
        assert run.status() == 0, "\n".join(log.read_text()[-3000:] for log in run.out.parent.glob("log*"))
        return run

    return begin


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """A LoRA folder whose B is not 0, with attn_pool."""
    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelMIX.from_pretrained(world[0])
    paddle.seed(3)
    pool = [name for name in parameter_shapes(model.config) if name.startswith("visual.attn_pool.")]
    trainable = [name for name in pool if name not in CONSTANTS]
    lora = apply_lora(model, rank=4, alpha=8, target_modules=TARGETS, trainable=trainable)
    for name, tensor in lora.model.state_dict().items():
        if name.endswith(".lora_B"):
            tensor.set_value(paddle.normal(0.0, 0.1, tensor.shape))
    lora.save_pretrained(str(folder))
    return str(folder)


def losses(run, name="loss"):
    lines = json.loads((run.out / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in lines if name in line]


def all_weights(folder):
    with open_weights(str(folder)) as reader:
        return {name: np.array(reader.read(name)) for name in reader}


def assert_near(ours, theirs):
    """Row-split sums have another order: float32's rounding, which AdamW carries into weights with gradients near 0."""
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4, err_msg=name)


def test_adapters_train_as_on_one_card(finished, world, adapters):
    """Loss, clipping, evaluation and captions too. The result is whole, so either is read by a run of the other."""
    evaluation = {
        "dataset": {part: [{"data_files": world[1]}] for part in ("train", "eval")},
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "eval_with_do_generation": True,
        "max_new_tokens": 4,
    }
    two, one = (
        finished(f"on {cards}", cards, lora_path=adapters, max_grad_norm=0.5, **LORA, **evaluation) for cards in (2, 1)
    )
    assert_near(final_weights(two.out), final_weights(one.out))
    for name in ("loss", "eval_loss", "eval_cider"):
        np.testing.assert_allclose(losses(two, name), losses(one, name), rtol=1e-5, err_msg=name)
        assert losses(one, name)
    for file in ("config.json", "lora_config.json"):
        ours, theirs = (json.loads((run.out / file).read_text()) for run in (two, one))
        assert ours.pop("tensor_parallel_degree", 1) in (-1, 1) and theirs.pop("tensor_parallel_degree", 1) in (-1, 1)
        assert ours == theirs
    again = finished("again", 2, lora_path=str(two.out), max_steps=1, learning_rate=1e-12, **LORA)
    assert_near(final_weights(again.out), final_weights(two.out))


def test_all_weights_train_as_on_one_card(finished):
    two, one = (finished(f"on {cards}", cards, lora_target_modules=..., **WHOLE) for cards in (2, 1))
    assert_near(all_weights(two.out), all_weights(one.out))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def test_a_resumed_run_ends_with_the_weights_of_one_go(finished):
    """Bit for bit, with dropout; the adapters begin as one matrix of their size does, not as two."""
    keys = {"save_steps": 2, "lora_dropout": 0.3, **LORA}
    whole = finished("whole", 2, **keys)
    part = whole.out.parent.parent / "part" / "out"
    part.mkdir(parents=True)
    shutil.copytree(str(whole.out / "checkpoint-2"), str(part / "checkpoint-2"))
    again = finished("part", 2, **dict(keys, resume=True))
    assert "global_step: 2" not in again.log.read_text() and "global_step: 3" in again.log.read_text()
    ours, theirs = final_weights(again.out), final_weights(whole.out)
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []
    rows = theirs["transformer.llm.h.0.attn.c_proj.lora_A"]
    assert 0.9 < np.abs(rows).max() * math.sqrt(len(rows)) < 1.1
    assert np.abs(rows[:64] - rows[64:]).max() > 0.05
