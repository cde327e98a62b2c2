"""How a file is written: beside its final name, flushed to disk, then renamed. A reader never sees half of it.

And how a configuration is read: a JSON object, or one clear error.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from typing import IO, Any, Callable, Dict, Iterator, Optional, Union

from paddlemix.utils.errors import ConfigError

# A configuration has a few KB.
MAX_CONFIG_BYTES = 4 << 20

_UMASK = os.umask(0)
os.umask(_UMASK)

_BLOCK = 1 << 20


def sync_folder(folder: str) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", **open_kwargs) -> Iterator[IO]:
    """Open a file that appears at `path` only when the block ends without an error.

    `mode` is "w" (UTF-8 unless `encoding` is given) or "wb". On an error the partial file is removed and whatever
    stood at `path` stays.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if "b" not in mode:
        open_kwargs.setdefault("encoding", "utf-8")
        open_kwargs.setdefault("newline", "\n")
    handle, partial = tempfile.mkstemp(prefix="." + os.path.basename(path) + ".", suffix=".partial", dir=folder)
    try:
        with os.fdopen(handle, mode, **open_kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_UMASK)
        os.replace(partial, path)
        sync_folder(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Give a fresh folder beside `path` that takes its name when the block ends without an error.

    An older folder at `path` is replaced only then. On an error the fresh folder is removed.
    """
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix="." + os.path.basename(path) + ".", suffix=".partial", dir=parent)
    os.chmod(partial, 0o777 & ~_UMASK)
    try:
        yield partial
        if os.path.isdir(path):
            old = tempfile.mkdtemp(prefix="." + os.path.basename(path) + ".", suffix=".old", dir=parent)
            os.rename(path, os.path.join(old, "old"))
            os.rename(partial, path)
            shutil.rmtree(old)
        else:
            os.rename(partial, path)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_file(source: str, target: IO[bytes], progress: Optional[Callable[[int], None]] = None) -> None:
    """Copy the bytes of a file into an open one. progress: told the bytes copied, as it goes."""
    with open(source, "rb") as file:
        while True:
            block = file.read(_BLOCK)
            if not block:
                return
            target.write(block)
            if progress is not None:
                progress(len(block))


def link_or_copy(source: str, target: str, progress: Optional[Callable[[int], None]] = None) -> bool:
    """Hard-link `source` to `target`, or copy it where links cannot be made (another disk, a file system without).

    A symbolic link at `source` is followed. progress: told the bytes of the file. Returns whether it is a link.
    """
    # os.link would link the symbolic link itself.
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        with open(target, "wb") as file:
            copy_file(source, file, progress)
        shutil.copystat(source, target)
        return False
    if progress is not None:
        progress(os.path.getsize(target))
    return True


def short_int(digits: Union[str, bytes]) -> int:
    """int() of what a file holds; ValueError over 20 digits, for which older Pythons take time with their square."""
    if len(digits) > 20:
        raise ValueError("a number of more than 20 digits")
    return int(digits)


def read_config_object(path: str) -> Dict[str, Any]:
    """The JSON object in a configuration file, which may come from anywhere.

    Raises:
        ConfigError: the file cannot be read, is over MAX_CONFIG_BYTES or not JSON, or holds something else than an
        object.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MB: this is no configuration")
        values = json.loads(data.decode("utf-8"), parse_int=short_int)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return values
