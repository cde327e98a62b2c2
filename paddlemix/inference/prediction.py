"""The job of predict.py: a file of rows in, a file of captions out, a line per row whatever a row holds."""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import Dict, Iterator, Optional

from paddlemix.datasets.tsv import TsvRow, check_input, read_rows
from paddlemix.inference.captioner import TRUNCATED, Answer, Captioner
from paddlemix.inference.loading import find_model_folder, load_model
from paddlemix.inference.results import ResultsWriter, clean_id, file_facts, fingerprint_folder
from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress

# A row without a caption of its own is logged when its reason is first met, and then each thousandth time.
LOG_EVERY = 1000


def row_id(row: TsvRow) -> str:
    """The id in a row's output line: its own, or its line number where the row has none."""
    return clean_id(row.id) or str(row.line_no)


def describe_notes(notes: Dict[str, int]) -> str:
    """For the log, the most frequent first: 7 × not an image, 1 × empty image."""
    ranked = sorted(notes.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count} × {note}" for note, count in ranked)


class _Rows:
    """The rows of a file, counted as they are read."""

    def __init__(self, path: str):
        self._rows = read_rows(path, want_caption=False)
        self.count = 0

    def __iter__(self) -> Iterator[TsvRow]:
        return self

    def __next__(self) -> TsvRow:
        row = next(self._rows)
        self.count += 1
        return row


def _pass_over(rows: _Rows, results: ResultsWriter) -> None:
    """Skip the rows that an earlier run has answered; no image is decoded for that."""
    for number, done_id in enumerate(results.done_ids(), 1):
        row = next(rows, None)
        if row is None or row_id(row) != done_id:
            raise JobFailed(
                f"line {number + 1} of {results.journal} is not of row {number} of the input; drop it with --restart"
            )
    if results.done:
        logger.info("going on after the %d rows of an earlier run", results.done)


def predict_file(
    input: str,
    output: str,
    model: str,
    prompt: Optional[str] = None,
    max_new_tokens: Optional[int] = None,
    batch_size: Optional[int] = None,
    fallback: str = "一张广告图片。",
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    restart: bool = False,
) -> None:
    """Write `id \\t caption` for every row of `input`, in order, and print each caption (SPEC §4).

    Rows are `id \\t base64`, with or without further columns; a row without an id has its line number for
    one. A row without a usable image, or that the model answers with nothing, gets `fallback`, and is logged
    and counted by what was wrong. Captions are greedy. A file without rows gives a file without lines. For the
    other arguments see predict.py --help; for how a run is resumed, results.py.

    Raises:
        UserError: bad arguments, input or model.
        JobFailed: the disk is full, memory runs out, or no row got a caption (OUTPUT is whole then).
    """
    from paddlemix.processors.mgen_vl_processing import clean_caption

    check_input(input)
    facts = file_facts(input)
    folder = find_model_folder(model)
    if os.path.exists(output) and os.path.samefile(input, output):
        raise UserError("INPUT and OUTPUT are the same file")
    fallback = clean_caption(fallback)
    if not fallback:
        raise UserError("--fallback must hold text")
    run = {
        "input": {"bytes": facts.size, "sha256": facts.sha256},
        "model": {"sha256": fingerprint_folder(folder)},
        "settings": {
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "fallback": fallback,
            "dtype": dtype,
        },
    }
    with ResultsWriter(output, run, restart=restart) as results:
        rows = _Rows(input)
        _pass_over(rows, results)
        first = next(rows, None)
        captioner = None
        if first is not None:
            loaded = load_model(folder, dtype, device)
            captioner = Captioner(
                loaded.model,
                loaded.tokenizer,
                loaded.image_processor,
                prompt=prompt,
                system=loaded.system,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
            logger.info("%d images at a time", captioner.batch_size)
        print("------predicting starts------", flush=True)
        if captioner is not None:
            _caption_rows(captioner, first, rows, results, fallback, facts.lines)
        results.finish(rows.count)
        print("------predicting finished-----", flush=True)

    if rows.count == 0:
        logger.warning("%s holds no rows, so %s holds no lines", input, output)
    if results.notes:
        logger.warning("of %d rows: %s", rows.count, describe_notes(results.notes))
    failed = sum(results.notes.values()) - results.notes[TRUNCATED]
    if failed:
        logger.warning("%d rows have the fallback caption %s", failed, fallback)
    if failed and failed == rows.count:
        raise JobFailed(f"not one of the {failed} rows could be captioned: {describe_notes(results.notes)}")


def _caption_rows(captioner: Captioner, first: TsvRow, rows: _Rows, results, fallback: str, lines: int) -> None:
    """Caption `first` and the rest of `rows`. lines: how many lines the input has, for the time left."""
    # Rows that were read, but not answered yet: (id, line number).
    waiting: deque = deque()

    def images():
        row = first
        while row is not None:
            waiting.append((row_id(row), row.line_no))
            yield Answer(None, row.error) if row.error else row.image
            row = next(rows, None)

    with Progress(lines, desc="captions", unit="row", initial=results.done) as bar:
        for answer in captioner.captions(images()):
            name, line_no = waiting.popleft()
            results.write(name, answer.caption or fallback, answer.note)
            # What is printed is safe. A row costs the model far more than this call.
            results.flush()
            if answer.note:
                met = results.notes[answer.note]
                if met == 1 or met % LOG_EVERY == 0:
                    logger.warning("line %d, id %r: %s (number %d)", line_no, name, answer.note, met)
            show(answer.caption or fallback)
            bar.update()


def show(text: str) -> None:
    """Print a line beside the progress bar on stderr; on a terminal the bar moves out of its way."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
    else:
        print(text, flush=True)
