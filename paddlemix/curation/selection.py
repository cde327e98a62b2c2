"""Selection of the rows of a data set by rules, which are recorded, and the resulting data set.

    rows → caption, its facts → CAPTION_RULES ┐
    rows → facts of images (image_facts.py)   ├ IMAGE_RULES, SET_RULES → the first rule that drops a row is its reason
                                              ┘
The rows are read twice: to decide and to write. In between some 80 bytes of each are in memory.

Shapes: n rows.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.curation.caption_facts import caption_facts
from paddlemix.curation.image_facts import PROBLEMS, all_image_facts, hash64, usable
from paddlemix.curation.near_duplicates import near_groups, nearest_in
from paddlemix.datasets.blocks import FileState
from paddlemix.datasets.caption_files import InOrder, new_captions
from paddlemix.datasets.labels import Checked, check_row
from paddlemix.datasets.labels import Options as RowOptions
from paddlemix.datasets.rows import keep_images, read_rows
from paddlemix.datasets.score_files import read_scores
from paddlemix.datasets.tsv import CAPTION_NOT_UTF8, EMPTY_CAPTION, NO_CAPTION, TRUNCATED, check_input, row_id
from paddlemix.datasets.writing import output_rows
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT
from paddlemix.utils.errors import JobFailed, UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.json_files import read_json_object, write_json
from paddlemix.utils.outputs import check_earlier, disk_errors
from paddlemix.utils.parallel import chunks_of, map_chunks
from paddlemix.utils.progress import Progress
from paddlemix.utils.texts import ranked

# Bits within which an image is that of another set, where --near_duplicates says nothing else.
LEAK_DISTANCE = 6

# bits: which of CAPTION_RULES drop it. opening: a hash. problem: why the row cannot be used, in Survey.problems.
ROW = np.dtype([
    ("bits", "<u2"), ("chars", "<u4"), ("opening", "<u8"), ("problem", "u1"), ("gain", "<f4"), ("line", "<u4"),
])  # fmt: skip


class Settings(NamedTuple):
    """The options of tools/curate_data.py.

    rules: by name of RULES, those that are given: must, must_not compiled; not_in a list of files; drop_scores
    (file, share in 0 … 1). prefer: (file of captions, their score file or None). fallback: in that file, the caption
    of rows without one.
    """

    rules: Dict[str, Any]
    keep: str = "first"
    per_group: int = 1
    prefer: Optional[Tuple[str, Optional[str]]] = None
    fallback: Optional[str] = None
    prompt: str = DEFAULT_PROMPT
    images: str = "inline"
    seed: int = 0
    workers: int = 1
    quiet: bool = False

    @property
    def inputs(self) -> List[Optional[str]]:
        """The input files other than the rows."""
        scores = self.rules.get("drop_scores", (None,))[0]
        return [scores, *(self.prefer or ()), *self.rules.get("not_in", ())]


class Survey(NamedTuple):
    """Input of a decision. rows: ROW [n]. problems: their reasons; "" for none. facts: FACTS [n]. leaks: bool [n].
    groups: int64 [n], see near_groups. draw: float64 [n], of the seed."""

    rows: np.ndarray
    problems: List[str]
    preferred: int
    facts: Optional[np.ndarray]
    leaks: Optional[np.ndarray]
    groups: Optional[np.ndarray]
    draw: np.ndarray


# ---- rules


def _aspect(facts: np.ndarray) -> np.ndarray:
    sides = facts["width"].astype(np.float64), facts["height"].astype(np.float64)
    return np.maximum(*sides) / np.maximum(np.minimum(*sides), 1)


def _beyond(group: np.ndarray, most: int, first: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Of the rows that are left, those beyond the `most` of each group that come first: by `first`, then in order."""
    rows = np.flatnonzero(left)
    order = rows[np.lexsort((first[rows], group[rows]))]
    begins = np.concatenate([[0], np.flatnonzero(group[order][1:] != group[order][:-1]) + 1])
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    dropped = np.zeros(len(left), bool)
    dropped[order[rank >= most]] = True
    return dropped


def _lowest(survey: Survey, settings: Settings, left: np.ndarray) -> np.ndarray:
    """The share of the scored rows with the lowest gain."""
    scored = left & ~np.isnan(survey.rows["gain"])
    most = int(scored.sum()) - int(settings.rules["drop_scores"][1] * scored.sum())
    return _beyond(np.zeros(len(left)), most, -survey.rows["gain"], scored)


