"""tools/evaluate_captions.py as a user runs it, but in this process."""

import json
import os
import sys

import pytest

from paddlemix.utils import cli
from tests.helpers import image_base64
from tools import evaluate_captions


@pytest.fixture
def run(root, tmp_path, monkeypatch, capsys):
    """Run the tool in tmp_path with some files; its exit status, stdout and last line of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate_captions.py", *arguments, "--workers", "0", "--quiet"])
        status = cli.run(evaluate_captions.main)
        out, err = capsys.readouterr()
        return status, out, (err.splitlines() or [""])[-1]

    (tmp_path / "refs.txt").write_text("a\t红杯在左\nb\t两只蓝瓶\nc\t黑猫\n", encoding="utf-8")
    (tmp_path / "good.txt").write_text("a\t红杯在左\nb\t两只蓝瓶\nc\t黑猫\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_text("a\t红杯在右\nb\t三只白色的瓶子\nc\t\n", encoding="utf-8")
    return run


def lines_of(out):
    return {line[:28].strip(): line[28:].split() for line in out.splitlines() if line[:1] not in ("", " ")}


def test_scores_are_printed_with_the_tokenizer(run):
    status, out, _ = run("bad.txt", "refs.txt")
    assert status == 0 and "tokenizer: char\n" in out and "seed 0; document frequencies held fixed" in out
    lines = lines_of(out)
    # 3 of 4, 3 of 7 (只, 瓶 and nothing else: 2) and 0 of 0 tokens: (3 + 2) / 11, no longer than the references' 10.
    assert lines["BLEU-1"][0] == f"{5 / 11:.4f}"
    assert lines["empty"][0] == "33.33%" and lines["count not in references"][0] == "33.33%"
    assert "colour: 白色 1" in out and "count: 三只 1" in out
    status, out, _ = run("bad.txt", "refs.txt", "--tokenizer", "jieba", "--resamples", "0")
    assert status == 0 and "tokenizer: jieba 0." in out and "…" not in lines_of(out)["CIDEr"]


def test_two_files_are_compared_and_written_as_json(run, tmp_path):
    status, out, _ = run("good.txt", "refs.txt", "--compare", "bad.txt", "--json", "out/all.json")
    assert status == 0
    value = json.loads((tmp_path / "out" / "all.json").read_text(encoding="utf-8"))
    assert value["settings"]["files"] == {
        "results": "good.txt", "references": "refs.txt", "others": ["bad.txt"], "attributes": None,
    }  # fmt: skip
    better = value["others"][0]["difference"]["BLEU-1"]["value"]
    assert better == pytest.approx(1 - 5 / 11) and f"+{better:.4f}" in lines_of(out)["BLEU-1"]
    assert out.splitlines()[6].split() == ["captions", "95", "%", "other", "95", "%", "difference", "95", "%"]
    # BLEU-1 of perfect captions hangs on their number in its tenth decimal, which is no difference.
    (tmp_path / "less.txt").write_text("a\t红杯在左\nb\t两只蓝瓶\nc\t黑\n", encoding="utf-8")
    (tmp_path / "both.txt").write_text("a\t红杯在左\nb\t两只蓝瓶\nc\t黑\t黑猫\n", encoding="utf-8")
    _, out, _ = run("less.txt", "both.txt", "--compare", "good.txt")
    assert lines_of(out)["BLEU-1"][-4:] == ["+0.0000", "+0.0000", "…", "+0.0000"]


def test_any_number_of_files_and_attributes(run, tmp_path):
    (tmp_path / "lists.json").write_text('{"side": [["左"], ["右"]], "colour": [["红"], ["白色"]]}', encoding="utf-8")
    words = ["good.txt", "refs.txt", "--compare", "bad.txt", "--compare", "good.txt", "--attributes", "lists.json"]
    status, out, _ = run(*words, "--json", "all.json", "--html", "page.html", "--resamples", "20")
    assert status == 0 and "other 1: bad.txt\nother 2: good.txt\n" in out
    heads = [title for title in lines_of_head(out) if title not in ("95", "%")]
    assert heads == ["captions", "other", "1", "difference", "other", "2", "difference"]
    line = lines_of(out)["side right"]
    assert [cell for cell in line if cell.endswith("%")][0] == "100.00%" and "+100.00%" in line and "0.00%" in line
    value = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert [other["difference"]["side right"]["value"] for other in value["others"]] == [1.0, 0.0]
    assert value["settings"]["files"]["others"] == ["bad.txt", "good.txt"]
    assert '"side: 左 → 右"' in (tmp_path / "page.html").read_text(encoding="utf-8")
    _, out, _ = run("bad.txt", "refs.txt", "--attributes", "lists.json")
    assert "  side: 左 → 右 1\n" in out


def lines_of_head(out):
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["captions"] and "95" in line]
    return line.split()


@pytest.mark.parametrize(
    "results, references, arguments, why",
    [
        ("a\tx\nb\tx\nd\tx\n", None, [], "1 ids have no caption: c; 1 ids have no reference: d"),
        ("a\tx\na\ty\n", None, [], "1 ids come more than once: a"),
        ("d\tx\n", None, ["--intersection"], "no id is in all of the files"),
        ("a\tx\n", "a\t\n", [], "1 rows have no reference: 1 (empty caption)"),
        (None, None, ["--images", "x.tsv"], "--images is for the page"),
        (None, None, ["--resamples", "-1"], "--resamples: must be an integer of at least 0"),
        (None, None, ["--tokenizer", "words"], "invalid choice"),
        (None, None, ["--html", "r.html", "--images", "none.tsv"], "cannot read none.tsv"),
    ],
)
def test_what_can_be_mended_is_one_line(run, tmp_path, results, references, arguments, why):
    for name, text in (("good.txt", results), ("refs.txt", references)):
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    status, out, error = run("good.txt", "refs.txt", *arguments)
    assert status == 2 and error.startswith("error: ") and why in error and out == ""


def test_a_score_file_is_a_plain_file(run, tmp_path):
    """A pipe without a writer would be waited for."""
    os.mkfifo(tmp_path / "scores")
    status, _, error = run("good.txt", "refs.txt", "--html", "r.html", "--scores", "scores")
    assert status == 2 and error == "error: scores is not a plain file"
    (tmp_path / "notepad").write_text("\ufeffa\t1\t2\t1\t[]\r\n", encoding="utf-8")
    status, out, _ = run("good.txt", "refs.txt", "--html", "r.html", "--scores", "notepad")
    assert status == 0 and "2 rows of good.txt have no score in notepad" in out


def test_an_intersection_is_scored_only_when_asked_for(run, tmp_path):
    (tmp_path / "some.txt").write_text("x\t红\nb\t两只蓝瓶\na\t红杯在左\n", encoding="utf-8")
    assert run("some.txt", "refs.txt")[0] == 2
    status, out, _ = run("some.txt", "refs.txt", "--intersection")
    assert status == 0 and "2 ids are in all files; 2 others are left out" in out
    assert lines_of(out)["BLEU-4"][0] == "1.0000"


def test_a_page_takes_its_pictures_from_the_references_or_another_file(run, tmp_path):
    rows = "".join(f"{key}\t{image_base64(seed)}\t红杯{key}\n" for seed, key in enumerate("abc"))
    (tmp_path / "train.tsv").write_text(rows, encoding="utf-8")
    status, out, _ = run("good.txt", "train.tsv", "--html", "page.html", "--thumbnail", "20")
    assert status == 0 and "page: page.html, all 3 rows, 0.0 MB" in out and "could not" not in out
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("\nUklGR") == 2
    (tmp_path / "images.tsv").write_text(f"a\t{image_base64()}\nb\tbroken\n", encoding="utf-8")
    status, out, _ = run("bad.txt", "refs.txt", "--html", "page.html", "--images", "images.tsv", "--html_rows", "2")
    assert status == 0 and "the 2 rows with the lowest CIDEr of 3 rows" in out
    assert "1 images could not be decoded" in out
    (tmp_path / "scores.tsv").write_text("a\t1.0\t1.5\t0.5\t[]\nb\t\t\t\tbad base64\n")
    assert run("good.txt", "train.tsv", "--html", "page.html", "--scores", "scores.tsv")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [(row[0], row[-1]) for row in data["rows"]] == [("a", 0.5), ("b", None), ("c", None)]
    assert run("good.txt", "train.tsv", "--scores", "scores.tsv")[0] == 2
    status, out, _ = run("good.txt", "train.tsv", "--html", "page.html", "--scores", "scores.tsv")
    assert status == 0 and "2 rows of good.txt have no score in scores.tsv" in out
    for other in ("", "x\t1.0\t1.5\t0.5\t[]\n", "a\tnan\tnan\tnan\t[]\n"):
        (tmp_path / "scores.tsv").write_text(other)
        status, _, err = run("good.txt", "train.tsv", "--html", "page.html", "--scores", "scores.tsv")
        assert status == 2 and "scores.tsv has no score for any row of good.txt" in err
