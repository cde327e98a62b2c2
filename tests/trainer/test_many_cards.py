"""Runs of two processes on the CPU, against one process that accumulates twice the batches."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights
from paddlemix.trainer import run_checkpoints
from tests.trainer.runs import COLOURS, final_weights, write_data

pytestmark = pytest.mark.slow

# Without dropout, whose random numbers each process draws for itself.
ALIKE = {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.0, "per_device_train_batch_size": 2}
FULL = dict.fromkeys(
    ("lora", "lora_rank", "lora_alpha", "lora_dropout", "freeze_include", "freeze_exclude"),
    ...,
)
STAGE1 = {"sharding": "stage1", "sharding_parallel_degree": 2}


@pytest.fixture
def alike(start_run):
    """Start a run that sees the same four samples at each step, whatever the number of processes."""

    def begin(name, processes, **changes):
        accumulation = 1 if processes == 2 else 2
        keys = dict(ALIKE, gradient_accumulation_steps=accumulation)
        keys.update(changes)
        run = start_run(name, processes, **keys)
        assert run.status() == 0, run.log.read_text()[-3000:]
        return run

    return begin


def all_weights(folder):
    with open_weights(str(folder)) as reader:
        return {name: np.array(reader.read(name)) for name in reader}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []


def test_data_parallel_is_one_process_with_twice_the_accumulation(alike):
    assert_equal(final_weights(alike("two", 2).out), final_weights(alike("one", 1).out))


def test_data_parallel_of_all_weights(alike):
    assert_equal(all_weights(alike("two", 2, **FULL).out), all_weights(alike("one", 1, **FULL).out))


def test_sharding_stage1_is_one_process_too(alike):
    """Bit for bit without clipping. The clipping's norm is summed shard by shard, in another order: float32's rounding,
    which AdamW carries into weights whose gradients are nearly 0."""
    for norm in (0.0, 1.0):
        keys = {"max_grad_norm": norm}
        ours = final_weights(alike(f"two {norm}", 2, **STAGE1, **keys).out)
        theirs = final_weights(alike(f"one {norm}", 1, **keys).out)
        if norm == 0:
            assert_equal(ours, theirs)
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("keys", [{}, STAGE1], ids=["data parallel", "sharding"])
def test_texts_alone_on_one_card_are_one_process_with_twice_the_accumulation(alike, tmp_path, keys):
    """They give the connector no gradient, and ads on the other card give one."""
    pictures = write_data(tmp_path / "pictures.json", list(COLOURS))
    texts = [json.dumps({"id": f"{n}", "conversations": [["say", f"word {n}"]]}) for n in range(6)]
    (tmp_path / "texts.json").write_text("\n".join(texts))
    train = [{"data_files": pictures}, {"data_files": str(tmp_path / "texts.json")}]
    mixed = {"dataset": {"train": train}, "max_grad_norm": 0.0, "per_device_train_batch_size": 1, "max_steps": 7}
    assert_equal(final_weights(alike("two", 2, **mixed, **keys).out), final_weights(alike("one", 1, **mixed).out))


@pytest.mark.parametrize("keys", [{}, STAGE1], ids=["data parallel", "sharding"])
def test_resuming_several_processes_ends_with_the_weights_of_one_go(alike, start_run, keys):
    keys = dict(keys, lora_dropout=0.3)
    whole = start_run("whole", 2, **dict(ALIKE, **keys))
    assert whole.status() == 0
    part = start_run("part", 2, **dict(ALIKE, **keys))
    part.wait_for("checkpoint-2")
    part.stop_inside_saving([4])
    part.kill()
    assert run_checkpoints.last_complete(str(part.out)).endswith("checkpoint-2")
    again = start_run("part", 2, **dict(ALIKE, **keys, resume=True))
    assert again.status() == 0, again.log.read_text()[-3000:]
    assert "global_step: 3" in again.log.read_text()
    assert_equal(final_weights(part.out), final_weights(whole.out))
    assert not list(part.out.glob(".*"))


def test_skipped_samples_of_all_processes_are_in_the_log(alike, tmp_path):
    """An epoch, in which each unreadable sample is met once, by one process or the other."""
    data = write_data(tmp_path / "some_bad.json", list(COLOURS) * 3, bad=(1, 4, 7, 10))
    for processes in (2, 1):
        run = alike(f"on {processes}", processes, dataset={"train": [{"data_files": data}]}, max_steps=3)
        assert [line.count("skipped_samples: 4,") for line in run.lines() if " loss: " in line][-1] == 1


def test_the_image_gain_is_that_of_one_process(alike, world, tmp_path):
    """Of nine samples, which two processes fill up to ten."""
    data = write_data(tmp_path / "eval.json", (list(COLOURS) * 3)[:9])
    keys = dict(do_eval=True, eval_image_gain=True, per_device_eval_batch_size=1)
    keys["dataset"] = {"train": [{"data_files": world[1]}], "eval": [{"data_files": data}]}
    gains = []
    for processes in (1, 2):
        found = json.loads((alike(f"of {processes}", processes, **keys).out / "eval_results.json").read_text())
        gains.append((found["eval_image_gain"], found["eval_loss"]))
    assert abs(gains[0][0]) > 1e-4 and gains[0] == pytest.approx(gains[1], abs=1e-6)


def test_sigterm_to_one_process_stops_all_after_the_same_step(start_run):
    run = start_run("run", 2, **dict(ALIKE, max_steps=400, save_total_limit=1))
    run.wait_for("checkpoint-2")
    os.kill(run.pid, signal.SIGTERM)
    assert run.status() == 0, run.log.read_text()[-3000:]
    assert "resume with --resume" in run.lines()[-1]
    step = run_checkpoints.step_of(run_checkpoints.last_complete(str(run.out)))
    assert f"stopped after step {step}:" in run.lines()[-1] and step < 400
    assert f"stopped after step {step}:" in run.log.with_suffix(".1").read_text()


def test_a_checkpoint_of_other_shards_is_refused_in_words(alike, start_run):
    run = alike("two", 2, **STAGE1)
    (run.out / run_checkpoints.RESULT_NAME).unlink()
    keys = dict(ALIKE, per_device_train_batch_size=4, max_steps=6, resume=True)
    other = start_run("two", 1, **keys)
    assert other.status() == 2
    assert "optimizer.pdopt is missing" in (run.out.parent / "log").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"sharding": "stage2"}, "sharding=stage2 needs GPUs"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree=2 needs GPUs"),
        ({"pipeline_parallel_degree": 2}, "pipeline_parallel_degree=2 cannot be used here: the model is"),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_reason(start_run, keys, says):
    run = start_run("run", 2, **keys)
    assert run.status() == 2
    last = run.lines()[-1]
    assert last.startswith("error: ") and says in last


def test_the_launcher_itself(root, start_run, tmp_path):
    """The other tests start the processes themselves, which saves Paddle's import."""
    one = start_run("one", 1, **dict(ALIKE, max_steps=2, gradient_accumulation_steps=2))
    assert one.status() == 0
    words = [str(tmp_path / "one" / "config.json"), "--gradient_accumulation_steps", "1", "--output_dir", "two"]
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "logs"]
    done = subprocess.run(
        [*launch, str(root / "supervised_finetune.py"), *words],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1"),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, (tmp_path / "logs" / "workerlog.0").read_text()[-3000:]
    assert_equal(final_weights(tmp_path / "two"), final_weights(one.out))
