"""Captions by id from files: results (`id \\t caption`), and references in any of the project's formats."""

from __future__ import annotations

import json
import os
from typing import IO, Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from paddlemix.datasets.rows import is_json, read_rows
from paddlemix.datasets.score_files import COLUMNS
from paddlemix.datasets.tsv import (
    CAPTION_NOT_UTF8,
    EMPTY_CAPTION,
    EMPTY_IMAGE,
    IMAGE_IS_URL,
    NO_CAPTION,
    NO_IMAGE,
    PATH_LEADS_OUT,
    check_input,
    check_text,
    clean_id,
    find_image,
    is_image,
    row_id,
    short_lines,
)
from paddlemix.utils.errors import UserError
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import some

SHOWN = 10


class References(NamedTuple):
    """texts: id → its references, in the order of the file. has_images: whether the file has images."""

    texts: Dict[str, List[str]]
    has_images: bool


def _reading(path: str, size: int, quiet: bool) -> Progress:
    return Progress(size, os.path.basename(path), unit="B", disable=quiet)


def _is_number(field: str) -> bool:
    try:
        float(field)
        return True
    except ValueError:
        return not field


def _names_image(text: str, folder: str) -> bool:
    """Whether a column is the path of an image file that exists."""
    place = find_image(text.encode("utf-8", "replace"), folder, False)[0] if "." in text[-5:] else None
    return place is not None and os.path.isfile(place.file)


def check_captions(path: str, fields: Sequence[str], references: bool = False) -> None:
    """Check that the columns of a line may be an id and a caption.

    references: images are allowed.

    Raises:
        UserError: they are those of a table of images, or of a file of tools/score_rows.py.
    """
    found = None
    starts = [field[:256] for field in fields[:2]]
    # A caption that repeats a character is also long and without spaces.
    if not references and (
        any(len(set(text)) > 12 and is_image(text.encode("utf-8", "replace")) for text in starts)
        or any(_names_image(text, os.path.dirname(path)) for text in fields[1:2])
    ):
        found = "images"
    elif len(fields) == 1 + len(COLUMNS) and all(map(_is_number, fields[1:4])):
        found = "scores"
    if found:
        raise UserError(f"{path} is a table of {found}, not of captions by id", found)


def caption_lines(path: str, file: IO[bytes]) -> Iterator[Tuple[int, bytes, List[str]]]:
    """(number, line, its columns, none if it is not UTF-8) of each line that is not blank.

    Raises:
        UserError: as check_captions and short_lines, or they are in GBK.
    """
    for number, line in enumerate(short_lines(path, file), 1):
        try:
            fields = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            if number == 1:
                with open(path, "rb") as head:
                    check_text(path, head.read(1 << 16), want_caption=True)
            fields = []
        if not fields or any(map(str.strip, fields)):
            check_captions(path, fields)
            yield number, line, fields


def read_captions(path: str, quiet: bool = True) -> Dict[str, str]:
    """`id \\t caption` lines by id, in the order of the file; a caption may be empty. quiet: show no progress.

    Raises:
        UserError: the file cannot be read, a line is not two columns of UTF-8, or an id occurs twice; lists lines and
        ids (the first ten).
    """
    size = check_input(path)
    if is_json(path):
        text = f"{path} is JSON, not lines of id, tab, caption: results come before references"
        raise UserError(text, "argument-order")
    found: Dict[str, str] = {}
    doubled: Dict[str, int] = {}
    bad: List[str] = []
    with open(path, "rb") as file, _reading(path, size, quiet) as bar:
        for number, line, fields in caption_lines(path, file):
            bar.update(len(line))
            if len(fields) != 2:
                bad.append(str(number))
            elif fields[0] in found:
                doubled[fields[0]] = doubled.get(fields[0], 1) + 1
            else:
                found[fields[0]] = fields[1]
    if bad:
        text = f"{path}: {len(bad)} lines are not id, tab, caption in UTF-8: lines {some(bad, SHOWN)}"
        raise UserError(text, "lines")
    if doubled:
        raise UserError(f"{path}: {len(doubled)} ids come more than once: {some(doubled, SHOWN)}", "duplicate")
    if not found:
        raise UserError(f"{path} has no captions", "empty")
    return found


