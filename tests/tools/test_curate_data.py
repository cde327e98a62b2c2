"""curate_data.py: each rule alone and all together, what is written, and the same bytes each time."""

import base64
import hashlib
import json
import os
import random
import re
import sys

import numpy as np
import pytest

from paddlemix.curation import selection
from paddlemix.curation.caption_facts import caption_facts
from paddlemix.curation.selection import Settings, decide, survey_rows
from paddlemix.datasets.blocks import FileState
from paddlemix.datasets.rows import image_text, read_rows
from paddlemix.utils import cli
from tests.helpers import byte_vocab_tokenizer, image_base64, image_bytes
from tools import curate_data


@pytest.fixture
def call(monkeypatch, capfd):
    def call(*arguments):
        given = [str(word) for word in arguments]
        workers = [] if "--workers" in given else ["--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["curate_data.py", *given, *workers, "--quiet"])
        status = cli.run(curate_data.main)
        return (status, *capfd.readouterr())

    return call


# Captions whose facts are easily seen, each with an image of its own seed and size.
ROWS = {
    "plain": ("红色的杯子放在桌上", 0, (64, 48)),
    "short": ("红杯", 1, (64, 48)),
    "long": ("蓝色的雨伞立在门边，" * 2 + "旁边是一只猫", 2, (64, 48)),
    "loop": ("买一送一买一送一买一送一买一送一", 3, (64, 48)),
    "latin": ("NEW ARRIVAL 2024 杯", 4, (64, 48)),
    "small": ("白色的盘子盛着水果", 5, (20, 48)),
    "narrow": ("绿色的横幅写着新品", 6, (200, 24)),
    "copy": ("红色的杯子放在木桌上面", 0, (128, 96)),
    "leak": ("黄色的台灯照着书本", 7, (64, 48)),
}


@pytest.fixture
def data(tmp_path):
    lines = [f"{name}\t{image_base64(seed, size=size)}\t{text}\n" for name, (text, seed, size) in ROWS.items()]
    lines += ["bad\n", "none\tQUJDQUJDQUJDQUJDQUJDQUJD\t没有图片的一行文字\n"]
    (tmp_path / "in.tsv").write_text("".join(lines))
    (tmp_path / "val.tsv").write_text(f"v\t{image_base64(7, size=(128, 96))}\n")
    return tmp_path


def kept(path):
    return [row.id for row in read_rows(str(path), True)]


@pytest.mark.parametrize(
    "rule, dropped",
    [
        (["--must", "的"], {"short", "loop", "latin"}),
        (["--must_not", "猫|台灯"], {"long", "leak"}),
        (["--min_chars", 9], {"short"}),
        (["--max_chars", 20], {"long"}),
        (["--min_tokens", 21, "--tokenizer", "TOKENIZER"], {"short", "latin"}),
        (["--max_tokens", 50, "--tokenizer", "TOKENIZER"], {"long"}),
        (["--max_repetition", 0.5], {"loop"}),
        (["--min_chinese", 0.5], {"latin"}),
        (["--min_side", 40], {"small", "narrow"}),
        (["--max_aspect", 3], {"narrow"}),
        (["--near_duplicates", 6], {"copy"}),
        (["--near_duplicates", 6, "--keep", "longest"], {"plain"}),
        (["--near_duplicates", 6, "--per_group", 2], set()),
        (["--not_in", "VAL"], {"leak"}),
        (["--drop_scores", "SCORES:25%"], {"small", "loop"}),
        (["--drop_scores", "SCORES:0%", "--near_duplicates", 6, "--keep", "best"], {"plain"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_each_rule_drops_its_rows(call, data, rule, dropped):
    gains = {"small": -0.5, "loop": -0.25, "plain": 0.1, "copy": 0.2}
    lines = [f"{name}\t1\t2\t{gains.get(name, 1)}\t[]\n" for name in ROWS if name != "narrow"] + ["bad\t\t\t\tx\n"]
    (data / "scores.tsv").write_text("".join(lines))
    places = {"VAL": data / "val.tsv", "SCORES": data / "scores.tsv", "TOKENIZER": data / "tokenizer"}
    if "--tokenizer" in rule:
        os.mkdir(data / "tokenizer")
        byte_vocab_tokenizer(data / "tokenizer")
    words = [str(word) for word in rule]
    for word, place in places.items():
        words = [each.replace(word, str(place)) for each in words]
    status, said, errors = call(data / "in.tsv", data / "out.tsv", *words)
    assert status == 0, errors
    assert kept(data / "out.tsv") == [name for name in ROWS if name not in dropped]
    rejected = [line.split("\t") for line in (data / "out.rejected.tsv").read_text().splitlines()]
    assert [name for _, name, _ in rejected] == [name for name in ROWS if name in dropped] + ["bad", "none"]
    assert rejected[-2] == ["10", "bad", "missing column"]
    report = json.loads((data / "out.curation.json").read_text())
    assert (report["rows"], report["kept"]) == (11, len(ROWS) - len(dropped))
    assert sum(report["together"].values()) == sum(report["alone"].values()) == len(dropped)


def test_a_dry_run_says_what_each_rule_drops_alone_and_together_and_writes_nothing(call, data):
    rules = ["--must", "的", "--min_chars", 9, "--near_duplicates", 6, "--not_in", data / "val.tsv"]
    before = set(os.listdir(data))
    status, said, _ = call(data / "in.tsv", data / "out.tsv", *rules, "--dry_run")
    # Only what is computed of images, which the next command takes.
    assert status == 0 and set(os.listdir(data)) - before == {".in.tsv.facts", ".val.tsv.facts"}
    table = [line.split() for line in said.splitlines() if line.startswith("--")]
    wanted = {"--must": ["-3", "-3"], "--min_chars": ["-1", "0"], "--not_in": ["-1", "-1"]}
    assert {name: counts for name, *counts in table} == {**wanted, "--near_duplicates": ["-1", "-1"]}
    assert said.splitlines()[-1].split() == ["kept", "4"]
    facts = os.stat(data / ".in.tsv.facts")
    assert call(data / "in.tsv", data / "out.tsv", *rules)[1].splitlines()[:-1] == said.splitlines()
    # Nothing of the images is computed again.
    assert os.stat(data / ".in.tsv.facts").st_mtime_ns == facts.st_mtime_ns


@pytest.mark.parametrize("rule", [rule.name for rule in selection.SET_RULES])
def test_a_rule_of_the_set_is_what_a_loop_over_rows_gives(monkeypatch, rule):
    """On 300 random rows: groups, gains with gaps and ties, openings."""
    draw = np.random.default_rng(1)
    rows = np.zeros(300, selection.ROW)
    rows["chars"], rows["opening"] = draw.integers(1, 9, 300), draw.integers(0, 20, 300)
    rows["gain"] = np.where(draw.random(300) < 0.2, np.nan, draw.integers(0, 30, 300))
    groups = draw.integers(0, 80, 300)
    groups = np.array([np.flatnonzero(groups == group)[0] for group in groups])
    survey = selection.Survey(rows, [""], 0, None, draw.random(300) < 0.1, groups, draw.random(300))
    left = draw.random(300) < 0.8
    values = {"not_in": ["x"], "drop_scores": ("x", 0.1), "near_duplicates": 6, "per_opening": 7, "limit": 100}
    for keep in ("first", "longest", "best") if rule == "near_duplicates" else ("first",):
        settings = Settings({rule: values[rule]}, keep=keep, per_group=2)
        there = [row for row in range(300) if left[row]]
        if rule == "not_in":
            wanted = {row for row in there if survey.leaks[row]}
        elif rule == "drop_scores":
            scored = [row for row in there if rows["gain"][row] == rows["gain"][row]]
            wanted = set(sorted(scored, key=lambda row: (rows["gain"][row], -row))[: int(len(scored) * 0.1)])
        elif rule == "limit":
            wanted = set(sorted(there, key=lambda row: survey.draw[row])[100:])
        else:
            name, most = (survey.groups, 2) if rule == "near_duplicates" else (rows["opening"], 7)
            best = {
                "first": lambda row: row, "longest": lambda row: (-int(rows["chars"][row]), row),
                "best": lambda row: (-np.nan_to_num(rows["gain"][row], nan=-1e9), row),
            }[keep]  # fmt: skip
            order = sorted(there, key=(lambda row: survey.draw[row]) if rule == "per_opening" else best)
            wanted = {row for at, row in enumerate(order) if sum(name[one] == name[row] for one in order[:at]) >= most}
        drops = next(one.drops for one in selection.SET_RULES if one.name == rule)
        assert set(np.flatnonzero(drops(survey, settings, left)).tolist()) == wanted and wanted


def test_caption_rules_are_their_facts(tmp_path):
    draw = random.Random(2)
    letters = ["红杯放在桌上买一送AB12 ，", "红杯"]
    texts = ["红" + "".join(draw.choices(letters[n % 2], k=draw.randint(0, 30))) + "1" for n in range(200)]
    (tmp_path / "in.tsv").write_text("".join(f"{n}\t{image_base64(0)}\t{text}\n" for n, text in enumerate(texts)))
    rules = {"min_chars": 5, "max_chars": 25, "max_repetition": 0.1, "min_chinese": 0.6}
    settings = Settings(rules, quiet=True, workers=0)
    path = str(tmp_path / "in.tsv")
    found = decide(survey_rows(path, settings, FileState.of(path)), settings)
    for text, reason in zip(texts, found.reason):
        facts = caption_facts(text)
        wanted = [
            (facts.chars < 5, "caption too short"), (facts.chars > 25, "caption too long"),
            (facts.repetition > 0.1, "caption repeats itself"), (facts.chinese < 0.6, "too little Chinese"), (True, ""),
        ]  # fmt: skip
        assert found.reasons[reason] == next(text for holds, text in wanted if holds)
    assert len(set(found.reason.tolist())) == 5


def forms_of(folder):
    """The same rows as a TSV, a table of paths, a train.json with references, and one with the images inside."""
    os.mkdir(folder / "images")
    lines, paths, inside, references = [], [], [], []
    for number in range(8):
        (folder / "images" / f"{number}.jpg").write_bytes(image_bytes(number))
        turns = [["说说\n这张图", f"第{number}张图片"], ["还有呢？", "没有了"]]
        lines.append(f"ad{number}\t{image_base64(number)}\t第{number}张图片\n")
        paths.append(f"ad{number}\timages/{number}.jpg\t第{number}张图片\n")
        record = {"id": f"ad{number}", "conversations": turns}
        inside.append({**record, "image": image_base64(number)})
        references.append({**record, "image": {"file": f"images/{number}.jpg"}})
    for name, content in {
        "in.tsv": "".join(lines), "paths.tsv": "".join(paths), "inside.json": json.dumps(inside),
        "references.json": json.dumps(references),
    }.items():  # fmt: skip
        (folder / name).write_text(content)
    return ["in.tsv", "paths.tsv", "inside.json", "references.json"]


@pytest.mark.parametrize(
    "out, images", [("sub/out.tsv", "inline"), ("sub/out.json", "inline"), ("sub/out.json", "reference")]
)
def test_tables_and_records_in_tables_and_records_out(call, tmp_path, out, images):
    for name in forms_of(tmp_path):
        for _ in range(2):
            status, _, errors = call(tmp_path / name, tmp_path / out, "--images", images, "--must_not", "第[135]")
            assert status == 0, errors
            bytes_now = [(tmp_path / file).read_bytes() for file in selection.output_names(out)]
        assert bytes_now == [(tmp_path / file).read_bytes() for file in selection.output_names(out)]
        rows = list(read_rows(str(tmp_path / out), True))
        assert [(row.id, row.caption) for row in rows] == [(f"ad{n}", f"第{n}张图片") for n in (0, 2, 4, 6, 7)]
        assert [base64.b64decode(bytes(image_text(row))) for row in rows] == [image_bytes(n) for n in (0, 2, 4, 6, 7)]
        if out.endswith(".json"):
            (first, *_) = json.loads((tmp_path / out).read_text())
            more = [["还有呢？", "没有了"]] if name.endswith(".json") else []
            question = "说说\n这张图" if name.endswith(".json") else "请描述图片内容"
            assert first["conversations"] == [[question, "第0张图片"], *more]
            assert isinstance(first["image"], dict) == (images == "reference")


def test_quotes_are_those_of_a_csv_writer_in_tables_alone(call, tmp_path):
    caption, image = '"新品""上市"', image_base64(1)
    (tmp_path / "in.json").write_text(json.dumps([{"id": "a", "conversations": [["看", caption]], "image": image}]))
    (tmp_path / "in.tsv").write_text(f"a\t{image}\t{caption}\n")
    for name, said in (("in.json", caption), ("in.tsv", '新品"上市')):
        assert call(tmp_path / name, tmp_path / "out.json")[0] == 0
        assert json.loads((tmp_path / "out.json").read_text())[0]["conversations"][0][1] == said
        assert call(tmp_path / name, tmp_path / "out.tsv")[0] == 0
        assert [row.text for row in read_rows(str(tmp_path / "out.tsv"), True)] == [said]


def test_preferred_captions(call, data):
    """All of them without scores; with scores those with the higher gain, by which rows are then dropped."""
    names = list(ROWS)
    (data / "new.txt").write_text("".join(f"{name}\t新的{name}\n" for name in names[:6]))
    for file, gains in {"old": [1, 2, 3, 4, "", "", 7, 0.5], "new": [2, 1, 3, 5, 0, ""]}.items():
        lines = [f"{name}\t{'' if gain == '' else 0}\t\t{gain}\t[]\n" for name, gain in zip(names, gains)]
        lines = [line.replace("\t0\t\t", "\t0\t0\t").replace("\t\t\t\t", "\t\t\t\t") for line in lines]
        (data / f"{file}.scores").write_text("".join(lines))
    status, _, errors = call(data / "in.tsv", data / "all.tsv", "--prefer", data / "new.txt")
    assert status == 0, errors
    captions = {row.id: row.caption for row in read_rows(str(data / "all.tsv"), True)}
    assert captions == {name: f"新的{name}" if name in names[:6] else ROWS[name][0] for name in names}
    prefer = f"{data / 'new.txt'}:{data / 'new.scores'}"
    status, said, errors = call(
        data / "in.tsv", data / "best.tsv", "--prefer", prefer, "--drop_scores", f"{data / 'old.scores'}:25%"
    )  # fmt: skip
    assert status == 0 and "3 rows have a caption of" in said, errors
    captions = {row.id: row.caption for row in read_rows(str(data / "best.tsv"), True)}
    # Gains: 2 new, 2, 3, 5 new, 0 new, none, 7, 0.5, none: of seven scored rows the lowest goes.
    wanted = {name: f"新的{name}" if name in ("plain", "loop") else ROWS[name][0] for name in names}
    del wanted["latin"]
    assert captions == wanted


@pytest.fixture
def scored(tmp_path):
    """Two tables of six rows without ids, and scores of four rows of the first, with their record."""
    for name in ("in", "other"):
        lines = [f"{image_base64(n)}\t{name}的第{n}张图片\n" for n in range(6)]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
        digest = hashlib.sha256((tmp_path / f"{name}.tsv").read_bytes()).hexdigest()
        (tmp_path / f"{name}.scores.run.json").write_text(json.dumps({"input": {"sha256": digest}}))
        (tmp_path / f"{name}.scores").write_text("".join(f"{n}\t1\t2\t{n / 4}\t[]\n" for n in range(1, 5)))
    (tmp_path / "new.txt").write_text("".join(f"{n}\t新的描述\n" for n in range(1, 7)))
    return tmp_path


def test_rows_without_a_score_are_counted(call, scored):
    status, _, errors = call(scored / "in.tsv", scored / "out.tsv", "--drop_scores", f"{scored / 'in.scores'}:25%")
    assert status == 0 and errors == f"warning: 2 usable rows have no score in {scored / 'in.scores'}\n"
    report = json.loads((scored / "out.curation.json").read_text())
    assert (report["kept"], report["unscored"]) == (5, 2)
    call(scored / "in.tsv", scored / "out.tsv")
    assert json.loads((scored / "out.curation.json").read_text())["unscored"] == 0


@pytest.mark.parametrize("line", [None, "{}\tnan\tnan\tnan\t[]\n", "{}\t\t\t\tno caption\n"])
@pytest.mark.parametrize("new", [False, True])
def test_a_file_without_any_score_is_refused(call, scored, line, new):
    empty = scored / "empty.scores"
    empty.write_text("".join(line.format(n) for n in range(1, 7)) if line else "")
    options = ["--drop_scores", f"{scored / 'in.scores' if new else empty}:10%"]
    options += ["--prefer", f"{scored / 'new.txt'}:{empty}"] if new else []
    status, _, errors = call(scored / "in.tsv", scored / "out.tsv", *options)
    assert status == 2 and errors == f"error: {empty} has no score for any row of {scored / 'in.tsv'}\n"


def test_scores_of_another_input_are_refused(call, scored):
    status, _, errors = call(scored / "in.tsv", scored / "out.tsv", "--drop_scores", f"{scored / 'other.scores'}:10%")
    assert status == 2 and "other.scores has the scores of other data than" in errors
    old, new = f"{scored / 'in.scores'}:10%", f"{scored / 'new.txt'}:{scored / 'in.scores'}"
    status, _, errors = call(scored / "in.tsv", scored / "out.tsv", "--drop_scores", old, "--prefer", new)
    assert status == 2 and "not of the captions in" in errors and not (scored / "out.tsv").exists()
    new = f"{scored / 'new.txt'}:{scored / 'other.scores'}"
    assert call(scored / "in.tsv", scored / "out.tsv", "--drop_scores", old, "--prefer", new)[0] == 0
    # Captions of another file, whose rows have the same line numbers for ids.
    (scored / "new.txt.run.json").write_text((scored / "other.scores.run.json").read_text())
    status, _, errors = call(scored / "in.tsv", scored / "out.tsv", "--prefer", scored / "new.txt")
    assert status == 2 and "new.txt has the captions of other data than" in errors
    # Without a record the ids decide.
    (scored / "other.scores.run.json").unlink()
    (scored / "new.txt.run.json").unlink()
    other = f"{scored / 'other.scores'}:10%"
    assert call(scored / "in.tsv", scored / "out.tsv", "--drop_scores", other)[0] == 0
    assert call(scored / "in.tsv", scored / "out.tsv", "--prefer", scored / "new.txt")[0] == 0


def test_a_fallback_caption_is_not_preferred(call, scored):
    (scored / "new.txt").write_text("1\t一张广告图片。\n2\t新的描述\n")
    (scored / "new.txt.run.json").write_text('{"settings": {"fallback": "一张广告图片。"}}')
    assert call(scored / "in.tsv", scored / "out.tsv", "--prefer", scored / "new.txt")[0] == 0
    captions = [row.caption for row in read_rows(str(scored / "out.tsv"), True)]
    assert captions[:3] == ["in的第0张图片", "新的描述", "in的第2张图片"]


@pytest.mark.parametrize("name", ["out.csv", "out.JSONL"])
def test_an_output_of_another_format_is_refused(call, data, name):
    status, _, errors = call(data / "in.tsv", data / name)
    assert status == 2 and "must be a .json, for records, or a .tsv" in errors and not (data / name).exists()


@pytest.mark.parametrize(
    "rows, reasons",
    [
        ("a\tgone.jpg\t一\nb\tgone.png\t二\n", "2 × no such file"), ("", "there are none"),
        (f"a\t{image_base64()}\n", "1 × no caption; convert_labels.py --captions adds those of predict.py's results"),
    ],
)  # fmt: skip
def test_without_a_row_the_reasons_are_counted(call, tmp_path, rows, reasons):
    (tmp_path / "in.tsv").write_text(rows)
    status, _, errors = call(tmp_path / "in.tsv", tmp_path / "out.tsv")
    assert (status, errors) == (1, f"error: no row of {tmp_path / 'in.tsv'} is left: {reasons}\n")


def test_truncated_images_are_used_unless_they_are_dropped(call, data):
    image = image_bytes(9, size=(256, 192))
    with open(data / "in.tsv", "a") as file:
        file.write(f"cut\t{base64.b64encode(image[: len(image) // 2]).decode()}\t一张不完整的图片\n")
    for rule, stays in (([], True), (["--min_side", 8], True), (["--drop_truncated"], False)):
        assert call(data / "in.tsv", data / "out.tsv", *rule)[0] == 0
        assert ("cut" in kept(data / "out.tsv")) == stays
    assert "cut\ttruncated image\n" in (data / "out.rejected.tsv").read_text()


def test_a_run_is_repeated_from_its_settings(call, data):
    for name, gain in (("old.tsv", 1), ("new.tsv", 2)):
        (data / name).write_text("".join(f"{row}\t1\t2\t{gain * i}\t[]\n" for i, row in enumerate(ROWS)))
    (data / "new.txt").write_text("".join(f"{row}\t新的描述{row}\n" for row in ROWS))
    given = ["--must", "[的杯]", "--max_repetition", 0.3, "--drop_truncated", "--near_duplicates", 4, "--keep", "best"]
    given += ["--not_in", data / "val.tsv", "--drop_scores", f"{data / 'old.tsv'}:14.5%", "--limit", 5, "--seed", 3]
    given += ["--prefer", f"{data / 'new.txt'}:{data / 'new.tsv'}"]
    status, _, errors = call(data / "in.tsv", data / "out.tsv", *given)
    assert status == 0, errors
    report = json.loads((data / "out.curation.json").read_text())
    again = []
    for name, value in report["settings"].items():
        for one in value if isinstance(value, list) else [value]:
            again += [f"--{name}"] if one is True else [f"--{name}", one]
    assert call(report["input"], data / "again.tsv", *again)[0] == 0
    for end in ("tsv", "rejected.tsv", "curation.json"):
        assert (data / f"again.{end}").read_bytes() == (data / f"out.{end}").read_bytes()


def test_draws_depend_on_the_seed_alone(call, data):
    def drawn(seed, workers):
        call(data / "in.tsv", data / "out.tsv", "--limit", 4, "--seed", seed, "--workers", workers)
        return kept(data / "out.tsv")

    first = drawn(0, 0)
    assert len(first) == 4 and first == sorted(first, key=list(ROWS).index) == drawn(0, 2)
    assert any(drawn(seed, 0) != first for seed in (1, 2))


def test_near_duplicates_name_the_row_that_stays(call, data):
    call(data / "in.tsv", data / "out.tsv", "--near_duplicates", 6)
    assert "8\tcopy\tnear duplicate of line 1\n" in (data / "out.rejected.tsv").read_text()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--must", "["], "is not a regular expression"), (["--drop_scores", "x"], "FILE:PERCENT%"),
        (["--drop_scores", "IN:101%"], "FILE:PERCENT%"), (["--keep", "best"], "needs --near_duplicates"),
        (["--near_duplicates", 6, "--keep", "best"], "--keep best needs --drop_scores"), (["--per_group", 2], "needs"),
        (["--max_tokens", 3], "needs --tokenizer"), (["--near_duplicates", 11], "at least 0 and at most 10"),
        (["--images", "reference"], "an OUT.json"), (["--limit", 0], "integer of at least 1"),
        (["--drop_scores", "IN:5%"], "not a file that tools/score_rows.py has written"),
        (["--not_in", "gone"], "cannot read gone"), (["--must", "狗"], "is left: 9 × caption lacks --must, 1 × "),
        (["--must", ""], "is empty"), (["--must_not", ""], "is empty"),
        (["--prefer", "IN"], "is a table of images"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_refused_is_one_line_and_leaves_nothing(call, data, arguments, says):
    words = [str(word).replace("IN", str(data / "val.tsv")) for word in arguments]
    status, _, errors = call(data / "in.tsv", data / "out.tsv", *words)
    assert status in (1, 2) and errors.startswith("error: ") and says in errors and errors.count("\n") == 1
    assert not [name for name in os.listdir(data) if name.startswith("out.")]
    status, _, errors = call(data / "in.tsv", data / "in.tsv")
    assert status == 2 and "would be overwritten" in errors


def test_the_page_on_data_lists_every_rule_and_its_reason(root):
    page = (root / "docs" / "data.md").read_text(encoding="utf-8")
    order = []
    for rule in selection.RULES:
        (line,) = [line for line in page.splitlines() if re.match(rf"\| [^|]*`--{rule.name}[ `]", line)]
        assert rule.reason in line, rule.name
        order.append(page.index(line))
    assert order == sorted(order)
