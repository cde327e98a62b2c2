"""The job of predict.py: from a file of rows to a file of captions, with one line for every row."""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections import deque
from itertools import chain, count
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Tuple, Union

from paddlemix.datasets.blocks import FileState
from paddlemix.datasets.rows import first_prompt, holds_images, image_text, is_json, most_rows, read_rows
from paddlemix.datasets.tsv import TsvRow, check_input, check_of, row_id
from paddlemix.inference.captioner import Answer, Captioner
from paddlemix.inference.facts import input_facts
from paddlemix.inference.loading import load_model
from paddlemix.inference.n_best import NBestWriter
from paddlemix.inference.options import FALLBACK
from paddlemix.inference.results import PARTIAL, SIDECAR, Place, ResultsWriter, report_notes
from paddlemix.inference.row_shards import Shard, is_whole
from paddlemix.inference.source import find_source
from paddlemix.processors.postprocess import PostProcessing, single_line
from paddlemix.utils.cli import harmless, let_go
from paddlemix.utils.errors import ImageError, JobFailed, UserError
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_file, check_kind, keep_apart
from paddlemix.utils.progress import Progress, bars_aside
from paddlemix.utils.runtime import rank, world_size
from paddlemix.utils.texts import counted

_NO_STEPS = PostProcessing()
# Rows without a caption are logged at the first and then every thousandth occurrence of a reason.
LOG_EVERY = 1000


class _Rows:
    """The rows of a shard. read: rows of the file read so far; count: those of the shard among them."""

    def __init__(self, path: str, shard: Shard, state: FileState, want_caption: bool):
        self._path, self._shard, self._state, self._want_caption = path, shard, state, want_caption
        self._rows = read_rows(path, want_caption=want_caption, state=state)
        self.read = self.count = 0

    def go_on(self, place: Place) -> None:
        """Continue after the shard's row at `place`.

        Raises:
            JobFailed: no line begins there.
        """
        with open(self._path, "rb") as file:
            file.seek(place.next_offset - 1)
            # Records of a JSON file need not be on separate lines.
            if file.read(1) != b"\n" and place.next_offset != self._state.size and not is_json(self._path):
                raise JobFailed(f"no line of {self._path} begins at byte {place.next_offset}; give --restart")
        self.count = place.row
        self.read = self._shard.index + (place.row - 1) * self._shard.of
        self._rows = read_rows(
            self._path,
            want_caption=self._want_caption,
            offset=place.next_offset,
            first_line=place.line_no + 1,
            state=self._state,
        )

    def __iter__(self) -> Iterator[TsvRow]:
        return self

    def __next__(self) -> TsvRow:
        for row in self._rows:
            self.read += 1
            if (self.read - self._shard.index) % self._shard.of == 0:
                self.count += 1
                return row
        raise StopIteration


def base64_or_answer(row: TsvRow) -> Union[bytes, memoryview, Answer]:
    """The base64 text of a row's image, or an Answer with the reason why there is none."""
    if row.error:
        return Answer(None, row.error)
    try:
        return image_text(row)
    except ImageError as error:
        return Answer(None, error.reason)


def _state_of_file(row: TsvRow) -> int:
    """A number that changes with size and time of the file which a row names; 0 if it is not there."""
    try:
        found = FileState.of(row.place.file)
    except OSError:
        return 0
    return zlib.crc32(f"{found.size} {found.mtime_ns}".encode())


def _check_of_image(row: TsvRow) -> int:
    image = base64_or_answer(row)
    return 0 if isinstance(image, Answer) else check_of(image)


