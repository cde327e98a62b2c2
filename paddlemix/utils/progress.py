"""A progress bar with rate and time left on a terminal; a line every few seconds in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Iterator, List, Optional

# In a log file each update is a line, so updates are rare there. tools/demo.py reads these lines.
LOG_SECONDS = float(os.environ.get("PROGRESS_SECONDS", 10))

# tqdm's bars on the terminal.
_SHOWN: List[Any] = []


class _Lines:
    """A log file for tqdm to write to: a line per update, without carriage returns and padding."""

    def __init__(self, file: Any):
        self._file = file

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._file.write(text + "\n")

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def bars_aside() -> Iterator[None]:
    """Clear the bars while a line is printed, and redraw them below it."""
    # Without tqdm's lock, which a forked process may have inherited in the locked state.
    for bar in _SHOWN:
        with contextlib.suppress(OSError):
            bar.clear(nolock=True)
    try:
        yield
    finally:
        for bar in _SHOWN:
            # A loader worker has an outdated copy of its parent's bar; a bar that is not due yet stays away.
            if bar.drawn_by == os.getpid() and bar.last_print_t >= bar.start_t + bar.delay:
                with contextlib.suppress(OSError):
                    bar.refresh(nolock=True)


class Progress:
    """A progress bar. `with Progress(total=n, desc="rows", unit="row") as bar: bar.update()`.

    It appears after a second. At the end of the block, without an exception, it is at 100 %: the total may be an upper
    bound.

    total: units of work; None if unknown. unit: "B" shows 12345678 as 11.8M. disable: show nothing.
    """

    def __init__(
        self,
        total: Optional[int] = None,
        desc: str = "",
        unit: str = "row",
        disable: bool = False,
        initial: int = 0,
    ):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=desc,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1024,
            disable=disable,
            initial=initial,
            mininterval=0.1 if terminal else LOG_SECONDS,
            delay=min(1.0, LOG_SECONDS),
            # A log has no width.
            ncols=None if terminal else 100,
            ascii=not terminal,
            file=sys.stderr if terminal else _Lines(sys.stderr),
        )
        if terminal and not disable:
            self._bar.drawn_by = os.getpid()
            _SHOWN.append(self._bar)

    def update(self, n: int = 1) -> None:
        # A bar that cannot be drawn must not end the job.
        with contextlib.suppress(OSError):
            self._bar.update(n)

    def reach(self, position: int) -> None:
        """Update to a position, such as an offset in a file."""
        self.update(position - self._bar.n)

    def note(self, text: str) -> None:
        """Show a short text after the bar (a loss, a count of failures)."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
        if self._bar in _SHOWN:
            _SHOWN.remove(self._bar)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: Any, *exc_info) -> None:
        if kind is None and self._bar.total is not None:
            self._bar.total = self._bar.n
        self.close()
