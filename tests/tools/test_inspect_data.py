"""inspect_data: numbers that can be counted by hand, duplicates, leaks, advice, and the page in a browser."""

import base64
import json
import sys

import numpy as np
import pytest
from PIL import Image

from paddlemix.auto import AutoTokenizerMIX
from paddlemix.curation import inspection
from paddlemix.curation.image_facts import facts_path
from paddlemix.curation.inspection import Frequent
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, encode_example
from paddlemix.utils import cli, language
from tests.helpers import byte_vocab_tokenizer, encoded, scene
from tools import convert_labels, inspect_data

HOSTILE = '</style><script>document.title="owned"</script><img src=x onerror=alert(1)> "quoted" \'&amp;'
LOOP = "买一送一" * 30


def write_rows(path, rows):
    """rows: (id, picture as bytes or text, caption)."""
    with open(path, "w", encoding="utf-8") as file:
        for name, picture, caption in rows:
            text = base64.b64encode(picture).decode() if isinstance(picture, bytes) else picture
            file.write(f"{name}\t{text}\t{caption}\n")
    return str(path)


def planted():
    """40 rows: 30 of their own, then copies, near copies and faults."""
    pictures = [encoded(scene(seed), quality=85) for seed in range(30)]
    captions = [f"这张图片展示了第{chr(0x4E00 + 7 * i)}款产品，复古风格，售价{10 + i}元。" for i in range(30)]
    rows = [(f"id{i}", picture, caption) for i, (picture, caption) in enumerate(zip(pictures, captions))]
    small = encoded(scene(4).resize((256, 170), Image.BICUBIC), quality=60)
    return rows + [
        ("copy1", pictures[3], captions[0]),
        ("copy2", pictures[3], captions[0]),
        ("near", small, "另一个说法"),
        ("white", encoded(Image.new("RGB", (300, 40), "white")), "白色"),
        ("loop", encoded(scene(40)), LOOP),
        ("latin", encoded(scene(41)), "A red cup on a table"),
        ("hostile", encoded(scene(42), "PNG"), HOSTILE + "\u200b"),
        ("id5", encoded(scene(43)), "重复的编号"),
        ("broken", base64.b64encode(b"no image at all " * 20).decode(), "坏图"),
        ("short", "x", "没有图"),
    ]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) → (status, stdout, last line of stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, arguments), "--quiet"])
        status = cli.run(inspect_data.main)
        out, err = capsys.readouterr()
        language.choose(None)
        return status, out, (err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def table(tmp_path):
    return write_rows(tmp_path / "rows.tsv", planted())


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_planted_is_counted(run, table, tmp_path, workers):
    status, out, _ = run(table, "--out", tmp_path / "out", "--workers", workers)
    assert status == 0
    found = report(tmp_path / "out")
    assert (found["rows"], found["good rows"], found["ids doubled"]) == (40, 38, 1)
    assert found["rejected"] == {"no image": 1, "not an image": 1}
    captions, images = found["captions"], found["images"]
    assert (captions["rows"], captions["distinct"]) == (39, 37)
    assert captions["texts"]["caption"]["listed"] == [[planted()[0][2], 3]]
    assert captions["texts"]["opening"]["listed"][0] == ["这张图片展示", 32]
    assert captions["texts"]["style"]["listed"] == [["复古", 32]]
    assert captions["texts"]["price"]["listed"][0] == ["10元", 3]
    assert captions["texts"]["4-gram"]["listed"][0][1] == 32 and captions["sampled for n-grams"] == 39
    assert captions["with"] == {"price": 32, "style": 32, "control": 1, "tags": 1}
    lengths = [len(caption) for _, _, caption in planted()[:-1]]
    measured = captions["measures"]["chars"]
    assert (measured["least"], measured["most"], measured["mean"]) == (2, 120, pytest.approx(np.mean(lengths)))
    assert measured["percentiles"]["50"] == np.percentile(lengths, 50)
    assert sum(measured["histogram"]["counts"]) == 39
    assert "tokens" not in captions["measures"]
    assert images["formats"] == {"JPEG": 37, "PNG": 1} and images["decoded"] == images["readable"] == 38
    assert images["copies"] == {"groups": 1, "rows beyond the first": 2, "largest": 3}
    assert images["near duplicates"] == {"bits apart": 6, "groups": 2, "rows beyond the first": 3, "largest": 3}
    assert images["one colour"] == 1
    assert images["measures"]["aspect"]["most"] == 7.5 and images["measures"]["height"]["least"] == 40
    said = "\n".join(found["advice"])
    for text in (
        "1 (2.50 %) captions repeat themselves: drop them with --max_repetition 0.3",
        "2 (5.00 %) captions are less than half Chinese: drop them with --min_chinese 0.5",
        "2 (5.00 %) images are copies of earlier ones",
        "3 (7.89 %) of the 38 decoded images are near duplicates",
        "1 (2.63 %) of the 38 decoded images show one colour",
        "1 (2.50 %) images have a side under 64 pixels: drop them with --min_side 64",
        "2 (5.00 %) rows cannot be used: 1 × no image, 1 × not an image",
        "1 (2.50 %) rows repeat an earlier id",
        "max_new_tokens 96 is enough for all captions",
    ):
        assert text in said
    assert all(f"- {text}" in out for text in found["advice"])


def test_images_of_one_layout_are_not_advised_away(run, tmp_path):
    rows = []
    for number in range(12):
        picture = scene(number if number < 4 else 0)
        picture.paste((number * 20, 90, 200), (250, 150, 262, 162))
        rows.append((f"id{number}", encoded(picture), "一件产品"))
    status, out, _ = run(write_rows(tmp_path / "rows.tsv", rows), "--out", tmp_path / "out", "--workers", 0)
    assert status == 0 and "drop them with --near_duplicates" not in out
    images = report(tmp_path / "out")["images"]
    closer = images["near duplicates by bits"]
    assert list(closer) == ["0", "2", "4"] and closer["0"] <= closer["2"] <= closer["4"] <= 8
    assert images["near duplicates"] == {"bits apart": 6, "groups": 1, "rows beyond the first": 8, "largest": 9}
    counts = ", ".join(f"{bits}: {count}" for bits, count in closer.items())
    assert f"the largest group has 9 (at fewer bits: {counts}): perhaps images of the same layout" in out
    # Nor are those that are near to images of another set.
    other = write_rows(tmp_path / "val.tsv", [("val", encoded(scene(0)), "另一件")])
    out = run(tmp_path / "rows.tsv", "--compare", other, "--out", tmp_path / "out", "--workers", 0)[1]
    assert f"0 images are also in {other}, and 9 nearly: perhaps these have the same layout" in out
    # Copies, as in a set with several captions per image, are another matter.
    copies = [(f"c{number}", encoded(scene(number // 3)), "一件产品") for number in range(12)]
    out = run(write_rows(tmp_path / "copies.tsv", copies), "--out", tmp_path / "out", "--workers", 0)[1]
    assert "--near_duplicates 0 would drop 8 (66.67 %), which is most of them" in out
    assert "same layout" not in out and "--near_duplicates 6" not in out


def test_a_train_json_is_the_same_set_inline_and_by_reference(run, table, tmp_path, monkeypatch):
    assert run(table, "--out", tmp_path / "tsv")[0] == 0
    expected = report(tmp_path / "tsv")
    for images in ("inline", "reference"):
        folder = tmp_path / images
        command = ["convert_labels.py", table, str(folder), "--images", images, "--val_every", "0", "--quiet"]
        monkeypatch.setattr(sys, "argv", [*command, "--verify", "header"])
        assert cli.run(convert_labels.main) == 0
        assert run(folder / "train.json", "--out", tmp_path / "out", "--workers", 2)[0] == 0
        found = report(tmp_path / "out")
        # The two broken rows are in no JSON, and ids are made anew.
        assert (found["rows"], found["good rows"], found["ids doubled"]) == (38, 38, 0)
        assert found["images"] == expected["images"]
        assert found["captions"]["texts"]["caption"] == expected["captions"]["texts"]["caption"]


def test_advice_on_odd_sets(run, tmp_path):
    def advice(rows):
        assert run(write_rows(tmp_path / "odd.tsv", rows), "--out", tmp_path / "out", "--workers", 0)[0] == 0
        return "\n".join(report(tmp_path / "out")["advice"])

    pictures = [encoded(scene(seed, size=(96, 64))) for seed in range(120)]
    said = advice([(f"id{i}", picture, f"A poster of {i} cups") for i, picture in enumerate(pictures)])
    assert "--min_chinese 0.5 would drop 120 (100.00 %), which is most of them" in said and "drop them" not in said
    assert "120 (100.00 %) captions begin with “A post”: the model will, too\n" in said + "\n"
    cut = [picture[: len(picture) // 2] if i < 3 else picture for i, picture in enumerate(pictures)]
    said = advice([(f"id{i}", picture, f"第{i}个杯子") for i, picture in enumerate(cut)])
    assert "3 (2.50 %) of the 120 decoded images are truncated: drop them with --drop_truncated" in said
    # The first rows may lack captions.
    assert "30 (25.00 %) rows cannot be used: 30 × empty caption" in advice(
        [(f"id{i}", picture, "一个杯子" * (i >= 30)) for i, picture in enumerate(pictures)]
    )
    assert advice([(f"id{i}", picture, "") for i, picture in enumerate(pictures[:5])]) == (
        "the rows have no captions: if this is a test set, drop none of them"
    )


def test_captions_do_not_steer_the_terminal(run, tmp_path):
    picture = encoded(scene(0, size=(96, 64)))
    rows = write_rows(tmp_path / "rows.tsv", [(f"id{i}", picture, f"\x1b[31m红{i}") for i in range(101)])
    status, out, _ = run(rows, "--out", tmp_path / "out", "--workers", 0)
    assert status == 0 and "\x1b" not in out and "captions begin with “\\x1b[31m红”" in out


def test_an_earlier_report_is_replaced_and_that_is_said(run, table, tmp_path):
    assert "in place of" not in run(table, "--out", tmp_path / "out")[1]
    assert run(table, "--out", tmp_path / "out")[1].endswith("report.html, in place of an earlier one\n")


def test_leaks_into_another_set_are_found_exactly_and_nearly(run, table, tmp_path):
    rows = planted()
    other = [(f"val{seed}", encoded(scene(seed)), "别的") for seed in range(100, 110)]
    near = encoded(scene(7).crop((5, 3, 507, 337)), quality=70)
    # A test set: no captions.
    with open(tmp_path / "val.tsv", "w") as file:
        for name, picture, _ in [*other, ("leak", rows[2][1], ""), ("nearly", near, "")]:
            file.write(f"{name}\t{base64.b64encode(picture).decode()}\n")
    assert run(table, "--compare", tmp_path / "val.tsv", "--out", tmp_path / "out")[0] == 0
    found = report(tmp_path / "out")
    assert found["overlap"] == {
        "exact": 1, "near": 1, "file": str(tmp_path / "val.tsv"), "decoded here": 38, "decoded there": 12,
    }  # fmt: skip
    assert found["other"]["rows"] == found["other"]["good rows"] == 12 and found["other"]["captions"]["rows"] == 0
    assert f"drop them with --not_in {tmp_path / 'val.tsv'}" in "\n".join(found["advice"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="pair"><article class="panel row">') == 2
    assert "an exact copy" in page and "val.tsv:12" in page


def test_a_sample_is_drawn_by_seed_and_hash_all_keeps_what_it_found(run, table, tmp_path):
    def decoded(*options):
        assert run(table, "--out", tmp_path / "out", *options)[0] == 0
        found = report(tmp_path / "out")
        return found["images"]["decoded"], found["captions"]["texts"]["4-gram"]["listed"], found

    some, texts, found = decoded("--images", 10, "--seed", 3)
    assert 2 <= some <= 20 and f"{some} of 38 images were decoded" in "\n".join(found["advice"])
    # Copies are known without pixels; one colour and near duplicates of the sample alone.
    assert found["images"]["copies"]["rows beyond the first"] == 2
    assert decoded("--images", 10, "--seed", 3)[:2] == (some, texts)
    assert decoded("--images", 10, "--seed", 4)[1] != texts
    everything = decoded("--images", 10, "--hash", "all")[2]
    assert everything["images"]["decoded"] == 38
    assert everything["images"]["near duplicates"]["rows beyond the first"] == 3
    # Now that it lies beside the data, it is used.
    assert decoded("--images", 10)[0] == 38
    assert facts_path(table) == str(tmp_path / ".rows.tsv.facts")


def test_several_files_are_one_set_and_tokens_are_counted(run, table, tmp_path):
    more = write_rows(tmp_path / "more.tsv", [("m", encoded(scene(3), quality=85), "另外的一行")])
    (tmp_path / "model").mkdir()
    byte_vocab_tokenizer(str(tmp_path / "model"))
    assert run(table, more, "--tokenizer", tmp_path / "model", "--out", tmp_path / "out")[0] == 0
    found = report(tmp_path / "out")
    assert found["rows"] == 41 and found["images"]["copies"]["largest"] == 4
    # A tokenizer of single bytes.
    lengths = [len(caption.encode()) for _, _, caption in planted()[:-1]] + [15]
    assert found["captions"]["measures"]["tokens"]["most"] == max(lengths) == 360
    assert found["captions"]["measures"]["tokens"]["mean"] == pytest.approx(np.mean(lengths))
    # With the end of the turn and what stands before the caption, as in training.
    tokenizer = AutoTokenizerMIX.from_pretrained(str(tmp_path / "model"))
    ids = encode_example(tokenizer, [(DEFAULT_PROMPT, planted()[-2][2])], 1, max_length=4096)["labels"]
    longest = len(ids) - lengths[-2] + max(lengths)
    said = f"the longest sample takes {longest} tokens with the default prompt, 6 of them for the image and 360 for"
    assert said in found["advice"][0]


def test_the_histogram_of_one_large_value_has_a_width():
    found = inspection._measure(np.full(2, 1 << 26))["histogram"]
    assert found["from"] < found["to"] and sum(found["counts"]) == 2


def test_frequent_texts_are_bounded_and_none_that_is_frequent_is_lost():
    counts = Frequent(100)
    rng = np.random.default_rng(0)
    true = {}
    for _ in range(50):
        part = {}
        for number in rng.zipf(1.3, 200).tolist():
            part[str(number)] = part.get(str(number), 0) + 1
            true[str(number)] = true.get(str(number), 0) + 1
        counts.add(part)
        assert len(counts.counts) <= 200
    assert counts.lost > 0
    for text, count in true.items():
        assert count - counts.lost <= counts.counts.get(text, 0) <= count
    assert counts.listed()[0][0] == max(true, key=true.get)


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["no-such.tsv"], 2, "cannot read no-such.tsv"),
        (["{table}", "--near_duplicates", "11"], 2, "of at least 0 and at most 10"),
        (["{table}", "--compare", "no-such.json"], 2, "cannot read no-such.json"),
        (["{empty}"], 2, "no rows"),
        (["{broken}"], 1, "can be used: 2 × no such file"),
        (["{table}", "--compare", "{broken}"], 1, "can be used: 2 × no such file"),
        (["{table}", "--out", "{table}"], 2, "is a file: give a folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, table, tmp_path, words, status, message):
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "broken.tsv").write_text("a\tgone.jpg\t一\nb\tgone.png\t二\n")
    places = {name: tmp_path / f"{name}.tsv" for name in ("empty", "broken")}
    words = [word.format(table=table, **places) for word in words]
    found = run(*words) if "--out" in words else run(*words, "--out", tmp_path / "out")
    assert found[0] == status and message in found[2]


# --- in a browser


def test_the_page_opens_quietly_and_text_stays_text(browser, run, table, tmp_path):
    assert run(table, "--compare", table, "--out", tmp_path / "my out")[0] == 0
    browser.open((tmp_path / "my out" / "report.html").as_uri())
    assert browser.run("document.title") == "What is in the data?"
    assert browser.run("document.documentElement.lang") == "en"
    browser.wait_for("[...document.images].every((image) => image.complete)")
    images = browser.run("[...document.images].map((image) => image.naturalWidth)")
    assert len(images) > 40 and min(images) > 0
    assert browser.run("document.querySelectorAll('main script, main img[src=x]').length") == 0
    shown = browser.run("[...document.querySelectorAll('.caption')].map((text) => text.textContent)")
    assert HOSTILE + "\u200b" in shown and LOOP in shown
    # The style sheet is allowed: bars have its colours, and the other set an outline.
    ours = "getComputedStyle(document.querySelector('svg rect.ours')).fill"
    assert browser.run(ours) not in ("", "rgb(0, 0, 0)")
    assert browser.run("getComputedStyle(document.querySelector('svg path.other')).fill") == "none"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data", "about"}


def test_page_and_advice_are_chinese_when_asked_for(browser, run, table, tmp_path):
    status, out, _ = run(table, "--out", tmp_path / "out", "--lang", "zh")
    assert status == 0
    for line in out.splitlines():
        assert any("\u4e00" <= letter <= "\u9fff" for letter in line), line
    browser.open((tmp_path / "out" / "report.html").as_uri())
    assert browser.run("document.documentElement.lang") == "zh-CN"
    for selector in ("h1", "h2", ".panel li", "figcaption", ".panel > .scroll th[scope=row]", ".words b", ".note"):
        texts = browser.run(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")
        assert texts
        for text in texts:
            assert text in ("JPEG", "PNG") or any("\u4e00" <= letter <= "\u9fff" for letter in text), text
    assert browser.problems == []
