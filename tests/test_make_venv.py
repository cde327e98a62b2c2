"""`make venv`: which Paddle it uses, what it asks pip for, and what it says where something is missing.

pip is replaced by a recorder: nothing is downloaded.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LOCKS = {"venv": "requirements/lock.txt", "venv-paddle26": "requirements/lock-paddle26.txt"}
BUILD = "requirements/build.txt"
PROGRAM = ("requirements.txt", "requirements/demo.txt", "requirements/test.txt")

# Stands for pip: notes what it was asked for, and puts a package `paddle` where a wheel of it was named.
PIP = """
import json, os, sys
if sys.argv[1] == "install":
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.environ["PIP_CONSTRAINT"], *sys.argv[2:]]) + chr(10))
    if any(name.startswith("paddlepaddle") for name in sys.argv):
        site = next(path for path in sys.path if path.endswith("-packages"))
        os.makedirs(site + "/paddle")
        with open(site + "/paddle/__init__.py", "w") as file:
            file.write("__version__ = 'asked for'")
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def bare(folder: pathlib.Path) -> pathlib.Path:
    """An environment without packages; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def site_of(python: pathlib.Path) -> pathlib.Path:
    return next((python.parent.parent / "lib").glob("python3*/site-packages"))


def install_fake_paddle(python: pathlib.Path, version="3.3.1") -> pathlib.Path:
    """paddlepaddle-gpu as pip would leave it; the folder of the package."""
    info = site_of(python) / f"paddlepaddle_gpu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: paddlepaddle-gpu\nVersion: {version}\n")
    folder = site_of(python) / "paddle"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


@pytest.fixture
def make(root, tmp_path):
    """make(target, python, **variables) runs it for the environment tmp_path/venv: (what it did, calls of pip)."""
    (tmp_path / "modules" / "pip").mkdir(parents=True)
    (tmp_path / "modules" / "pip" / "__init__.py").touch()
    (tmp_path / "modules" / "pip" / "__main__.py").write_text(PIP)
    calls = tmp_path / "calls"

    def run(target, python, **variables):
        calls.write_text("")
        left_out = ("MAKE", "PYTHON", "PIP_", "VENV", "PADDLE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        environment.update(CALLS=str(calls), PYTHONPATH=str(tmp_path / "modules"))
        variables.update({"PYTHON": python, "VENV" if target == "venv" else "VENV26": tmp_path / "venv"})
        command = ["make", "-C", str(root), target, *(f"{name}={value}" for name, value in variables.items())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


@pytest.mark.parametrize("target", LOCKS)
def test_the_wheel_is_installed_where_there_is_no_paddle(make, root, tmp_path, target):
    done, calls = make(target, bare(tmp_path / "base"))
    assert done.returncode == 0, done.stderr
    pins = (root / LOCKS[target]).as_uri()
    assert calls[0] == [pins, "-r", BUILD]
    assert calls[1][0] == pins and calls[1][1].startswith("paddlepaddle")
    assert set(PROGRAM) <= set(calls[1])
    assert "installing into " in done.stdout and "ready: " in done.stdout and "with Paddle asked for" in done.stdout
    assert (tmp_path / "venv" / ".ready").exists()


def test_a_wheel_of_ones_own_or_none(make, tmp_path):
    base = bare(tmp_path / "base")
    bare(tmp_path / "venv")
    done, calls = make("venv", base, PADDLE="none")
    assert done.returncode == 0 and calls[1][1] == "-r", done.stderr
    (tmp_path / "venv" / ".ready").unlink()
    done, calls = make("venv", base, PADDLE="paddlepaddle-gpu==3.3.1")
    assert done.returncode == 0 and calls[1][1] == "paddlepaddle-gpu==3.3.1", done.stderr


@pytest.mark.parametrize("wanted", ["paddlepaddle", "none", "paddlepaddle==3.3.1"])
def test_paddle_in_the_environment_is_kept(make, tmp_path, wanted):
    folder = install_fake_paddle(bare(tmp_path / "venv"), version="3.2.2")
    done, calls = make("venv", bare(tmp_path / "base"), PADDLE=wanted)
    assert done.returncode == 0 and calls[1][1] == "-r", done.stderr
    assert f"with Paddle 3.2.2 in {folder}" in done.stdout


@pytest.mark.parametrize(("target", "version"), [("venv", "3.1.0"), ("venv", "0.0.0"), ("venv-paddle26", "2.6.1")])
def test_paddle_of_the_given_python_is_used_in_place(make, tmp_path, target, version):
    """The given Python is an environment itself, whose packages --system-site-packages would not show."""
    base, python = bare(tmp_path / "base"), bare(tmp_path / "venv")
    folder = install_fake_paddle(base, version)
    for interpreter, text in ((base, "theirs"), (python, "ours")):
        (site_of(interpreter) / "pinned.py").write_text(f"whose = {text!r}\n")
    before = sorted(os.listdir(folder.parent))
    done, calls = make(target, base)
    assert done.returncode == 0 and calls[1][1] == "-r", done.stderr
    assert f"with Paddle {version} in {folder}" in done.stdout
    assert sorted(os.listdir(folder.parent)) == before
    code = "import paddle, pinned; print(paddle.__version__, pinned.whose)"
    seen = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen == f"{version} ours\n"


@pytest.mark.parametrize(("target", "version"), [("venv", "2.6.2"), ("venv-paddle26", "3.3.1")])
def test_the_other_paddle_is_refused_and_kept(make, tmp_path, target, version):
    base = bare(tmp_path / "base")
    folder = install_fake_paddle(base, version)
    done, calls = make(target, base)
    assert done.returncode == 2 and not calls
    assert re.search(rf"^error: .* has paddlepaddle-gpu=={version}, and {LOCKS[target]} is for", done.stderr, re.M)
    assert folder.is_dir() and not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("module", "text"), [
    ("ensurepip", "raise ImportError"),
    ("ctypes", "def CDLL(name): raise OSError(name)"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_command_that_brings_it(make, tmp_path, module, text):
    (tmp_path / "modules" / f"{module}.py").write_text(text)
    done, calls = make("venv", bare(tmp_path / "base"))
    assert done.returncode == 2 and not calls
    assert "apt-get install python3-venv libgomp1" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("body", ["exit 1", "exit 127"])
def test_another_python_is_refused(make, tmp_path, body):
    python = tmp_path / "python3.9"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    for wanted in (python, tmp_path / "missing", ""):
        done, calls = make("venv", wanted)
        assert done.returncode == 2 and not calls
        assert "is not a Python 3.10, 3.11 or 3.12" in done.stderr


def names(path: pathlib.Path):
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {re.split(r"[\s<>=;]", line)[0].lower().replace("_", "-") for line in lines if line}


@pytest.mark.parametrize("lock", LOCKS.values())
def test_every_name_that_is_installed_has_a_pin(root, lock):
    locked = names(root / lock)
    for path in (BUILD, *PROGRAM, "requirements/submission.txt"):
        assert names(root / path) <= locked, path
    paddle = {name for name in locked if name.startswith("paddlepaddle")}
    assert paddle
    for path in ("requirements.txt", "requirements/submission.txt"):
        assert not paddle & names(root / path)


def test_a_submission_asks_for_the_paddlenlp_of_the_platforms_lock(root):
    lock = (root / LOCKS["venv-paddle26"]).read_text()
    pin = re.search(r"^paddlenlp==\S+$", lock, flags=re.MULTILINE).group()
    assert pin in (root / "requirements/submission.txt").read_text().splitlines()
