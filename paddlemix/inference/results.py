"""The output of predict.py and score_rows.py: written as it goes, whole when it appears, and resumable after a kill.

While a run lasts, its lines go to a journal, `OUTPUT.partial`:

    {"format": 2, "input": {…}, "model": {…}, "settings": {…}}     what made the lines below
    id \\t caption \\t note \\t place                                 one line per row; the note says what was
                                                                   wrong with it, and is mostly empty

A line's place is "1 1 52310": its number, the number of its line in the input, and the byte at which the next one
begins there, so that a resumed run goes on reading at that byte. Of a row that names an image file, two numbers more
tell whether the file is another one since. Journals of format 1 have no places. An output of more columns has them in
place of the caption.

When every row has its line, OUTPUT (`id \\t caption`) is written from the journal beside its name and
renamed, and so is `OUTPUT.run.json`: the journal's first line with the number of rows, the notes,
counted, and what OUTPUT's bytes were. Then the journal goes. So OUTPUT is always a whole one, and one
file, the journal, holds all that a resumed run needs. A million captions are some 200 MB, so the last copy
takes a second.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections import Counter
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple

from paddlemix.datasets.tsv import clean_id
from paddlemix.inference.facts import file_facts
from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_file

# Of OUTPUT.run.json.
FORMAT = 1
_JOURNAL_FORMATS = (1, 2)
# The note of a row whose image file was cut short: it has a caption, of what there was.
TRUNCATED = "truncated image"
# That of an answer which repeated itself and was cut (see Decoding.stop_repeating); it has a caption, too.
REPEATING = "repeated itself"
PARTIAL = ".partial"
SIDECAR = ".run.json"
# Lines are handed to the system with every flush; to the disk itself this often.
SYNC_SECONDS = 5.0
# What a journal begins with.
_BEGIN = b'{"format": '
# Longer first lines are not ours. (The settings hold a prompt and a fallback caption.)
_MAX_HEADER = 1 << 20


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """One sentence for each value in which two runs differ; a key that is missing counts as null."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(set(there) | set(here)):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {there!r} there and {here!r} here"


def report_notes(rows: int, notes: Dict[str, int], fallback: Optional[str]) -> Optional[str]:
    """Log what was wrong with rows. Returns None, or what to say of a job in which no row got a caption; without a
    `fallback`, a score."""
    ranked = sorted(notes.items(), key=lambda pair: -pair[1])
    described = ", ".join(f"{count} × {note}" for note, count in ranked)
    if notes:
        logger.warning("of %d rows: %s", rows, described)
    failed = sum(count for note, count in notes.items() if not {*note.split(", ")} <= {TRUNCATED, REPEATING})
    if failed:
        logger.warning("%d rows have %s", failed, f"the fallback caption {fallback}" if fallback else "no score")
    if failed and failed == rows:
        return f"not one of the {failed} rows could be {'captioned' if fallback else 'scored'}: {described}"
    return None


def write_sidecar(path: str, run: Dict[str, Any], rows: int, notes: Dict[str, int], **facts) -> None:
    """Write `path`.run.json for the results in `path`, whose lines are counted once more.

    Raises:
        JobFailed: there are more or fewer lines than rows.
    """
    written = file_facts(path)
    if written.lines != rows:
        raise JobFailed(f"{path} has {written.lines} lines for {rows} rows")
    output = {"bytes": written.size, "sha256": written.sha256}
    with atomic_write(path + SIDECAR) as file:
        summary = dict(run, rows=rows, notes=dict(sorted(notes.items())), output=output, **facts)
        json.dump(summary, file, ensure_ascii=False, indent=2)
        file.write("\n")


class Place(NamedTuple):
    """Where a resumed run goes on: rows answered, the number of the last one's line in the input, and the byte at which
    the next line begins."""

    row: int
    line_no: int
    next_offset: int


_PLACE = re.compile(r"\d{1,15} \d{1,15} \d{1,18}(?: (\d{1,10} \d{1,10}))?", re.ASCII)


