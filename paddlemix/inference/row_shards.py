"""Sharding: several processes or machines caption one input, and their outputs are merged.

Shard i of n answers the rows i, i + n, i + 2n, … (counted from 1) and writes them to `OUTPUT.shard-i-of-n`, with a
journal and a sidecar of its own, so each shard is resumed independently. Interleaving gives equal shares of any input,
and merging needs no second look at the input.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import itertools
import os
import re
import shlex
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional

from paddlemix.datasets.rows import read_rows
from paddlemix.datasets.tsv import row_id
from paddlemix.inference.facts import file_facts, input_facts
from paddlemix.inference.n_best import line_id as candidates_id
from paddlemix.inference.results import FORMAT, PARTIAL, SIDECAR, differences, write_sidecar
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.json_files import read_config_object
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import check_file, check_kind, keep_apart
from paddlemix.utils.surroundings import allow_open_files
from paddlemix.utils.texts import some

# Maximum rows of a broken shard named in an error.
_NAMED = 5


class Shard(NamedTuple):
    """Shard `index` (from 1) of `of`."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Argument type: i/n, such as 1/4 … 4/4."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or not 1 <= int(found.group(1)) <= int(found.group(2)):
            raise argparse.ArgumentTypeError(f"is i/n with i from 1 to n, such as 1/4, not {text!r}")
        return cls(int(found.group(1)), int(found.group(2)))

    def path(self, output: str) -> str:
        """This shard's output file."""
        return f"{output}.shard-{self.index}-of-{self.of}"

    def share(self, rows: int) -> int:
        """This shard's number of rows, of `rows` in all."""
        return (rows - self.index + self.of) // self.of


def add_shard_options(parser: argparse.ArgumentParser, output: str) -> None:
    """--restart and --shard. output: the name of the output in the help text."""
    parser.add_argument(
        "--restart", action="store_true", help=f"discard an unfinished run on {output}, or a finished shard"
    )
    parser.add_argument(
        "--shard", metavar="i/n", type=Shard.parse,
        help=f"process only rows i, i + n, i + 2n, … and write {output}.shard-i-of-n; tools/merge_results.py joins the "
        "shards",
    )  # fmt: skip


def is_whole(shard: Shard, path: str, run: Dict[str, Any]) -> bool:
    """Whether the shard at `path` is complete, unchanged, and of this run (see ResultsWriter)."""
    if os.path.exists(path + PARTIAL) or not os.path.isfile(path):
        return False
    try:
        there = _read_sidecar(shard, path)
    except UserError:
        return False
    same = all(there.get(key) == value for key, value in run.items())
    return same and file_facts(path).sha256 == there["output"].get("sha256")


def merge_shards(output: str, input: Optional[str] = None) -> Dict[str, Any]:
    """Join OUTPUT.shard-1-of-n … n-of-n to OUTPUT and OUTPUT.run.json, as a single run would write them.

    input: the file that should have been captioned. Its rows are only read to say which of them a changed shard lacks:
    an unchanged one has a line for each. An OUTPUT without shards that a single process finished is kept. Returns the
    contents of OUTPUT.run.json.

    Raises:
        UserError: no shards, missing or unfinished ones, different inputs, models or settings, or a shard that was
            changed since it was written. OUTPUT is unchanged then.
    """
    whole = _whole(output, input)
    if whole is not None:
        logger.info("%s is complete, written by a single process: nothing to join", output)
        return whole
    check_file(output, plain=True)
    shards = _find(output, input)
    keep_apart([input, *(shard.path(output) for shard in shards)], [output, output + SIDECAR])
    sidecars = [_read_sidecar(shard, shard.path(output)) for shard in shards]
    for shard, there in zip(shards[1:], sidecars[1:]):
        different = "; ".join(differences(_common(there), _common(sidecars[0])))
        if different:
            raise UserError(f"{shard.path(output)} and shard 1 are of different runs: {different}", "other-run")
    run, rows = _common(sidecars[0]), sidecars[0]["input_rows"]
    columns = run["settings"].get("columns", 1)
    check_kind(output, "results" if columns == 1 else "scores")
    listed = run["settings"].get("n_best")
    paths = [output, listed] if listed else [output]
    for shard in shards if listed else ():
        if not os.path.isfile(shard.path(listed)):
            raise UserError(f"no {shard.path(listed)}, which --n_best of shard {shard.index} wrote")
    allow_open_files(len(shards) * len(paths), "raise it (ulimit -n)")
    if input is not None:
        facts = input_facts(input)
        if facts.sha256 != run["input"].get("sha256"):
            raise UserError(f"{input} is not the file that was captioned: its SHA-256 is {facts.sha256}", "other-input")
    for shard, there in zip(shards, sidecars):
        _check_lines(shard, shard.path(output), there, rows, input)

    notes: Counter = Counter()
    for there in sidecars:
        notes.update(there["notes"])
    with contextlib.ExitStack() as opened:
        files = [[opened.enter_context(open(shard.path(path), "rb")) for path in paths] for shard in shards]
        outs = [opened.enter_context(atomic_write(path, "wb")) for path in paths]
        for row in range(rows):
            shard, number = shards[row % len(shards)], row // len(shards) + 1
            lines = [file.readline() for file in files[row % len(shards)]]
            if lines[0].count(b"\t") != columns:
                raise UserError(f"line {number} of {shard.path(output)} does not have {columns + 1} columns", "columns")
            if listed and candidates_id(lines[1]) != _line_id(lines[0]):
                raise UserError(f"{shard.path(listed)} does not hold the candidates of row {number}")
            for out, line in zip(outs, lines):
                out.write(line)
    del run["input_rows"]
    return write_sidecar(output, run, rows, notes)


