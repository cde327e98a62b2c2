"""Ctrl-C, pressed twice, while worker processes decode images: one line, status 130, and no process that stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import image_base64

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


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.15])
@pytest.mark.parametrize(
    "command",
    [
        ["curate_data.py", "rows.tsv", "out.tsv", "--min_side", "8"],
        ["inspect_data.py", "rows.tsv", "--out", "out"],
        ["inspect_data.py", "rows.tsv", "--out", "out", "--hash", "all"],
        ["convert_labels.py", "rows.tsv", "out", "--verify", "decode"],
    ],
    ids=lambda words: "_".join(words[::6]) if isinstance(words, list) else None,
)
def test_two_interrupts_end_it_at_once(command, gap, root, tmp_path):
    image = image_base64(1, size=(64, 48))
    (tmp_path / "rows.tsv").write_text("".join(f"r{i}\t{image}\t杯子\n" for i in range(600)), encoding="utf-8")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    at_work = tmp_path / "at_work"
    at_work.mkdir()
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"), AT_WORK=str(at_work))
    # Interrupted between taking and releasing its own lock, coverage waits for that lock forever.
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        environment.pop(name, None)
    tool, *words = command
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
    try:
        while not {path.name for path in at_work.iterdir()} - {str(process.pid)}:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(gap)
        os.killpg(process.pid, signal.SIGINT)
        # Until no worker has the pipe open, either.
        said = process.communicate(timeout=120)[1]
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said and "resource_tracker" not in said and "Exception" not in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tsv").exists()
