"""A progress bar with rate and time left on a terminal; a line every few seconds in a log file."""

from __future__ import annotations

import contextlib
import sys
from typing import Optional

# In a log file a bar redraws as a new line each time, so it is drawn rarely there.
LOG_SECONDS = 10.0


class Progress:
    """Counts work done. `with Progress(total=n, desc="rows", unit="row") as bar: bar.update()`.

    total: units of work, or None when unknown (then no time left is shown). disable: draw nothing.
    unit_scale: show 12.3M in place of 12345678, for bytes.
    """

    def __init__(
        self,
        total: Optional[int] = None,
        desc: str = "",
        unit: str = "row",
        disable: bool = False,
        unit_scale: bool = False,
        initial: int = 0,
    ):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=desc,
            unit=unit,
            unit_scale=unit_scale,
            unit_divisor=1024 if unit == "B" else 1000,
            disable=disable,
            initial=initial,
            mininterval=0.1 if terminal else LOG_SECONDS,
            # A log has no width, and no line that can be redrawn.
            ncols=None if terminal else 100,
            ascii=not terminal,
            file=sys.stderr,
        )

    def update(self, n: int = 1) -> None:
        # A bar that can no longer be drawn ends no job.
        with contextlib.suppress(OSError):
            self._bar.update(n)

    def note(self, text: str) -> None:
        """Show a few words behind the bar (a loss, a count of failures)."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
