"""The output of predict.py and score_rows.py: written atomically, and resumable after a kill.

During a run, its lines go to a journal, `OUTPUT.partial`:

    {"format": 2, "input": {…}, "model": {…}, "settings": {…}}     identifies the run
    id \\t caption \\t note \\t place                                 one line per row; the note is the reason of a
                                                                   problem, and usually empty

A line's place is "1 1 52310": its number, the line number of its row in the input, and the byte offset of the next
line there, at which a resumed run continues reading. For a row that names an image file, two more numbers tell whether
the file has changed since. An output with more columns has them instead of the caption.

When all rows have a line, OUTPUT (`id \\t caption`) is written from the journal, atomically, and so is
`OUTPUT.run.json`: the journal's first line with the number of rows, the counts of notes, and size and SHA-256 of
OUTPUT. Then the journal is deleted. So OUTPUT is always complete, and the journal is all that a resumed run needs. A
million captions are some 200 MB, so the final copy takes a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple

from paddlemix.datasets.tsv import TRUNCATED, clean_id
from paddlemix.inference.facts import file_facts, input_facts
from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.files import atomic_write, lock
from paddlemix.utils.json_files import read_config_object, write_json
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_file
from paddlemix.utils.texts import counted

# Of OUTPUT.run.json, and of the journal.
FORMAT, _JOURNAL_FORMAT = 1, 2
# The note of an answer that repeated itself and was cut (see Decoding.stop_repeating); as with TRUNCATED, there is a
# caption.
REPEATING = "repeated itself"
PARTIAL = ".partial"
SIDECAR = ".run.json"
# Interval of fsync; every flush writes to the system.
SYNC_SECONDS = 5.0
# The start of every journal.
_BEGIN = b'{"format": '
# Maximum length of the first line. (The settings hold a prompt and a fallback caption.)
_MAX_HEADER = 1 << 20


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """A message for each value in which two runs differ; a missing key counts as null."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(set(there) | set(here)):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {there!r} there and {here!r} here"


def report_notes(rows: int, notes: Dict[str, int], fallback: Optional[str]) -> Optional[str]:
    """Log the notes of rows. Returns an error message if no row succeeded, else None. fallback: None for scores."""
    ranked = sorted(notes.items(), key=lambda pair: -pair[1])
    described = ", ".join(f"{count} × {note}" for note, count in ranked)
    if notes:
        logger.warning("of %d rows: %s", rows, described)
    failed = sum(count for note, count in notes.items() if not {*note.split(", ")} <= {TRUNCATED, REPEATING})
    if failed:
        lacks = f"the fallback caption {fallback}" if fallback else "no score"
        logger.warning("%s %s %s", counted(failed, "row"), "has" if failed == 1 else "have", lacks)
    if failed and failed == rows:
        return f"not one of the {failed} rows could be {'captioned' if fallback else 'scored'}: {described}"
    return None


def write_sidecar(path: str, run: Dict[str, Any], rows: int, notes: Dict[str, int], **facts) -> Dict[str, Any]:
    """Write `path`.run.json for the results in `path`, after counting their lines. Returns its contents.

    Raises:
        JobFailed: the number of lines is not that of rows.
    """
    written = file_facts(path)
    if written.lines != rows:
        raise JobFailed(f"{path} has {written.lines} lines for {rows} rows", "lines")
    output = {"bytes": written.size, "sha256": written.sha256}
    summary = dict(run, rows=rows, notes=dict(sorted(notes.items())), output=output, **facts)
    write_json(path + SIDECAR, summary)
    return summary


class Recorded(NamedTuple):
    """Of the run that wrote a file: SHA-256 (hex) of its input, and its fallback caption; None if not recorded."""

    input: Optional[str]
    fallback: Optional[str]


def read_record(path: str) -> Dict[str, Any]:
    """The contents of `path`.run.json; {} if there is none.

    Raises:
        ConfigError: it is not a JSON object.
    """
    return read_config_object(path + SIDECAR) if os.path.isfile(path + SIDECAR) else {}


def recorded(path: str) -> Recorded:
    """From read_record."""
    run = read_record(path)
    found = (run.get(key) if isinstance(run.get(key), dict) else {} for key in ("input", "settings"))
    return Recorded(next(found).get("sha256"), next(found).get("fallback"))


def check_same_input(path: str, what: str, input: str) -> None:
    """Check that `path`, which has `what` of the rows of a file, has those of `input`, if its run is recorded.

    Raises:
        UserError: it has those of another file.
    """
    there = recorded(path).input
    if there is not None and there != input_facts(input).sha256:
        raise UserError(f"{path} has the {what} of other data than {input}, as {path}{SIDECAR} says", "other-input")


