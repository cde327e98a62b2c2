"""Checks before any work that an output file or folder can be written and is not an input; errors while writing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from typing import Iterable, Iterator, Optional

from paddlemix.utils.errors import JobFailed, UserError


@contextlib.contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn an OSError while `path` is written into a JobFailed."""
    try:
        yield
    except OSError as error:
        # shutil.copytree lists the errors of all files.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise JobFailed(f"cannot write {path}: {reason}", "disk") from error


def nearest_folder(path: str) -> str:
    """The path or its nearest existing parent. Links are followed, dangling ones too."""
    path = os.path.realpath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def takes_entries(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _check_above(path: str) -> None:
    above = nearest_folder(path)
    if not os.path.isdir(above):
        raise UserError(f"cannot write {path}: {above} is a file", "not-writable")
    if not takes_entries(above):
        raise UserError(f"cannot write {path}: {above} cannot be written to", "not-writable")
    try:
        # Not every file system that would let us can, such as /proc.
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {above}: {error.strerror}", "not-writable") from None


def check_file(path: str, plain: bool = False) -> None:
    """Check that a file can be written. plain: not to a device or FIFO.

    Raises:
        UserError: the path is a folder, or its folder is not writable.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; the output must be a file", "is-a-folder")
    if plain and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a device or a pipe; the output must be a file", "not-regular")
    # A writable file is enough in a read-only folder.
    if not (os.path.exists(path) and os.access(path, os.W_OK)):
        _check_above(path)


# How the outputs of the tools begin, by what a message calls them.
_BEGINNINGS = {
    "a report page": rb"<!doctype html>",
    "a JSON report": rb'\{\s*"(files|machine|rows)":',
    "results": rb"[^\t\n]*\t[^\t\n]*$",
    "scores": rb"[^\t\n]*(\t[^\t\n]*){4}$",
    "a file of --n_best": rb'\{"id":',
    "a zip archive": rb"PK",
}


def check_kind(path: str, kind: str) -> None:
    """Check that an output replaces nothing but an empty file or one of its kind, a key of _BEGINNINGS.

    Raises:
        UserError: it does.
    """
    if os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        if head and not re.match(_BEGINNINGS[kind], head, re.MULTILINE):
            raise UserError(f"{path} exists and is not {kind}: give another output", "other-kind")


def check_earlier(output: str, ours: bool, overwrite: bool) -> None:
    """Check that an output replaces nothing but an empty file, or one that an earlier run wrote (`ours`); anything with
    `overwrite`.

    Raises:
        UserError: it does.
    """
    if os.path.isfile(output) and os.path.getsize(output) and not ours and not overwrite:
        text = f"{output} exists and is not from an earlier run of this command: give another output, or --overwrite"
        raise UserError(text, "overwrite")


def check_folder(path: str) -> None:
    """Check that a folder can be written.

    Raises:
        UserError: the path is a file, or is not writable.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file: give a folder", "is-a-file")
    _check_above(path)


def keep_apart(inputs: Iterable[Optional[str]], outputs: Iterable[Optional[str]]) -> None:
    """Check that no output is an input or another output, under whatever name. None: a file that was not given.

    Raises:
        UserError: one is.
    """
    taken = set()
    there = [path for path in inputs if path is not None and os.path.exists(path)]
    for output in outputs:
        # Devices and FIFOs may be written to twice.
        if output is None or os.path.exists(output) and not os.path.isfile(output):
            continue
        if os.path.realpath(output) in taken:
            raise UserError(f"{output} would be written to twice: give another output", "overlap")
        taken.add(os.path.realpath(output))
        for path in there if os.path.exists(output) else ():
            if os.path.samefile(path, output):
                raise UserError(f"{path} would be overwritten by {output}: give another output", "overlap")
