"""Atomic writing of files and folders: under a temporary name, flushed to disk, then renamed. Links are followed.
Devices, FIFOs and mounts, which cannot be renamed, are written in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from typing import IO, Callable, Iterator, List, Optional, Tuple, Union

from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_folder, takes_entries
from paddlemix.utils.surroundings import temporary_folder

_BLOCK = 1 << 20


def open_plain(path: str) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    # Opening a pipe would block until it has a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(handle, "rb")


@contextlib.contextmanager
def made_folder(folder: str) -> Iterator[None]:
    """Create a folder and its parents; on leaving the block, those still empty are removed."""
    # What a dangling link leads to can be made, the link itself cannot.
    folder = os.path.realpath(folder)
    made, above = [], folder
    while not os.path.isdir(above):
        made.append(above)
        above = os.path.dirname(above)
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    finally:
        for one in made:
            # Fails unless it is empty.
            with contextlib.suppress(OSError):
                os.rmdir(one)


# ---- locks


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL)


def _locked(handle: Union[int, IO]) -> Optional[bool]:
    """Lock an open file or folder. False if another process holds the lock, None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


# Handles of folders locked by this process. Children, which may outlive it, close theirs.
_WRITING: List[int] = []


def _let_go() -> None:
    while _WRITING:
        os.close(_WRITING.pop())


os.register_at_fork(after_in_child=_let_go)


def lock(handle: Union[int, IO], path: str) -> None:
    """Lock an open file or folder, where the file system has locks.

    Raises:
        UserError: another process has locked it, or the disk fails.
    """
    try:
        locked = _locked(handle)
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}", "lock") from None
    if locked is False:
        raise UserError(f"another process is writing {path}: wait for it, or give another output", "busy")


@contextlib.contextmanager
def only_writer(folder: str) -> Iterator[None]:
    """Lock a folder for writing, where the file system supports locks; creates it if needed.

    Raises:
        UserError: another process is writing there, or it is not writable.
    """
    check_folder(folder)
    with made_folder(folder):
        handle = os.open(folder, os.O_RDONLY)
        _WRITING.append(handle)
        try:
            lock(handle, folder)
            yield
        finally:
            if handle in _WRITING:
                _WRITING.remove(handle)
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)
                os.close(handle)


# ---- partial files and folders


def sync(path: str) -> None:
    """Make a file's contents, or the renames in a folder, durable where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


# Until NAME is complete it is called .NAME.xxxxxxxx.partial and locked by its process. One without a lock was left by a
# killed process. (On a file system without locks, none is removed.)


def _lock(path: str) -> Tuple[Optional[int], bool]:
    """(a locked handle of a file or folder of this user or None, whether another process holds the lock)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None, False
    status, locked = os.fstat(handle), None
    if status.st_uid == os.geteuid() and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        locked = _locked(handle)
        if locked:
            return handle, False
    os.close(handle)
    return None, locked is False


def _new_partial(path: str, folder: bool, suffix: str = ".partial") -> Tuple[str, int]:
    """A new file or folder next to `path`, and its locked handle."""
    parent, name = os.path.split(path)
    while True:
        partial = os.path.join(parent, f".{name}.{secrets.token_hex(4)}{suffix}")
        # With its final mode: not every file system can change it.
        try:
            if folder:
                os.mkdir(partial)
                handle = os.open(partial, os.O_RDONLY)
            else:
                handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        # Another process may have taken it for a leftover before it was locked.
        if _locked(handle) is not False and os.path.lexists(partial):
            return partial, handle
        os.close(handle)


def remove_leftovers(path: str) -> bool:
    """Remove leftovers of killed processes that were writing `path`; restores a folder that one had moved aside.

    Returns whether a live process is writing it.
    """
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    pattern = re.compile(re.escape(f".{name}.") + r"[a-z0-9_]{8}\.(partial|old)")
    left = []
    # For a folder that cannot be renamed they are inside.
    for place in (parent, path):
        with contextlib.suppress(OSError):
            left += [os.path.join(place, one) for one in os.listdir(place) if pattern.fullmatch(one)]
    in_use = False
    for partial in left:
        handle, taken = _lock(partial)
        in_use = in_use or taken
        if handle is None:
            continue
        try:
            aside = os.path.join(partial, _ASIDE)
            if partial.endswith(".old") and os.path.isdir(aside) and not os.path.lexists(path):
                os.rename(aside, path)
                logger.warning(f"restored {path}, which a killed process had moved aside to replace it")
            if os.path.isdir(partial):
                shutil.rmtree(partial)
            else:
                os.unlink(partial)
            logger.info(f"removed {partial}, left by a killed process")
        except OSError as error:
            logger.warning(f"{partial}, left by a killed process, cannot be removed: {error.strerror}")
        finally:
            os.close(handle)
    return in_use


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", **open_kwargs) -> Iterator[IO]:
    """Open a file that is renamed to `path` when the block ends without an error.

    `mode` is "w" (UTF-8 unless `encoding` is given) or "wb". On an error the partial file is removed and `path` is
    unchanged. Leftovers of killed processes are removed too. A link at `path` stays and leads to the new file; devices
    and FIFOs are written directly.
    """
    if "b" not in mode:
        open_kwargs.setdefault("encoding", "utf-8")
        open_kwargs.setdefault("newline", "\n")
        # Of names that are not UTF-8. In JSON this is the escape of that character.
        open_kwargs.setdefault("errors", "backslashreplace")
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **open_kwargs) as file:
            yield file
        return
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    with made_folder(folder):
        if os.path.exists(path) and not takes_entries(folder):
            folder = temporary_folder() or folder
        beside = os.path.join(folder, os.path.basename(path))
        remove_leftovers(beside)
        partial, handle = _new_partial(beside, folder=False)
        try:
            with os.fdopen(handle, mode, **open_kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                _give_name(partial, path)
            sync(os.path.dirname(path))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)