def _duplicates(survey: Survey, settings: Settings, left: np.ndarray) -> np.ndarray:
    gain = np.where(np.isnan(survey.rows["gain"]), -np.inf, survey.rows["gain"])
    first = {"first": np.zeros(len(left)), "longest": -survey.rows["chars"].astype(np.int64), "best": -gain}
    return _beyond(survey.groups, settings.per_group, first[settings.keep], left)


class Rule(NamedTuple):
    """What the option `name` drops, and the reason that rejected rows get."""

    name: str
    reason: str
    drops: Callable


# drops: (caption, CaptionFacts, the option's value) → bool.
CAPTION_RULES = (
    Rule("must", "caption lacks --must", lambda text, facts, value: not value.search(text)),
    Rule("must_not", "caption has --must_not", lambda text, facts, value: bool(value.search(text))),
    Rule("min_chars", "caption too short", lambda text, facts, value: facts.chars < value),
    Rule("max_chars", "caption too long", lambda text, facts, value: facts.chars > value),
    Rule("min_tokens", "too few tokens", lambda text, facts, value: facts.tokens < value),
    Rule("max_tokens", "too many tokens", lambda text, facts, value: facts.tokens > value),
    Rule("max_repetition", "caption repeats itself", lambda text, facts, value: facts.repetition > value),
    Rule("min_chinese", "too little Chinese", lambda text, facts, value: facts.chinese < value),
)
# drops: (FACTS [n], the option's value) → bool [n].
IMAGE_RULES = (
    Rule("drop_truncated", TRUNCATED, lambda facts, value: facts["truncated"]),
    Rule("min_side", "image too small", lambda facts, value: np.minimum(facts["width"], facts["height"]) < value),
    Rule("max_aspect", "image too narrow", lambda facts, value: _aspect(facts) > value),
    Rule("min_sharpness", "image not sharp", lambda facts, value: facts["sharpness"] < value),
)
# drops: (Survey, Settings, which rows are left: bool [n]) → bool [n].
SET_RULES = (
    Rule("not_in", "image is in --not_in", lambda survey, settings, left: left & survey.leaks),
    Rule("drop_scores", "low gain", _lowest),
    Rule("near_duplicates", "near duplicate", _duplicates),
    Rule("per_opening", "opening too frequent", lambda survey, settings, left: _beyond(
        survey.rows["opening"], settings.rules["per_opening"], survey.draw, left)),
    Rule("limit", "over --limit", lambda survey, settings, left: _beyond(
        np.zeros(len(left)), settings.rules["limit"], survey.draw, left)),
)  # fmt: skip
RULES = CAPTION_RULES + IMAGE_RULES + SET_RULES
_OF_IMAGES = {rule.name for rule in IMAGE_RULES} | {"not_in", "near_duplicates"}


# ---- the rows


def _rows(path: str, settings: Settings, state: FileState, title: str) -> Iterator[Tuple[Checked, float, bool]]:
    """(row with its caption, gain of that or NaN, whether the caption is a preferred one) of each row."""

    def opened(file: Optional[str], read: Callable) -> Optional[InOrder]:
        return InOrder(file, read(file)) if file is not None else None

    captions, new_scores = settings.prefer or (None, None)
    files = [
        opened(settings.rules.get("drop_scores", (None,))[0], read_scores),
        opened(captions, lambda file: new_captions(file, settings.fallback)),
        opened(new_scores, read_scores),
    ]
    options = RowOptions(prompt=settings.prompt, images=settings.images, verify="header")
    # Which of the score files have had no score yet.
    empty = {at for at in (0, 2) if files[at]}
    with Progress(state.size, title, "B", settings.quiet) as bar:
        for row in read_rows(path, want_caption=True, state=state):
            bar.reach(row.next_offset)
            score, caption, new_score = (file and file.take(row_id(row)) for file in files)
            gain, new_gain = (one.gain if one is not None else np.nan for one in (score, new_score))
            empty.difference_update(at for at, value in ((0, gain), (2, new_gain)) if not np.isnan(value))
            # Without scores, all new captions are used.
            better = new_scores is None or new_gain > gain or (np.isnan(gain) and not np.isnan(new_gain))
            preferred = bool(caption and better)
            if preferred:
                error = None if row.error in (EMPTY_CAPTION, CAPTION_NOT_UTF8) else row.error
                row, gain = row._replace(caption=caption, error=error), new_gain
            yield check_row(row, options), gain, preferred
    for file in filter(None, files):
        file.end()
    for at in empty:
        raise UserError(f"{files[at].path} has no score for any row of {path}", "no-scores")


