"""How files and folders are written: beside their final name, flushed to disk, then renamed, so that a reader never
sees half of them. A link is followed. What cannot be renamed is written in place: a device, a FIFO, a mount.
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
from typing import IO, Callable, Iterator, List, Optional, Tuple

from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_folder, takes_entries
from paddlemix.utils.surroundings import temporary_folder

_BLOCK = 1 << 20


def open_plain(path: str) -> IO[bytes]:
    """A plain file, for reading, whatever a stranger has put in its place.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    # Opening a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return open(handle, "rb")


# ---- where something is to be written, asked before the work is done


# Handles of folders that only this process writes into. Its children, which may outlive it, let go of them.
_WRITING: List[int] = []


def _let_go() -> None:
    while _WRITING:
        os.close(_WRITING.pop())


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def only_writer(folder: str) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if need be. (Where locks are known.)

    Raises:
        UserError: another process is writing there, or it cannot be written to.
    """
    check_folder(folder)
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    _WRITING.append(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another process is writing into {folder}: wait for it, or give another folder"
            raise UserError(text, "busy") from None
        except OSError:
            pass
        yield
    finally:
        if handle in _WRITING:
            _WRITING.remove(handle)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
        if made:
            # Only if nothing was written.
            with contextlib.suppress(OSError):
                os.rmdir(folder)


# ---- partial files and folders


def sync_folder(folder: str) -> None:
    """Make a rename inside `folder` survive a power cut, where the file system can."""
    _sync(folder)


def _sync(path: str) -> None:
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
    parent, name = os.path.split(path)
    while True:
        partial = os.path.join(parent, f".{name}.{secrets.token_hex(4)}{suffix}")
        # With the rights that it keeps: not every file system can change them.
        try:
            if folder:
                os.mkdir(partial)
                handle = os.open(partial, os.O_RDONLY)
            else:
                handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
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
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    pattern = re.compile(re.escape(f".{name}.") + r"[a-z0-9_]{8}\.(partial|old)")
    left = []
    # A folder that cannot be renamed has them inside.
    for place in (parent, path):
        with contextlib.suppress(OSError):
            left += [os.path.join(place, one) for one in os.listdir(place) if pattern.fullmatch(one)]
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
                logger.warning(f"Restored {path}, which a killed process had moved aside to replace it")
            if os.path.isdir(partial):
                shutil.rmtree(partial)
            else:
                os.unlink(partial)
            logger.info(f"Removed {partial}, left by a killed process")
        except OSError as error:
            logger.warning(f"{partial}, left by a killed process, cannot be removed: {error.strerror}")
        finally:
            os.close(handle)
    return in_use


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", **open_kwargs) -> Iterator[IO]:
    """Open a file that appears at `path` only when the block ends without an error.

    `mode` is "w" (UTF-8 unless `encoding` is given) or "wb". On an error the partial file is removed and whatever
    was at `path` stays. So is what killed processes left of the same file. A link at `path` stays, and leads to the new
    file; a device or FIFO is written into.
    """
    if "b" not in mode:
        open_kwargs.setdefault("encoding", "utf-8")
        open_kwargs.setdefault("newline", "\n")
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **open_kwargs) as file:
            yield file
        return
    # Where a link leads to.
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
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
        sync_folder(os.path.dirname(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


# What renaming says of a mount, of another file system, and of a file system that cannot.
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def _give_name(partial: str, path: str) -> None:
    """Rename a whole file to `path`; copy it into the file that is there where that cannot be replaced."""
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
    fresh folder is removed. A link at `path` stays, and leads to the new folder. So does a mount, and gets the files
    one by one when all are whole.

    Raises:
        UserError: `path` is a file, cannot be written to, or another process is writing it.
    """
    given, path = path, os.path.realpath(path)
    check_folder(path)
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    if remove_leftovers(path):
        raise UserError(f"another process is writing {given}: wait for it, or give another folder", "busy")
    stays = os.path.isdir(path) and (os.path.ismount(path) or not takes_entries(parent))
    partial, handle = _new_partial(os.path.join(path, os.path.basename(path)) if stays else path, folder=True)
    with _cleaning_up():
        try:
            yield partial
            for inner, _, names in os.walk(partial):
                for name in names:
                    if not os.path.islink(os.path.join(inner, name)):
                        _sync(os.path.join(inner, name))
                _sync(inner)
            if stays or not _take_name(partial, path):
                _fill(path, partial)
            sync_folder(parent)
        finally:
            # After an exchange it is the older folder.
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


# What tells readers that a folder is whole: moved last.
_LAST = ("config.json", "checkpoint.json")
# What a new file system has in its top folder.
_OF_THE_SYSTEM = "lost+found"


def is_empty(folder: str) -> bool:
    """Whether a folder holds nothing of anybody's."""
    return not set(os.listdir(folder)) - {_OF_THE_SYSTEM}


def _take_name(partial: str, path: str) -> bool:
    """Put a whole folder in the place of `path`; False where folders cannot be renamed."""
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
    """Put the files of a whole folder, one by one, in the place of those of a folder that keeps its name."""
    os.makedirs(path, exist_ok=True)
    for name in set(os.listdir(path)) - {_OF_THE_SYSTEM, os.path.basename(partial)}:
        old = os.path.join(path, name)
        if os.path.isdir(old) and not os.path.islink(old):
            shutil.rmtree(old)
        else:
            os.unlink(old)
    move_entries(partial, path)


def rename_folder(folder: str, path: str) -> None:
    """Give a whole folder the name `path`, which is free; entry by entry where folders cannot be renamed."""
    if not _take_name(folder, path):
        os.makedirs(path, exist_ok=True)
        move_entries(folder, path)
        os.rmdir(folder)


def move_entries(folder: str, target: str) -> None:
    """Move all that a folder holds into another one, what tells that it is whole last."""
    for name in sorted(os.listdir(folder), key=lambda name: name in _LAST):
        shutil.move(os.path.join(folder, name), os.path.join(target, name))
    _sync(target)


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
    """Copy the bytes of a file into an open one. progress: called with the bytes copied, as it goes."""
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

    A symbolic link at `source` is followed. progress: called with the bytes of the file. Returns whether it is a link.
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
