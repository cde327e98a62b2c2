"""The demo for several seeds and threads: `python benchmarks/demo_seeds.py [--seeds 7 8 9] [--threads 1 2 4]`

Runs tools/demo.py for each combination and writes demo_seeds.md: the range of every score over all runs, which README
quotes, and a line per run. Runs already finished in --out are not repeated. Exit status 1 if a run misses one of the
demo's targets.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import run_all

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
COLUMNS = {"base": "pretrained", "tuned": "tuned", "blank": "tuned, blank images"}


def run(seed: int, threads: int, out: str, more: list) -> dict:
    """The demo's results.json, with seed, threads, and the processor time of all its processes in seconds."""
    record = os.path.join(out, "run.json")
    if os.path.exists(record):
        with open(record, encoding="utf-8") as file:
            return json.load(file)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # From the start: skipped stages of an interrupted run would be missing from the processor time.
    command = [sys.executable, os.path.join(ROOT, "tools", "demo.py"), "--restart", "--seed", str(seed), "--out", out]
    status = subprocess.call([*command, *more], env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = os.path.join(out, "results.json")
    if status not in (0, 1) or not os.path.exists(results):
        raise SystemExit(f"the demo with seed {seed} and {threads} threads ended with status {status}")
    with open(results, encoding="utf-8") as file:
        found = json.load(file)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found.update(seed=seed, threads=threads, cpu=cpu, date=time.strftime("%Y-%m-%d"))
    found.update(commit=run_all.commit(), machine=run_all.machine())
    with open(record, "w", encoding="utf-8") as file:
        json.dump(found, file, ensure_ascii=False)
    return found


def shown(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.strip() not in ("CIDEr", "CIDEr-D", "BLEU-4", "ROUGE-L") else f"{value:.3f}"


def ranges(runs: list) -> list:
    """Rows of the table: the name of a score, and its range over the runs for each of COLUMNS."""
    rows = []
    for name in runs[0]["scores"]["tuned"]:
        cells = []
        for column in COLUMNS:
            values = [found["scores"][column][name] for found in runs]
            low, high = shown(name, min(values)), shown(name, max(values))
            cells.append(low if low == high else f"{low.replace(' %', '')} – {high}")
        rows.append([name.strip(), *cells])
    return rows


def report(runs: list) -> str:
    """The page in Markdown."""
    lines = [
        "# The demo over seeds and threads", "",
        "Written by `python benchmarks/demo_seeds.py`: the lowest and highest figure of all runs.", "",
        f"| {len(runs)} runs | " + " | ".join(COLUMNS.values()) + " |", "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in ranges(runs)), "",
        "| seed | threads | attributes right before | after | all right before | after | CIDEr before | after "
        "| seconds | of processor time | as it should be |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for found in runs:
        base, tuned = found["scores"]["base"], found["scores"]["tuned"]
        cells = [str(found["seed"]), str(found["threads"])]
        for name in ("attribute accuracy", "all attributes right", "CIDEr"):
            cells += [shown(name, base[name]), shown(name, tuned[name])]
        missed = [text for text, holds in found["verdicts"].items() if not holds]
        cells += [f"{sum(found['seconds'].values()):.0f}", f"{found['cpu']:.0f}", "**no**: " * bool(missed)]
        cells[-1] += "; ".join(missed) or "yes"
        lines.append("| " + " | ".join(cells) + " |")
    machines = sorted({f"{found['machine']}; commit {found['commit']}, {found['date']}." for found in runs})
    return "\n".join([*lines, "", *machines]) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="OMP_NUM_THREADS (default: 2)")
    parser.add_argument("--out", default=os.path.join(ROOT, "demo", "seeds"), help="folder of the runs")
    parser.add_argument("--report", default=os.path.join(HERE, "demo_seeds.md"), help="the file to write")
    args, more = parser.parse_known_args(argv)
    runs = []
    for threads in args.threads:
        for seed in args.seeds:
            print(f"==== seed {seed}, {threads} threads", flush=True)
            runs.append(run(seed, threads, os.path.join(args.out, f"seed{seed}-threads{threads}"), more))
            with open(args.report, "w", encoding="utf-8") as file:
                file.write(report(runs))
    print(report(runs), end="")
    return 0 if all(all(found["verdicts"].values()) for found in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
