"""Fixtures of the trainer's tests: a tiny world to train in, the keys of a run in it, its log."""

import functools
import os
import subprocess
import sys

import pytest

from paddlemix.trainer import command_line
from tests.helpers import save_tiny_model
from tests.trainer.forked import Run
from tests.trainer.runs import COLOURS, LORA_POOL, write_data


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(model folder, data file) for all runs."""
    folder = tmp_path_factory.mktemp("world")
    return save_tiny_model(folder / "model"), write_data(folder / "train.json", list(COLOURS) * 3)


@pytest.fixture(scope="session")
def run_keys_in(world):
    """Keys of a run that leaves its result in this folder, with changes; `...` takes a key away."""

    def keys(folder, **changes):
        entry = [{"name": "chatml_dataset", "data_files": world[1]}]
        values = {
            "model_name_or_path": world[0],
            "output_dir": str(folder),
            "dataset": {"train": entry, "eval": entry},
            "do_train": True,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
            # Each costs a decoding of up to max_new_tokens; the tests of captions ask for them.
            "shown_captions": 0,
        }
        values.update(changes)
        return command_line.from_values({name: value for name, value in values.items() if value is not ...})

    return keys


@pytest.fixture
def run_keys(run_keys_in, tmp_path):
    """The same with tmp_path/out as its folder."""
    return functools.partial(run_keys_in, tmp_path / "out")


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO")
    return caplog


@pytest.fixture(scope="session")
def forker(root):
    """The process that has imported all and forks the runs of start_run."""
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    with subprocess.Popen(
        [sys.executable, str(root / "tests" / "trainer" / "forking.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process
        process.stdin.write("null\n")
        process.stdin.close()


@pytest.fixture
def start_run(forker, world, tmp_path):
    """Start the script on a LoRA run in tmp_path/name, with changes; `...` takes a key away. Returns the Run."""

    def begin(name="run", processes=1, stand_ins=None, **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        keys = {
            "model_name_or_path": world[0],
            "dataset": {"train": [{"data_files": world[1]}]},
            "do_train": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": ["none"],
            "disable_tqdm": True,
            **LORA_POOL,
        }
        keys.update(changes)
        keys = {name: value for name, value in keys.items() if value is not ...}
        return Run(forker, folder, processes, stand_ins, **keys)

    return begin
