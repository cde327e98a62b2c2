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
    """Writes to the current sys.stderr, so that redirection and pytest's capture work; above progress bars."""

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

# Lines of PaddleNLP that are wrong here: samples are skipped by index, which takes no time; temporary names of saves.
_LEFT_OUT = re.compile(r"--ignore_data_skip|consumed_samples to|[/\\]\.partial-")


def _holds(record: logging.LogRecord) -> bool:
    record.msg, record.args = record.getMessage().strip("\n"), ()
    return not _LEFT_OUT.search(record.msg)


def print_like_ours(other: logging.Logger) -> None:
    """Let another logger use our format and level, without colours and _LEFT_OUT."""
    other.handlers = logger.handlers[:1]
    other.setLevel(logger.level)
    if _holds not in other.filters:
        other.addFilter(_holds)
