"""Argument parsing and exit statuses of all scripts: 0 when the job is complete, else one line of error."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import math
import os
import re
import signal
import sys
import time
import warnings
from typing import IO, Any, Callable, Dict, Optional

from paddlemix.utils import language
from paddlemix.utils.errors import UserError
from paddlemix.utils.outputs import check_file, check_folder
from paddlemix.utils.runtime import physical_cores
from paddlemix.utils.surroundings import open_standard_streams
from paddlemix.utils.texts import nearest, one_line


class Parser(argparse.ArgumentParser):
    """argparse with one-line usage errors and help in the chosen language.

    `run` removes --lang from the command line before parsing; it is declared here for the help text.
    """

    def __init__(self, **options):
        # Keep the line breaks of texts that have any.
        if "\n" in (options.get("description") or "") + (options.get("epilog") or ""):
            options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # An abbreviation would change its meaning with each new option.
        super().__init__(allow_abbrev=False, **options)
        # Of arguments without a type.
        self.register("type", None, _text)
        self.add_argument(
            "--lang", choices=language.LANGUAGES, default=argparse.SUPPRESS,
            help="language of help, the dry run, and reports of check_submission.py and inspect_data.py (default: from "
            "the locale)",
        )  # fmt: skip

    def format_help(self) -> str:
        if language.chosen() == "en":
            return super().format_help()
        self.description, self.epilog = (language.tr((text or "").strip()) for text in (self.description, self.epilog))
        for group in self._action_groups:
            group.title, group.description = language.tr(group.title), language.tr(group.description)
        for action in self._actions:
            action.help = language.tr(action.help)
        text = super().format_help().replace("usage: ", language.tr("usage: "), 1)
        # argparse puts an ASCII colon behind a group's title.
        return re.sub(r"(?m)^(\S.*):$", r"\1：", text)

    def _get_formatter(self) -> argparse.HelpFormatter:
        formatter = super()._get_formatter()
        if language.chosen() == "zh":
            # argparse counts characters, not columns; the table's paragraphs have their own line breaks.
            formatter._split_lines = language.wrap
            formatter._fill_text = lambda text, width, indent: "\n".join(indent + line for line in text.splitlines())
        return formatter

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            word, options = unknown.group(1), list(self._option_string_actions)
            # An abbreviation may be much shorter than its option.
            near = next((name for name in options if name.startswith(word)), nearest(word, options))
            message += f"; did you mean {near}?" if near else ""
        raise UserError(f"{message} (see {self.prog} --help)")


def _text(text: str) -> str:
    """Argument type: text, such as a prompt. In the encoding of another terminal it would be another text."""
    if os.fsencode(text).decode("utf-8", "replace") != text:
        raise argparse.ArgumentTypeError(f"must be UTF-8 text, not {os.fsencode(text)!r}")
    return text


def path(text: str) -> str:
    """Argument type: a path. Expands a leading ~, which shells leave in `--out=~/x` and within quotes."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not empty")
    return os.path.expanduser(text)


def output_file(text: str) -> str:
    """Argument type: a path that a file can be written to."""
    check_file(path(text))
    return path(text)


def output_rows(text: str) -> str:
    """Argument type: a file for rows, records in a .json, otherwise a TSV."""
    if text.lower().endswith((".csv", ".jsonl")):
        raise argparse.ArgumentTypeError(f"must be a .json, for records, or a .tsv, not {text!r}")
    return output_file(text)


def output_folder(text: str) -> str:
    """Argument type: a path that a folder can be written to."""
    check_folder(path(text))
    return path(text)


def number(kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable:
    """Argument type: a finite int or float (`kind`) within bounds."""
    bounds = (("above", above), ("of at least", least), ("at most", most))
    wanted = " and ".join(f"{says} {bound:,}" for says, bound in bounds if math.isfinite(bound))

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and above < value < math.inf):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {wanted}, not {text!r}")
        return value

    return parse


positive = number(int, least=1)
# What numpy takes.
seed = number(int, 0, (1 << 32) - 1)


def add_weights_options(parser: argparse.ArgumentParser, folder: str, format: Optional[str] = None) -> None:
    """Options of a command that writes weights into a folder. format: the default, None for the input's."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="store floating-point tensors in this dtype (default: the input's)",
    )
    parser.add_argument(
        "--format",
        choices=("pdparams", "safetensors"),
        default=format,
        help="weights format (default: %(default)s)" if format else "weights format (default: the input's)",
    )
    parser.add_argument(
        "--max_shard_size", default="10GB",
        help="maximum size of a weights file (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace {folder} if it exists and is not empty")


def weights_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The values of add_weights_options."""
    return {name: getattr(args, name) for name in ("dtype", "format", "max_shard_size", "overwrite")}


