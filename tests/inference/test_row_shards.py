"""Shares of the rows, and what merge_shards refuses.

tests/test_predict.py joins what predict.py wrote; here the shards are written by hand.
"""

import argparse
import json
import os

import pytest

from paddlemix.datasets.tsv import read_rows
from paddlemix.inference import row_shards as module
from paddlemix.inference.facts import file_facts
from paddlemix.inference.results import ResultsWriter
from paddlemix.inference.row_shards import Shard, merge_shards
from paddlemix.utils.errors import UserError
from tests.helpers import refused

ROWS = [(f"id {i}", f"caption {i}") for i in range(7)]


def test_shares():
    for of in (1, 2, 3, 7, 9):
        for rows in (0, 1, 6, 7, 8):
            shares = [Shard(i, of).share(rows) for i in range(1, of + 1)]
            assert shares == [len(range(i, rows, of)) for i in range(of)]
    assert Shard.parse("2/10") == (2, 10)
    with pytest.raises(argparse.ArgumentTypeError):
        Shard.parse("٢/3/4")


@pytest.fixture
def shards(tmp_path):
    """Three whole shards of seven rows, and their input. make(index, **changes) writes one with another run."""
    source = tmp_path / "in.tsv"
    source.write_text("".join(f"{name}\tAAAA\n" for name, _ in ROWS))

    def make(index, rows=ROWS, **changes):
        shard = Shard(index, 3)
        run = {"input": {"sha256": file_facts(str(source)).sha256}, "model": {}, "settings": {"fallback": "x"}}
        run.update(changes, shard=shard._asdict())
        mine = rows[index - 1 :: 3]
        with ResultsWriter(shard.path(str(tmp_path / "out")), run) as writer:
            for name, caption in mine:
                writer.write(name, caption, "empty image" if name == "id 3" else None)
            writer.finish(len(mine), input_rows=len(rows))

    for index in (1, 2, 3):
        make(index)
    return make


def merge(tmp_path, **kwargs):
    return merge_shards(str(tmp_path / "out"), **kwargs)


def refusal(tmp_path, **kwargs):
    with pytest.raises(UserError) as error:
        merge(tmp_path, **kwargs)
    assert not (tmp_path / "out").exists()
    return str(error.value).replace(str(tmp_path) + "/", "")


def test_joined_in_the_order_of_the_rows(shards, tmp_path):
    merged = merge(tmp_path, input=str(tmp_path / "in.tsv"))
    assert (tmp_path / "out").read_text() == "".join(f"{name}\t{caption}\n" for name, caption in ROWS)
    assert merged["rows"] == 7 and merged["notes"] == {"empty image": 1}
    assert "shard" not in merged and "input_rows" not in merged
    # Once more is no different.
    before = (tmp_path / "out.run.json").read_bytes()
    assert merge(tmp_path) == merged
    assert (tmp_path / "out.run.json").read_bytes() == before


def test_missing_and_unfinished_shards(shards, tmp_path):
    (tmp_path / "out.shard-2-of-3").rename(tmp_path / "kept")
    assert refusal(tmp_path).startswith("missing: --shard 2/3; ")
    (tmp_path / "out.shard-2-of-3.partial").write_text("")
    assert refusal(tmp_path).startswith("unfinished: --shard 2/3; ")
    assert refusal(tmp_path).endswith(" MODEL --shard 2/3")
    (tmp_path / "out.shard-2-of-3.partial").unlink()
    (tmp_path / "kept").rename(tmp_path / "out.shard-2-of-3")
    (tmp_path / "out.shard-1-of-2").write_text("")
    assert refusal(tmp_path).startswith("next to out are shards of 2 and of 3")
    with refused(UserError, "no-shards"):
        merge_shards(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"input": {"sha256": "b"}}, "input.sha256"),
        ({"model": {"sha256": "b"}}, "model.sha256 is 'b' there and None here"),
        ({"settings": {"fallback": "y"}}, "settings.fallback is 'y' there and 'x' here"),
        ({"rows": ROWS[:4]}, "input_rows is 4 there and 7 here"),
    ],
)
def test_shards_of_different_runs(shards, tmp_path, changes, says):
    shards(2, **changes)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda lines: lines[:-1], "does not answer its rows: missing: 'id 3'"),
        (lambda lines: lines + lines[-1:], "does not answer its rows: too many: 'id 3'"),
        (lambda lines: lines[::-1], "does not answer its rows: they are in another order"),
        (lambda lines: [b"x\ty\n"] * 9, "missing: 'id 0', 'id 3', 'id 6'; too many: 'x'"),
        (lambda lines: [lines[0].replace(b"caption", b"Caption"), *lines[1:]], "was changed since it was written"),
    ],
)
def test_a_shard_that_was_changed(shards, tmp_path, change, says):
    path = tmp_path / "out.shard-1-of-3"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change([rows[0], rows[2], rows[1]])))
    # Without the input it is noticed too, if not said so well.
    assert "was changed since it was written" in refusal(tmp_path)
    path.write_bytes(b"".join(change(rows if "order" in says or "since" in says else [rows[0], rows[2], rows[1]])))
    assert says in refusal(tmp_path, input=str(tmp_path / "in.tsv"))


