"""Keys of the notebook's table that have no test file of their own do what they say."""

import json
import math

import numpy as np
import paddle
import pytest

from paddlemix.trainer import finetune as module
from paddlemix.trainer import tuned_model
from paddlemix.utils import runtime
from paddlemix.utils.compat import FUSED_ATTENTION_ON_CPU
from paddlemix.utils.runtime import Choice
from tests.trainer.runs import LORA, LORA_POOL, final_weights, run, start


def history(folder, name="loss"):
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if name in line]


def checkpoint_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*"))


# Twelve samples in batches of four: three steps an epoch.
@pytest.mark.parametrize(
    "keys, steps",
    [
        ({"max_steps": 2, "num_train_epochs": 5}, 2),
        ({"max_steps": 7, "num_train_epochs": 1}, 7),
        ({"max_steps": -1, "num_train_epochs": 2}, 6),
        ({"max_steps": ..., "num_train_epochs": 1, "gradient_accumulation_steps": 3}, 1),
    ],
)
def test_max_steps_goes_before_epochs(run_keys, tmp_path, keys, steps):
    run(run_keys(**LORA, save_strategy="no", **keys))
    assert [line["global_step"] for line in history(tmp_path)] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    "keys, saved, evaluated",
    [
        ({"save_steps": 2}, [2, 4], []),
        ({"save_strategy": "epoch"}, [3, 6], []),
        ({"save_strategy": "no", "evaluation_strategy": "epoch"}, [], [3, 6]),
        ({"save_strategy": "no", "evaluation_strategy": "steps", "eval_steps": 4}, [], [4]),
        ({"save_strategy": "no", "evaluation_strategy": "steps", "logging_steps": 3}, [], [3, 6]),
    ],
)
def test_when_a_run_saves_and_evaluates(run_keys, tmp_path, keys, saved, evaluated):
    run(run_keys(**dict(LORA, max_steps=5 if "save_steps" in keys else 6, **keys)))
    assert checkpoint_steps(tmp_path) == saved
    assert [line["global_step"] for line in history(tmp_path, "eval_loss")] == evaluated


def linear(done, total, warmup):
    return done / warmup if done < warmup else (total - done) / (total - warmup)


SCHEDULES = [
    ({"lr_scheduler_type": "linear"}, lambda k: linear(k, 6, 0)),
    ({"lr_scheduler_type": "linear", "warmup_steps": 2}, lambda k: linear(k, 6, 2)),
    # Half of six steps; a number of steps wins over the part.
    ({"lr_scheduler_type": "linear", "warmup_ratio": 0.5}, lambda k: linear(k, 6, 3)),
    ({"lr_scheduler_type": "linear", "warmup_ratio": 0.5, "warmup_steps": 2}, lambda k: linear(k, 6, 2)),
    ({"lr_scheduler_type": "constant"}, lambda k: 1.0),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4}, lambda k: min(1.0, k / 4)),
    ({"lr_scheduler_type": "cosine"}, lambda k: (1 + math.cos(math.pi * k / 6)) / 2),
    (
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        lambda k: k / 2 if k < 2 else (1 + math.cos(math.pi * (k - 2) / 4)) / 2,
    ),
    (
        {"lr_scheduler_type": "polynomial", "power": 2.0, "lr_end": 1e-4},
        lambda k: 0.9 * (1 - k / 6) ** 2 + 0.1,
    ),
]


@pytest.mark.parametrize("keys, part", SCHEDULES)
def test_the_rate_follows_its_schedule(run_keys, keys, part):
    trainer = start(run_keys(**LORA, learning_rate=1e-3, max_steps=6, **keys))
    trainer.create_optimizer_and_scheduler(6)
    rates = []
    for _ in range(6):
        rates.append(trainer.optimizer.get_lr())
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([1e-3 * part(k) for k in range(6)], rel=1e-6, abs=1e-12)


