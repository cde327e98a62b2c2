"""How a file is written: beside its final name, flushed to disk, then renamed. A reader never sees half of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from typing import IO, Callable, Iterator, Optional, Tuple

from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger

_UMASK = os.umask(0)
os.umask(_UMASK)

_BLOCK = 1 << 20


def sync_folder(folder: str) -> None:
    """Make a rename inside `folder` survive a power cut, where the file system can."""
    _sync(folder)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


# ---- partial files and folders
#
# What is written to NAME is called .NAME.xxxxxxxx.partial until it is whole, and locked for as long as its process
# lives. One that is not locked was left by a killed process. (Where the file system knows no locks, none is removed.)


def _lock(path: str) -> Optional[int]:
    """A handle of a file or folder of ours, with its lock; None if it is not ours, or gone.

    Raises:
        BlockingIOError: another process has the lock.
    """
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(handle)
        if status.st_uid == os.geteuid() and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked, handle = handle, None
            return locked
    except BlockingIOError:
        raise
    except OSError:
        pass
    finally:
        if handle is not None:
            os.close(handle)
    return None


def _new_partial(path: str, folder: bool, suffix: str = ".partial") -> Tuple[str, int]:
    """A fresh file or folder beside `path`, and an open handle with its lock."""
    where = {"prefix": f".{os.path.basename(path)}.", "suffix": suffix, "dir": os.path.dirname(path)}
    while True:
        if folder:
            partial = tempfile.mkdtemp(**where)
            handle = os.open(partial, os.O_RDONLY)
        else:
            handle, partial = tempfile.mkstemp(**where)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = False
        except BlockingIOError:
            taken = True
        except OSError:
            return partial, handle
        # Before it was locked, another process may have taken it for a leftover.
        if not taken and os.path.lexists(partial):
            return partial, handle
        os.close(handle)


def remove_leftovers(path: str) -> bool:
    """Remove what killed processes left of writing `path`; a folder that one of them had moved aside is put back.

    Returns whether a process that lives is writing it now.
    """
    parent, name = os.path.split(os.path.abspath(path))
    pattern = re.compile(re.escape(f".{name}.") + r"[a-z0-9_]{8}\.(partial|old)")
    try:
        left = [os.path.join(parent, one) for one in os.listdir(parent) if pattern.fullmatch(one)]
    except OSError:
        return False
    in_use = False
    for partial in left:
        try:
            handle = _lock(partial)
        except BlockingIOError:
            in_use = True
            continue
        if handle is None:
            continue
        try:
            aside = os.path.join(partial, _ASIDE)
            if partial.endswith(".old") and os.path.isdir(aside) and not os.path.lexists(path):
                os.rename(aside, path)
                logger.warning(f"{path} is back, which a killed process had moved aside to replace it")
            if os.path.isdir(partial):
                shutil.rmtree(partial)
            else:
                os.unlink(partial)
            logger.info(f"Removed {partial}, which a killed process left")
        except OSError as error:
            logger.warning(f"{partial}, which a killed process left, cannot be removed: {error.strerror}")
        finally:
            os.close(handle)
    return in_use


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", **open_kwargs) -> Iterator[IO]:
    """Open a file that appears at `path` only when the block ends without an error.

    `mode` is "w" (UTF-8 unless `encoding` is given) or "wb". On an error the partial file is removed and whatever
    was at `path` stays. So is what killed processes left of the same file.
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(path)
    if "b" not in mode:
        open_kwargs.setdefault("encoding", "utf-8")
        open_kwargs.setdefault("newline", "\n")
    partial, handle = _new_partial(path, folder=False)
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


class _Ended(BaseException):
    """A signal that ends the process, as an exception."""


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Have SIGTERM and SIGHUP leave the block by an exception, as Ctrl-C does, and end the process then."""
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
    """Give a fresh folder beside `path` that takes its name, flushed to disk, when the block ends without an error.

    An older folder at `path` is replaced only then, in one step where the system can. On an error, and on SIGTERM, the
    fresh folder is removed. A link at `path` stays, and leads to the new folder.

    Raises:
        UserError: another process is writing it.
    """
    given, path = path, os.path.realpath(path)
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    if remove_leftovers(path):
        raise UserError(f"another process is writing {given}: wait for it, or give another folder")
    with _cleaning_up():
        partial, handle = _new_partial(path, folder=True)
        try:
            os.chmod(partial, 0o777 & ~_UMASK)
            yield partial
            for inner, _, names in os.walk(partial):
                for name in names:
                    if not os.path.islink(os.path.join(inner, name)):
                        _sync(os.path.join(inner, name))
                _sync(inner)
            if not os.path.isdir(path):
                os.rename(partial, path)
            elif not _exchange(partial, path):
                _replace(path, partial)
            sync_folder(parent)
        finally:
            # After an exchange it is the older folder.
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


# Name of an older folder in the one that it is moved into.
_ASIDE = "old"


def _replace(path: str, partial: str) -> None:
    """Where two folders cannot be exchanged: between the two renames there is none, see remove_leftovers."""
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
    """Give two folders each other's names, in one step; False where the system or the file system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


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