def test_the_rows_of_the_input_are_only_read_if_a_shard_was_changed(shards, tmp_path, monkeypatch):
    read = []

    def rows(path, want_caption):
        read.append(path)
        return read_rows(path, want_caption)

    monkeypatch.setattr(module, "read_rows", rows)
    merge(tmp_path, input=str(tmp_path / "in.tsv"))
    assert not read
    (tmp_path / "out").unlink()
    for index in (1, 2, 3):
        (tmp_path / f"out.shard-{index}-of-3").write_text("id 0\tcaption 0\n")
    assert "missing: 'id 3'" in refusal(tmp_path, input=str(tmp_path / "in.tsv"))
    assert len(read) == 1


def test_what_a_single_process_finished_has_nothing_to_join(shards, tmp_path):
    source = str(tmp_path / "in.tsv")
    for path in tmp_path.glob("out.shard-*"):
        path.unlink()
    run = {"input": {"sha256": file_facts(source).sha256}, "model": {}, "settings": {"fallback": "x"}}
    with ResultsWriter(str(tmp_path / "out"), run) as writer:
        for name, caption in ROWS:
            writer.write(name, caption)
        writer.finish(len(ROWS))
    before = (tmp_path / "out").read_bytes()
    assert merge(tmp_path, input=source)["rows"] == 7
    assert (tmp_path / "out").read_bytes() == before
    (tmp_path / "other").write_text("id 0\tAAAA\n")
    with refused(UserError, "other-input"):
        merge(tmp_path, input=str(tmp_path / "other"))
    (tmp_path / "out").write_text("changed\tby hand\n")
    with refused(UserError, "no-shards"):
        merge(tmp_path)


def test_files_that_are_no_shards(shards, tmp_path):
    for name in ("none.shard-0-of-0", "none.shard-3-of-2"):
        (tmp_path / name).write_text("")
    with refused(UserError, "no-shards"):
        merge_shards(str(tmp_path / "none"))
    (tmp_path / "out.shard-1-of-3").unlink()
    os.mkfifo(tmp_path / "out.shard-1-of-3")
    assert refusal(tmp_path).endswith("out.shard-1-of-3: not a regular file")


def test_many_missing_shards_leave_room_for_the_command(tmp_path):
    (tmp_path / "out.shard-1-of-2000").write_text("")
    text = refusal(tmp_path)
    assert "11/2000 and 1989 more; " in text and text.endswith(" MODEL --shard 2/2000")


def test_another_input(shards, tmp_path):
    (tmp_path / "other").write_text("id 0\tAAAA\n")
    assert "is not the file that was captioned" in refusal(tmp_path, input=str(tmp_path / "other"))
    for index in (1, 2, 3):
        shards(index, input={})
    assert "is not the file that was captioned" in refusal(tmp_path, input=str(tmp_path / "in.tsv"))


def test_sidecars(shards, tmp_path):
    path = tmp_path / "out.shard-1-of-3.run.json"
    values = json.loads(path.read_text())
    wrong = {"shard": {"index": 2, "of": 3}, "rows": "3", "notes": {"a": "b"}, "settings": {"columns": "1"}}
    for key, value in {**wrong, "format": 9}.items():
        path.write_text(json.dumps(dict(values, **{key: value})))
        assert "is not the sidecar of shard 1 of 3" in refusal(tmp_path)
    path.write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    path.unlink()
    assert refusal(tmp_path).startswith("no out.shard-1-of-3.run.json")
    # One that tells of fewer rows than its share, although nothing was changed.
    path.write_text(json.dumps(dict(values, input_rows=70)))
    for index in (2, 3):
        other = tmp_path / f"out.shard-{index}-of-3.run.json"
        other.write_text(json.dumps(dict(json.loads(other.read_text()), input_rows=70)))
    assert "has 3 lines, but 24 of the 70 rows are its share" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["# Notes\n", "a\t0.5\t1.5\t1\t4\n"])
def test_only_results_are_replaced(shards, tmp_path, text):
    (tmp_path / "out").write_text(text)
    with pytest.raises(UserError, match="out exists and is not results"):
        merge(tmp_path)
    assert (tmp_path / "out").read_text() == text
    (tmp_path / "out").write_text("a\t旧\n", encoding="utf-8")
    assert merge(tmp_path)["rows"] == 7


def test_candidates_that_do_not_fit_leave_no_output(shards, tmp_path):
    listed = tmp_path / "n.jsonl"
    for index in (1, 2, 3):
        shards(index, settings={"fallback": "x", "n_best": str(listed)})
        lines = [json.dumps({"id": name}) + "\n" for name, _ in ROWS[index - 1 :: 3]]
        if index < 3:
            (tmp_path / f"n.jsonl.shard-{index}-of-3").write_text("".join(lines))
    assert refusal(tmp_path) == "no n.jsonl.shard-3-of-3, which --n_best of shard 3 wrote"
    third = tmp_path / "n.jsonl.shard-3-of-3"
    third.write_text(lines[0] + '{"id": "other"}\n')
    assert refusal(tmp_path) == "n.jsonl.shard-3-of-3 does not hold the candidates of row 2" and not listed.exists()
    third.write_text("".join(lines))
    merge(tmp_path)
    assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == [name for name, _ in ROWS]
