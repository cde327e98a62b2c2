"""The consensus of results files: what is chosen, what is recorded, and files that do not belong together."""

import json
import random
import sys

import pytest

from paddlemix.inference import combining
from paddlemix.metrics.captions import score_captions
from paddlemix.utils import cli
from tests.helpers import image_base64
from tools import combine_results

ROWS = {
    "a": ("红色的杯子放在左边", "红色的杯子放在右边", "红色的大杯子放在左边"),
    "b": ("两只蓝瓶", "三只白色的瓶子", "三只白色瓶子"),
    "c": ("", "黑猫坐着", "黑猫站着"),
    "b2": ("一样", "一样", "别的"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) → (exit status, stdout, last line of stderr); 0.txt, 1.txt and 2.txt are three results files."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{key}\t{texts[i]}\n" for key, texts in ROWS.items()), "utf-8")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["combine_results.py", *arguments, "--quiet"])
        status = cli.run(combine_results.main)
        said = capsys.readouterr()
        return status, said.out, (said.err.splitlines() or [""])[-1]

    return run


def consensus(texts, rows):
    """The caption with the highest mean CIDEr-D against the others, by the scorer of captions, one pair at a time."""
    def against(one, other):
        # Document frequencies of all texts; the pair that is asked about comes first.
        references = {key: [text for text in row if text] for key, row in rows.items()}
        scorer = combining.DocumentFrequencies()
        for row in references.values():
            scorer.add([list(text) for text in dict.fromkeys(row)])
        scorer.finish()
        return combining.agreement([[one, other]], "char", scorer)[0][0]

    usable = [text for text in texts if text]
    means = []
    for i, text in enumerate(usable):
        others = usable[:i] + usable[i + 1 :]
        means.append(sum(against(text, other) for other in others) / len(others))
    return usable[means.index(max(means))]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_row_gets_its_consensus(run, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(combining, "CHUNK_ROWS", 3)
    status, out, err = run("0.txt", "1.txt", "2.txt", "out.txt", "--workers", workers)
    assert status == 0, err
    lines = [line.split("\t") for line in (tmp_path / "out.txt").read_text("utf-8").splitlines()]
    assert lines == [[key, consensus(texts, ROWS)] for key, texts in ROWS.items()]
    assert dict(lines)["b"] != ROWS["b"][0] and dict(lines)["c"] != "" and dict(lines)["b2"] == "一样"
    record = json.loads((tmp_path / "out.txt.run.json").read_text("utf-8"))
    assert [one["path"] for one in record["combined"]] == ["0.txt", "1.txt", "2.txt"]
    assert sum(one["taken"] for one in record["combined"]) == record["rows"] == 4
    assert record["output"]["bytes"] == (tmp_path / "out.txt").stat().st_size
    assert out.startswith("out.txt: 4 rows, ")


def test_it_is_nearer_to_the_truth_than_its_parts(run, tmp_path):
    """Three files that are wrong in different rows."""
    truth = {str(i): f"第{i}款商品售价{i * 7 % 90}元放在{'左右'[i % 2]}边" for i in range(30)}
    for number in range(3):
        wrong = {key: text if int(key) % 3 != number else "完全不同的一句话" for key, text in truth.items()}
        (tmp_path / f"w{number}.txt").write_text("".join(f"{k}\t{v}\n" for k, v in wrong.items()), "utf-8")
    assert run("w0.txt", "w1.txt", "w2.txt", "out.txt")[0] == 0
    combined = dict(line.split("\t") for line in (tmp_path / "out.txt").read_text("utf-8").splitlines())
    assert combined == truth
    assert score_captions(combined, {key: [text] for key, text in truth.items()}).corpus["BLEU-4"] > 0.99


def test_a_fallback_is_the_last_choice(run, tmp_path):
    record = {"input": {"bytes": 1, "sha256": "x"}, "settings": {"fallback": "两只蓝瓶"}, "model": {"base": "y"}}
    (tmp_path / "0.txt.run.json").write_text(json.dumps(record), "utf-8")
    (tmp_path / "3.txt").write_text("a\t甲\nb\t两只蓝瓶\nc\t乙\nb2\t丙\n", "utf-8")
    (tmp_path / "4.txt").write_text("a\t甲\nb\t三只白色的瓶子\nc\t乙\nb2\t丙\n", "utf-8")
    assert run("0.txt", "4.txt", "out.txt")[0] == 0
    assert "b\t三只白色的瓶子\n" in (tmp_path / "out.txt").read_text("utf-8")
    assert json.loads((tmp_path / "out.txt.run.json").read_text("utf-8"))["input"] == record["input"]
    # Without another caption it is what there is.
    assert run("0.txt", "0.txt", "out.txt")[0] == 0
    assert "b\t两只蓝瓶\n" in (tmp_path / "out.txt").read_text("utf-8")
    (tmp_path / "4.txt.run.json").write_text(json.dumps({"input": {"bytes": 2, "sha256": "z"}}))
    status, _, err = run("0.txt", "4.txt", "out.txt")
    assert status == 2 and "captions of different inputs" in err


def test_a_single_row(run, tmp_path):
    for i, text in enumerate(("绿色的书", "红色的杯子", "红色的杯子。")):
        (tmp_path / f"s{i}.txt").write_text(f"a\t{text}\n", "utf-8")
    assert run("s0.txt", "s1.txt", "s2.txt", "out.txt")[0] == 0
    assert (tmp_path / "out.txt").read_text("utf-8") == "a\t红色的杯子\n"


@pytest.mark.parametrize(
    "content, says",
    [
        ("a\t甲\nx\t乙\nc\t丙\nb2\t丁\n", "row 2 of 0.txt has the id 'b'; in bad.txt it is 'x'"),
        ("a\t甲\n", "row 2 of 0.txt has the id 'b'; in bad.txt there is no such row"),
        ("a\t甲\nb\t乙\nc\t丙\nb2\t丁\ne\t戊\n", "bad.txt has more rows than 0.txt"),
        ("a\t甲\nb 乙\n", "line 2 of bad.txt is not id, tab, caption"),
        (None, "bad.txt"),
    ],
)
def test_files_that_do_not_belong_together(run, tmp_path, content, says):
    if content is not None:
        (tmp_path / "bad.txt").write_text(content, "utf-8")
    status, _, err = run("0.txt", "bad.txt", "out.txt")
    assert status == 2 and says in err and not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("what, line", [("images", "\t" + image_base64()), ("scores", "\t0.5\t0.7\t0.2\t[]")])
def test_images_and_scores_are_refused(run, tmp_path, what, line):
    (tmp_path / "bad.txt").write_text("".join(f"{key}{line}\n" for key in ROWS), "utf-8")
    status, _, err = run("0.txt", "bad.txt", "1.txt", "out.txt")
    assert status == 2 and f"bad.txt is a table of {what}" in err and not (tmp_path / "out.txt").exists()


def test_ties_go_to_the_first_file_and_copies_are_named(run, tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("红绿蓝白黑杯子瓶灯书左右上下大小新款", k=20)) for _ in range(60)]
    for name in range(4):
        lines = [f"{i}\t{text if name < 3 else text[:12] + text[::-1]}\n" for i, text in enumerate(texts)]
        (tmp_path / f"{name}.txt").write_text("".join(lines), "utf-8")
    status, out, err = run("0.txt", "1.txt", "2.txt", "3.txt", "out.txt")
    assert status == 0 and out.startswith("out.txt: 60 rows, 60 of 0.txt, 0 of 1.txt, 0 of 2.txt, 0 of 3.txt")
    assert "2.txt has the same contents as 0.txt" in err


def test_only_what_was_combined_is_replaced(run, tmp_path):
    """A forgotten OUT makes one of the last results file."""
    before = (tmp_path / "2.txt").read_bytes()
    status, _, err = run("0.txt", "1.txt", "2.txt")
    assert status == 2 and "2.txt exists and is not from an earlier run" in err
    assert (tmp_path / "2.txt").read_bytes() == before
    assert [run("0.txt", "1.txt", "2.txt", "out.txt")[0] for _ in range(2)] == [0, 0]
    assert run("0.txt", "1.txt", "2.txt", "--overwrite")[0] == 0


def test_bad_usage(run):
    for arguments in (["0.txt", "out.txt"], ["0.txt", "1.txt", "0.txt"], ["0.txt", "1.txt", "o.txt", "--workers=-1"]):
        status, _, err = run(*arguments)
        assert status == 2 and err.startswith("error: ")
