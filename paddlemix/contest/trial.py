"""Run a submission as the platform would: a read-only copy in another place, without a network.

`unshare` (util-linux) disables the network, as root or in a user namespace if the system allows that; elsewhere the run
keeps it. File permissions apply in both cases; if root runs the check, `setpriv` drops its right to bypass them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import signal
import site
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from paddlemix.contest.pack import RUN_SH, WEIGHTS
from paddlemix.utils.cli import harmless
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.files import link_or_copy
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import counted

# Smaller files are copied instead of linked, so that making them read-only does not affect the original.
_LINK_FROM = 1 << 20

_NO_NETWORK = ("unshare", "--net")
_NO_NETWORK_FOR_USERS = ("unshare", "--user", "--map-current-user", "--net")
_MODES_BIND_ROOT = ("setpriv", "--bounding-set=-dac_override")
# In a new network namespace the loopback interface is down; only root can bring it up.
_LOOPBACK = ("sh", "-c", '/sbin/ip link set lo up 2>/dev/null; exec "$@"', "sh")


def _works(*command: str) -> bool:
    """Whether this system allows starting a program through `command`."""
    try:
        return subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def write_sample(path: str) -> None:
    """Write rows like the platform's: two pictures, a truncated image, and one that is not an image."""
    from PIL import Image

    rows = []
    for seed, size in enumerate([(640, 480), (300, 500)]):
        colors = [(seed * 90 + i * 60) % 256 for i in range(48)]
        picture = Image.frombytes("RGB", (4, 4), bytes(colors)).resize(size, Image.BILINEAR)
        file = io.BytesIO()
        picture.save(file, "JPEG")
        rows.append(file.getvalue())
    rows += [rows[0][: len(rows[0]) // 2], b"no image"]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, data in enumerate(rows):
            file.write(f"sample{number}\t{base64.b64encode(data).decode()}\n")
    logger.info("%s to caption; the last two are broken on purpose", counted(len(rows), "row"))


class Trial(NamedTuple):
    """One call of run.sh. status: exit status, None after a timeout. output: the last lines printed. lines: of the
    results file, None without one. written: paths in the submission that were created, changed or removed."""

    status: Optional[int]
    seconds: float
    output: List[str]
    lines: Optional[List[bytes]]
    written: List[str]


class TrialFolder:
    """A copy of a submission, laid out as in the notebook: submission/ next to dataset/test_samples.txt.

    offline: whether its runs have no network.
    """

    def __init__(self, folder: str, name: str):
        # The notebook's relative path ../../dataset stays inside `folder`, from submission/ and from src/.
        self.folder = os.path.join(folder, "work")
        self.submission = os.path.join(self.folder, name)
        self.input = os.path.join(self.folder, "dataset", "test_samples.txt")
        self._home = os.path.join(self.folder, "home")
        for path in (os.path.dirname(self.input), self._home):
            os.makedirs(path)
        self._bind = _MODES_BIND_ROOT if os.geteuid() == 0 and _works(*_MODES_BIND_ROOT) else ()
        apart = next((way for way in (_NO_NETWORK, _NO_NETWORK_FOR_USERS) if _works(*way)), ())
        self.offline = bool(apart)
        self._start = [*apart, *(_LOOPBACK if apart else ()), *self._bind]
        self._before: Dict[str, Tuple[int, int]] = {}
        self._modes: Dict[Tuple[int, int], Tuple[str, int]] = {}

    @property
    def how_read_only(self) -> str:
        """How writing into the submission is prevented or detected, for the report."""
        if os.geteuid() != 0:
            return "by file modes and by comparing files afterwards"
        if self._bind:
            return "by file modes (without root's right to override them) and by comparing files afterwards"
        return "by comparing files afterwards, since file modes do not restrict root"

    def _environment(self, path: str) -> Dict[str, str]:
        left_out = ("PYTHON", "HF_", "PPNLP_", "XDG_", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        # Nothing from the home folder of earlier runs, except the user's packages.
        return dict(kept, PATH=path, HOME=self._home, PYTHONUSERBASE=site.getuserbase())

    def freeze(self) -> None:
        """Make the copy read-only, and record its state. Hard-linked weights share the original's mode, which is
        restored by `thaw`."""
        self._before = self._state()
        for parent, _, names in os.walk(self.submission, topdown=False):
            for name in names:
                path = os.path.join(parent, name)
                found = os.stat(path)
                if os.path.islink(path):
                    continue
                # A linked file may belong to another user.
                with contextlib.suppress(PermissionError):
                    os.chmod(path, 0o444)
                    # A file may have two names here; only the first still shows its original mode.
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
            # Ignore Python's caches: Python works without them if it cannot write them.
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                path = os.path.join(parent, name)
                found = os.lstat(path)
                state[os.path.relpath(path, self.submission)] = (found.st_size, found.st_mtime_ns)
        return state

    def run(self, arguments: List[str], output: str, path: str, time_limit: float, echo: bool) -> Trial:
        """Run `sh run.sh ARGUMENTS` inside the submission. path: the run's PATH. output: its results file. echo: print
        its output to stderr."""
        start = time.perf_counter()
        tail: List[str] = []
        process = subprocess.Popen(
            [*self._start, "sh", RUN_SH, *arguments],
            cwd=self.submission,
            env=self._environment(path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def listen(stream: Any) -> None:
            for line in stream:
                text = line.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
                tail.append(text)
                del tail[:-8]
                if echo:
                    print(f"    {harmless(text)}", file=sys.stderr, flush=True)

        listener = threading.Thread(target=listen, args=(process.stdout,), daemon=True)
        listener.start()
        status: Optional[int] = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(time_limit)
        finally:
            # End everything that it started: it leads its own session.
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
        after = self._state()
        written = sorted(name for name in {*after, *self._before} if after.get(name) != self._before.get(name))
        return Trial(status, time.perf_counter() - start, tail, lines, written)


@contextlib.contextmanager
def copied(submission: str, sample: str, progress: bool = True) -> Iterator[TrialFolder]:
    """A read-only copy of a submission at a path with spaces, with `sample` as its test file.

    It is created next to the submission, where large files can be hard links, or else in the temporary folder.

    Raises:
        JobFailed: the disk is full.
    """
    submission = os.path.abspath(submission)
    parent = os.path.dirname(submission)
    folder = tempfile.mkdtemp(prefix=".check of a submission ", dir=parent if os.access(parent, os.W_OK) else None)
    place = TrialFolder(folder, os.path.basename(submission))
    try:
        total = sum(os.path.getsize(os.path.join(p, name)) for p, _, names in os.walk(submission) for name in names)
        with Progress(total, desc="copy", unit="B", disable=not progress) as bar:

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
                raise JobFailed(f"could not copy {submission} to run it: {error}", "disk") from None
        place.freeze()
        yield place
    finally:
        place.thaw()
        shutil.rmtree(folder, ignore_errors=True)


def both_calls(place: TrialFolder, python: str, fourth: str, time_limit: float, progress: bool) -> Dict[str, Trial]:
    """Two calls: with absolute paths and without the fourth argument, and with the notebook's paths and arguments."""
    folder, beside = os.path.dirname(place.input), os.path.dirname(os.path.abspath(python))
    calls = {
        "without the fourth argument": [place.input, os.path.join(folder, "results.txt"),
                                        os.path.join(place.submission, WEIGHTS)],
        "with it": ["../../dataset/test_samples.txt", "../../dataset/results 2.txt", f"../{WEIGHTS}", fourth],
    }  # fmt: skip
    runs = {}
    for name, arguments in calls.items():
        logger.info("sh run.sh, %s", name)
        output = os.path.join(folder, os.path.basename(arguments[1]))
        # With the fourth argument, the PATH must not matter.
        path = os.defpath if len(arguments) == 4 else os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
        runs[name] = place.run(arguments, output, path, time_limit, echo=progress)
    return runs