class RowJob:
    """An input of rows, an output with a line per row, and a model: the common part of predict.py and score_rows.py.

    settings: everything else that the output depends on. order: of the script's arguments. Under
    paddle.distributed.launch each process takes the shard of its rank.

    Raises:
        UserError: bad arguments, input or model.
    """

    def __init__(
        self,
        input: str,
        output: str,
        model: str,
        lora_path: Optional[str],
        settings: Mapping[str, Any],
        shard: Optional[Shard],
        order: str,
        want_caption: bool = False,
    ):
        if world_size() > 1:
            if shard is not None:
                raise UserError("paddle.distributed.launch gives each process its shard: give no --shard with it")
            shard = Shard(rank() + 1, world_size())
        check_input(input)
        self.input, self.shard, self.share, self.want_caption = input, shard, shard or Shard(1, 1), want_caption
        self.state = FileState.of(input)
        self.output = output if shard is None else shard.path(output)
        check_file(self.output, plain=True)
        keep_apart([input], [self.output, self.output + PARTIAL, self.output + SIDECAR])
        if holds_images(self.output):
            text = f"OUTPUT {self.output} holds images or records, not results: the order is {order}"
            raise UserError(text, "argument-order")
        check_kind(self.output, "scores" if want_caption else "results")
        self.facts = input_facts(input)
        self.source = find_source(model, lora_path)
        self.run = {
            "input": {"bytes": self.facts.size, "sha256": self.facts.sha256},
            "model": self.source.fingerprints(),
            "settings": settings,
        }
        if shard is not None:
            self.run["shard"] = shard._asdict()

    def is_done(self, beside: Optional[str] = None) -> bool:
        """Whether this shard is finished, and the file `beside` it: paddle.distributed.launch restarts all processes if
        one was killed."""
        if self.shard is None or not is_whole(self.shard, self.output, self.run):
            return False
        if beside is not None and not os.path.isfile(beside):
            return False
        logger.info("%s is already complete and stays unchanged; --restart starts over", self.output)
        return True

    def rows(self, results: ResultsWriter) -> _Rows:
        """The rows after those that an earlier run has answered, which are skipped without decoding images."""
        rows = _Rows(self.input, self.share, self.state, self.want_caption)
        if results.place is not None and not results.has_files:
            rows.go_on(results.place)
        for number, (done_id, image) in enumerate(results.done_rows() if results.has_files else (), 1):
            row = next(rows, None)
            if row is None or row_id(row) != done_id:
                raise JobFailed(
                    f"line {number + 1} of {results.journal} is not of row {number} to answer; drop it with --restart"
                )
            state, _, check = image.partition(" ")
            # The file is read only where its state is another one: it may have been copied.
            if image and _state_of_file(row) != int(state) and _check_of_image(row) != int(check):
                raise JobFailed(
                    f"{row.place.file} has changed since an earlier run answered its row (line {number + 1} of "
                    f"{results.journal}): --restart starts over"
                )
        if results.done:
            logger.info("resuming after the %d rows of an earlier run", results.done)
        return rows

    def answer(
        self,
        rows: Iterable[TsvRow],
        results: ResultsWriter,
        item: Callable[[TsvRow], Any],
        answers: Callable[[Iterator[Any]], Iterable[Any]],
        line: Callable[[str, Any], Tuple[str, Optional[str]]],
        desc: str,
        done: Callable[[str], None] = lambda columns: None,
    ) -> None:
        """Write the line of each row, in order.

        item: row → input of `answers`. answers: inputs → answers, in order. line: (id, answer) → (columns after the id,
        note). done: called with the columns once they are written.
        """
        # Rows read but not answered yet: (id, line number, offset of the next line, its image file).
        waiting: deque = deque()

        def items():
            for row in rows:
                # Before the image is read: if it changes meanwhile, a resumed run must notice.
                file = "" if row.place is None else f"{_state_of_file(row)} {_check_of_image(row)}"
                waiting.append((row_id(row), row.line_no, row.next_offset, file))
                yield item(row)

        total = self.share.share(most_rows(self.input, self.facts.lines))
        with Progress(total, desc=desc, unit="row", initial=results.done) as bar:
            for answer in answers(items()):
                name, line_no, next_offset, file = waiting.popleft()
                columns, note = line(name, answer)
                results.write(name, columns, note, line_no, next_offset, file)
                # Cheap compared with generating a row.
                results.flush()
                if note:
                    met = results.notes[note]
                    if met == 1 or met % LOG_EVERY == 0:
                        logger.warning("line %d, id %r: %s (number %d)", line_no, name, note, met)
                done(columns)
                bar.update()

    def finish(self, rows: _Rows, results: ResultsWriter) -> None:
        results.finish(rows.count, **({} if self.shard is None else {"input_rows": rows.read}))

    def report(self, rows: _Rows, results: ResultsWriter, fallback: Optional[str] = None) -> None:
        """Log the notes of rows.

        Raises:
            JobFailed: no row succeeded. (For a shard this is not an error.)
        """
        if rows.count == 0:
            logger.warning("%s has no rows, so %s has no lines", self.input, self.output)
        failed = report_notes(rows.count, results.notes, fallback)
        if failed and self.shard is None:
            raise JobFailed(failed)