def _parse_line(line: bytes, columns: int) -> Optional[List[str]]:
    """The columns of a journal line, or None if it is not a whole one."""
    # A power cut can leave blocks of zeros where the last lines should be.
    if not line.endswith(b"\n") or b"\0" in line:
        return None
    try:
        fields = line[:-1].decode("utf-8").split("\t")
    except UnicodeDecodeError:
        return None
    if len(fields) != columns or (columns > 3 and not _PLACE.fullmatch(fields[-1])):
        return None
    return fields


class ResultsWriter:
    """Lines in the order of the rows, one `write` per row; `finish` makes OUTPUT of them.

        with ResultsWriter(path, run) as results:
            for row in rows_after(results.done):
                results.write(row.id, caption, note)
            results.finish(rows)

    run: what the captions depend on, as JSON values ({"input": …, "model": …, "settings": …}). A journal of
    the same run is gone on with, after its last whole line; `done` says how many lines there are. A journal
    of another run is refused unless `restart`, which drops it. Leaving the block without `finish` keeps a
    journal that has lines. settings.columns says how many OUTPUT has behind the id
    (default: 1).

    Raises:
        UserError: the folder cannot be written, or the journal is of another run or in use by a process.
        JobFailed: the disk is full (the journal stays, and the same command goes on).
    """

    def __init__(self, path: str, run: Dict[str, Any], restart: bool = False):
        check_file(path, plain=True)
        self.path = os.path.abspath(path)
        self.journal = self.path + PARTIAL
        # As it will be read back, so that equal runs compare equal (a tuple comes back as a list).
        self.run = json.loads(json.dumps({"format": FORMAT, **run}))
        self.done = 0
        # Behind the last row that an earlier run answered; None without such a run, or if it did not say.
        self.place: Optional[Place] = None
        # Whether some of these rows name an image file.
        self.has_files = False
        # Of the journal: the id, OUTPUT's others, note and place.
        self._columns = 3 + run.get("settings", {}).get("columns", 1)
        self.notes: Counter = Counter()
        check_file(self.journal, plain=True)
        if os.path.islink(self.journal):
            raise self._foreign()
        with self._explained():
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            # Unbuffered, with a buffer of our own: closing after a full disk must not try to write once more.
            self._file = open(self.journal, "a+b", buffering=0)
        self._pending = bytearray()
        try:
            self._lock()
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
            hint = f"; {self.done} lines are safe in {self.journal}, the same command goes on" if safe else ""
            raise kind(f"cannot write {self.path}: {error.strerror}{hint}") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {self.journal}; give another output", "busy") from None
        except OSError as error:
            # Some network disks know no locks. Two runs on one output are the user's to avoid there.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise UserError(f"cannot lock {self.journal}: {error.strerror}") from error

    def _is_there(self) -> bool:
        """Whether the journal still has its name: it may have been removed while it is written."""
        try:
            return os.path.samestat(os.lstat(self.journal), os.fstat(self._file.fileno()))
        except OSError:
            return False

    @contextlib.contextmanager
    def _reading(self) -> Iterator[BinaryIO]:
        """The journal from its begin, whatever has become of its name."""
        with open(os.dup(self._file.fileno()), "rb") as journal:
            journal.seek(0)
            yield journal

    def _foreign(self) -> UserError:
        return UserError(f"{self.journal} was not written by this program: move it away")

    def _open_journal(self, restart: bool) -> None:
        with self._reading() as journal:
            header = journal.readline(_MAX_HEADER)
            # What a power cut leaves may be zeros.
            begin = header[: len(_BEGIN)]
            if begin.strip(b"\0") and not _BEGIN.startswith(begin):
                raise self._foreign()
            if restart or (not header.endswith(b"\n") and len(header) < _MAX_HEADER):
                # Fresh, or killed before its first line was whole.
                self._file.truncate(0)
                header = dict(self.run, format=_JOURNAL_FORMATS[-1])
                self._pending += json.dumps(header, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                self._write_pending()
                return
            self._check_header(header)
            whole = len(header)
            fields = None
            for line in journal:
                parsed = _parse_line(line, self._columns)
                if parsed is None:
                    break
                fields = parsed
                whole += len(line)
                self._count(fields[2 if self._columns == 3 else -2])
                self._check_place(fields, self.done)
                self.has_files = self.has_files or bool(self._image_of(fields))
            if fields is not None and self._columns > 3:
                place = Place(*map(int, fields[-1].split(" ")[:3]))
                self.place = place if place.next_offset else None
        self._file.truncate(whole)

    def _check_header(self, header: bytes) -> None:
        try:
            there = json.loads(header.decode("utf-8"))
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict) or there.get("format") not in _JOURNAL_FORMATS:
            raise self._foreign()
        self._columns = 3 if there["format"] == 1 else self._columns
        different = "; ".join(differences(dict(there, format=FORMAT), self.run))
        if different:
            raise UserError(
                f"{self.journal} is an unfinished run of another kind: {different}. "
                "Give the same input, model and settings to go on, or drop it with --restart"
            )

    def _check_place(self, fields: List[str], number: int) -> None:
        """Raise JobFailed if the line behind `number` - 1 others is not of that row: one was doubled, moved or lost."""
        if self._columns > 3 and not fields[-1].startswith(f"{number} "):
            raise JobFailed(f"line {number + 1} of {self.journal} is not of row {number}; drop it with --restart")

    def _write_pending(self) -> None:
        while self._pending:
            written = self._file.write(self._pending)
            del self._pending[:written]

    def _count(self, note: str) -> None:
        self.done += 1
        if note:
            self.notes[note] += 1

    def _image_of(self, fields: List[str]) -> str:
        return (_PLACE.fullmatch(fields[-1])[1] or "") if self._columns > 3 else ""

    def done_rows(self) -> Iterator[Tuple[str, str]]:
        """(id, image as `write` took it) of the lines that a resumed run found, as they stand in the journal."""
        with self._reading() as file:
            file.readline(_MAX_HEADER)
            for _ in range(self.done):
                fields = _parse_line(file.readline(), self._columns)
                yield fields[0], self._image_of(fields)

    def write(
        self,
        row_id: str,
        columns: str,
        note: Optional[str] = None,
        line_no: int = 0,
        next_offset: int = 0,
        image: str = "",
    ) -> None:
        """The line of the next row, kept in memory until `flush`. columns: OUTPUT's behind the id, joined by tabs.

        line_no, next_offset: the row's place in the input, see Place. image: two numbers that tell the file which the
        row names from another, "" if it names none.
        """
        place = f"{self.done + 1} {line_no} {next_offset} {image}".rstrip()
        fields = (clean_id(row_id), columns.replace("\0", " "), note or "", place)[: 3 if self._columns == 3 else 4]
        # A lone surrogate from a hostile row must not end the run at row 900,000: it becomes "?".
        line = "\t".join(fields).encode("utf-8", "replace") + b"\n"
        if line.count(b"\n") > 1 or b"\r" in line or _parse_line(line, self._columns) is None:
            raise ValueError(f"not one line without tabs: {line!r}")
        self._pending += line
        self._count(fields[2])

    def flush(self) -> None:
        """Hand the lines to the system: from here on, a killed process loses none of them."""
        with self._explained():
            self._write_pending()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def finish(self, rows: int, **facts) -> None:
        """Write OUTPUT and OUTPUT.run.json, count OUTPUT's lines once more, and drop the journal.

        rows: how many rows there are to answer. facts: further entries of OUTPUT.run.json.

        Raises:
            JobFailed: there are more or fewer lines than rows; OUTPUT is not touched.
        """
        with self._explained():
            self._write_pending()
            os.fsync(self._file.fileno())
            if self.done != rows:
                raise JobFailed(f"{self.journal} has {self.done} lines for {rows} rows")
            with atomic_write(self.path, "wb") as out, self._reading() as journal:
                journal.readline(_MAX_HEADER)
                lines = 0
                for line in journal:
                    fields = _parse_line(line, self._columns)
                    if fields is None:
                        raise JobFailed(f"{self.journal} was changed while it was written: line {lines + 2} is broken")
                    lines += 1
                    self._check_place(fields, lines)
                    kept = fields[:2] if self._columns == 3 else fields[:-2]
                    out.write("\t".join(kept).encode() + b"\n")
                if lines != rows:
                    raise JobFailed(f"{self.journal} was changed while it was written: {lines} lines for {rows} rows")
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
            # Nothing to go on with; a command that never got so far must not stand in the way of the next.
            self._drop()
        self.close()