_WORKERS = "worker processes; 0: work in this process (default: number of cores)"


def add_work_options(parser: argparse.ArgumentParser, workers: str = _WORKERS) -> None:
    """--workers and --quiet. workers: the help text of the former."""
    # Locks for 100,000 take half a minute to make.
    kind = number(int, 0, 1024)
    parser.add_argument("--workers", type=kind, default=physical_cores(), metavar="N", help=workers)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def let_go(stream: IO) -> None:
    """Redirect a broken stream (closed by its reader, a full disk) to /dev/null, including its buffer."""
    with contextlib.suppress(OSError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """`text` with control characters other than line breaks and tabs escaped: a model's output may be untrusted."""
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def _start_again_if_needed(main: Callable[[], Optional[int]]) -> None:
    """Restart a script's process if Python runs with a locale other than UTF-8, or with -O, which breaks PaddleNLP."""
    if sys.getfilesystemencoding() == "utf-8" and not sys.flags.optimize:
        return
    args = [os.fsencode(arg) for arg in sys.argv]
    try:
        with open("/proc/self/cmdline", "rb") as file:
            command = file.read().split(b"\0")[:-1]
    except OSError:
        return
    # Only a script's own process, not a notebook's or a test's.
    if main.__module__ != "__main__" or command[-len(args) :] != args or not sys.executable:
        return
    import subprocess

    options = [option for option in subprocess._args_from_interpreter_flags() if not option.startswith("-O")]
    environment = dict(os.environ, PYTHONUTF8="1")
    environment.pop("PYTHONOPTIMIZE", None)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *options, "-Xutf8", *args], environment)


def _print_utf8() -> None:
    """Use UTF-8 whatever the locale: captions are Chinese."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Replaced streams have no `reconfigure`, and streams already read from cannot change.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace" if stream is sys.stderr else "replace")


def _has_working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


# Errors of disks, permissions and limits: not bugs of ours.
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ENFILE, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip


# Seconds after a Ctrl-C in which another one is ignored.
_CLEANING_UP = 3.0
_interrupted = -_CLEANING_UP


def _interrupt(number: int, frame: Any) -> None:
    """Like the default handler, but ignores a second Ctrl-C while the first one is cleaned up after."""
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > _CLEANING_UP:
        raise KeyboardInterrupt


def run(main: Callable[[], Optional[int]], resumes: str = "") -> int:
    """Run `main` and turn its outcome into an exit status. resumes: what is said after Ctrl-C of how to go on.

    0 or the return value of `main`; the `exit_code` of a UserError, shown as one line; 130 after Ctrl-C; 1, in one
    line, if a disk or folder cannot be read or written; 1, silently, if the reader of stdout went away (`| head`). Any
    other exception is a bug and keeps its traceback.
    """
    _start_again_if_needed(main)
    open_standard_streams()
    if any(action == "error" for action, *_ in warnings.filters):
        # Paddle and PaddleNLP cannot be imported without warnings.
        warnings.simplefilter("default")
    _print_utf8()
    with contextlib.suppress(ValueError):  # raised in another thread than the main one
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    try:
        sys.argv[1:] = language.take(sys.argv[1:])
        if not _has_working_folder():
            raise UserError("the working folder was removed: change to another one")
        return main() or 0
    except UserError as error:
        print(f"error: {one_line(str(error), 4000)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if main.__module__ == "__main__" and signal.getsignal(signal.SIGINT) is _interrupt:
            # Only the interpreter's own clean-up is left.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"interrupted: {resumes}" if resumes else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout again at exit.
        let_go(sys.stdout)
        return 1
    except ModuleNotFoundError as error:
        if not error.name or importlib.util.find_spec(error.name.split(".")[0]) is not None:
            raise
        text = f"{sys.executable} has no {error.name}: use the Python of the environment (. .venv/bin/activate), or"
        print(f"error: {text} pip install -r requirements.txt", file=sys.stderr)
        return UserError.exit_code
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        print(f"error: {one_line(where, 4000)}{error.strerror}", file=sys.stderr)
        return 1
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