def survey_rows(
    path: str, settings: Settings, state: FileState, count_tokens: Optional[Callable[[str], int]] = None
) -> Survey:
    """Look at all rows.

    Raises:
        UserError: a file cannot be read.
        JobFailed: the rows change meanwhile, or a worker was killed.
    """
    facts = all_image_facts(path, settings.workers, settings.quiet) if _OF_IMAGES & set(settings.rules) else None
    used = [(1 << bit, rule) for bit, rule in enumerate(CAPTION_RULES) if rule.name in settings.rules]
    problems, codes = [""], {"": 0}
    preferred = 0

    def items() -> Iterator[Tuple[str, int, float, int]]:
        nonlocal preferred
        for number, (checked, gain, is_new) in enumerate(_rows(path, settings, state, "looking at rows")):
            reason = checked.reason or ""
            if not reason and facts is not None and number < len(facts):
                reason = PROBLEMS[facts[number]["problem"]]
            if codes.setdefault(reason, len(codes)) == len(problems):
                problems.append(reason)
            preferred += is_new
            yield checked.caption, codes[reason], gain, checked.row.line_no

    def look(chunk: Sequence[Tuple[str, int, float, int]]) -> np.ndarray:
        rows = np.zeros(len(chunk), ROW)
        for at, (text, problem, gain, line) in enumerate(chunk):
            one = caption_facts(text, count_tokens)
            bits = sum(bit for bit, rule in used if rule.drops(text, one, settings.rules[rule.name]))
            opening = hash64(one.opening.encode("utf-8", "replace"))
            rows[at] = bits, one.chars, opening, problem, gain, line
        return rows

    chunks = chunks_of(items(), lambda item: len(item[0]))
    rows = np.concatenate([np.zeros(0, ROW), *map_chunks(look, chunks, settings.workers)])
    if facts is not None and len(facts) != len(rows):
        raise JobFailed(f"{path} changed while it was read")
    return Survey(
        rows, problems, preferred, facts, _leaks(facts, settings), _groups(facts, settings),
        np.random.default_rng(settings.seed).random(len(rows)),
    )  # fmt: skip


def _leaks(facts: Optional[np.ndarray], settings: Settings) -> Optional[np.ndarray]:
    if "not_in" not in settings.rules:
        return None
    own = usable(facts)
    leaks = np.zeros(len(facts), bool)
    for path in settings.rules["not_in"]:
        other = all_image_facts(path, settings.workers, settings.quiet)
        leaks |= np.isin(facts["content"], other["content"][other["problem"] == 0])
        there = other["perceptual"][usable(other)]
        distance = settings.rules.get("near_duplicates", LEAK_DISTANCE)
        leaks[own] |= nearest_in(facts["perceptual"][own], there, distance)[0] >= 0
    return leaks


def _groups(facts: Optional[np.ndarray], settings: Settings) -> Optional[np.ndarray]:
    distance = settings.rules.get("near_duplicates")
    return None if distance is None else near_groups(facts["perceptual"], distance, usable(facts))


# ---- decision


class Decision(NamedTuple):
    """reason: int [n], 0 for rows that stay, else an index in reasons. alone, together: rows that each rule in use
    drops of all usable rows, and of those that the rules before it leave."""

    reason: np.ndarray
    reasons: List[str]
    alone: Dict[str, int]
    together: Dict[str, int]


def decide(survey: Survey, settings: Settings) -> Decision:
    """Apply the rules in the order of RULES."""
    good = survey.rows["problem"] == 0
    reasons, reason = list(survey.problems), survey.rows["problem"].astype(np.int64)
    alone, together = {}, {}
    for rule in RULES:
        if rule.name not in settings.rules:
            continue
        for counts, left in ((alone, good), (together, reason == 0)):
            if rule in CAPTION_RULES:
                dropped = left & ((survey.rows["bits"] >> CAPTION_RULES.index(rule)) & 1).astype(bool)
            elif rule in IMAGE_RULES:
                dropped = left & rule.drops(survey.facts, settings.rules[rule.name])
            else:
                dropped = rule.drops(survey, settings, left)
            counts[rule.name] = int(dropped.sum())
        reason[dropped] = len(reasons)
        reasons.append(rule.reason)
    return Decision(reason, reasons, alone, together)