def read_references(path: str, quiet: bool = True) -> References:
    """References by id (tsv.row_id). An id may occur several times, each time with another reference.

    A JSON file has chatml records, whose first answer is the reference. In other files a line is
    `id \\t base64 \\t caption` (or another form of rows.py), or `id \\t caption`, with more references in further
    columns. quiet: show no progress.

    Raises:
        UserError: the file cannot be read, or rows have no reference; lists their lines.
    """
    texts: Dict[str, List[str]] = {}
    bad: List[str] = []
    has_images = False
    with _reading(path, check_input(path), quiet) as bar:
        for row in read_rows(path, want_caption=True):
            bar.reach(row.next_offset)
            if row.turns:
                texts.setdefault(row_id(row), []).append(row.caption)
                has_images = has_images or row.error is None
                continue
            second = bytes(row.image)
            reason = row.error
            named = reason in (IMAGE_IS_URL, PATH_LEADS_OUT) and row.caption is not None
            if row.place is not None or named or is_image(second):
                has_images = True
                captions, reason = [row.text], None if named else reason
            else:
                # A line of text; TsvRow says what it lacks as a row with an image.
                if reason in (NO_IMAGE, EMPTY_CAPTION, NO_CAPTION, IMAGE_IS_URL, PATH_LEADS_OUT):
                    reason = None
                elif reason == EMPTY_IMAGE and row.caption is None:
                    reason = EMPTY_CAPTION
                if reason is None and not row.id:
                    reason = "no id"
                try:
                    captions = [second.decode("utf-8"), *(row.caption or "").split("\t")]
                    check_captions(path, [row.id, *captions], references=True)
                except UnicodeDecodeError:
                    reason = CAPTION_NOT_UTF8
            if reason in (None, EMPTY_IMAGE):
                texts.setdefault(row_id(row), []).extend(caption for caption in captions if caption.strip())
            else:
                bad.append(f"{row.line_no} ({reason})")
    if bad:
        raise UserError(f"{path}: {len(bad)} rows have no reference: {some(bad, SHOWN)}", "lines")
    if not texts:
        raise UserError(f"{path} has no references", "empty")
    return References(texts, has_images)


def new_captions(path: str, fallback: Optional[str] = None) -> Iterator[Tuple[str, str]]:
    """(id, caption) of each line of predict.py's results, or the chosen candidates of its n-best file ("" if none).

    fallback: the caption of rows that got none.

    Raises:
        UserError: the file cannot be read, or a line is neither.
    """
    check_input(path)
    with open(path, "rb") as file:
        for number, line, fields in caption_lines(path, file):
            try:
                if "".join(fields[:1]).startswith('{"id"'):
                    row = json.loads(line)
                    chosen = row["chosen"]
                    caption = "" if chosen is None else dict(enumerate(row["candidates"]))[chosen]["text"]
                    fields = [clean_id(row["id"]), clean_id(caption)]
                name, caption = fields
                yield name, "" if caption == fallback else caption
            except (ValueError, KeyError, TypeError, RecursionError):
                text = f"{path}: line {number} is neither `id \\t caption` nor a line of --n_best"
                raise UserError(text, "lines") from None


class InOrder:
    """Values for some of the rows, in their order, from lines (id, value), in constant memory."""

    def __init__(self, path: str, lines: Iterator[Tuple[str, Any]]):
        self.path, self._lines = path, lines
        self._next = next(lines, None)

    def take(self, name: str) -> Any:
        """The value of the row with that id (tsv.row_id), or None. To be called once per row."""
        if self._next is None or self._next[0] != name:
            return None
        value, self._next = self._next[1], next(self._lines, None)
        return value

    def end(self) -> None:
        """Check, after all rows, that all lines were used.

        Raises:
            UserError: a line belongs to no row.
        """
        if self._next is not None:
            raise UserError(f"{self.path}: {self._next[0]} is not the id of a row, or out of order", "ids")


def common_ids(*sides: Mapping[str, object]) -> List[str]:
    """The ids in all sides, in the order of the first."""
    return [key for key in sides[0] if all(key in side for side in sides[1:])]
