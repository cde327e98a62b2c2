"""How every script reads its arguments and ends: status 0 when the job is complete, one clear line otherwise."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from typing import IO, Any, Callable, Dict, Optional

from paddlemix.utils import language
from paddlemix.utils.errors import UserError
from paddlemix.utils.outputs import check_file, check_folder
from paddlemix.utils.runtime import physical_cores
from paddlemix.utils.surroundings import open_standard_streams


class Parser(argparse.ArgumentParser):
    """argparse, with bad usage as one line in place of the whole usage text, and help in the language in use.

    `run` has taken --lang out of the command line before a parser sees it; it is an option here for the help.
    """

    def __init__(self, **options):
        # Texts of several lines keep them.
        if "\n" in (options.get("description") or "") + (options.get("epilog") or ""):
            options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        self.add_argument(
            "--lang", choices=language.LANGUAGES, default=argparse.SUPPRESS,
            help="language of help and reports (default: from the locale)",
        )  # fmt: skip

    def format_help(self) -> str:
        if language.chosen() == "en":
            return super().format_help()
        self.description, self.epilog = (language.tr((text or "").strip()) for text in (self.description, self.epilog))
        for group in self._action_groups:
            group.title, group.description = language.tr(group.title), language.tr(group.description)
        for action in self._actions:
            action.help = language.tr(action.help)
        return super().format_help().replace("usage: ", language.tr("usage: "), 1)

    def _get_formatter(self) -> argparse.HelpFormatter:
        formatter = super()._get_formatter()
        if language.chosen() == "zh":
            # argparse counts characters, not columns; the paragraphs of the table have their line breaks.
            formatter._split_lines = language.wrap
            formatter._fill_text = lambda text, width, indent: "\n".join(indent + line for line in text.splitlines())
        return formatter

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def path(text: str) -> str:
    """An argument's type: a path. A leading ~ is the home; a shell leaves it in `--out=~/x` and behind quotes."""
    return os.path.expanduser(text)


def output_file(text: str) -> str:
    """An argument's type: a path that a file can be written to."""
    check_file(path(text))
    return path(text)


def output_folder(text: str) -> str:
    """An argument's type: a path that a folder can be written to."""
    check_folder(path(text))
    return path(text)


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


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
    parser.add_argument("--workers", type=int, default=physical_cores(), metavar="N", help=workers)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def one_line(text: str, limit: int = 4000) -> str:
    """`text` without line breaks and without what steers a terminal: names and values in it may be a stranger's."""
    shown = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def let_go(stream: IO) -> None:
    """Point a stream that takes no more (a reader that went away, a full disk) to nowhere, with what it still holds."""
    with contextlib.suppress(OSError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """`text` with the characters that steer a terminal as escapes: what a model says may be a stranger's, too. Line
    breaks and tabs stay."""
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def _start_again_if_needed(main: Callable[[], Optional[int]]) -> None:
    """Start a script's process anew where Python was started in a way that it cannot work in: with a locale other than
    UTF-8, which arguments, file names and all that is printed would be taken for, or with -O, which takes away what
    PaddleNLP needs."""
    if sys.getfilesystemencoding() == "utf-8" and not sys.flags.optimize:
        return
    words = [os.fsencode(word) for word in sys.argv]
    try:
        with open("/proc/self/cmdline", "rb") as file:
            command = file.read().split(b"\0")[:-1]
    except OSError:
        return
    # Only where this process is the script's own: in a notebook or a test it is not.
    if main.__module__ != "__main__" or command[-len(words) :] != words or not sys.executable:
        return
    import subprocess

    options = [word for word in subprocess._args_from_interpreter_flags() if not word.startswith("-O")]
    environment = dict(os.environ, PYTHONUTF8="1")
    environment.pop("PYTHONOPTIMIZE", None)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *options, "-Xutf8", *words], environment)


def _print_utf8() -> None:
    """Captions are Chinese, whatever a locale says."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Another stream than Python's has no such thing, and one that was read from cannot change.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace" if stream is sys.stderr else "replace")


def _has_working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


# What a disk or a folder refuses is not for us to mend.
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip


def run(main: Callable[[], Optional[int]]) -> int:
    """Run `main` and turn its outcome into an exit status.

    0 or what `main` returns; 2 (or the error's own `exit_code`) after a UserError, shown as one line; 130 after
    Ctrl-C. What a disk or a folder refuses is one line and 1. A reader that went away (`| head`) ends the program
    quietly with 1. Anything else is a bug of ours and keeps its traceback.
    """
    _start_again_if_needed(main)
    open_standard_streams()
    _print_utf8()
    try:
        sys.argv[1:] = language.take(sys.argv[1:])
        if not _has_working_folder():
            raise UserError("the working folder was removed: change to another one")
        return main() or 0
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout again at exit; point it somewhere that takes the bytes.
        let_go(sys.stdout)
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        print(f"error: {one_line(where)}{error.strerror}", file=sys.stderr)
        return 1
