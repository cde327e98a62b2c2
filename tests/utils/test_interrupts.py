"""Ctrl-C, pressed twice, or SIGKILL while worker processes decode images: no process stays."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import image_base64, without_coverage

# Read by every Python at its start: whoever opens an image says so, and takes a while.
SLOW = """
import os, time
from PIL import Image

def slowly(*args, opened=Image.open, **kwargs):
    open(os.path.join(os.environ["AT_WORK"], str(os.getpid())), "w").close()
    time.sleep(0.2)
    return opened(*args, **kwargs)

Image.open = slowly
"""


@pytest.fixture
def start(root, tmp_path):
    """(tool, words) → a process of the tool that has begun to decode images, the leader of its session."""
    image = image_base64(1, size=(64, 48))
    (tmp_path / "rows.tsv").write_text("".join(f"r{i}\t{image}\t杯子\n" for i in range(600)), encoding="utf-8")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    at_work = tmp_path / "at_work"
    at_work.mkdir()
    environment = dict(without_coverage(), PYTHONPATH=str(tmp_path / "site"), AT_WORK=str(at_work))
    started = []

    def start(tool, *words):
        process = subprocess.Popen(
            [sys.executable, str(root / "tools" / tool), *words, "--workers", "2"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
            # Tests that were started in the background ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        while not {path.name for path in at_work.iterdir()} - {str(process.pid)}:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


COMMANDS = [
    ["curate_data.py", "rows.tsv", "out.tsv", "--min_side", "8"],
    ["inspect_data.py", "rows.tsv", "--out", "out"],
    ["inspect_data.py", "rows.tsv", "--out", "out", "--hash", "all"],
    ["convert_labels.py", "rows.tsv", "out", "--verify", "decode"],
]


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: "_".join(words[::6]))
def test_two_interrupts_end_it_at_once(command, gap, start, tmp_path):
    process = start(*command)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(gap)
    os.killpg(process.pid, signal.SIGINT)
    # Until no worker has the pipe open, either.
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said and "resource_tracker" not in said and "Exception" not in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tsv").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: "_".join(words[::6]))
def test_workers_end_with_a_killed_process(command, start):
    process = start(*command)
    process.kill()
    # Workers that waited for work would keep the pipe open, and the facts of images locked.
    process.communicate(timeout=120)
