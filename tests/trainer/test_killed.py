"""Runs of the script, killed from outside at moments of the machine's own choosing."""

import functools
import json
import mmap
import os
import random
import resource
import signal
import time

import numpy as np
import pytest

from paddlemix.trainer import callbacks, run_checkpoints
from tests.trainer.forked import PATIENCE
from tests.trainer.runs import final_weights

pytestmark = pytest.mark.slow

STEPS = 14


@pytest.fixture
def start(start_run):
    return functools.partial(
        start_run, max_steps=STEPS, save_steps=1, save_total_limit=3, lora_dropout=0.3, logging_steps=5
    )


def test_killed_at_five_moments_ends_with_the_weights_of_one_go(start):
    chance = random.Random(20240817)
    whole = start("whole")
    assert whole.status() == 0, whole.log.read_text()
    run, caught = start(), []
    for step in (2, 4, 6, 8, 10):
        if chance.random() < 0.6 or step == 2:
            caught.append(run.stop_inside_saving(range(step, step + 2)))
        else:
            run.wait_for(f"checkpoint-{step}")
            time.sleep(chance.uniform(0, 0.1))
        assert run.kill() == -signal.SIGKILL
        last = run_checkpoints.last_complete(str(run.out))
        assert last is not None and run_checkpoints.step_of(last) >= step - 1
        run = start(resume=True)
    assert run.status() == 0, run.log.read_text()
    assert len(caught) >= 2
    ours, theirs = final_weights(run.out), final_weights(whole.out)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    # Nothing of the broken saves is left.
    assert not list(run.out.glob(".*"))
    losses = [json.loads((one.out / "train_results.json").read_text())["train_loss"] for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_killed_while_the_first_checkpoint_is_written(start):
    run = start()
    run.stop_inside_saving([1])
    run.kill()
    assert run_checkpoints.last_complete(str(run.out)) is None
    again = start(max_steps=1)
    assert again.status() == 0, again.log.read_text()


def children(pid):
    """Processes that this one forked and that live."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return list(map(int, file.read().split()))


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_ends_with_status_0_and_says_how_to_go_on(start, workers):
    """Sent to all processes of the run, the loader's workers first, as launchers and schedulers do."""
    run = start(max_steps=10**6, save_steps=10**6, dataloader_num_workers=workers)
    end = time.monotonic() + PATIENCE
    while "global_step: 5" not in (run.log.read_text() if run.log.exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.01)
    loaders = children(run.pid)
    assert len(loaders) == workers
    for pid in [*loaders, run.pid]:
        os.kill(pid, signal.SIGTERM)
    assert run.status() == 0, run.log.read_text()
    last = run_checkpoints.step_of(run_checkpoints.last_complete(str(run.out)))
    assert f"stopped after step {last}: resume with --resume" in run.log.read_text()
    assert not (run.out / run_checkpoints.RESULT_NAME).exists()


def test_a_killed_run_leaves_no_worker_behind(start):
    run = start(max_steps=10**6, save_steps=1, dataloader_num_workers=1)
    run.wait_for("checkpoint-2")
    (loader,) = children(run.pid)
    run.kill()
    end = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{loader}/exe"):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_ends_by_sigterm_only_when_its_parent_minds_it_no_more(monkeypatch):
    minded = mmap.mmap(-1, 1)
    monkeypatch.setattr(callbacks, "_HANDLED", minded)
    (request, ask), (reply, answer) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        callbacks.leave_sigterm_to_parent()
        while True:
            os.write(answer, os.read(request, 1))
    try:
        os.write(ask, b"1")
        assert os.read(reply, 1) == b"1"
        minded[0] = 1
        os.kill(pid, signal.SIGTERM)
        os.write(ask, b"2")
        assert os.read(reply, 1) == b"2"
        minded[0] = 0
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0) == (pid, 0)
    finally:
        for handle in (request, ask, reply, answer):
            os.close(handle)


def test_no_room_on_the_disk_is_one_line_and_the_last_checkpoint_stands(start):
    """The kernel refuses every write beyond 64 KB of a file from the third step on."""
    run = start()
    run.wait_for("checkpoint-2")
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (65536, 65536))
    assert run.status() == 1
    last = run.log.read_text().splitlines()[-1]
    assert last.startswith("error: checkpoint-") and "free the disk and add --resume" in last
    assert "Traceback" not in run.log.read_text()
    assert run_checkpoints.step_of(run_checkpoints.last_complete(str(run.out))) >= 2
    assert not list(run.out.glob(".*"))
    again = start(resume=True, max_steps=4)
    assert again.status() == 0