def predict_file(
    input: str,
    output: str,
    model: str,
    prompt: Optional[str] = None,
    system: Optional[str] = None,
    max_new_tokens: Optional[int] = None,
    batch_size: Optional[int] = None,
    fallback: str = FALLBACK,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    restart: bool = False,
    shard: Optional[Shard] = None,
    keep_boxes: bool = False,
    postprocess: PostProcessing = _NO_STEPS,
    lora_path: Optional[str] = None,
    decoding: Optional[Mapping[str, Any]] = None,
    n_best: Optional[str] = None,
) -> None:
    """Write `id \\t caption` for every row of `input`, in order, and print each caption.

    Rows are `id \\t base64`, with or without further columns; the line number replaces a missing id. A row without a
    usable image, or with an empty answer, gets `fallback`, and is logged and counted by its reason. A file without rows
    gives a file without lines. decoding: fields of Decoding other than their defaults, and `choose` (see Captioner);
    default: greedy. For the other arguments see predict.py --help; for resuming, results.py.

    shard: answer only that share of the rows, into a file of its own (row_shards.py). A complete shard of the same
    input, model and settings is kept. That no row of a shard succeeds is not an error; that no row of all succeeds is,
    which merge_shards' caller checks.

    Raises:
        UserError: bad arguments, input or model.
        JobFailed: the disk is full, memory runs out, the input changes while it is read, or no row got a caption
            (OUTPUT is complete in that case).
    """
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT

    fallback = single_line(fallback)
    if not fallback:
        raise UserError("--fallback must hold text")
    settings = {
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "fallback": fallback,
        "dtype": dtype,
        "postprocess": postprocess.settings(),
    }
    # Newer settings are recorded only if used, so that older runs can be resumed.
    used = {"system": system, "keep_boxes": keep_boxes or None, "decoding": decoding or None, "n_best": n_best}
    settings.update((name, value) for name, value in used.items() if value is not None)
    job = RowJob(input, output, model, lora_path, settings, shard, "INPUT OUTPUT MODEL")
    asked = first_prompt(input)
    if prompt is None and asked not in (None, DEFAULT_PROMPT):
        logger.warning("the records of %s have the prompt %r: pass it as --prompt to use it", input, asked)
    if n_best is not None:
        n_best = n_best if job.shard is None else job.shard.path(n_best)
        for path in (n_best, n_best + PARTIAL):
            check_file(path, plain=True)
        check_kind(n_best, "a file of --n_best")
        written = [job.output, job.output + PARTIAL, job.output + SIDECAR, n_best, n_best + PARTIAL]
        keep_apart([input], written)
    if not restart and job.is_done(beside=n_best):
        return

    with contextlib.ExitStack() as outputs:
        results = outputs.enter_context(ResultsWriter(job.output, job.run, restart))
        listed = None if n_best is None else outputs.enter_context(NBestWriter(n_best, results))
        rows = job.rows(results)
        first = next(rows, None)
        captioner = None
        if first is not None:
            loaded = load_model(job.source, dtype, device)
            captioner = Captioner(
                loaded.model,
                loaded.tokenizer,
                loaded.image_processor,
                prompt=prompt,
                system=system,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                template=loaded.template,
                keep_boxes=keep_boxes,
                decoding=decoding,
                scores=n_best is not None,
            )
            logger.info("%d rows at a time, images decoded by %d threads", captioner.batch_size, captioner.workers)
            repeats = captioner.decoding.stop_repeating
            if repeats and captioner.decoding.num_beams == 1:
                logger.info("answers end after %d repetitions (--stop_repeating)", repeats)
        # Independent of the number of shards and of resuming.
        numbers = count(job.share.index - 1 + results.done * job.share.of, job.share.of)

        def line(name: str, answer: Answer) -> Tuple[str, Optional[str]]:
            if listed is not None:
                listed.write(name, answer)
            question = DEFAULT_PROMPT if prompt is None else prompt
            return postprocess(answer.caption, question) if answer.caption else fallback, answer.note

        show("------predicting starts------")
        if captioner is not None:
            job.answer(
                chain([first], rows),
                results,
                base64_or_answer,
                lambda images: captioner.captions(images, numbers),
                line,
                "captions",
                show,
            )
        if listed is not None:
            listed.finish()
        job.finish(rows, results)
        show("------predicting finished-----")
    logger.info("%s: %s", job.output, counted(rows.count, "row"))
    job.report(rows, results, fallback)


def show(text: str) -> None:
    """Print a line; on a terminal the progress bar makes room for it.

    A broken stdout does not end the job: the captions are in the file.
    """
    text = harmless(text)
    try:
        with bars_aside():
            print(text, flush=True)
    except OSError as error:
        logger.warning("captions can no longer be printed (%s), only written", error.strerror)
        let_go(sys.stdout)
