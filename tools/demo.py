"""The whole pipeline on the CPU, as `make demo` runs it: from drawn ads to captions of ads that were never seen.

    python tools/demo.py [--out demo]

Each stage is a command of the project, run as a user would run it; its output goes to OUT/logs. A stage that
has finished is not run again, unless its command, script or configuration or a stage before it has changed. At
the end stand a table (the model before and after tuning, and the tuned one on blank images) and a few
captions; both are also in OUT/results.txt. Exit status 1 when the tuned model stays below the target.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from typing import Dict, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402

# How a running stage gets on is shown at most this often: its last line with a loss or a rate.
ECHO_SECONDS = 5.0
_TELLING = re.compile(r"(?:\[.*\] - )?(.*(?:loss: \d|\d/s\]|%\|).*)")
WIDTH = 110
# How many rows are shown with all their captions.
SHOWN = 4
CAPTION_SCORES = ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L")


class Stage(NamedTuple):
    """name: a file name. title: for people. command: program and arguments, run from the project's top folder.
    makes: what it writes. Removed before it runs: what a killed run left there would be in its way."""

    name: str
    title: str
    command: List[str]
    makes: Tuple[str, ...] = ()


def plan(args: argparse.Namespace) -> List[Stage]:
    """The stages in order."""
    out, python = args.out, sys.executable

    def path(*parts: str) -> str:
        return os.path.join(out, *parts)

    def dataset(folder: str) -> str:
        return json.dumps(
            {
                part: {"data_files": path(folder, file), "chat_template": path(folder, "chat_template.json")}
                for part, file in (("train", "train.json"), ("eval", "val.json"))
            }
        )

    def steps(count: Optional[int]) -> List[str]:
        return ["--max_steps", str(count)] if count else []

    def predict(name: str, title: str, model: str, rows: str) -> Stage:
        command = ["sh", "run.sh", path("data", rows), path(f"{name}.txt"), path(model), python]
        return Stage(name, title, command, (path(f"{name}.txt"), path(f"{name}.txt.partial")))

    seed = str(args.seed)
    counts = ["--pretrain", args.pretrain_rows, "--tune", args.tune_rows, "--held_out", args.held_out_rows]
    return [
        Stage(
            "draw",
            "draw the ads",
            [python, "tools/make_demo_data.py", path("data"), "--seed", seed, *map(str, counts)],
        ),
        Stage(
            "convert_pretrain",
            "convert the first part (plain captions)",
            [python, "tools/convert_labels.py", path("data", "pretrain.tsv"), path("pretrain")],
        ),
        Stage(
            "pretrain",
            "make a tiny MGen-VL and pretrain all of it on the first part",
            [
                *(python, "tools/make_tiny_model.py", path("tiny_model"), "--seed", seed),
                *("--captions", path("data", "pretrain.tsv"), path("data", "tune.tsv")),
                *("--pretrain", "config/mgen_vl/pretrain_demo.json", "--seed", seed),
                *("--dataset", dataset("pretrain"), "--output_dir", path("pretrained")),
                *steps(args.pretrain_steps),
            ],
            (path("tiny_model"), path("pretrained")),
        ),
        Stage(
            "convert_tune",
            "convert the second part (ad captions)",
            [python, "tools/convert_labels.py", path("data", "tune.tsv"), path("tune")],
        ),
        Stage(
            "tune",
            "tune LoRA adapters and attn_pool on the second part",
            [
                *(python, "supervised_finetune.py", "config/mgen_vl/lora_sft_demo.json", "--seed", seed),
                *("--model_name_or_path", path("pretrained"), "--output_dir", path("lora")),
                *("--dataset", dataset("tune")),
                *steps(args.tune_steps),
            ],
            (path("lora"),),
        ),
        Stage(
            "merge",
            "merge the adapters into the weights",
            [
                *(python, "merge_lora_params.py", "--model_name_or_path", path("pretrained")),
                *("--lora_path", path("lora"), "--merge_model_path", path("merged")),
            ],
            (path("merged"),),
        ),
        predict("base", "caption held-out ads with the pretrained model", "pretrained", "held_out.tsv"),
        predict("tuned", "caption them with the tuned model", "merged", "held_out.tsv"),
        predict("blank", "caption blank images with the tuned model", "merged", "held_out_blank.tsv"),
    ]


# --- running ---


def _record_path(out: str, stage: Stage) -> str:
    return os.path.join(out, "logs", f"{stage.name}.json")


def fingerprint(stage: Stage) -> str:
    """Changes with the command, the script that it runs, and the configuration that it names."""
    digest = hashlib.sha256(json.dumps(stage.command).encode())
    for word in stage.command:
        if word.endswith((".py", ".sh", ".json")) and os.path.isfile(os.path.join(ROOT, word)):
            with open(os.path.join(ROOT, word), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()


def finished(out: str, stage: Stage) -> Optional[float]:
    """Seconds that this very stage took when it finished earlier, or None."""
    try:
        with open(_record_path(out, stage), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return None
    return record["seconds"] if record.get("fingerprint") == fingerprint(stage) else None


def run_stage(out: str, stage: Stage) -> float:
    """Run one stage, its output to a log file and now and then a line of it to the screen. Returns its seconds.

    Raises:
        JobFailed: the command ended with another status than 0; its last lines are shown.
    """
    log_path = os.path.join(out, "logs", f"{stage.name}.log")
    start = echoed = time.monotonic()
    last: collections.deque = collections.deque(maxlen=15)
    environment = dict(os.environ, PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1")
    with open(log_path, "w", buffering=1, encoding="utf-8") as log:
        process = subprocess.Popen(
            stage.command,
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
                telling = _TELLING.match(line)
                if telling and time.monotonic() - echoed > ECHO_SECONDS:
                    echoed = time.monotonic()
                    print(f"      {telling.group(1)[:WIDTH]}", flush=True)
            status = process.wait()
        except BaseException:
            # The stage and whatever it started: none of it may train on alone.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    seconds = time.monotonic() - start
    if status:
        sys.stderr.writelines(last)
        raise JobFailed(f"stage {stage.name} ended with status {status}; its whole output is in {log_path}")
    with atomic_write(_record_path(out, stage)) as file:
        json.dump({"fingerprint": fingerprint(stage), "seconds": seconds}, file)
    return seconds


def run_all(args: argparse.Namespace) -> Dict[str, float]:
    """Run what has not finished yet. Returns seconds by stage, those of earlier runs included."""
    os.makedirs(os.path.join(args.out, "logs"), exist_ok=True)
    stages = plan(args)
    seconds: Dict[str, float] = {}
    earlier_holds = True
    for number, stage in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {stage.title}", flush=True)
        done = finished(args.out, stage) if earlier_holds else None
        if done is None:
            earlier_holds = False
            # Whatever stands behind this stage was made from an older one. (Also if this run is killed now.)
            for stale in stages[number - 1 :]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_record_path(args.out, stale))
            for made in stage.makes:
                if os.path.isdir(made):
                    shutil.rmtree(made)
                elif os.path.exists(made):
                    os.unlink(made)
            print(f"      $ {' '.join(map(shlex.quote, stage.command))}"[: 3 * WIDTH], flush=True)
            seconds[stage.name] = run_stage(args.out, stage)
            print(f"      {seconds[stage.name]:.1f} s", flush=True)
        else:
            seconds[stage.name] = done
            print(f"      finished before, in {done:.1f} s", flush=True)
    return seconds


# --- the table ---


def _pad(text: str, columns: int) -> str:
    """Left-justified on a terminal, where a Chinese character takes two columns."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return text + " " * (columns - len(text) - wide)


