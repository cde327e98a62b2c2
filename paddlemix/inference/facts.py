"""Identification of a run's inputs: size, lines and SHA-256 of a file, and the fingerprint of a model folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from paddlemix.datasets.blocks import FileState
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import open_plain
from paddlemix.utils.progress import Progress
from paddlemix.utils.surroundings import temporary_folder

_CHUNK = 1 << 20
# Reading a file of this size takes a tenth of a second.
_BAR_BYTES = 64 << 20


class FileFacts(NamedTuple):
    """size in bytes, number of lines (including an unterminated last one), SHA-256."""

    size: int
    lines: int
    sha256: str


def reading(path: str) -> Progress:
    """A progress bar over the bytes of a file, shown for large files."""
    size = os.path.getsize(path)
    return Progress(size, os.path.basename(path), unit="B", disable=size < _BAR_BYTES)


def file_facts(path: str) -> FileFacts:
    """Read a file once, in pieces.

    Raises:
        UserError: it cannot be read.
    """
    digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"
    try:
        # hashlib releases Python's lock, so lines are counted in parallel.
        with open_plain(path) as file, ThreadPoolExecutor(1) as hashing, reading(path) as bar:
            hashed = None
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                if hashed is not None:
                    hashed.result()
                hashed = hashing.submit(digest.update, chunk)
                size += len(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:]
                bar.update(len(chunk))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "unreadable") from error
    return FileFacts(size, lines + (last != b"\n"), digest.hexdigest())


def input_facts(path: str) -> FileFacts:
    """file_facts, cached for large files in the temporary folder while size, time and inode are unchanged. Processes
    that start at the same time wait for the first one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = FileState.of(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "unreadable") from error
    folder = temporary_folder() if state.size >= _BAR_BYTES else None
    if folder is None:
        return file_facts(path)
    with contextlib.ExitStack() as opened:
        try:
            note = opened.enter_context(open(os.path.join(folder, f"{state.device}-{state.inode}.json"), "a+"))
            fcntl.flock(note, fcntl.LOCK_EX)
        except OSError:
            return file_facts(path)
        note.seek(0)
        try:
            noted = json.load(note)
            if noted["state"] == list(state):
                return FileFacts(*noted["facts"])
        except (ValueError, KeyError, TypeError):
            pass
        facts = file_facts(path)
        # Do not cache a file that changed meanwhile.
        if FileState.of(path) == state:
            with contextlib.suppress(OSError):
                note.truncate(0)
                json.dump({"state": state, "facts": facts}, note)
        return facts


# Blocks of a large file in a fingerprint, spread evenly from its first to its last byte.
_BLOCKS = 64


def fingerprint_folder(folder: str) -> str:
    """SHA-256 (hex) over names, sizes and contents of the files that a model's answers depend on.

    Of files over 64 MiB only 64 blocks of 1 MiB are read, so that 20 GB of weights take less than a second. This tells
    trained weights apart, which differ everywhere, but does not detect a single altered byte.
    """
    # Not needed for --help, which would load numpy with it.
    from paddlemix.checkpoint.model_folder import ANSWERS, files_of

    digest = hashlib.sha256()
    for name in files_of(folder, *ANSWERS):
        path = os.path.join(folder, name)
        size = os.path.getsize(path)
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            if size <= _BLOCKS * _CHUNK:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek((size - _CHUNK) * block // (_BLOCKS - 1))
                digest.update(file.read(_CHUNK))
    return digest.hexdigest()
