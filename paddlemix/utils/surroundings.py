"""What a process may lack where it runs: standard streams, a home that can be written, room in /dev/shm.

`prepare` runs when paddlemix is imported, before Paddle and PaddleNLP are.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import os
import sys
from typing import Iterator, Optional

from paddlemix.utils.errors import UserError


def prepare() -> None:
    """Make Paddle and PaddleNLP importable here, without what they say about settings of ours."""
    open_standard_streams()
    _find_homes()
    sys.meta_path.insert(0, _Around())


def open_standard_streams() -> None:
    """Open to nowhere what was closed (cron, daemons, `>&-`): else the next file gets its number, and is printed into.

    A stream that is None or was closed becomes a file that takes everything.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="replace"))


# What writes into the home while it is imported, and the variable that names another place.
_HOMES = {"PPNLP_HOME": ".paddlenlp", "MPLCONFIGDIR": os.path.join(".config", "matplotlib")}


def _find_homes() -> None:
    """Name a temporary folder to the libraries that would write into a home that takes nothing."""
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
    """Whether a folder can be written to, or can be made."""
    if not os.path.isabs(folder):
        return False
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        return False
    # To root, everything is writable by its rights, also where nothing can be made.
    probe = os.path.join(nearest, f".mgen-vl-{os.getpid()}")
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError:
        return False
    return True


def temporary_folder() -> Optional[str]:
    """This user's folder for what may be lost, in the system's temporary folder; None where none can be had."""
    import tempfile

    try:
        folder = os.path.join(tempfile.gettempdir(), f"mgen-vl-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Another user may have made it first.
        return folder if os.lstat(folder).st_uid == os.getuid() else None
    except OSError:
        return None


@contextlib.contextmanager
def _without_thread_lines() -> Iterator[None]:
    """Keep back Paddle's two lines about an OMP_NUM_THREADS above 1: they are meant for processes that share the cores,
    and set_cpu_defaults sets it for one that has them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        kept = [line for line in said.getvalue().splitlines(True) if "OMP_NUM_THREADS" not in line]
        sys.stderr.write("".join(kept))


@contextlib.contextmanager
def _with_a_home() -> Iterator[None]:
    """For a library that knows no variable but HOME."""
    home = os.environ.get("HOME")
    folder = None if _takes_files(os.path.expanduser(os.path.join("~", ".visualdl"))) else temporary_folder()
    try:
        if folder is not None:
            os.environ["HOME"] = folder
        yield
    finally:
        if folder is not None:
            os.environ.pop("HOME")
            os.environ.update({} if home is None else {"HOME": home})


class _Around:
    """Finds modules that are imported within a context."""

    contexts = {"paddle.base": _without_thread_lines, "visualdl": _with_a_home}

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


# Files that a process has open beside those that it asks for.
_OPEN_BESIDE = 64


def allow_open_files(count: int, instead: str) -> None:
    """Let this process have so many more files open at once.

    instead: what to do where that is not allowed.

    Raises:
        UserError: the system's hard limit is lower.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OPEN_BESIDE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(f"{count} files at once are too many here, where a process may open {hard}: {instead}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_shared_memory(workers: int, instead: str) -> None:
    """Refuse to start processes where they cannot be given their locks, which lie in /dev/shm.

    instead: the option, with its value, that does without them.

    Raises:
        UserError: there is no room, or no /dev/shm.
    """
    import multiprocessing

    try:
        # Two queues and an event take eight, each worker's own queue three.
        [multiprocessing.Lock() for _ in range(8 + 4 * workers)]
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"/dev/shm takes nothing ({reason}), and processes that work together need it: enlarge it "
            f"(docker run --shm-size=1g), or give {instead}"
        ) from None
