"""The project's logger, in the line format that PaddleMIX users know:

[2024-06-03 12:50:53,791] [ WARNING] - text
"""

from __future__ import annotations

import logging
import re
import sys

from paddlemix.utils.progress import bars_aside

FORMAT = "[%(asctime)s] [%(levelname)8s] - %(message)s"


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is now, so that redirection and pytest's capture both see the lines; over a bar."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr

    def emit(self, record):
        with bars_aside():
            super().emit(record)


def _make_logger() -> logging.Logger:
    made = logging.getLogger("paddlemix")
    if not made.handlers:
        handler = _CurrentStderr()
        handler.setFormatter(logging.Formatter(FORMAT))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
        made.propagate = False
    return made


logger = _make_logger()

# Lines of PaddleNLP that do not hold here: samples are skipped by index, which takes no time; what is saved has another
# name for a moment.
_LEFT_OUT = re.compile(r"--ignore_data_skip|consumed_samples to|[/\\]\.partial-")


def _holds(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage().strip("\n"), ()
    return not _LEFT_OUT.search(record.msg)


def print_like_ours(other: logging.Logger) -> None:
    """One form of line for a whole run: a library's logger without its colours, lines below our level, and those that
    do not hold."""
    other.handlers = logger.handlers[:1]
    other.setLevel(logger.level)
    if _holds not in other.filters:
        other.addFilter(_holds)