class Place(NamedTuple):
    """Where a resumed run continues: rows answered, line number of the last one in the input, and byte offset of the
    next line."""

    row: int
    line_no: int
    next_offset: int


_PLACE = re.compile(r"\d{1,15} \d{1,15} \d{1,18}(?: (\d{1,10} \d{1,10}))?", re.ASCII)


def _parse_line(line: bytes, columns: int) -> Optional[List[str]]:
    """The columns of a journal line; None if it is incomplete."""
    # A power cut can leave blocks of zeros in place of the last lines.
    if not line.endswith(b"\n") or b"\0" in line:
        return None
    try:
        fields = line[:-1].decode("utf-8").split("\t")
    except UnicodeDecodeError:
        return None
    return fields if len(fields) == columns and _PLACE.fullmatch(fields[-1]) else None


def _image_of(fields: List[str]) -> str:
    """The image argument of ResultsWriter.write, from a journal line's columns."""
    return _PLACE.fullmatch(fields[-1])[1] or ""


class ResultsWriter:
    """Writes a line per row, in order, with `write`; `finish` creates OUTPUT.

        with ResultsWriter(path, run) as results:
            for row in rows_after(results.done):
                results.write(row.id, caption, note)
            results.finish(rows)

    run: everything that the captions depend on, as JSON values ({"input": …, "model": …, "settings": …}). A journal of
    the same run is continued after its last complete line; `done` is the number of its lines. A journal of another run
    is refused unless `restart`, which drops it. Leaving the block without `finish` keeps a journal that has lines.
    settings.columns: number of OUTPUT's columns after the id (default: 1).

    Raises:
        UserError: the folder is not writable, or the journal belongs to another run or is in use by a process.
        JobFailed: the disk is full (the journal stays, and the same command continues).
    """

    def __init__(self, path: str, run: Dict[str, Any], restart: bool = False):
        check_file(path, plain=True)
        self.path = os.path.abspath(path)
        self.journal = self.path + PARTIAL
        # Converted as by a round trip, so that equal runs compare equal (tuples become lists).
        self.run = json.loads(json.dumps({"format": FORMAT, **run}))
        self.done = 0
        # After the last row that an earlier run answered; None if there is none, or if unknown.
        self.place: Optional[Place] = None
        # Whether some of these rows name an image file.
        self.has_files = False
        # Of the journal: id, OUTPUT's other columns, note and place.
        self._columns = 3 + run.get("settings", {}).get("columns", 1)
        self.notes: Counter = Counter()
        check_file(self.journal, plain=True)
        if os.path.islink(self.journal):
            raise self._foreign()
        with self._explained():
            os.makedirs(os.path.realpath(os.path.dirname(self.path)), exist_ok=True)
            # Unbuffered, with a buffer of our own: closing must not retry a write that failed on a full disk.
            self._file = open(self.journal, "a+b", buffering=0)
        self._pending = bytearray()
        try:
            lock(self._file, self.journal)
            with self._explained():
                self._open_journal(restart)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            kind = UserError if self.done == 0 else JobFailed
            safe = self.done and self._is_there()
            hint = f"; {self.done} lines are safe in {self.journal}, the same command resumes" if safe else ""
            raise kind(f"cannot write {self.path}: {error.strerror}{hint}", "not-writable") from error

    def _is_there(self) -> bool:
        """Whether the journal still exists under its name."""
        try:
            return os.path.samestat(os.lstat(self.journal), os.fstat(self._file.fileno()))
        except OSError:
            return False

    @contextlib.contextmanager
    def _reading(self) -> Iterator[BinaryIO]:
        """The journal from its start, even if it was renamed or removed."""
        with open(os.dup(self._file.fileno()), "rb") as journal:
            journal.seek(0)
            yield journal

    def _foreign(self) -> UserError:
        return UserError(f"{self.journal} was not written by this program: move it away", "foreign-journal")

    def keep(self, rows: int) -> None:
        """Drop all lines but the first `rows`, as if the other rows had not been answered."""
        self.done, self.place, self.has_files, self.notes = 0, None, False, Counter()
        with self._explained():
            self._open_journal(False, rows)

    def _open_journal(self, restart: bool, most: Optional[int] = None) -> None:
        with self._reading() as journal:
            header = journal.readline(_MAX_HEADER)
            # A power cut may leave zeros.
            begin = header[: len(_BEGIN)]
            if begin.strip(b"\0") and not _BEGIN.startswith(begin):
                raise self._foreign()
            if restart or (not header.endswith(b"\n") and len(header) < _MAX_HEADER):
                # New, or killed before its first line was complete.
                self._file.truncate(0)
                header = dict(self.run, format=_JOURNAL_FORMAT)
                text = json.dumps(header, ensure_ascii=False).encode("utf-8", "backslashreplace")
                self._pending += text + b"\n"
                self._write_pending()
                return
            self._check_header(header)
            whole = len(header)
            fields = None
            for line in journal:
                parsed = _parse_line(line, self._columns)
                if parsed is None or self.done == most:
                    break
                fields = parsed
                whole += len(line)
                self._count(fields[-2])
                self._check_place(fields, self.done)
                self.has_files = self.has_files or bool(_image_of(fields))
            if fields is not None:
                place = Place(*map(int, fields[-1].split(" ")[:3]))
                self.place = place if place.next_offset else None
        self._file.truncate(whole)

    def _check_header(self, header: bytes) -> None:
        try:
            there = json.loads(header.decode("utf-8"))
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict) or there.get("format") != _JOURNAL_FORMAT:
            raise self._foreign()
        different = "; ".join(differences(dict(there, format=FORMAT), self.run))
        if different:
            raise UserError(
                f"{self.journal} belongs to a different run: {different}. "
                "Use the same input, model and settings to resume, or discard it with --restart",
                "other-run",
                "restart",
            )

    def _check_place(self, fields: List[str], number: int) -> None:
        """Raise JobFailed if the journal's line is not that of row `number`: a duplicated, moved or lost line."""
        if not fields[-1].startswith(f"{number} "):
            text = f"line {number + 1} of {self.journal} is not of row {number}; drop it with --restart"
            raise JobFailed(text, "other-row")

    def _write_pending(self) -> None:
        while self._pending:
            written = self._file.write(self._pending)
            del self._pending[:written]

    def _count(self, note: str) -> None:
        self.done += 1
        if note:
            self.notes[note] += 1

    def done_rows(self) -> Iterator[Tuple[str, str]]:
        """(id, image argument of `write`) of the journal's lines."""
        with self._reading() as file:
            file.readline(_MAX_HEADER)
            for _ in range(self.done):
                fields = _parse_line(file.readline(), self._columns)
                yield fields[0], _image_of(fields)

    def write(
        self,
        row_id: str,
        columns: str,
        note: Optional[str] = None,
        line_no: int = 0,
        next_offset: int = 0,
        image: str = "",
    ) -> None:
        """Add the line of the next row, in memory until `flush`. columns: those after the id, joined by tabs.

        line_no, next_offset: the row's place in the input, see Place. image: two numbers that identify the file that
        the row names, or "".
        """
        place = f"{self.done + 1} {line_no} {next_offset} {image}".rstrip()
        fields = (clean_id(row_id), columns.replace("\0", " "), note or "", place)
        # Lone surrogates become "?" instead of an error.
        line = "\t".join(fields).encode("utf-8", "replace") + b"\n"
        if line.count(b"\n") > 1 or b"\r" in line or _parse_line(line, self._columns) is None:
            raise ValueError(f"not one line without tabs: {line!r}")
        self._pending += line
        self._count(fields[2])

    def flush(self) -> None:
        """Write the lines to the system, after which a kill does not lose them."""
        with self._explained():
            self._write_pending()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def finish(self, rows: int, **facts) -> None:
        """Write OUTPUT and OUTPUT.run.json, and delete the journal.

        rows: expected number of lines. facts: further entries of OUTPUT.run.json.

        Raises:
            JobFailed: the number of lines is not that of rows; OUTPUT is unchanged.
        """
        with self._explained():
            self._write_pending()
            os.fsync(self._file.fileno())
            if self.done != rows:
                raise JobFailed(f"{self.journal} has {self.done} lines for {rows} rows", "lines")
            with atomic_write(self.path, "wb") as out, self._reading() as journal:
                journal.readline(_MAX_HEADER)
                lines = 0
                for line in journal:
                    fields = _parse_line(line, self._columns)
                    if fields is None:
                        text = f"{self.journal} was changed while it was written: line {lines + 2} is broken"
                        raise JobFailed(text, "changed")
                    lines += 1
                    self._check_place(fields, lines)
                    out.write("\t".join(fields[:-2]).encode() + b"\n")
                if lines != rows:
                    text = f"{self.journal} was changed while it was written: {lines} lines for {rows} rows"
                    raise JobFailed(text, "changed")
            write_sidecar(self.path, self.run, rows, self.notes, **facts)
            self._drop()
        self.close()

    def _drop(self) -> None:
        if self._is_there():
            os.unlink(self.journal)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *exc_info) -> None:
        if self.done == 0:
            # Without lines the journal is of no use, and must not block the next command.
            self._drop()
        self.close()
