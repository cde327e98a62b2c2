"""Shared by the benchmarks: interleaved pairs, peak memory of a separate process, bounds, one line of JSON per run.

A script has `main(argv=None)`, measures two or more ways of doing one thing in one run, and reports the results:

    def main(argv=None):
        args = harness.parse(argv, __doc__)
        bench = harness.Bench(args, "merge a checkpoint")
        pairs = harness.pairs(args, baseline, ours)              # two callables that return seconds
        bench.ratio("whole-model merge ÷ ours", pairs, at_least=5)
        done = harness.in_child(args, ours_alone, folder)        # a fresh process: result, seconds, peak_bytes
        bench.value("peak memory", done.peak_bytes / 1e6, "MB", at_most=400)
        bench.finish()

    if __name__ == "__main__":
        main()

Sizes: `normal` takes at most a few minutes, `large` uses gigabytes, `quick` only shows that the script runs (seconds,
one pair, no child process). A missed bound is reported, but is not an error.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

PAIRS = 5
# The last column of a table: the row's bound is met, missed, or there is none.
MET = {True: "met", False: "**missed**", None: ""}


def parse(argv: Optional[Sequence[str]], doc: str, parts: Sequence[str] = ()) -> argparse.Namespace:
    """The options of a benchmark: size ("quick", "normal" or "large"), pairs, json; and its file's name, script.

    parts: choices of --only; by default all of them run.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="only check that it runs")
    size.add_argument("--large", dest="size", action="store_const", const="large", help="the full size (gigabytes)")
    parser.add_argument("--pairs", type=int, help=f"pairs of measurements (default: {PAIRS}; quick: 1)")
    parser.add_argument("--json", metavar="FILE", help="append the result there, as one line of JSON")
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts (default: all)")
    parser.set_defaults(size="normal")
    args = parser.parse_args(argv)
    args.script = os.path.basename(inspect.stack()[1].filename)
    if args.size != "quick":
        # Exit normally, so that scratch files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.pairs = args.pairs or (1 if args.size == "quick" else PAIRS)
    return args


class Pairs(NamedTuple):
    """Seconds of both sides, taken in turns."""

    baseline: List[float]
    ours: List[float]

    @property
    def ratio(self) -> float:
        """Median over the pairs of baseline ÷ ours."""
        return statistics.median(b / o for b, o in zip(self.baseline, self.ours))


