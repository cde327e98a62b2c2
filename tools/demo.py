"""Run the complete pipeline on the CPU, from drawn ads to captions of unseen ads, as `make demo` does.

    python tools/demo.py [--out demo]

Each stage runs commands of the project as a user would; their output goes to OUT/logs. A finished stage is skipped,
unless its commands, scripts or configuration, or an earlier stage, have changed. At the end it prints scores (before
and after tuning, and on blank images), the captions of three ads with their errors marked, and commands to try next.
OUT/index.html shows the same with images; OUT/results.txt and OUT/results.json have the figures. The exit status is 1
if the tuned model misses --target.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from statistics import fmean
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write, cleaning_up  # noqa: E402
from paddlemix.utils.json_files import write_json  # noqa: E402

PAGE = os.path.join(ROOT, "tools", "demo_page.html")
# Columns of the terminal that a stage's number and title take.
TITLE_WIDTH = 50
# How many ads are shown with their captions: in the terminal, and on the page.
SHOWN, PICTURED = 3, 12
CAPTION_SCORES = ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L")
COLUMNS = {"base": "pretrained", "tuned": "tuned", "blank": "tuned, blank images"}
# Folders that the READMEs' other commands and benchmarks/demo_seeds.py make in the demo's folder.
BESIDE = {"curation", "real_samples", "seeds"}
# Accuracy that the tuned model may lose per attribute, and for all at once: two of 200 ads.
TOLERANCE = 0.01


class Stage(NamedTuple):
    """name: a file name. title: for people. commands: programs and arguments, run from the project's top folder.
    bar: the description of the progress bar that a command draws, if it draws one. makes: what it writes. Removed
    before it runs: what a killed run left there would be in its way. fills: folders in which it replaces files."""

    name: str
    title: str
    commands: List[List[str]]
    bar: str = ""
    makes: Tuple[str, ...] = ()
    fills: Tuple[str, ...] = ()


def command(text: str, values: Mapping[str, Any]) -> List[str]:
    """The words of a command, in which values have their places: `{python} tools/x.py {out}/rows.tsv`."""
    return [word.format_map({"python": sys.executable, **values}) for word in text.split()]


def plan(args: argparse.Namespace) -> List[Stage]:
    """The stages in order."""

    def paths(*names: str) -> Tuple[str, ...]:
        return tuple(os.path.join(args.out, name) for name in names)

    def dataset(folder: str) -> str:
        files = {"train": "train.json", "eval": "val.json"}
        template = os.path.join(args.out, folder, "chat_template.json")
        data = {part: os.path.join(args.out, folder, name) for part, name in files.items()}
        return json.dumps({part: {"data_files": path, "chat_template": template} for part, path in data.items()})

    values = {**vars(args), "to_pretrain": dataset("pretrain"), "to_tune": dataset("tune")}

    def words(text: str, steps: Optional[int] = None) -> List[str]:
        return command(text + f" --max_steps {steps}" * bool(steps), values)

    ads = args.pretrain_rows + args.tune_rows + args.held_out_rows
    return [
        Stage("draw", f"draw {ads:,} ads", [words(
            "{python} tools/make_demo_data.py {out}/data --seed {seed} --pretrain {pretrain_rows} --tune {tune_rows} "
            "--held_out {held_out_rows}"
        )], "drawing", fills=paths("data")),
        Stage("convert_pretrain", "convert the ads with plain captions", [words(
            "{python} tools/convert_labels.py {out}/data/pretrain.tsv {out}/pretrain"
        )], fills=paths("pretrain")),
        Stage("pretrain", "pretrain a tiny MGen-VL on them", [words(
            "{python} tools/make_tiny_model.py {out}/tiny_model --seed {seed} "
            "--captions {out}/data/pretrain.tsv {out}/data/tune.tsv "
            "--pretrain config/mgen_vl/pretrain_demo.json --seed {seed} --dataset {to_pretrain} "
            "--output_dir {out}/pretrained", args.pretrain_steps,
        )], "training", paths("tiny_model", "pretrained")),
        Stage("convert_tune", "convert the ads with ad captions", [words(
            "{python} tools/convert_labels.py {out}/data/tune.tsv {out}/tune"
        )], fills=paths("tune")),
        Stage("tune", "tune LoRA and attn_pool on them", [words(
            "{python} supervised_finetune.py config/mgen_vl/lora_sft_demo.json --seed {seed} "
            "--model_name_or_path {out}/pretrained --output_dir {out}/lora --dataset {to_tune}", args.tune_steps,
        )], "training", paths("lora")),
        Stage("merge", "merge the tuned weights into the model", [words(
            "{python} merge_lora_params.py --model_name_or_path {out}/pretrained --lora_path {out}/lora "
            "--merge_model_path {out}/merged"
        )], makes=paths("merged")),
        Stage("caption", f"caption {args.held_out_rows} unseen ads: before, after, blank", [
            words("sh run.sh {out}/data/held_out.tsv {out}/base.txt {out}/pretrained {python}"),
            words("sh run.sh {out}/data/held_out.tsv {out}/tuned.txt {out}/merged {python}"),
            words("sh run.sh {out}/data/held_out_blank.tsv {out}/blank.txt {out}/merged {python}"),
        ], "captions", paths(*(f"{name}.txt{suffix}" for name in COLUMNS for suffix in ("", ".partial")))),
        Stage("score", "score the captions, write the report page", [words(
            "{python} tools/evaluate_captions.py {out}/tuned.txt {out}/data/held_out_captions.tsv "
            "--compare {out}/base.txt --html {out}/report.html --images {out}/data/held_out.tsv"
        )], makes=paths("report.html")),
        Stage("chat", "ask about one of the images", [words("{python} chat.py {out}/merged {out}/data/ad0.jpg")]),
    ]  # fmt: skip


# --- running ---


def _record_path(out: str, stage: Stage) -> str:
    return os.path.join(out, "logs", f"{stage.name}.json")


def fingerprint(stage: Stage) -> str:
    """Changes with the commands, the scripts that they run, and the configurations that they name."""
    digest = hashlib.sha256(json.dumps(stage.commands).encode())
    for word in (word for command in stage.commands for word in command):
        if word.endswith((".py", ".sh", ".json")) and os.path.isfile(os.path.join(ROOT, word)):
            with open(os.path.join(ROOT, word), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


def finished(out: str, stage: Stage) -> Optional[float]:
    """Seconds that this very stage took when it finished earlier, or None; also if a file that it wrote is missing."""
    try:
        with open(_record_path(out, stage), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return None
    same = record.get("fingerprint") == fingerprint(stage)
    return record["seconds"] if same and all(map(os.path.exists, record.get("files", stage.makes))) else None


def _files(stage: Stage) -> List[str]:
    """What a finished stage has written. Hidden files, such as indexes, are replaced when they are needed."""
    found: List[str] = []
    for path in (*stage.makes, *stage.fills):
        names = [name for name in sorted(os.listdir(path)) if name[0] != "."] if os.path.isdir(path) else []
        found += [os.path.join(path, name) for name in names] or ([path] if os.path.exists(path) else [])
    return found


def claim(out: str, first: str) -> None:
    """Make OUT/logs, unless OUT holds something else than an earlier run, whose first stage has left its log.

    Raises:
        UserError: it does.
    """
    log = os.path.join(out, "logs", f"{first}.log")
    if os.path.isdir(out) and set(os.listdir(out)) - BESIDE and not os.path.isfile(log):
        raise UserError(f"{out} is not empty, and there is no {log} of an earlier run: give another folder")
    os.makedirs(os.path.dirname(log), exist_ok=True)
    open(log, "a").close()


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


class _StageLine:
    """The line of a running stage: a bar with the time left on a terminal; once it has finished, its seconds."""

    def __init__(self, head: str):
        from tqdm import tqdm

        self._head = head
        self._bar = tqdm(
            total=1.0,
            desc=head,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            leave=False,
            bar_format="{desc}{percentage:4.0f}% |{bar:24}| {elapsed}, left: {remaining}{postfix}",
        )
        # The clock goes on while a command says nothing.
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def _tick(self) -> None:
        while not self._ended.wait(1):
            self._bar.refresh()

    def show(self, done: float, loss: Optional[str]) -> None:
        """done: share of the stage, from 0 to 1."""
        if loss:
            self._bar.set_postfix_str(f"loss {loss}", refresh=False)
        self._bar.update(max(0.0, done - self._bar.n))

    def end(self, text: str) -> None:
        self._ended.set()
        self._clock.join()
        self._bar.close()
        print(f"{self._head} {text}", flush=True)


def run_stage(out: str, stage: Stage, head: str) -> float:
    """Run a stage's commands, their output to a log file and how far they are to the screen. Returns its seconds.

    Raises:
        JobFailed: a command ended with another status than 0; its last lines are shown.
    """
    log_path = os.path.join(out, "logs", f"{stage.name}.log")
    start = time.monotonic()
    last: collections.deque = collections.deque(maxlen=15)
    environment = dict(os.environ, PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1", PROGRESS_SECONDS="0.5")
    # A bar as Progress writes it to a log, and what training adds behind it.
    drawn = re.compile(rf"{stage.bar}: +(\d+)%(?:.*\bloss ([\d.]+))?")
    line_of_stage = _StageLine(head)
    status = 0
    with cleaning_up(), open(log_path, "w", buffering=1, encoding="utf-8") as log:
        for number, command in enumerate(stage.commands):
            log.write(f"$ {' '.join(map(shlex.quote, command))}\n")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                # A group of its own, so that all of it can be ended together.
                start_new_session=True,
            )
            try:
                for line in process.stdout:
                    log.write(line)
                    last.append(line)
                    bar = drawn.match(line) if stage.bar else None
                    if bar:
                        line_of_stage.show((number + int(bar.group(1)) / 100) / len(stage.commands), bar.group(2))
                status = process.wait()
            except BaseException:
                # The stage and whatever it started: none of it may train on alone.
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                line_of_stage.end("stopped")
                raise
            if status:
                break
            line_of_stage.show((number + 1) / len(stage.commands), None)
    seconds = time.monotonic() - start
    if status:
        line_of_stage.end("failed")
        sys.stderr.writelines(last)
        raise JobFailed(f"stage {stage.name} ended with status {status}; its whole output is in {log_path}")
    line_of_stage.end(_duration(seconds))
    record = {"fingerprint": fingerprint(stage), "seconds": seconds, "files": _files(stage)}
    write_json(_record_path(out, stage), record)
    return seconds


def run_all(args: argparse.Namespace) -> Dict[str, float]:
    """Run what has not finished yet. Returns seconds by stage, those of earlier runs included."""
    stages = plan(args)
    claim(args.out, stages[0].name)
    if args.restart:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_record_path(args.out, stages[0]))
    seconds: Dict[str, float] = {}
    earlier_holds = True
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.title}".ljust(TITLE_WIDTH)
        done = finished(args.out, stage) if earlier_holds else None
        if done is None:
            earlier_holds = False
            # What later stages have made is out of date now, even if this run is killed.
            for stale in stages[number - 1 :]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_record_path(args.out, stale))
            for made in stage.makes:
                if os.path.isdir(made):
                    shutil.rmtree(made)
                elif os.path.exists(made):
                    os.unlink(made)
            seconds[stage.name] = run_stage(args.out, stage, head)
        else:
            seconds[stage.name] = done
            print(f"{head} skipped: finished before, in {_duration(done)}", flush=True)
    return seconds


# --- what came out ---


class Outcome(NamedTuple):
    """references: id → caption. captions: the same of each of COLUMNS. scores: of each of COLUMNS, name → value."""

    references: Dict[str, str]
    captions: Dict[str, Dict[str, str]]
    scores: Dict[str, Dict[str, float]]


def evaluate(out: str) -> Outcome:
    """Read and score the captions."""
    from make_demo_data import parse_caption

    from paddlemix.datasets.caption_files import read_captions
    from paddlemix.metrics.captions import score_captions

    references = read_captions(os.path.join(out, "data", "held_out_captions.tsv"))
    truth = [parse_caption(caption) for caption in references.values()]
    outcome = Outcome(references, {}, {})
    for name in COLUMNS:
        captions = outcome.captions[name] = read_captions(os.path.join(out, f"{name}.txt"))
        found = [parse_caption(captions[key]) for key in references]
        right = {name: [one.get(name) == true[name] for one, true in zip(found, truth)] for name in truth[0]}
        scored = score_captions(captions, {key: [caption] for key, caption in references.items()})
        outcome.scores[name] = {
            "attribute accuracy": fmean(one for values in right.values() for one in values),
            **{f"  {name}": fmean(values) for name, values in right.items()},
            "all attributes right": fmean(map(all, zip(*right.values()))),
            **{metric: scored.corpus[metric] for metric in CAPTION_SCORES},
        }
    return outcome


def verdicts(scores: Mapping[str, Mapping[str, float]], target: float) -> Dict[str, bool]:
    """What the demo is to show, and whether it did. The first decides the exit status."""
    base, tuned, blank = (scores[name] for name in COLUMNS)
    kept = [name for name in tuned if name.startswith("  ") or name == "all attributes right"]
    return {
        f"tuned: at least {target:.0%} of the attributes right": tuned["attribute accuracy"] >= target,
        f"each attribute, and all at once: at most {100 * TOLERANCE:.0f} point below the pretrained model": all(
            tuned[name] >= base[name] - TOLERANCE - 1e-9 for name in kept
        ),
        "the new style: CIDEr at least doubled": tuned["CIDEr"] >= 2 * base["CIDEr"],
        "on blank images: less than half of the tuned model's accuracy": (
            blank["attribute accuracy"] < tuned["attribute accuracy"] / 2
        ),
    }


def marked(caption: str, reference: str, right: Callable[[str], str], wrong: Callable[[str, str], str]) -> str:
    """The caption with each attribute that it states as right(value) or wrong(value, true value)."""
    from make_demo_data import find_attributes, parse_caption

    truth = parse_caption(reference)
    spans = {span: field for field, span in find_attributes(caption).items()}
    parts, end = [], 0
    for (start, stop), field in sorted(spans.items()):
        value = caption[start:stop]
        parts += [caption[end:start], right(value) if value == truth[field] else wrong(value, str(truth[field]))]
        end = stop
    return "".join(parts) + caption[end:]


def count_right(caption: str, reference: str) -> str:
    """`7 of 8`"""
    from make_demo_data import parse_caption

    found, truth = parse_caption(caption), parse_caption(reference)
    return f"{sum(found[field] == truth[field] for field in truth)} of {len(truth)}"


def choose_examples(outcome: Outcome, count: int) -> List[str]:
    """The first ads; the last of them gives way to the first one that the tuned model has wrong, if none is yet."""
    keys = list(outcome.references)
    wrong = [key for key in keys if outcome.captions["tuned"][key] != outcome.references[key]]
    if not wrong or wrong[0] in keys[:count]:
        return keys[:count]
    return [*keys[: count - 1], wrong[0]]


def score_lines(scores: Mapping[str, Mapping[str, float]]) -> List[Tuple[str, List[str]]]:
    """Rows of the table: name of a score, and its value in each of COLUMNS."""
    form = {name: "{:.3f}" if name in CAPTION_SCORES else "{:.1%}" for name in scores["tuned"]}
    return [(name, [form[name].format(scores[column][name]) for column in COLUMNS]) for name in form]


def report(args: argparse.Namespace, outcome: Outcome, seconds: Dict[str, float]) -> str:
    """The table, three ads with their captions, the verdicts and what to run next, as text."""
    lines = [f"{len(outcome.references)} unseen ads; captions tokenized by character", ""]
    lines.append(" " * 24 + "".join(f"{title:>21}" for title in COLUMNS.values()))
    for name, values in score_lines(outcome.scores):
        lines.append(name.ljust(24) + "".join(f"{value:>21}" for value in values))
    lines += ["(The pretrained model writes the other style of captions, so its CIDEr is low.)", ""]
    lines.append("✓ right, ✗ wrong (the truth); blank images all get the same caption, shown with the first ad:")
    for number, key in enumerate(choose_examples(outcome, SHOWN)):
        for name, title in COLUMNS.items():
            if name != "blank" or not number:
                caption, reference = outcome.captions[name][key], outcome.references[key]
                text = marked(caption, reference, "✓{}".format, "✗{}({})".format)
                lines.append(f"{f'{key}  {title}':<26} {count_right(caption, reference)}: {text}")
    lines.append("")
    for text, holds in verdicts(outcome.scores, args.target).items():
        lines.append(f"{'yes' if holds else 'NO '}  {text}")
    lines += [f"all stages, skipped ones included: {_duration(sum(seconds.values()))}", "", "To try next:"]
    for what, how in next_steps(args):
        lines.append(f"  {what:<26} {how}")
    return "\n".join(lines) + "\n"


def next_steps(args: argparse.Namespace) -> List[Tuple[str, str]]:
    """What there is to look at, and the file or the command, as they were run."""
    stages = {stage.name: stage.commands[-1] for stage in plan(args)}

    def path(*parts: str) -> str:
        return os.path.join(args.out, *parts)

    def typed(stage: str) -> str:
        # From the top folder, as `make` calls it.
        return " ".join(shlex.quote(word.replace(ROOT + os.sep, "", 1)) for word in stages[stage])

    return [
        ("the same, with images", path("index.html")),
        ("every caption", path("report.html")),
        ("  made by", typed("score")),
        ("ask about another image", typed("chat").replace("ad0.jpg", "ad1.jpg")),
        ("  more images", path("data", "ad0.jpg") + " … ad7.jpg"),
        ("loss curve of the tuning", path("lora", "loss_curve.png")),
        ("output of each stage", path("logs", "")),
    ]


def _picture(data: bytes, kind: str, alt: str) -> str:
    """An <img> that holds its picture."""
    return f'<img alt="{alt}" src="data:image/{kind};base64,{base64.b64encode(data).decode("ascii")}">'


def write_page(args: argparse.Namespace, outcome: Outcome, seconds: Dict[str, float]) -> str:
    """Write OUT/index.html: one file that asks for nothing from elsewhere. Returns its path."""
    from paddlemix.datasets.thumbnails import read_thumbnails

    keys = choose_examples(outcome, PICTURED)
    pictures = read_thumbnails(os.path.join(args.out, "data", "held_out.tsv"), keys, 160)

    def shown(name: str, key: str) -> str:
        caption, reference = html.escape(outcome.captions[name][key], quote=False), outcome.references[key]
        return marked(caption, reference, "<b>{}</b>".format, '<del>{}</del><ins lang="zh">{}</ins>'.format)

    def row(tag: str, cells: List[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def curve(folder: str) -> str:
        """The run's loss; a run shorter than its logging_steps draws none."""
        path = os.path.join(args.out, folder, "loss_curve.png")
        if not os.path.exists(path):
            return ""
        with open(path, "rb") as file:
            return _picture(file.read(), "png", f"loss of {folder}")

    names = {"base": "pretrained 预训练", "tuned": "tuned 微调后", "blank": "blank image 空白图"}
    ads = []
    for key in keys:
        captions = "".join(
            f"<dt>{names[name]}</dt><dd>{shown(name, key)}</dd>" for name in COLUMNS if name != "blank" or not ads
        )
        ads.append(
            f"<figure>{_picture(pictures[key].webp, 'webp', key)}<figcaption><dl>"
            f"<dt>reference 参考</dt><dd>{html.escape(outcome.references[key])}</dd>{captions}"
            "</dl></figcaption></figure>"
        )
    table = [row("td", [name.replace("  ", "·\u00a0"), *cells]) for name, cells in score_lines(outcome.scores)]
    values: Dict[str, Any] = {
        "count": len(outcome.references),
        "head": row("th", ["", *names.values()]),
        "scores": "\n".join(table),
        "ads": "\n".join(ads),
        "curves": "\n".join(map(curve, ("pretrained", "lora"))),
        "stages": "\n".join(
            row("td", [stage.title, _duration(seconds[stage.name]), f'<a href="logs/{stage.name}.log">log</a>'])
            for stage in plan(args)
        ),
        "total": _duration(sum(seconds.values())),
        "commands": "\n".join(f"# {what.strip()}\n{html.escape(how)}" for what, how in next_steps(args)),
    }
    with open(PAGE, encoding="utf-8") as file:
        template = string.Template(file.read())
    path = os.path.join(args.out, "index.html")
    with atomic_write(path) as file:
        file.write(template.substitute(values))
    return path


