"""Working around what a process's environment may lack: standard streams, a writable home, room in /dev/shm.

`prepare` runs when paddlemix is imported, before Paddle and PaddleNLP are.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import os
import sys
from functools import partial
from typing import Iterator, Optional

from paddlemix.utils.errors import UserError
from paddlemix.utils.outputs import check_folder


def prepare() -> None:
    """Make Paddle and PaddleNLP importable here, without warnings about our settings."""
    open_standard_streams()
    _find_homes()
    sys.meta_path.insert(0, _Around())


def open_standard_streams() -> None:
    """Open closed standard streams (cron, daemons, `>&-`) to /dev/null: else the next file gets their descriptor, and
    output is written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest free descriptor: this one.
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="replace"))


# Libraries that write into the home on import, by the variable that names another folder.
_HOMES = {"PPNLP_HOME": ".paddlenlp", "MPLCONFIGDIR": os.path.join(".config", "matplotlib")}


def _find_homes() -> None:
    """Point the libraries that write into the home to a temporary folder if the home is not writable."""
    if all(name in os.environ for name in _HOMES):
        return
    home = os.path.expanduser("~")
    for name, inside in _HOMES.items():
        if name not in os.environ and not _takes_files(os.path.join(home, inside)):
            folder = temporary_folder()
            if folder is not None:
                os.environ[name] = os.path.join(folder, inside.strip("."))
                with contextlib.suppress(OSError):
                    os.makedirs(os.environ[name], exist_ok=True)


def _takes_files(folder: str) -> bool:
    """Whether a folder is writable, or can be created."""
    # Without a home, ~ is a name in the working folder.
    if not os.path.isabs(folder):
        return False
    try:
        check_folder(folder)
    except UserError:
        return False
    return True


def temporary_folder() -> Optional[str]:
    """This user's folder for disposable files in the system's temporary folder; None if unavailable."""
    import tempfile

    try:
        folder = os.path.join(tempfile.gettempdir(), f"mgen-vl-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Another user may have created it first.
        return folder if os.lstat(folder).st_uid == os.getuid() else None
    except OSError:
        return None


@contextlib.contextmanager
def _without_thread_lines() -> Iterator[None]:
    """Suppress Paddle's two lines about an OMP_NUM_THREADS above 1: they are meant for processes that share the cores,
    but set_cpu_defaults sets it for a single process."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    finally:
        kept = [line for line in stderr.getvalue().splitlines(True) if "OMP_NUM_THREADS" not in line]
        sys.stderr.write("".join(kept))


@contextlib.contextmanager
def _with_a_home(inside: str) -> Iterator[None]:
    """A HOME with a writable folder `inside`, for a library without a variable of its own."""
    home = os.environ.get("HOME")
    folder = None if _takes_files(os.path.join(os.path.expanduser("~"), inside)) else temporary_folder()
    try:
        if folder is not None:
            os.environ["HOME"] = folder
        yield
    finally:
        if folder is not None:
            os.environ.pop("HOME")
            os.environ.update({} if home is None else {"HOME": home})


class _Around:
    """A finder that imports some modules within a context."""

    contexts = {
        "paddle.base": _without_thread_lines,
        "paddle.dataset.common": partial(_with_a_home, os.path.join(".cache", "paddle", "dataset")),
        "visualdl": partial(_with_a_home, ".visualdl"),
    }

    def find_spec(self, name, path=None, target=None):
        if name not in self.contexts:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_within(module):
                with self.contexts[name]():
                    load(module)

            spec.loader.exec_module = load_within
        return spec


# File descriptors that a process needs for other things.
_OPEN_BESIDE = 64


def allow_open_files(count: int, instead: str) -> None:
    """Raise this process's limit of open files to allow `count` more. instead: advice where that is not allowed.

    Raises:
        UserError: the system's hard limit is lower.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OPEN_BESIDE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        text = f"{count} open files are too many here, where a process may open {hard}: {instead}"
        raise UserError(text, "open-files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_shared_memory(workers: int, instead: str) -> None:
    """Check that /dev/shm has room for the locks of worker processes. instead: the option that avoids them.

    Raises:
        UserError: there is no room, or no /dev/shm.
    """
    import multiprocessing

    try:
        # Two queues and an event take eight, each worker's own queue three.
        [multiprocessing.Lock() for _ in range(8 + 4 * workers)]
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = f"enlarge it (docker run --shm-size=1g), or give {instead}"
        raise UserError(f"/dev/shm has no room ({reason}) for worker processes: {advice}", "shared-memory") from None