class Result(NamedTuple):
    """rows, kept: their numbers. preferred: rows whose caption is of Settings.prefer. unscored: usable rows without a
    gain, if "drop_scores" is a rule. unusable: rows by reason."""

    rows: int
    kept: int
    preferred: int
    unscored: int
    unusable: Dict[str, int]
    alone: Dict[str, int]
    together: Dict[str, int]


def output_names(output: str) -> List[str]:
    """The files that are written: the rows, rejected rows, and settings with counts."""
    stem = os.path.splitext(output)[0]
    return [output, f"{stem}.rejected.tsv", f"{stem}.curation.json"]


def curate(
    path: str,
    output: Optional[str],
    settings: Settings,
    shown: Dict[str, Any],
    count_tokens: Optional[Callable[[str], int]] = None,
    overwrite: bool = False,
) -> Result:
    """Write the rows of `path` that stay to `output`, and beside it the other files of output_names; nothing if None.

    shown: the settings as the report has them. count_tokens: needed by rules of tokens. overwrite:
    replace an `output` that no earlier run wrote.

    Raises:
        UserError: a file cannot be read, or would be overwritten.
        JobFailed: no row stays, the disk is full, or the rows change while they are read.
    """
    for file in (path, *settings.inputs):
        if file is not None:
            check_input(file)
    state = FileState.of(path)
    if output is not None:
        keep_images([path, *settings.inputs], output_names(output))
        record = output_names(output)[2]
        # The record of a train.json that was made of a train.tsv lies beside both.
        source = str(read_json_object(record).get("input")) if os.path.isfile(record) else output
        check_earlier(output, os.path.realpath(source) != os.path.realpath(output), overwrite)
    survey = survey_rows(path, settings, state, count_tokens)
    found = decide(survey, settings)
    problems = np.bincount(survey.rows["problem"], minlength=len(survey.problems)).tolist()
    unusable = {reason: count for reason, count in zip(survey.problems, problems) if reason and count}
    kept = int((found.reason == 0).sum())
    unscored = int((np.isnan(survey.rows["gain"]) & (survey.rows["problem"] == 0)).sum())
    unscored *= "drop_scores" in settings.rules
    result = Result(len(survey.rows), kept, survey.preferred, unscored, unusable, found.alone, found.together)
    if output is None:
        return result
    if not kept:
        counts = Counter({found.reasons[code]: int(n) for code, n in enumerate(np.bincount(found.reason)) if n})
        text = f"no row of {path} is left: {ranked(counts)}"
        if counts[NO_CAPTION] + counts[EMPTY_CAPTION]:
            text += "; convert_labels.py --captions adds those of predict.py's results"
        raise JobFailed(text)
    with disk_errors(output):
        _write(path, output, settings, state, survey, found)
        write_json(output_names(output)[2], {"input": path, "settings": shown, **result._asdict()})
    return result


def _write(path: str, output: str, settings: Settings, state: FileState, survey: Survey, found: Decision) -> None:
    duplicate = found.reasons.index("near duplicate") if "near_duplicates" in settings.rules else -1
    # The line of the first row that stays of each group.
    stays, kept_line = np.flatnonzero(found.reason == 0)[::-1], np.zeros(len(survey.rows), np.int64)
    if duplicate > 0:
        kept_line[survey.groups[stays]] = survey.rows["line"][stays]
    with atomic_write(output_names(output)[1]) as rejected, output_rows(
        output, path, settings.images == "reference", settings.prompt
    ) as add:
        for number, (checked, _, _) in enumerate(_rows(path, settings, state, "writing rows")):
            code = int(found.reason[number])
            reason = checked.reason or found.reasons[code]
            if not reason:
                add(checked.row, checked.image, checked.caption)
                continue
            if code == duplicate and kept_line[survey.groups[number]]:
                reason += f" of line {kept_line[survey.groups[number]]}"
            rejected.write(f"{checked.row.line}\t{row_id(checked.row)}\t{reason}\n")
