"""Outputs of the data tools that would harm something, cannot be made, or stay empty: one line, and nothing changes."""

import sys

import pytest

from paddlemix.utils import cli
from tests.helpers import image_base64, image_bytes
from tools import combine_results, convert_labels, convert_public, curate_data, evaluate_captions, inspect_data

CURATE, LABELS, PUBLIC = [curate_data, "--workers", "0"], [convert_labels], [convert_public]
INSPECT, COMBINE = [inspect_data, "--workers", "0"], [combine_results]
EVALUATE = [evaluate_captions, "--resamples", "0", "--workers", "0"]


def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def call(monkeypatch, capfd):
    def call(tool, *words):
        monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *words, "--quiet"])
        return cli.run(tool.main), capfd.readouterr().err

    return call


@pytest.fixture
def data(tmp_path, monkeypatch, call):
    """a.tsv, whose images c.json refers to; pictures.tsv, which names one.jpg; results."""
    monkeypatch.chdir(tmp_path)
    rows = [f"r{i}\t{image_base64(i, size=(64, 48))}\t红色的杯子放在桌上{i}\n" for i in range(6)]
    for name in ("a.tsv", "other.tsv"):
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
    assert call(*CURATE, "a.tsv", "c.json", "--images", "reference")[0] == 0
    for name in ("held/train.json", "held/report.json", "held/x.rejected.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(rows), encoding="utf-8")
        assert call(*CURATE, name, f"{name}.refers.json", "--images", "reference")[0] == 0
    (tmp_path / "one.jpg").write_bytes(image_bytes(1))
    (tmp_path / "pictures.tsv").write_text("p\tone.jpg\t一只杯子\n", encoding="utf-8")
    (tmp_path / "captions.jsonl").write_text('{"image_id": "r0", "text": ["一只杯子"]}\n', encoding="utf-8")
    for name in ("p.txt", "q.txt"):
        (tmp_path / name).write_text("r0\t杯子\n", encoding="utf-8")
    (tmp_path / "p.txt.run.json").write_text("{}")
    (tmp_path / "notes.md").write_text("# Notes\n")
    (tmp_path / "empty.tsv").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "words, says",
    [
        ([*CURATE, "c.json", "a.tsv", "--limit", "3"], "a.tsv would be overwritten"),
        ([*CURATE, "other.tsv", "a.tsv", "--not_in", "c.json"], "a.tsv would be overwritten"),
        ([*CURATE, "held/x.rejected.tsv.refers.json", "held/x.tsv"], "x.rejected.tsv would be overwritten"),
        ([*CURATE, "pictures.tsv", "one.jpg"], "one.jpg is an image"),
        ([*PUBLIC, "a.tsv", "captions.jsonl", "one.jpg"], "one.jpg is an image"),
        ([*LABELS, "other.tsv", "held", "--captions", "held/train.json.refers.json"], "would be overwritten"),
        ([*INSPECT, "held/report.json.refers.json", "--out", "held"], "report.json would be overwritten"),
        ([*INSPECT, "a.tsv", "--compare", "held/report.json.refers.json", "--out", "held"], "would be overwritten"),
        ([*COMBINE, "p.txt", "q.txt", "a.tsv"], "a.tsv holds images or records"),
        ([*COMBINE, "p.txt", "q.txt", "c.json"], "c.json holds images or records"),
        ([*COMBINE, "q.txt", "q.txt", "p.txt.run.json"], "p.txt.run.json holds images or records"),
        ([*COMBINE, "p.txt", "q.txt", "/dev/null"], "a device or a pipe"),
        ([*CURATE, "a.tsv", "/dev/null"], "a device or a pipe"),
        ([*PUBLIC, "a.tsv", "captions.jsonl", "/dev/null"], "a device or a pipe"),
        # Nor is anything of another kind, or data that no earlier run wrote.
        ([*CURATE, "a.tsv", "other.tsv", "--limit", "3"], "or --overwrite"),
        ([*PUBLIC, "a.tsv", "captions.jsonl", "other.tsv"], "or --overwrite"),
        ([*PUBLIC, "a.tsv", "captions.jsonl", "c.json"], "or --overwrite"),
        ([*COMBINE, "p.txt", "q.txt", "notes.md"], "notes.md exists and is not from an earlier run"),
        ([*EVALUATE, "p.txt", "q.txt", "--html", "other.tsv"], "other.tsv exists and is not a report page"),
        ([*EVALUATE, "p.txt", "q.txt", "--json", "c.json"], "c.json exists and is not a JSON report"),
        ([*EVALUATE, "p.txt", "q.txt", "--json", "p.txt.run.json"], "is not a JSON report"),
        ([*INSPECT, "a.tsv", "--out", "held"], "report.json exists and is not a JSON report"),
        # What cannot be made.
        ([*PUBLIC, "a.tsv", "captions.jsonl", "/proc/x/y.json"], "cannot write /proc/x/y.json"),
        ([*INSPECT, "a.tsv", "--out", "/proc/x"], "cannot write /proc/x"),
        ([*LABELS, "a.tsv", "/proc/x"], "cannot write /proc/x"),
        ([*CURATE, "a.tsv", "/proc/x/y.tsv"], "cannot write /proc/x/y.tsv"),
        # What stays empty.
        ([*LABELS, "empty.tsv", "new/z"], "it is empty"),
        ([*PUBLIC, "other.tsv", "empty.tsv", "new/o/x.json"], "no image of"),
        ([*CURATE, "a.tsv", "new/x.tsv", "--min_side", "9999"], "no row of a.tsv is left"),
        ([*INSPECT, "empty.tsv", "--out", "new/report"], "no rows"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(call, data, words, says):
    before = files(data)
    status, said = call(*words)
    assert status and says in said and said.count("error: ") == 1 and "Traceback" not in said
    after = files(data)
    assert {name: after[name] for name in before} == before and not (data / "new").exists()
    # Facts of images are kept, even of a run that fails, and indexes of records.
    assert all(name.endswith((".facts", ".facts.partial", ".idx")) for name in set(after) - set(before))


def test_facts_that_cannot_be_kept_are_a_line(call, data):
    (data / ".a.tsv.facts").mkdir()
    status, said = call(*CURATE, "a.tsv", "out.tsv", "--min_side", "8")
    assert status == 0 and "kept in memory only" in said and (data / "out.tsv").is_file()
    assert not list((data / ".a.tsv.facts").iterdir())


def test_what_an_earlier_run_wrote_is_replaced(call, data):
    runs = [
        [*CURATE, "a.tsv", "new.tsv", "--limit", "3"],
        [*CURATE, "a.tsv", "other.tsv", "--overwrite"],
        [*CURATE, "a.tsv", "a.json"],
        [*PUBLIC, "a.tsv", "captions.jsonl", "new.json"],
        [*PUBLIC, "a.tsv", "captions.jsonl", "c.json", "--overwrite"],
        [*COMBINE, "p.txt", "q.txt", "r.txt"],
        [*EVALUATE, "p.txt", "q.txt", "--html", "page.html", "--json", "scores.json"],
        [*INSPECT, "a.tsv", "--out", "report"],
    ]  # fmt: skip
    for words in runs * 2:
        assert call(*words)[0] == 0, words
    # The record beside a.tsv is that of a.json.
    status, said = call(*CURATE, "a.json", "a.tsv")
    assert status == 2 and "a.tsv exists and is not from an earlier run" in said


def test_converting_into_a_dataset_says_what_it_replaces(call, data):
    assert "replaced" not in call(*LABELS, "a.tsv", "set")[1]
    status, said = call(*LABELS, "pictures.tsv", "set")
    assert status == 0 and "train.json and val.json in set (6 rows) will be replaced" in said