def evaluate(out: str) -> Dict[str, Dict[str, float]]:
    """Score name → value for each of "base", "tuned" and "blank"."""
    from make_demo_data import parse_caption

    from paddlemix.datasets.caption_files import read_captions
    from paddlemix.metrics.captions import attribute_accuracy, score_captions

    references = read_captions(os.path.join(out, "data", "held_out_captions.tsv"))
    truth = [parse_caption(caption) for caption in references.values()]
    scores = {}
    for name in ("base", "tuned", "blank"):
        captions = read_captions(os.path.join(out, f"{name}.txt"))
        attributes = attribute_accuracy([parse_caption(captions[key]) for key in references], truth)
        scored = score_captions(captions, {key: [caption] for key, caption in references.items()})
        scores[name] = {
            "attribute accuracy": attributes.mean,
            **{f"  {attribute}": value for attribute, value in attributes.attributes.items()},
            "all attributes right": attributes.all_right,
            **{metric: scored.corpus[metric] for metric in CAPTION_SCORES},
        }
    return scores


def report(out: str, scores: Dict[str, Dict[str, float]], seconds: Dict[str, float], target: float) -> str:
    """The table, a few captions, and the times, as text."""
    from paddlemix.datasets.caption_files import read_captions

    references = read_captions(os.path.join(out, "data", "held_out_captions.tsv"))
    columns = {"base": "pretrained", "tuned": "tuned", "blank": "tuned, blank images"}
    lines = [f"{len(references)} held-out ads, captions tokenized by character", ""]
    lines.append(_pad("", 24) + "".join(f"{title:>22}" for title in columns.values()))
    for name in scores["base"]:
        form = ">22.3f" if name in CAPTION_SCORES else ">22.1%"
        lines.append(_pad(name, 24) + "".join(format(scores[column][name], form) for column in columns))
    lines.append("")
    captions = {name: read_captions(os.path.join(out, f"{name}.txt")) for name in columns}
    for key in list(references)[:SHOWN]:
        lines.append(f"{key}  {_pad('reference', 20)} {references[key]}")
        for name, title in columns.items():
            lines.append(f"{' ' * len(key)}  {_pad(title, 20)} {captions[name][key]}")
        lines.append("")
    lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    lines.append(f"in all: {sum(seconds.values()):.0f} s")
    reached = scores["tuned"]["attribute accuracy"] >= target
    lines.append(f"target of {target:.0%} attribute accuracy: {'reached' if reached else 'MISSED'}")
    return "\n".join(lines) + "\n"


