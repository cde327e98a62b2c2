"""Run a submission as the platform would: a copy elsewhere, read-only, without a network, watched.

The network is shut twice, without root. Every Python of the run has an audit hook (PEP 578) that refuses to look up or
connect to another machine, and notes who tried. On Linux a seccomp filter, inherited by every process of the run,
refuses IPv4 and IPv6 sockets to native code, too. Neither changes user or mount namespaces, so file modes keep their
meaning; where root runs the check, its right to pass over them is dropped for the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import shutil
import signal
import site
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from paddlemix.contest.pack import RUN_SH
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.files import link_or_copy
from paddlemix.utils.progress import Progress

# Smaller files are copied, so that the copy can be made read-only without touching the original.
_LINK_FROM = 1 << 20

_HOOK = '''\
"""Refuses connections to other machines, and notes them."""
import errno, os, socket, sys

_LOG = {log!r}
_LOCAL = {{None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}}


def _watch(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(args[1], tuple):
            return
        host = args[1][0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in _LOCAL or str(host).startswith("127."):
        return
    frame, place = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        place = place or f"{{name}}:{{frame.f_lineno}}"
        if os.path.dirname(os.__file__) not in name or "-packages" in name:
            place = f"{{name}}:{{frame.f_lineno}}"
            break
        frame = frame.f_back
    with open(_LOG, "a", encoding="utf-8") as file:
        file.write(f"{{host}} by {{place}}\\n")
    raise OSError(errno.ENETUNREACH, "no network during the check")


sys.addaudithook(_watch)
'''

# linux/audit.h, asm/unistd.h: the architecture's mark and the number of its socket call.
_SOCKET_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction))]


def _shut_sockets() -> Callable[[], None]:
    """A function that shuts IPv4 and IPv6 to the process that calls it and to all that it starts.

    Raises:
        KeyError: on an architecture that is not known here.
    """
    mark, number = _SOCKET_CALL[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06
    steps = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, 5, mark),
        (load, 0, 0, 0),  # the call
        (equal, 0, 3, number),
        (load, 0, 0, 16),  # its first argument
        (equal, 2, 0, int(socket.AF_INET)),
        (equal, 1, 0, int(socket.AF_INET6)),
        (give, 0, 0, 0x7FFF0000),
        (give, 0, 0, 0x00050000 | errno.ENETUNREACH),
    ]
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    libc = ctypes.CDLL(None, use_errno=True)

    def shut() -> None:
        # PR_SET_NO_NEW_PRIVS, without which only root may filter; then PR_SET_SECCOMP, mode filter.
        if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")

    return shut


def _bind_root() -> Callable[[], None]:
    """A function after which file modes bind what root starts, too."""
    libc = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE.
        if libc.prctl(24, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")

    return bind


@functools.lru_cache(maxsize=None)
def _if_possible(make: Callable[[], Callable[[], None]]) -> Optional[Callable[[], None]]:
    """What `make` gives, if this system lets a process do it to itself."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        step = make()
        subprocess.run([sys.executable, "-S", "-c", ""], preexec_fn=step, check=True, capture_output=True)
    except (KeyError, OSError, subprocess.SubprocessError):
        return None
    return step


class Trial(NamedTuple):
    """One call of run.sh. status: its exit status, or None when it took too long. said: the last lines it printed.
    lines: of the results, or None without any. reached: hosts it asked for. written: paths in the submission that it
    made, changed or removed."""

    status: Optional[int]
    seconds: float
    said: List[str]
    lines: Optional[List[bytes]]
    reached: List[str]
    written: List[str]


