"""Every benchmark runs at its smallest size, and what the harness says of the measurements is true."""

import argparse
import importlib
import json
import math
import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
NO_SCRIPTS = ("harness", "run_all", "scratch", "checkpoints", "baseline_model", "demo_seeds")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_SCRIPTS)


@pytest.fixture
def benchmarks(monkeypatch):
    """Import a module of benchmarks/ as its scripts do each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_runs(benchmarks, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "result.jsonl"
    benchmarks(script).main(["--quick", "--json", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["script"], result["size"], result["pairs"]) == (f"{script}.py", "quick", 1)
    # Once and so small, a difference of two times may even be negative.
    assert result["rows"] and all(math.isfinite(row["value"]) for row in result["rows"])
    assert result["title"] in capsys.readouterr().out
    # The coverage of a child is not the script's.
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".coverage")}
    assert left == {"result.jsonl"}, "left behind"


def test_pairs_take_turns_and_are_compared_one_by_one(benchmarks):
    harness, calls = benchmarks("harness"), []

    def side(name, seconds):
        return lambda: calls.append(name) or seconds.pop(0)

    taken = harness.pairs(argparse.Namespace(pairs=3), side("b", [4.0, 30.0, 2.0]), side("o", [1.0, 10.0, 1.0]))
    assert calls == list("boobbo")
    assert taken == ([4.0, 30.0, 2.0], [1.0, 10.0, 1.0]) and taken.ratio == 3


def test_bounds(benchmarks, capsys):
    harness = benchmarks("harness")
    args = harness.parse(["--quick"], "doc")
    bench = harness.Bench(args, "title")
    taken = harness.Pairs([4.0], [1.0])
    bench.ratio("fast", taken, at_least=5)
    bench.ratio("within", taken, at_most=0.25)
    bench.value("much", 3e9, "B")
    assert [row.get("met") for row in bench.rows] == [False, True, None]
    bench.finish()
    assert "| fast | 4.00 s | 1.00 s | 4 × | ≥ 5 × | **missed** |" in capsys.readouterr().out



def test_a_child_reports_its_result_and_its_own_peak(benchmarks):
    harness = benchmarks("harness")
    ballast = b"x" * (300 << 20)
    done = harness.in_child(argparse.Namespace(size="normal"), len, [1, 2, 3])
    assert done.result == 3 and done.peak_bytes < len(ballast)
    with pytest.raises(RuntimeError, match="invalid literal"):
        harness.in_child(argparse.Namespace(size="normal"), int, "no number")
    with pytest.raises(RuntimeError, match="was killed"):
        harness.in_child(argparse.Namespace(size="normal"), os._exit, 1)


def test_the_demo_over_seeds_reports_ranges_and_what_was_missed(benchmarks, tmp_path, capsys):
    demo_seeds = benchmarks("demo_seeds")
    for seed, right, verdict in ((1, 0.98, True), (2, 0.995, True), (3, 0.9, False)):
        scores = {"  side": right, "all attributes right": right, "attribute accuracy": right, "CIDEr": 10 * right}
        found = {
            "seed": seed, "threads": 2, "scores": {name: scores for name in demo_seeds.COLUMNS}, "cpu": 90.0,
            "verdicts": {"good": True, "enough": verdict}, "seconds": {"draw": 8.0, "tune": 20.4}, "machine": "M",
            "commit": "c", "date": "d",
        }  # fmt: skip
        folder = tmp_path / "runs" / f"seed{seed}-threads2"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(found))

    def main(*seeds):
        words = ["--out", str(tmp_path / "runs"), "--report", str(tmp_path / "report.md"), "--seeds", *map(str, seeds)]
        status = demo_seeds.main(words)
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert capsys.readouterr().out.endswith(text)
        return status, text

    status, text = main(1, 2)
    assert status == 0
    assert "| side | 98.0 – 99.5 % | 98.0 – 99.5 % | 98.0 – 99.5 % |" in text and "| CIDEr | 9.800 – 9.950 |" in text
    assert "| 2 | 2 | 99.5 % | 99.5 % | 99.5 % | 99.5 % | 9.950 | 9.950 | 28 | 90 | yes |" in text
    status, text = main(1, 3)
    assert status == 1 and "| **no**: enough |" in text