# Errors of renaming a mount, across file systems, or where it is not supported.
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def _give_name(partial: str, path: str) -> None:
    """Rename a complete file to `path`; where `path` cannot be replaced, copy into it."""
    try:
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in (*_NO_RENAME, errno.EACCES) or not os.path.isfile(path):
            raise
        with open(path, "wb") as file:
            copy_file(partial, file)
            file.flush()
            os.fsync(file.fileno())


class _Ended(BaseException):
    """A terminating signal as an exception."""


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """On SIGTERM or SIGHUP, leave the block by an exception, as on Ctrl-C, and then end the process."""
    numbers = []
    if threading.current_thread() is threading.main_thread():
        numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    ended = []

    def end(number, frame):
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        ended.append(number)
        raise _Ended

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if ended:
            os.kill(os.getpid(), ended[0])


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """A new folder next to `path` that is flushed to disk and renamed to it when the block ends without an error.

    An existing folder at `path` is replaced only then, in one step where the system can. On an error or SIGTERM the new
    folder is removed. A link at `path` stays and leads to the new folder. A mount stays and gets the complete files one
    by one.

    Raises:
        UserError: `path` is a file, is not writable, or another process is writing it.
    """
    given, path = path, os.path.realpath(path)
    check_folder(path)
    parent = os.path.dirname(path)
    if remove_leftovers(path):
        raise UserError(f"another process is writing {given}: wait for it, or give another folder", "busy")
    stays = os.path.isdir(path) and (os.path.ismount(path) or not takes_entries(parent))
    with made_folder(parent), cleaning_up():
        partial, handle = _new_partial(os.path.join(path, os.path.basename(path)) if stays else path, folder=True)
        try:
            yield partial
            for inner, _, names in os.walk(partial):
                for name in names:
                    if not os.path.islink(os.path.join(inner, name)):
                        sync(os.path.join(inner, name))
                sync(inner)
            if stays or not _take_name(partial, path):
                _fill(path, partial)
            sync(parent)
        finally:
            # After an exchange this is the older folder.
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


# Files by which readers recognise a complete folder: moved last.
_LAST = ("config.json", "checkpoint.json")
# In the top folder of a new file system.
_OF_THE_SYSTEM = "lost+found"


def is_empty(folder: str) -> bool:
    """Whether a folder holds no user files."""
    return not set(os.listdir(folder)) - {_OF_THE_SYSTEM}


def _take_name(partial: str, path: str) -> bool:
    """Rename a complete folder to `path`, replacing it; False where folders cannot be renamed."""
    try:
        if not os.path.isdir(path):
            os.rename(partial, path)
        elif not _exchange(partial, path):
            _replace(path, partial)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        return False
    return True


def _fill(path: str, partial: str) -> None:
    """Replace the files of the folder `path`, which cannot be renamed, by those of a complete folder."""
    os.makedirs(path, exist_ok=True)
    for name in set(os.listdir(path)) - {_OF_THE_SYSTEM, os.path.basename(partial)}:
        old = os.path.join(path, name)
        if os.path.isdir(old) and not os.path.islink(old):
            shutil.rmtree(old)
        else:
            os.unlink(old)
    move_entries(partial, path)


def rename_folder(folder: str, path: str) -> None:
    """Rename a complete folder to the unused name `path`; entry by entry where folders cannot be renamed."""
    if not _take_name(folder, path):
        os.makedirs(path, exist_ok=True)
        move_entries(folder, path)
        os.rmdir(folder)


def move_entries(folder: str, target: str) -> None:
    """Move all entries of a folder into another one, those of _LAST last."""
    for name in sorted(os.listdir(folder), key=lambda name: name in _LAST):
        shutil.move(os.path.join(folder, name), os.path.join(target, name))
    sync(target)


# Name of a folder moved aside, inside its temporary parent.
_ASIDE = "old"


def _replace(path: str, partial: str) -> None:
    """Replace a folder by two renames, between which `path` does not exist; see remove_leftovers."""
    old, handle = _new_partial(path, folder=True, suffix=".old")
    try:
        os.rename(path, os.path.join(old, _ASIDE))
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(os.path.join(old, _ASIDE), path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        os.close(handle)


def _exchange(one: str, other: str) -> bool:
    """Exchange two folders atomically; False where this is not supported."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def copy_file(source: str, target: IO[bytes], progress: Optional[Callable[[int], None]] = None) -> None:
    """Copy the bytes of a file into an open one. progress: called with the number of bytes copied."""
    with open(source, "rb") as file:
        while True:
            block = file.read(_BLOCK)
            if not block:
                return
            target.write(block)
            if progress is not None:
                progress(len(block))


def link_or_copy(source: str, target: str, progress: Optional[Callable[[int], None]] = None) -> bool:
    """Hard-link `source` to `target`, or copy it where hard links are not possible. Returns whether it is a link.

    A symbolic link at `source` is followed. progress: called with the number of bytes linked or copied.
    """
    # os.link would link the symbolic link itself.
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        with open(target, "wb") as file:
            copy_file(source, file, progress)
        with contextlib.suppress(OSError):
            shutil.copystat(source, target)
        return False
    if progress is not None:
        progress(os.path.getsize(target))
    return True