def parse_arguments(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--out", type=cli.output_folder, default="demo", help="folder for everything that it makes (default: demo)"
    )
    parser.add_argument("--restart", action="store_true", help="run every stage again")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pretrain_rows", type=int, default=5000)
    parser.add_argument("--tune_rows", type=int, default=2000)
    parser.add_argument("--held_out_rows", type=int, default=200)
    parser.add_argument("--pretrain_steps", type=int, help="optimizer steps, over the configuration's epochs")
    parser.add_argument("--tune_steps", type=int, help="the same for tuning")
    parser.add_argument("--target", type=float, default=0.9, help="attribute accuracy to reach (default: 0.9)")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    if min(args.pretrain_rows, args.tune_rows, args.held_out_rows) < 2:
        raise UserError("each part needs at least two rows")
    # The stages run from the top folder, wherever this was called.
    inside = os.path.relpath(os.path.abspath(args.out), ROOT)
    args.out = os.path.abspath(args.out) if inside.startswith(os.pardir) else inside
    os.chdir(ROOT)
    if args.restart and os.path.isdir(os.path.join(args.out, "logs")):
        shutil.rmtree(os.path.join(args.out, "logs"))
    # A scheduler's SIGTERM ends the stage at hand too, as Ctrl-C does, and so does a terminal that is closed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    seconds = run_all(args)
    scores = evaluate(args.out)
    text = report(args.out, scores, seconds, args.target)
    with atomic_write(os.path.join(args.out, "results.txt")) as file:
        file.write(text)
    with atomic_write(os.path.join(args.out, "results.json")) as file:
        json.dump({"scores": scores, "seconds": seconds}, file, ensure_ascii=False, indent=2)
    print("\n" + text, end="")
    return 0 if scores["tuned"]["attribute accuracy"] >= args.target else JobFailed.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