class Place:
    """A copy of a submission, laid out as in the notebook: submission/ beside dataset/test_samples.txt."""

    def __init__(self, folder: str, name: str):
        self.folder = folder
        self.submission = os.path.join(folder, name)
        self.input = os.path.join(folder, "dataset", "test_samples.txt")
        self._log = os.path.join(folder, "network.log")
        self._hook = os.path.join(folder, "hook")
        self._home = os.path.join(folder, "home")
        for path in (os.path.dirname(self.input), self._hook, self._home):
            os.makedirs(path)
        with open(os.path.join(self._hook, "sitecustomize.py"), "w", encoding="utf-8") as file:
            file.write(_HOOK.format(log=self._log))
        self._shut = _if_possible(_shut_sockets)
        self._bind = _if_possible(_bind_root) if os.geteuid() == 0 else None
        self._before: Dict[str, Tuple[int, int]] = {}
        self._modes: Dict[Tuple[int, int], Tuple[str, int]] = {}

    @property
    def how_offline(self) -> str:
        """How the network is shut, for the report."""
        hook = "an audit hook in every Python"
        return f"{hook} and a seccomp filter on IPv4 and IPv6 sockets" if self._shut else f"{hook} (no seccomp here)"

    @property
    def how_read_only(self) -> str:
        """How it is known that nothing is written into the submission, for the report."""
        if os.geteuid() != 0:
            return "by file modes, and compared afterwards"
        if self._bind:
            return "by file modes (root's right to pass over them was dropped), and compared afterwards"
        return "by comparing afterwards: file modes do not bind root"

    def _confine(self) -> None:
        for step in (self._bind, self._shut):
            if step is not None:
                step()

    def _environment(self, path: str) -> Dict[str, str]:
        left_out = ("PYTHON", "HF_", "PPNLP_", "XDG_", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        # Nothing that an earlier run fetched into the home folder helps. Packages of the user do stay.
        return dict(kept, PATH=path, HOME=self._home, PYTHONPATH=self._hook, PYTHONUSERBASE=site.getuserbase())

    def freeze(self) -> None:
        """Make the copy read-only, and remember it. Linked weights are so, too, until `thaw`: their mode is the
        original's, and what opens them to write would fail on the platform, and spoil the original here."""
        self._before = self._state()
        for parent, _, names in os.walk(self.submission, topdown=False):
            for name in names:
                path = os.path.join(parent, name)
                found = os.stat(path)
                if os.path.islink(path):
                    continue
                # A linked file may be another user's, who alone can change its mode.
                with contextlib.suppress(PermissionError):
                    os.chmod(path, 0o444)
                    # One file may have two names here; only the first still sees its mode.
                    if found.st_nlink > 1:
                        self._modes.setdefault((found.st_dev, found.st_ino), (path, stat.S_IMODE(found.st_mode)))
            os.chmod(parent, 0o555)

    def thaw(self) -> None:
        for path, mode in self._modes.values():
            with contextlib.suppress(FileNotFoundError):
                os.chmod(path, mode)
        for parent, folders, _ in os.walk(self.submission):
            os.chmod(parent, 0o755)
            for name in folders:
                if not os.path.islink(os.path.join(parent, name)):
                    os.chmod(os.path.join(parent, name), 0o755)

    def _state(self) -> Dict[str, Tuple[int, int]]:
        state = {}
        for parent, folders, names in os.walk(self.submission):
            # Python's own caches are no fault of the program: where it may not write them, it goes without.
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                path = os.path.join(parent, name)
                found = os.lstat(path)
                state[os.path.relpath(path, self.submission)] = (found.st_size, found.st_mtime_ns)
        return state

    def run(
        self, arguments: List[str], output: str, path: str, time_limit: float, said: Callable[[str], None]
    ) -> Trial:
        """`sh run.sh ARGUMENTS` from inside the submission. path: the run's PATH. output: file that it must write.
        said: told each line that it prints."""
        start = time.perf_counter()
        tail: List[str] = []
        process = subprocess.Popen(
            ["sh", RUN_SH, *arguments],
            cwd=self.submission,
            env=self._environment(path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=self._confine,
            start_new_session=True,
        )

        def listen(stream: Any) -> None:
            for line in stream:
                text = line.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
                tail.append(text)
                del tail[:-8]
                said(text)

        listener = threading.Thread(target=listen, args=(process.stdout,), daemon=True)
        listener.start()
        status: Optional[int] = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(time_limit)
        finally:
            # It leads a session of its own, so that nothing it started outlives it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        listener.join(10)
        lines = None
        if os.path.isfile(output):
            with open(output, "rb") as file:
                lines = file.read().split(b"\n")
            if lines[-1] == b"":
                lines.pop()
        reached: List[str] = []
        if os.path.exists(self._log):
            with open(self._log, encoding="utf-8") as file:
                reached = sorted(set(file.read().splitlines()))
            os.unlink(self._log)
        after = self._state()
        written = sorted(
            name for name in {*after, *self._before} if after.get(name) != self._before.get(name)
        )
        return Trial(status, time.perf_counter() - start, tail, lines, reached, written)


@contextlib.contextmanager
def copied(submission: str, sample: str, progress: bool = True) -> Iterator[Place]:
    """A read-only copy of a submission at a path with blanks in it, with `sample` as its test file.

    It is made beside the submission, where large files can be hard links, else in the system's folder for temporary
    files.

    Raises:
        JobFailed: the disk is full.
    """
    submission = os.path.abspath(submission)
    parent = os.path.dirname(submission)
    folder = tempfile.mkdtemp(prefix=".check of a submission ", dir=parent if os.access(parent, os.W_OK) else None)
    place = Place(folder, os.path.basename(submission))

    total = sum(os.path.getsize(os.path.join(p, name)) for p, _, names in os.walk(submission) for name in names)
    try:
        with Progress(total, desc="copy", unit="B", unit_scale=True, disable=not progress) as bar:

            def copy(source: str, target: str) -> None:
                if os.path.getsize(source) >= _LINK_FROM:
                    link_or_copy(source, target, bar.update)
                else:
                    shutil.copy2(source, target)
                    bar.update(os.path.getsize(target))

            try:
                shutil.copytree(submission, place.submission, copy_function=copy)
                shutil.copyfile(sample, place.input)
            except OSError as error:
                raise JobFailed(f"could not copy {submission} to try it: {error}") from None
        place.freeze()
        yield place
    finally:
        place.thaw()
        shutil.rmtree(folder, ignore_errors=True)


def python_path(python: str) -> str:
    """A PATH on which `python` is the interpreter at the path `python`, whatever that is called."""
    return os.pathsep.join([os.path.dirname(os.path.abspath(python)), os.environ.get("PATH", os.defpath)])