def _whole(output: str, input: Optional[str]) -> Optional[Dict[str, Any]]:
    """The contents of OUTPUT.run.json if OUTPUT is complete and unchanged and there are no shards; else None."""
    if glob.glob(glob.escape(output) + ".shard-*") or not os.path.isfile(output + SIDECAR):
        return None
    there = read_config_object(output + SIDECAR)
    written, captioned = there.get("output"), there.get("input")
    sound = isinstance(written, dict) and isinstance(captioned, dict) and isinstance(there.get("settings"), dict)
    if not sound or not os.path.isfile(output) or file_facts(output).sha256 != written.get("sha256"):
        return None
    if input is not None and input_facts(input).sha256 != captioned.get("sha256"):
        raise UserError(f"{output} is complete, but {input} is not the file that was captioned", "other-input")
    return there


def _find(output: str, input: Optional[str]) -> List[Shard]:
    """All shards of `output`, in order."""
    name = re.compile(re.escape(os.path.basename(output)) + rf"\.shard-(\d+)-of-(\d+)(?:{re.escape(PARTIAL)})?")
    found = set()
    for path in glob.glob(glob.escape(output) + ".shard-*"):
        match = name.fullmatch(os.path.basename(path))
        if match and 1 <= int(match.group(1)) <= int(match.group(2)):
            found.add(Shard(int(match.group(1)), int(match.group(2))))
    if not found:
        raise UserError(f"no shards {output}.shard-i-of-n: give the OUTPUT that predict.py was given", "no-shards")
    counts = sorted({shard.of for shard in found})
    if len(counts) > 1:
        text = f"next to {output} are shards of {' and of '.join(map(str, counts))}: move one kind away"
        raise UserError(text, "shard-counts")
    shards = [Shard(index, counts[0]) for index in range(1, counts[0] + 1)]
    for what, ending in (("unfinished", PARTIAL), ("missing", "")):
        lacking = [shard for shard in shards if os.path.exists(shard.path(output) + ending) == bool(ending)]
        if lacking:
            listed = some(f"{shard.index}/{shard.of}" for shard in lacking)
            source = shlex.quote(input) if input is not None else "INPUT"
            one = f"{lacking[0].index}/{lacking[0].of}"
            command = f"python predict.py {source} {shlex.quote(output)} MODEL --shard {one}"
            raise UserError(f"{what}: --shard {listed}; with the same flags, finish it with: {command}", what)
    return shards


def _read_sidecar(shard: Shard, path: str) -> Dict[str, Any]:
    if not os.path.isfile(path + SIDECAR):
        raise UserError(f"no {path}{SIDECAR}: copy it along with the shard, which it describes", "no-sidecar")
    there = read_config_object(path + SIDECAR)
    wanted = {"input": dict, "model": dict, "settings": dict, "output": dict, "notes": dict}
    wanted.update(rows=int, input_rows=int)
    sound = all(isinstance(there.get(key), kind) for key, kind in wanted.items())
    sound = sound and all(type(count) is int for count in there["notes"].values())
    sound = sound and type(there["settings"].get("columns", 1)) is int
    if not sound or there.get("format") != FORMAT or there.get("shard") != shard._asdict():
        raise ConfigError(f"{path}{SIDECAR} is not the sidecar of shard {shard.index} of {shard.of}", "sidecar")
    return there


def _common(sidecar: Dict[str, Any]) -> Dict[str, Any]:
    """The entries in which all sidecars of a run agree."""
    return {key: sidecar[key] for key in ("format", "input", "model", "settings", "input_rows")}


def _line_id(line: bytes) -> str:
    return line.split(b"\t", 1)[0].decode("utf-8", "replace").rstrip("\n")


def _check_lines(shard: Shard, path: str, sidecar: Dict[str, Any], rows: int, input: Optional[str]) -> None:
    """Raise a UserError unless the shard is unchanged. input: to list the ids in which a changed one differs."""
    facts, share = file_facts(path), shard.share(rows)
    if facts.sha256 == sidecar["output"].get("sha256"):
        if facts.lines != share:
            raise UserError(f"{path} has {facts.lines} lines, but {share} of the {rows} rows are its share", "lines")
        return
    if input is not None:
        wanted = [row_id(row) for row in itertools.islice(read_rows(input, False), shard.index - 1, None, shard.of)]
        with open(path, "rb") as file:
            found = [_line_id(line) for line in file]
        if found != wanted:
            lacking, surplus = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
            kinds = (("missing", lacking), ("too many", surplus))
            what = [f"{kind}: {some(map(repr, ids), _NAMED)}" for kind, ids in kinds if ids]
            raise UserError(f"{path} does not answer its rows: {'; '.join(what) or 'they are in another order'}", "ids")
    text = f"{path} was changed since it was written ({facts.lines} lines, {share} rows are its share)"
    raise UserError(text, "changed")