def parse_arguments(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--out", type=cli.output_folder, default="demo", help="output folder (default: demo)"
    )
    parser.add_argument("--restart", action="store_true", help="run every stage again")
    parser.add_argument("--seed", type=cli.seed, default=7, help="seed of ads, weights and sample order (default: 7)")
    rows = cli.number(int, 2)
    parser.add_argument("--pretrain_rows", type=rows, default=6000, help="ads for pretraining (default: 6000)")
    parser.add_argument("--tune_rows", type=rows, default=3000, help="ads for tuning (default: 3000)")
    parser.add_argument("--held_out_rows", type=rows, default=200, help="unseen ads to caption (default: 200)")
    parser.add_argument("--pretrain_steps", type=int, help="steps of pretraining (default: by the config's epochs)")
    parser.add_argument("--tune_steps", type=int, help="steps of tuning (default: by the config's epochs)")
    parser.add_argument("--target", type=float, default=0.98, help="attribute accuracy to reach (default: 0.98)")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    # The stages run from the top folder, wherever this was called.
    inside = os.path.relpath(os.path.abspath(args.out), ROOT)
    args.out = os.path.abspath(args.out) if inside.startswith(os.pardir) else inside
    os.chdir(ROOT)
    seconds = run_all(args)
    outcome = evaluate(args.out)
    write_page(args, outcome, seconds)
    text = report(args, outcome, seconds)
    with atomic_write(os.path.join(args.out, "results.txt")) as file:
        file.write(text)
    holds = verdicts(outcome.scores, args.target)
    record = {"scores": outcome.scores, "verdicts": holds, "seconds": seconds}
    write_json(os.path.join(args.out, "results.json"), record)
    print("\n" + text, end="")
    return 0 if next(iter(holds.values())) else JobFailed.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
