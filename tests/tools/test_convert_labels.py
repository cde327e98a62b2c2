"""convert_labels.py as a user runs it."""

import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from tests.helpers import image_base64


@pytest.fixture
def call(root, tmp_path):
    def call(*arguments):
        command = [sys.executable, "tools/convert_labels.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


def test_the_notebooks_run(call, tmp_path):
    image = image_base64(0)
    (tmp_path / "train samples.txt").write_text("".join(f"id{n}\t{image}\t标题{n}\n" for n in range(991)))
    status, out, _ = call(tmp_path / "train samples.txt", tmp_path / "train_demo")
    assert status == 0
    assert out == "num of training set: 941\nnum of validation set: 50\n"
    records = json.loads((tmp_path / "train_demo" / "val.json").read_text(encoding="utf-8"))
    assert records[0]["conversations"] == [["请描述图片内容", "标题0"]]


def test_all_flags(call, tmp_path):
    rows = [f"id{n}\t{image_base64(n % 3)}\t标题{n % 30}。。\n" for n in range(40)]
    rows += ["bad\n", "x\tQUJDQUJDQUJDQUJDQUJDQUJD\tcaption\n", f"y\t{image_base64(0)}\t短\n"]
    (tmp_path / "in.tsv").write_text("".join(rows))
    status, out, err = call(
        tmp_path / "in.tsv", tmp_path / "out", "--prompt", "说说这张图", "--val_every", 10, "--clean", "--dedupe",
        "--min_chars", 3, "--max_chars", 50, "--verify", "decode", "--workers", 2, "--images", "reference", "--quiet",
    )  # fmt: skip
    assert status == 0
    assert out == "num of training set: 27\nnum of validation set: 3\n"
    lines = err.strip().split("\n")
    assert lines[0] == f"rejected 13 of 43 rows (see {tmp_path / 'out' / 'rejected.tsv'}):"
    assert {tuple(line.split(None, 1)) for line in lines[1:]} == {
        ("10", "duplicate"), ("1", "missing column"), ("1", "not an image"), ("1", "caption too short"),
    }  # fmt: skip
    (first, *_) = json.loads((tmp_path / "out" / "train.json").read_text())
    assert first["conversations"] == [["说说这张图", "标题1。"]] and first["image"]["file"] == "../in.tsv"


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (("missing.tsv", "OUT"), 2, "cannot read missing.tsv"),
        (("IN", "OUT", "--val_every", "-1"), 2, "--val_every: must be an integer of at least 0"),
        (("IN", "OUT", "--workers", "-1"), 2, "--workers: must be an integer of at least 0"),
        (("IN", "OUT", "--min_chars", "5", "--max_chars", "4"), 2, "--max_chars is less"),
        (("IN", "OUT", "--verify", "all"), 2, "invalid choice"),
        (("IN",), 2, "OUT_DIR"),
        (("IN", "IN/sub"), 2, "cannot write"),
        (("BAD", "OUT"), 1, "all 1 rows were rejected"),
        (("GZ", "OUT"), 2, "damaged or cut short"),
    ],
)
def test_what_goes_wrong_is_one_line(call, tmp_path, arguments, status, says):
    (tmp_path / "in.tsv").write_text(f"a\t{image_base64(0)}\tcaption\n")
    (tmp_path / "bad.tsv").write_text("a\n")
    (tmp_path / "in.gz").write_bytes(b"\x1f\x8b\x08")
    places = {"IN": "in.tsv", "OUT": "out", "BAD": "bad.tsv", "GZ": "in.gz", "IN/sub": "in.tsv/sub"}
    found, out, err = call(*(tmp_path / places[word] if word in places else word for word in arguments))
    assert (found, out) == (status, "")
    last = err.strip().split("\n")[-1]
    assert says in last and "error: " in last


def test_captions_of_another_file_and_fallback_captions(call, tmp_path):
    """Rows without ids have line numbers for ids, which the rows of every file have."""
    for name in ("in", "other"):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{image_base64(n)}\t{name}的第{n}张\n" for n in range(3)))
    (tmp_path / "new.txt").write_text("1\t新的描述\n2\t一张广告图片。\n3\t新的描述\n")
    digest = hashlib.sha256((tmp_path / "in.tsv").read_bytes()).hexdigest()
    record = {"input": {"sha256": digest}, "settings": {"fallback": "一张广告图片。"}}
    (tmp_path / "new.txt.run.json").write_text(json.dumps(record))
    status, _, err = call(tmp_path / "other.tsv", tmp_path / "out", "--captions", tmp_path / "new.txt")
    assert status == 2 and "new.txt has the captions of other data than" in err
    status, out, err = call(tmp_path / "in.tsv", tmp_path / "out", "--captions", tmp_path / "new.txt", "--quiet")
    assert status == 0 and "training set: 1\n" in out and "1  no new caption\n" in err
    # Of an archive the record says nothing.
    (tmp_path / "in.gz").write_bytes(gzip.compress((tmp_path / "in.tsv").read_bytes()))
    assert call(tmp_path / "in.gz", tmp_path / "out2", "--captions", tmp_path / "new.txt")[0] == 0


def test_help(call):
    status, out, _ = call("--help")
    assert status == 0 and "--images {inline,reference}" in out
