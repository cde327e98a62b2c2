"""Whether an output can be written, asked before any work: a file or folder, and apart from the inputs."""

from __future__ import annotations

import os
from typing import Iterable, Optional

from paddlemix.utils.errors import UserError


def nearest_folder(path: str) -> str:
    """The path, or what is nearest above it that there is. Links are followed, also those that lead to nothing."""
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


def check_file(path: str, plain: bool = False) -> None:
    """Refuse a path that no file can be written to. plain: neither to devices and FIFOs, which hold nothing.

    Raises:
        UserError: it is a folder, or the folder cannot be written to.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; the output must be a file", "is-a-folder")
    if plain and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a device or a pipe; the output must be a file", "not-regular")
    # A file that can be written is enough where the folder takes no other.
    if not (os.path.exists(path) and os.access(path, os.W_OK)):
        _check_above(path)


def check_folder(path: str) -> None:
    """Refuse a path that no folder can be written to.

    Raises:
        UserError: it is a file, or cannot be written to.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file: give a folder", "is-a-file")
    _check_above(path)


def keep_apart(inputs: Iterable[Optional[str]], outputs: Iterable[Optional[str]]) -> None:
    """Refuse to write over what is read, under whatever name. None: a file that was not given.

    Raises:
        UserError: an output is an input.
    """
    outputs = [path for path in outputs if path is not None and os.path.exists(path)]
    for path in inputs:
        for output in outputs:
            if path is not None and os.path.exists(path) and os.path.samefile(path, output):
                raise UserError(f"{path} would be overwritten by {output}: give another output", "overlap")
