"""The consensus of several results files: for each row, the caption that agrees most with those of the other files.

Two passes over all files in parallel: one counts document frequencies of n-grams, the other compares. The counts take
four bytes per token of all distinct captions, a quarter of a gigabyte per file of a million rows.
"""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.datasets.caption_files import caption_lines
from paddlemix.datasets.tsv import check_input
from paddlemix.inference.facts import file_facts
from paddlemix.inference.results import FORMAT, SIDECAR, read_record, write_sidecar
from paddlemix.metrics.captions import CHUNK_ROWS, TOKENIZERS, agreement, first_best
from paddlemix.metrics.ngrams import DocumentFrequencies
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger
from paddlemix.utils.parallel import map_chunks
from paddlemix.utils.progress import Progress


class _Results(NamedTuple):
    """A results file. fallback: its fallback caption, if recorded. run: its record."""

    path: str
    fallback: Optional[str]
    run: Dict[str, Any]


def combine(paths: Sequence[str], output: str, workers: int = 0, quiet: bool = True) -> Dict[str, Any]:
    """Write to `output`, per row, the caption of `paths` with the highest mean CIDEr-D against the others, the first on
    a tie. A fallback caption is only used if there is no other.

    CIDEr's document frequencies come from all rows of all files; with a single row, all n-grams have the same weight.
    OUTPUT.run.json records the files, and the number of captions from each. workers: see map_chunks.

    Returns the contents of OUTPUT.run.json, without the facts of OUTPUT.

    Raises:
        UserError: a file cannot be read, is not lines of id and caption, has other ids or another order than the first
            one, or was made of another input.
    """
    files = [_opened(path) for path in paths]
    _check_inputs(files)
    facts = [file_facts(path) for path in paths]
    for number, one in enumerate(facts):
        same = paths[facts.index(one)]
        if facts.index(one) < number:
            logger.warning("%s has the same contents as %s: its captions count twice", paths[number], same)
    split = TOKENIZERS["char"]
    counted, rows = DocumentFrequencies(), 0
    with Progress(facts[0].lines, "n-grams", unit="row", disable=quiet) as bar:
        for _, captions in _rows(files):
            counted.add([split(text) for text in dict.fromkeys(captions)])
            rows += 1
            bar.update()
    if rows == 0:
        raise UserError(f"{paths[0]} has no captions")
    frequencies = None
    if rows > 1:
        counted.finish(workers, quiet)
        frequencies = counted

    def choose(chunk: List[Tuple[str, List[str]]]) -> List[Tuple[str, str, int]]:
        """(id, caption, index of its file) of each row."""
        usable = [
            [i for i, text in enumerate(captions) if text and text != files[i].fallback] or [0] for _, captions in chunk
        ]
        texts = [[captions[i] for i in kept] for (_, captions), kept in zip(chunk, usable)]
        scores = agreement(texts, "char", frequencies)
        best = [kept[first_best(row)] for kept, row in zip(usable, scores)]
        return [(name, captions[i], i) for (name, captions), i in zip(chunk, best)]

    taken = [0] * len(files)
    read = _rows(files)
    chunks = iter(lambda: list(islice(read, CHUNK_ROWS)), [])
    with atomic_write(output) as out, Progress(rows, "consensus", unit="row", disable=quiet) as bar:
        for part in map_chunks(choose, chunks, workers):
            for name, caption, i in part:
                out.write(f"{name}\t{caption}\n")
                taken[i] += 1
            bar.update(len(part))
    run = {"format": FORMAT, "combined": []}
    for file, one, count in zip(files, facts, taken):
        entry = {"path": file.path, "bytes": one.size, "sha256": one.sha256, "taken": count}
        run["combined"].append({**entry, **{key: file.run[key] for key in ("model", "settings") if key in file.run}})
    inputs = [file.run["input"] for file in files if "input" in file.run]
    if inputs:
        run["input"] = inputs[0]
    write_sidecar(output, run, rows, {})
    return {**run, "rows": rows}


def combined(path: str) -> bool:
    """Whether these results were combined, by their record."""
    return "combined" in read_record(path)


def _opened(path: str) -> _Results:
    check_input(path)
    run = read_record(path)
    settings = run.get("settings")
    return _Results(path, settings.get("fallback") if isinstance(settings, dict) else None, run)


def _check_inputs(files: Sequence[_Results]) -> None:
    """Raise UserError if the records name different inputs."""
    known = [file for file in files if "input" in file.run]
    for file in known[1:]:
        if file.run["input"] != known[0].run["input"]:
            raise UserError(f"{file.path} and {known[0].path} are captions of different inputs, as {SIDECAR} says")


def _rows(files: Sequence[_Results]) -> Iterator[Tuple[str, List[str]]]:
    """(id, its caption in each file), in the order of the files; the ids must be the same in all."""
    with contextlib.ExitStack() as opened:
        readers = [_lines(opened.enter_context(open(file.path, "rb")), file.path) for file in files]
        for number, first in enumerate(readers[0], 1):
            captions = [first[1]]
            for file, reader in zip(files[1:], readers[1:]):
                name, caption = next(reader, (None, ""))
                if name != first[0]:
                    found = "there is no such row" if name is None else f"it is {name!r}"
                    raise UserError(f"row {number} of {files[0].path} has the id {first[0]!r}; in {file.path} {found}")
                captions.append(caption)
            yield first[0], captions
        for file, reader in zip(files[1:], readers[1:]):
            if next(reader, None) is not None:
                raise UserError(f"{file.path} has more rows than {files[0].path}")


def _lines(file, path: str) -> Iterator[Tuple[str, str]]:
    for number, _, fields in caption_lines(path, file):
        if len(fields) != 2:
            raise UserError(f"line {number} of {path} is not id, tab, caption in UTF-8")
        yield fields[0], fields[1]