def timed(call: Callable[..., Any], *args: Any) -> Callable[[], float]:
    """A callable that runs `call(*args)` and returns the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start

    return run


def pairs(args: argparse.Namespace, baseline: Callable[[], float], ours: Callable[[], float]) -> Pairs:
    """Call both in turns, each returning its seconds, in alternating order. Warm them up first."""
    taken = Pairs([], [])
    for i in range(args.pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            taken[side].append((baseline, ours)[side]())
    return taken


def peak_bytes() -> int:
    """Peak resident memory of this process, including mapped files (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def matmul_peak(side: int) -> float:
    """Floating-point operations per second of a large float32 matmul in Paddle, the best of 50."""
    import paddle

    a, b = paddle.rand([side, side]), paddle.rand([side, side])
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        paddle.matmul(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def memory_bandwidth(size: int = 512 << 20) -> float:
    """Read bandwidth of this process in bytes per second: the fastest sum over `size` bytes, with one thread or two."""
    import numpy as np

    halves = np.split(np.ones(size // 4, np.float32), 2)
    best = 0.0
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for run in (map, pool.map):
                start = time.perf_counter()
                list(run(np.sum, halves))
                best = max(best, 2 * halves[0].nbytes / (time.perf_counter() - start))
    return best


class Side:
    """Something to time in a process of its own: `side("prefill", 8)` calls its method `prefill(8)` there.

    make: a module-level function or class, called in that process with the size of the run. environment: variables to
    set there. folder: where its paddlemix is imported from (default: this project). A quick run makes and calls it
    here. Leaving the `with` block ends the process; `peak` is then its peak memory in bytes.
    """

    def __init__(
        self, args: argparse.Namespace, make: Callable[[str], Any], environment: Optional[Mapping[str, str]] = None,
        folder: str = ROOT,
    ):  # fmt: skip
        self.peak = 0
        self._here = make(args.size) if args.size == "quick" else None
        if self._here is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args.size, folder))
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()

    def __call__(self, method: str, *arguments: Any) -> Any:
        if self._here is not None:
            return getattr(self._here, method)(*arguments)
        self._pipe.send((method, arguments))
        try:
            fine, result = self._pipe.recv()
        except EOFError:
            fine, result = False, f"the process of {method} was killed"
        if not fine:
            raise RuntimeError(result)
        return result

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        if self._here is not None:
            self.peak = peak_bytes()
        elif kind is None:
            self._pipe.send(None)
            self.peak = self._pipe.recv()
            self._process.join()
        else:
            self._process.terminate()


def _serve(pipe: Any, make: Callable[[str], Any], size: str, folder: str) -> None:
    sys.path.insert(0, folder)
    import paddlemix  # noqa: F401 (the CPU settings)

    try:
        # Before the first call, so that the sides of a script load at the same time.
        made, failed = make(size), None
    except Exception:  # noqa: BLE001
        made, failed = None, traceback.format_exc()
    for method, arguments in iter(pipe.recv, None):
        try:
            pipe.send((False, failed) if failed else (True, getattr(made, method)(*arguments)))
        except Exception:  # noqa: BLE001
            pipe.send((False, traceback.format_exc()))
    pipe.send(peak_bytes())


class Done(NamedTuple):
    result: Any
    seconds: float
    peak_bytes: int


class _Calls:
    def __init__(self, size: str):
        pass

    def run(self, call: Callable[..., Any], arguments: Sequence[Any]) -> Done:
        start = time.perf_counter()
        result = call(*arguments)
        return Done(result, time.perf_counter() - start, peak_bytes())


def in_child(args: argparse.Namespace, call: Callable[..., Any], *arguments: Any) -> Done:
    """Run a module-level function in a Side; returns its (picklable) result, seconds and peak memory.

    Seconds are those of the call alone; peak memory is that of the process, Python included.

    Raises:
        RuntimeError: it failed; the message has its traceback.
    """
    with Side(args, _Calls) as side:
        return side("run", call, arguments)


class Bench:
    """Collects the measurements of a script; `finish` prints them and writes the line of JSON."""

    def __init__(self, args: argparse.Namespace, title: str):
        self.args, self.title = args, title
        self.rows: List[dict] = []
        self._start, self._load = time.time(), os.getloadavg()[0]

    def ratio(self, name: str, taken: Pairs, at_least: Optional[float] = None, at_most: Optional[float] = None) -> None:
        """Median of baseline ÷ ours (the speed-up); with at_most, of ours ÷ baseline."""
        value = taken.ratio if at_most is None else Pairs(taken.ours, taken.baseline).ratio
        times = {"baseline": statistics.median(taken.baseline), "ours": statistics.median(taken.ours)}
        self.value(name, value, "×", at_least, at_most, **times, seconds=[list(side) for side in taken])

    def value(
        self, name: str, value: float, unit: str, at_least: Optional[float] = None, at_most: Optional[float] = None,
        **more: Any,
    ) -> None:  # fmt: skip
        """A number with its bound, if any. `more` goes into the JSON; baseline, ours: seconds."""
        row = {"name": name, "value": value, "unit": unit, **more}
        if at_least is not None:
            row.update(bound=f"≥ {at_least:g} {unit}", met=value >= at_least)
        elif at_most is not None:
            row.update(bound=f"≤ {at_most:g} {unit}", met=value <= at_most)
        self.rows.append(row)

    def finish(self) -> None:
        result = {
            "script": self.args.script, "size": self.args.size, "title": self.title, "pairs": self.args.pairs,
            "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(self._start)), "load": round(self._load, 1),
            "took": round(time.time() - self._start), "rows": self.rows,
        }  # fmt: skip
        print("\n".join(table(result)))
        if self.args.json:
            with open(self.args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")


def _seconds(value: Optional[float]) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def figure(row: dict) -> str:
    """A row's value with its unit, to four digits."""
    number = f"{row['value']:.4g}" if abs(row["value"]) < 1000 else f"{row['value']:,.0f}"
    return f"{number} {row['unit']}"


def table(result: dict) -> List[str]:
    """A result as lines of Markdown."""
    lines = [f"{result['title']} ({result['size']})", ""]
    lines += ["| | baseline | ours | | bound | |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = (
            row["name"], _seconds(row.get("baseline")), _seconds(row.get("ours")), figure(row),
            row.get("bound", ""), MET[row.get("met")],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines
