"""The output of tools/score_rows.py: a line of id and COLUMNS for each row of its data, in order."""

from __future__ import annotations

import math
from typing import Iterator, NamedTuple, Optional, Tuple

from paddlemix.datasets.tsv import check_input, short_lines
from paddlemix.utils.errors import UserError

COLUMNS = ("loss", "blank_loss", "gain", "tokens")


class Score(NamedTuple):
    """loss: mean cross-entropy per token of a row's caption, given its image; blank_loss: given a blank image. gain:
    blank_loss - loss."""

    loss: float
    blank_loss: float
    gain: float


def read_scores(path: str) -> Iterator[Tuple[str, Optional[Score]]]:
    """(id, its Score) of each line; None for a row that could not be scored.

    Raises:
        UserError: it cannot be read, or has another format.
    """
    check_input(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(short_lines(path, file)):
                name, *columns = line.decode("utf-8" if number else "utf-8-sig").rstrip("\n").split("\t")
                if len(columns) != len(COLUMNS):
                    raise ValueError
                score = Score(*map(float, columns[:3])) if columns[0] else None
                yield name, score if score is not None and math.isfinite(score.gain) else None
    except ValueError:
        raise UserError(f"{path} is not a file that tools/score_rows.py has written") from None