def test_lazy_makes_no_difference(run_keys, tmp_path):
    results = []
    for lazy in (False, True):
        run(run_keys(**LORA, lazy=lazy, output_dir=str(tmp_path / str(lazy)), save_strategy="no"))
        results.append(final_weights(tmp_path / str(lazy)))
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.skipif(not FUSED_ATTENTION_ON_CPU, reason="this Paddle has no fused attention on the CPU")
def test_flash_attention_trains_the_same(run_keys, tmp_path):
    results = []
    for flash in (False, True):
        keys = run_keys(**LORA_POOL, use_flash_attention=flash, output_dir=str(tmp_path / str(flash)))
        trainer = start(keys)
        assert trainer.model.model.config.use_flash_attention is flash
        trainer.train()
        results.append({name: tensor.numpy() for name, tensor in trainer.model.model.state_dict().items()})
    for name, array in results[0].items():
        apart = np.abs(results[1][name] - array)
        # Adam divides a gradient by its own size: one that is next to zero may turn its step with its last bit.
        assert (apart > 1e-5).mean() < 1e-3 and apart.max() < 1e-3, name


@pytest.mark.parametrize("skip", [True, False])
def test_memory_is_in_the_log_unless_skipped(run_keys, tmp_path, skip):
    run(run_keys(**LORA, skip_memory_metrics=skip, save_strategy="no", max_steps=1))
    assert ("cpu_mem_used" in history(tmp_path)[0]) is not skip


def test_a_cards_peak_is_in_the_results_without_the_thread(run_keys, monkeypatch):
    assert "gpu_mem_max_memory_allocated" not in run(run_keys(**LORA, save_strategy="no", max_steps=1))
    # What a GPU would answer when the steps are done.
    monkeypatch.setattr(paddle.device.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    assert runtime.peak_memory() == {"gpu_mem_max_memory_allocated": 3 << 30}


@pytest.mark.parametrize("tuning", ["lora", "lora_only", "attn_pool", "layers", "full", ""])
def test_shipped_configs_leave_the_launching_thread_alone(root, tuning):
    """No thread that watches memory, and images are decoded in other processes."""
    name = f"{tuning}_sft_argument.json".lstrip("_")
    config = json.loads((root / "config" / "mgen_vl" / name).read_text(encoding="utf-8"))
    assert config["skip_memory_metrics"] is True and config["dataloader_num_workers"] > 0


def test_neftune_changes_training_and_not_evaluation(run_keys, tmp_path):
    losses = []
    for noise in (False, True):
        out = tmp_path / str(noise) / "out"
        keys = dict(LORA, neftune=noise, neftune_noise_alpha=50.0, learning_rate=0.0, max_steps=1)
        run(run_keys(**keys, evaluation_strategy="steps", output_dir=str(out), save_strategy="no"))
        losses.append([history(out.parent, name)[0][name] for name in ("loss", "eval_loss")])
    (clean, clean_eval), (noisy, noisy_eval) = losses
    assert abs(noisy - clean) > 1e-3 and noisy_eval == clean_eval


@pytest.mark.parametrize(
    "level, weights, masters", [("O1", paddle.float32, False), ("O2", paddle.bfloat16, True)], ids=["O1", "O2"]
)
def test_levels_of_half_precision(run_keys, monkeypatch, level, weights, masters):
    """As far as a CPU goes: the dtype of the weights, and whether the optimizer keeps float32 copies."""
    monkeypatch.setattr(runtime, "decide_dtype", lambda asked, *machine: Choice(asked))
    made = []
    make = tuned_model.load_base_model

    def load(*args):
        made.append(make(*args))
        return made[0]

    monkeypatch.setattr(module, "load_base_model", load)
    # The CPU has no autocast to wrap the model for.
    monkeypatch.setattr(module.FinetuneTrainer, "_wrap_amp_model", lambda self, *args: None)
    trainer = start(run_keys(bf16=True, fp16_opt_level=level))
    assert trainer.args.bf16 and made[0].lm_head.weight.dtype == weights
    trainer.create_optimizer_and_scheduler(2)
    assert trainer.optimizer._multi_precision is masters
