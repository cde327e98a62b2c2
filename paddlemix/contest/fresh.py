"""Checking a submission's requirements in a new virtual environment with Paddle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import List, NamedTuple

from paddlemix.contest.sources import foreign_imports
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.log import logger

_PADDLE = """
import importlib.metadata
found = [(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()]
print(*sorted({f"{n}=={v}" for n, v in found if n.lower().startswith("paddlepaddle")}))
"""
_IMPORT = """
import importlib, json, sys
sys.path.insert(0, "")
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
"""


class Fresh(NamedTuple):
    """python: the environment's interpreter. paddle: its Paddle. problems: packages missing or broken."""

    python: str
    paddle: str
    problems: List[str]


def _run(command: List[str]) -> None:
    # The default of newer pips: PaddleNLP needs seqeval, whose legacy build fails.
    environment = dict(os.environ, PIP_USE_PEP517="1")
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise JobFailed(f"`{' '.join(command)}` ended with status {done.returncode}: {last}")


def _paddle_of(python: str) -> str:
    return subprocess.run([python, "-c", _PADDLE], capture_output=True, text=True, check=True).stdout.strip()


def module_name(file: str) -> str:
    """The import name of a Python file, relative to a folder on the path."""
    parts = file[: -len(".py")].split(os.sep)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def try_requirements(python: str, submission: str, files: List[str], folder: str) -> Fresh:
    """Create an environment in `folder` with the interpreter `python` and the version of its Paddle, and import in it
    `files` of the submission's src/ (sources.files_reached) and their dependencies. Needs a network.

    Raises:
        JobFailed: the environment cannot be created: no pip, no network, no Paddle.
    """
    paddle = _paddle_of(python)
    if not paddle:
        raise JobFailed(f"{python} has no Paddle, whose version the environment would have: give another --python")
    fresh = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "--python", fresh, "--disable-pip-version-check", "install", "--quiet"]
    logger.info("creating a fresh environment with %s; this takes minutes", paddle)
    _run([python, "-m", "venv", "--without-pip", folder])
    # Some package builds call the environment's own pip.
    _run([*pip, "pip", *paddle.split()])
    before = _paddle_of(fresh)
    problems = []
    try:
        _run([*pip, "-r", os.path.join(submission, "requirements.txt")])
    except JobFailed as error:
        problems.append(f"requirements.txt cannot be installed: {error}")
    after = _paddle_of(fresh)
    if after != before:
        problems.append(f"requirements.txt changes the platform's Paddle from {before} to {after or 'none'}")
    source = os.path.join(submission, "src")
    wanted = [name for name, one in foreign_imports(source, files).items() if not one.guarded]
    # Our own package first: it makes settings that Paddle reads on import.
    own = sorted((module_name(file) for file in files), key=lambda name: name != "paddlemix")
    done = subprocess.run(
        [fresh, "-c", _IMPORT, json.dumps([*own, *wanted])], cwd=source, capture_output=True, text=True
    )
    problems += done.stdout.splitlines()
    if done.returncode and not done.stdout:
        problems.append((done.stderr.strip().splitlines() or ["Python failed"])[-1])
    return Fresh(fresh, after, problems)
