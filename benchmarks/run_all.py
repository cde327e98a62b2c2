"""Run the benchmarks and write RESULTS.md: `python benchmarks/run_all.py [--large] [SCRIPT …]`

Runs every script of this folder (or those named) in its own process, in the normal or the large size. Their lines of
JSON are kept in results.jsonl, one per script and size; RESULTS.md shows them all. With --large, only scripts with a
large size (LARGE below) run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile

import harness

HERE = os.path.dirname(os.path.abspath(__file__))
LINES = os.path.join(HERE, "results.jsonl")
RESULTS = os.path.join(HERE, "RESULTS.md")
# Not benchmarks.
OTHERS = {"harness.py", "run_all.py", "scratch.py", "checkpoints.py", "baseline_model.py", "demo_seeds.py"}
# Those with a size beyond the normal one.
LARGE = ("caption_throughput.py", "convert.py", "index.py", "inspection.py", "lora_step.py", "merge.py", "opening.py")


def scripts() -> list:
    return sorted(name for name in os.listdir(HERE) if name.endswith(".py") and name not in OTHERS)


def machine() -> str:
    """CPU, cores, memory, versions: one line."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for name in ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy", "pillow"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB; {', '.join(versions)}"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def summary(results: list) -> list:
    """Lines of Markdown: every figure that has a bound, of all scripts."""
    lines = ["| script | what | figure | bound | |", "|---|---|---|---|---|"]
    for result in results:
        size = "" if result["size"] == "normal" else f" --{result['size']}"
        for row in filter(lambda row: "bound" in row, result["rows"]):
            cells = result["script"] + size, row["name"], harness.figure(row), row["bound"], harness.MET[row["met"]]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_results(results: list) -> None:
    lines = [
        "# Results of the benchmarks", "",
        "Written by `make bench` and `make bench-large` (`benchmarks/run_all.py`); README.md says what each row is.",
        "Ratios are medians over interleaved pairs; load is the system's own, before the script began.", "",
        "## Bounds", "", *summary(results), "",
    ]  # fmt: skip
    for result in results:
        size = "" if result["size"] == "normal" else f" --{result['size']}"
        lines += [f"## {result['script']}{size}", "", *harness.table(result)[2:], ""]
        lines += [
            f"`python benchmarks/{result['script']}{size}`, {result['pairs']} pairs, {result['took']} s, "
            f"{result['date']}, load {result['load']}, commit {result['commit']}.", "",
            f"{result['machine']}.", "",
        ]  # fmt: skip
    with open(RESULTS, "w", encoding="utf-8") as file:
        file.write("\n".join(lines[:-1]) + "\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="names in this folder (default: all)")
    parser.add_argument("--large", action="store_true", help="the full sizes; needs disk space while it runs")
    args = parser.parse_args(argv)
    known = LARGE if args.large else scripts()
    for name in args.scripts:
        if name not in known:
            parser.error(f"no benchmark {name}{' with a large size' if args.large else ''}: {', '.join(known)}")
    results = {}
    if os.path.exists(LINES):
        with open(LINES, encoding="utf-8") as file:
            results = {(line["script"], line["size"]): line for line in map(json.loads, file)}
    failed = []
    about = {"commit": commit(), "machine": machine()}
    for name in args.scripts or known:
        print(f"==== {name}", flush=True)
        with tempfile.NamedTemporaryFile("r", suffix=".jsonl", encoding="utf-8") as lines:
            command = [sys.executable, os.path.join(HERE, name), "--json", lines.name, *["--large"] * args.large]
            if subprocess.run(command).returncode:
                failed.append(name)
                continue
            for line in map(json.loads, lines):
                results[line["script"], line["size"]] = dict(line, **about)
        ordered = [results[key] for key in sorted(results)]
        with open(LINES, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in ordered)
        write_results(ordered)
    print("\n".join(summary([results[key] for key in sorted(results)])))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
