"""Check a submission folder against the contest's rules: sections (四), what to submit, and (六), what may change."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from paddlemix.checkpoint import WeightsReader, open_weights
from paddlemix.checkpoint.structure import LANGUAGE_KEYS, differences, language
from paddlemix.contest import fresh, trial
from paddlemix.contest.pack import NAMES, README, RUN_SH, SCRIPT, SOURCE, WEIGHTS
from paddlemix.contest.sources import (
    REQUIREMENTS_NAME,
    Import,
    files_reached,
    foreign_imports,
    modules_of,
    parse_requirement,
)
from paddlemix.contest.weights import Change, look_through
from paddlemix.datasets.rows import read_rows
from paddlemix.datasets.tsv import check_input, row_id
from paddlemix.inference.source import find_model_folder
from paddlemix.models.mgen_vl.config_values import plain_config
from paddlemix.models.mgen_vl.parameters import check_weights, count, parameter_shapes
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import cleaning_up
from paddlemix.utils.language import tr
from paddlemix.utils.texts import some

# In the order of the report: (section and number of the rule, its text).
RULES = {
    "names": ("(四)", "requirements.txt, run.sh, src/predict.py and weights/ with one model folder"),
    "config": ("(四) 3", "config.json is next to the weights, with valid values"),
    "weights": ("(四) 1", "the weights are complete, load without executing code, and match config.json"),
    "finite": ("(四) 1", "all weights are finite"),
    "requirements": ("(四)", "requirements.txt lists what predict.py imports, and not Paddle"),
    "fresh": ("(四) 1", "all imports work in a fresh environment with nothing else"),
    "runs": ("(四) 1", "run.sh works from another path, with and without the fourth argument"),
    "read_only": ("(四) 1", "it writes nothing into its own folder, which may be read-only"),
    "offline": ("(四) 1", "it needs no network"),
    "lines": ("(四) 2", "one line per row, in the same order"),
    "paddle": ("(六) 1", "the program uses Paddle and imports no other framework"),
    "language": ("(六) 2", "the LLM's structure and number of parameters are unchanged"),
    "changes": ("(六) 3", "what changed (allowed: weights of the LLM, and anything outside it)"),
}
PASS, FAIL, NOT_RUN = "pass", "FAIL", "----"

# Maximum names in a finding.
_SHOWN = 5
_FRAMEWORKS = {
    "torch", "torchvision", "tensorflow", "keras", "jax", "flax", "mxnet", "mindspore", "onnxruntime", "tensorrt",
    "vllm", "oneflow", "megengine",
}  # fmt: skip
# Extensions of weights files, or of files that may be taken for them.
_WEIGHTS_LIKE = (".pdparams", ".safetensors", ".bin", ".pdopt", ".pkl", ".pth", ".pt")
_OF_RUNS = ("runs", "read_only", "offline", "lines")
TIME_LIMIT = 3600.0


@dataclass
class Verdict:
    """status: PASS, FAIL or NOT_RUN. problems: why it failed, or was not run. notes: further information."""

    status: str = PASS
    problems: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)


class Report(Dict[str, Verdict]):
    """{key of RULES: Verdict}, filled rule by rule."""

    def look(self, key: str, rule: Callable[..., None], *arguments: Any) -> None:
        """Call rule(*arguments, verdict), which adds problems and notes; a UserError becomes a problem."""
        found = self[key] = Verdict()
        try:
            rule(*arguments, found)
        except UserError as error:
            found.problems.append(_reason(error))
        if found.problems:
            found.status = FAIL

    def waits(self, why: str, *keys: str) -> None:
        """These rules cannot be checked before another one passes."""
        self.update({key: Verdict(NOT_RUN, [why]) for key in keys})

    def left_out(self, why: str, key: str) -> None:
        """This rule was not requested."""
        self[key] = Verdict(NOT_RUN, notes=[why])

    def has_passed(self, *keys: str) -> bool:
        return all(self[key].status == PASS for key in keys)

    @property
    def passed(self) -> bool:
        """No rule failed, and rules that were not run were not requested."""
        return all(verdict.status == PASS or not verdict.problems for verdict in self.values())

    def lines(self) -> List[str]:
        """The report: each rule with its section and number in the notebook."""
        lines = []
        for key, (rule, text) in RULES.items():
            verdict = self[key]
            lines.append(f"{tr(verdict.status)}  {rule:<6} {tr(text)}")
            lines += [f"        {tr(line)}" for line in [*verdict.problems, *verdict.notes]]
        return lines


class _Model(NamedTuple):
    """An opened model folder. config: see plain_config."""

    config: Any
    reader: WeightsReader


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


# ---- the rules, one function each


def _names(folder: str, found: Verdict) -> None:
    for name, kind in ((REQUIREMENTS_NAME, os.path.isfile), (RUN_SH, os.path.isfile), (SOURCE, os.path.isdir),
                       (f"{SOURCE}/{SCRIPT}", os.path.isfile), (WEIGHTS, os.path.isdir)):  # fmt: skip
        if not kind(os.path.join(folder, name)):
            found.problems.append(f"no {name}")
    real = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            target = os.path.realpath(path)
            if os.path.islink(path) and not (target.startswith(real + os.sep) and os.path.exists(target)):
                found.problems.append(f"{os.path.relpath(path, folder)} is a link to {target}: replace it by the file")
    weights = os.path.join(folder, WEIGHTS)
    if os.path.isdir(weights):
        models = [name for name in sorted(os.listdir(weights)) if os.path.isdir(os.path.join(weights, name))]
        if len(models) != 1:
            listed = some(models, _SHOWN) or "none"
            found.problems.append(f"{WEIGHTS}/ must contain exactly one model folder, not {listed}")
    script = os.path.join(folder, RUN_SH)
    if os.path.isfile(script):
        with open(script, "rb") as file:
            windows = b"\r\n" in file.read()
        done = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
        if windows:
            found.problems.append("run.sh has Windows line endings (CR LF): save it with LF")
        elif done.returncode:
            found.problems.append(f"sh cannot parse run.sh: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    more = sorted(set(os.listdir(folder)) - {*NAMES, README})
    if more:
        found.notes.append(f"not needed: {some(more, _SHOWN)}")


def _requirements(folder: str, tops: Dict[str, Import], found: Verdict) -> None:
    """tops: what predict.py imports, directly or not."""
    named = {}
    with open(os.path.join(folder, REQUIREMENTS_NAME), encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                wanted = parse_requirement(line)
            except UserError as error:
                found.problems.append(f"line {number}: {error}")
                continue
            if wanted is not None:
                named[wanted.package] = wanted
                if wanted.package.startswith("paddlepaddle"):
                    found.problems.append(f"line {number}: {wanted.text} would replace the platform's Paddle")
    named_so = {"paddle", *(package.replace("-", "_") for package in named)}
    for top, one in sorted(tops.items()):
        if top in named_so or any(top in modules_of(package) for package in named):
            continue
        if one.guarded:
            found.notes.append(f"{top} is not listed; {one.file}:{one.line} also works without it")
        else:
            found.problems.append(f"{one.file}:{one.line} imports {top}, which requirements.txt does not list")


def _paddle(tops: Dict[str, Import], found: Verdict) -> None:
    for top in sorted(_FRAMEWORKS & set(tops)):
        found.problems.append(f"{tops[top].file}:{tops[top].line} imports {top}")
    if "paddle" not in tops:
        found.problems.append(f"{SCRIPT} does not import paddle, directly or through another file of {SOURCE}/")


def _finite(
    model: _Model, base: Optional[_Model], changes: Dict[str, Change], progress: bool, found: Verdict
) -> None:
    """Fills `changes` on the way: the files are read once."""
    bad, seen = look_through(model.reader, base.reader if base else None, progress)
    changes.update(seen)
    if bad:
        counted = (f"{name} ({count:,})" for name, count in bad.items())
        found.problems.append(f"values that are NaN or infinite: {some(counted, _SHOWN)}")


def _language(model: _Model, base: Optional[_Model], found: Verdict) -> None:
    # Adapters would be additional parameters.
    ours = {name: shape for name, shape in model.reader.shapes().items() if not name.startswith("visual.")}
    if base is None:
        theirs = language(parameter_shapes(model.config))
        found.notes.append("compared with its own config.json only; give --base to compare with the base model")
    else:
        theirs = language(base.reader.shapes())
        for key in LANGUAGE_KEYS:
            mine, its = getattr(model.config, key), getattr(base.config, key)
            if mine != its:
                found.problems.append(f"config.json: {key} is {mine}, but {its} in the base")
    found.problems += [f"tensors of the LLM: {line}" for line in differences(ours, theirs, _SHOWN)]
    if count(ours) != count(theirs):
        found.problems.append(f"the LLM has {count(ours):,} parameters instead of {count(theirs):,}")
    else:
        found.notes.append(f"{count(ours):,} parameters in {len(ours)} tensors")


def _changes(changes: Dict[str, Change], found: Verdict) -> None:
    for group, change in changes.items():
        text = f"{group}: {change.changed} of {change.tensors} tensors differ"
        if change.changed:
            text += f", by at most {change.largest:.3g}"
        for kind in ("reshaped", "new", "gone"):
            names = getattr(change, kind)
            if names:
                text += f"; {len(names)} {kind}: {some(names, _SHOWN)}"
        found.notes.append(text)
    if not any(change.changed or change.reshaped or change.new or change.gone for change in changes.values()):
        found.notes.append("nothing differs from the base: is this the tuned model?")


def _fresh(made: fresh.Fresh, found: Verdict) -> None:
    found.problems += made.problems
    found.notes.append(f"with {made.paddle}, which the run with the fourth argument also used")


def _lines(sample: str, runs: Dict[str, trial.Trial], found: Verdict) -> None:
    ids = [row_id(row) for row in read_rows(sample, want_caption=False)]
    for name, run in runs.items():
        if run.lines is None:
            found.problems.append(f"{name}: no results file")
            continue
        if len(run.lines) != len(ids):
            found.problems.append(f"{name}: {len(run.lines)} lines for {len(ids)} rows")
            continue
        empty = 0
        for number, (line, wanted) in enumerate(zip(run.lines, ids), 1):
            columns = line.decode("utf-8", "replace").split("\t")
            if len(columns) != 2 or columns[0] != wanted:
                found.problems.append(f"{name}: line {number} must be the id {wanted!r}, a tab and the caption")
                break
            empty += not columns[1].strip()
        if empty:
            found.notes.append(f"{name}: {empty} captions are empty")
    texts = [run.lines for run in runs.values()]
    if not found.problems:
        found.notes.append(f"{len(ids)} rows, {len(ids)} lines")
        if texts[0] != texts[-1]:
            found.notes.append("the two runs gave different captions")


# ---- all rules


def check_submission(
    folder: str,
    base: Optional[str] = None,
    sample: Optional[str] = None,
    python: str = sys.executable,
    fresh_venv: bool = False,
    time_limit: float = TIME_LIMIT,
    progress: bool = True,
) -> Report:
    """A verdict for each of RULES.

    base: the folder of the base model. sample: TSV to caption (default: a few generated rows). python: the interpreter
    of the runs. fresh_venv: create an environment with only the requirements (needs a network) and use it as the fourth
    argument. time_limit: seconds for a call of run.sh. run.sh is only run if files and weights are in order.

    Raises:
        UserError: no such folder, base or sample. JobFailed: no room for a copy, or no fresh environment.
    """
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file: give the folder; unpack an archive first", "is-a-file")
    if not os.path.isdir(folder):
        command = f"python tools/pack_submission.py --weights MODEL --out {shlex.quote(folder)}"
        raise UserError(f"no folder {folder}: make it with: {command}", "no-folder")
    if sample is not None:
        check_input(sample)
    report = Report()
    with contextlib.ExitStack() as stack:
        opened = None
        if base is not None:
            base_folder = find_model_folder(base)
            reader = stack.enter_context(open_weights(base_folder))
            opened = _Model(plain_config(base_folder), reader)
        files = _static(report, folder)
        _weights_rules(report, folder, opened, stack, progress)
    # A kill must not leave the weights read-only, which are linked into a copy.
    with cleaning_up(), tempfile.TemporaryDirectory(prefix="check") as scratch:
        if not fresh_venv:
            report.left_out("not checked without --fresh_venv (takes minutes and a network)", "fresh")
            fourth = python
        elif report.has_passed("names", "requirements"):
            made = fresh.try_requirements(python, folder, files, os.path.join(scratch, "fresh environment"))
            report.look("fresh", _fresh, made)
            fourth = made.python
        else:
            report.waits("not checked until requirements.txt passes", "fresh")
        if not report.has_passed("names", "config", "weights", "finite"):
            report.waits("not checked until files and weights pass", *_OF_RUNS)
            return report
        if sample is None:
            sample = os.path.join(scratch, "sample.tsv")
            trial.write_sample(sample)
        with trial.copied(folder, sample, progress) as place:
            runs = trial.both_calls(place, python, fourth, time_limit, progress)
            report.look("runs", _status, runs, time_limit)
            report.look("read_only", _written, runs, place)
            if not place.offline:
                report.left_out("not checked: this system does not allow `unshare --net`", "offline")
            elif not all(run.status == 0 for run in runs.values()):
                report.waits("unknown: a run without a network failed", "offline")
            else:
                report.look("offline", _offline)
            report.look("lines", _lines, sample, runs)
    return report


def _static(report: Report, folder: str) -> List[str]:
    """The rules on source texts. Returns the files of src/ that predict.py imports."""
    report.look("names", _names, folder)
    source = os.path.join(folder, SOURCE)
    try:
        files = files_reached(source, SCRIPT)
        tops = foreign_imports(source, files)
    except UserError as error:
        report.waits(_reason(error), "requirements", "paddle")
        return []
    report["names"].notes.extend(_unused(source, files))
    report.look("paddle", _paddle, tops)
    if os.path.isfile(os.path.join(folder, REQUIREMENTS_NAME)):
        report.look("requirements", _requirements, folder, tops)
    else:
        report.waits("there is no requirements.txt", "requirements")
    return files


def _unused(source: str, files: List[str]) -> List[str]:
    """A note on entries of src/ above 0.1 MB without any of `files`, the largest first."""
    sizes = {}
    for name in set(os.listdir(source)) - {file.split(os.sep)[0] for file in files}:
        path = os.path.join(source, name)
        inner = [os.path.join(parent, one) for parent, _, names in os.walk(path) for one in names] or [path]
        sizes[name] = sum(os.lstat(one).st_size for one in inner) / 1e6
    large = sorted((name for name in sizes if sizes[name] >= 0.1), key=sizes.get, reverse=True)
    unused = [f"{name} ({sizes[name]:.1f} MB)" for name in large]
    return [f"in {SOURCE}/, but not imported by {SCRIPT}: {some(unused, _SHOWN)}"] if unused else []


def _weights_rules(
    report: Report, folder: str, base: Optional[_Model], stack: contextlib.ExitStack, progress: bool
) -> None:
    """The rules on the model folder, which stays open as long as `stack`."""
    models: List[_Model] = []
    configs: List[Any] = []

    def config(found: Verdict) -> None:
        model = find_model_folder(os.path.join(folder, WEIGHTS))
        configs.append((model, plain_config(model)))
        found.notes.append(f"{os.path.relpath(model, folder)}/config.json")

    def weights(found: Verdict) -> None:
        model, values = configs[0]
        reader = stack.enter_context(open_weights(model))
        models.append(_Model(values, reader))
        check_weights(reader, parameter_shapes(values), model)
        elements = count(reader.shapes())
        found.notes.append(f"{elements:,} parameters in {len(reader)} tensors; files: {len(reader.files)}")
        files = {os.path.basename(path) for path in reader.files}
        others = sorted(name for name in set(os.listdir(model)) - files if name.endswith(_WEIGHTS_LIKE))
        if others:
            found.notes.append(f"neither opened nor needed: {some(others, _SHOWN)}")

    report.look("config", config)
    if configs:
        report.look("weights", weights)
    else:
        report.waits("not checked without a valid config.json", "weights")
    if not models:
        report.waits("not checked without valid weights", "finite", "language", "changes")
        return
    changes: Dict[str, Change] = {}
    report.look("finite", _finite, models[0], base, changes, progress)
    report.look("language", _language, models[0], base)
    if base is None:
        report.left_out("not checked without --base", "changes")
    else:
        report.look("changes", _changes, changes)


def _status(runs: Dict[str, trial.Trial], time_limit: float, found: Verdict) -> None:
    for name, run in runs.items():
        if run.status == 0:
            found.notes.append(f"{name}: {run.seconds:.0f} s")
            continue
        ended = f"took more than {time_limit:.0f} s" if run.status is None else f"exited with status {run.status}"
        found.problems.append(f"{name}: {ended}; last output:")
        found.problems += [f"    {line}" for line in run.output[-_SHOWN:]]


def _written(runs: Dict[str, trial.Trial], place: trial.TrialFolder, found: Verdict) -> None:
    written = sorted({name for run in runs.values() for name in run.written})
    if written:
        found.problems.append(f"it wrote {some(written, _SHOWN)}")
    found.notes.append(f"checked {place.how_read_only}")


def _offline(found: Verdict) -> None:
    found.notes.append("both runs had no network (unshare --net)")
