"""The whole pipeline at a tiny scale, as a user runs it: tools/demo.py with few rows and steps. About a minute."""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def demo(root, tmp_path_factory):
    """A finished run: its folder, a function that runs it again, and what the first run printed."""
    out = tmp_path_factory.mktemp("demo run") / "out"
    command = [sys.executable, str(root / "tools" / "demo.py"), "--out", str(out), "--target", "0"]
    command += ["--pretrain_rows", "48", "--tune_rows", "24", "--held_out_rows", "5"]
    command += ["--pretrain_steps", "40", "--tune_steps", "5"]

    def run(*more):
        return subprocess.run(command + list(more), capture_output=True, encoding="utf-8", cwd=out.parent)

    run.command = command
    done = run()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out, run, done.stdout


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_every_row_gets_a_caption_in_order(demo):
    out, _, _ = demo
    ids = [line.split("\t")[0] for line in lines(out / "data" / "held_out.tsv")]
    assert len(ids) == 5
    for name in ("base", "tuned", "blank"):
        rows = [line.split("\t") for line in lines(out / f"{name}.txt")]
        assert [row[0] for row in rows] == ids
        assert all(len(row) == 2 and row[1] for row in rows)
    # All blank images are the same one, so their captions are.
    assert len({line.split("\t")[1] for line in lines(out / "blank.txt")}) == 1


def test_counts_of_the_conversion(demo):
    out, _, _ = demo
    for folder, train, val in (("pretrain", 45, 3), ("tune", 22, 2)):
        for name, count in (("train", train), ("val", val)):
            with open(out / folder / f"{name}.json", encoding="utf-8") as file:
                assert len(json.load(file)) == count


def test_training_lowers_the_loss(demo):
    out, _, _ = demo
    losses = {}
    for name in ("pretrain", "tune"):
        log = (out / "logs" / f"{name}.log").read_text(encoding="utf-8")
        for title in ("Model", "Data", "Training"):
            assert f"{title} Configuration Arguments" in log
        losses[name] = float(re.findall(r"eval_loss: ([\d.]+)", log)[-1])
    # Ids drawn evenly would cost log(768) = 6.6.
    assert losses["pretrain"] < 5


def test_what_was_tuned_and_merged(demo):
    from paddlemix.checkpoint import open_weights

    out, _, _ = demo
    assert (out / "lora" / "lora_config.json").is_file()
    with open_weights(str(out / "pretrained")) as base, open_weights(str(out / "merged")) as merged:
        assert sorted(base.keys()) == sorted(merged.keys())
        changed = {key for key in base.keys() if (base.read(key) != merged.read(key)).any()}
    assert any("attn.c_attn" in key for key in changed)
    assert any(key.startswith("visual.attn_pool.") for key in changed)
    # Frozen: the ViT. Without adapters: embeddings and lm_head.
    assert not any(key.startswith("visual.vit.") for key in changed)
    assert not {"lm_head.weight", "transformer.llm.wte.weight"} & changed


def test_what_is_printed(demo):
    out, _, printed = demo
    stages = printed.split("\n\n")[0].splitlines()
    assert [line.split("]")[0] for line in stages] == [f"[{number}/9" for number in range(1, 10)]
    assert all(re.search(r" [\d.]+ s$", line) for line in stages)
    # No line of a library, and the last lines of all are what results.txt keeps.
    text = (out / "results.txt").read_text(encoding="utf-8")
    assert printed == "\n".join(stages) + "\n\n" + text
    for words in ("attribute accuracy", "all attributes right", "CIDEr", "tuned, blank images", "To try next"):
        assert words in text
    with open(out / "results.json", encoding="utf-8") as file:
        results = json.load(file)
    assert set(results["scores"]) == {"base", "tuned", "blank"}
    assert len(results["verdicts"]) == 4 and set(results["seconds"]) == {path.stem for path in out.glob("logs/*.json")}
    for values in results["scores"].values():
        assert 0 <= values["attribute accuracy"] <= 1 and values["CIDEr"] >= 0


def test_the_examples_mark_what_is_right_and_wrong(demo):
    from tools.make_demo_data import parse_caption

    out, _, printed = demo
    references = dict(line.split("\t") for line in lines(out / "data" / "held_out_captions.tsv"))
    examples = re.findall(r"^(ad\d)  (pretrained|tuned|tuned, blank images) +(\d) of 8: (.*)$", printed, re.MULTILINE)
    assert [title for _, title, _, _ in examples].count("tuned") == 3
    files = {"pretrained": "base", "tuned": "tuned", "tuned, blank images": "blank"}
    for key, title, count, text in examples:
        caption = re.sub(r"✓|✗|(?<=[^(])\([^()]*\)", "", text)
        assert caption == dict(line.split("\t") for line in lines(out / f"{files[title]}.txt"))[key]
        truth, found = parse_caption(references[key]), parse_caption(caption)
        assert int(count) == text.count("✓") == sum(found[field] == truth[field] for field in truth)
        assert text.count("✗") == sum(found[field] not in (None, truth[field]) for field in truth)


def test_the_page_and_what_there_is_to_look_at(demo, root):
    out, _, printed = demo
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "$" not in page and len(page) < 1 << 20
    assert page.count("data:image/webp") == 5
    # Nothing is asked for from elsewhere, and what it links is there.
    links = re.findall(r'(?:href|src)="((?!data:)[^"]+)"', page)
    assert len(links) >= 10 and all((out / link).is_file() for link in links)
    assert "http" not in page.split("</head>")[0].replace("http-equiv", "")
    # Each command that is printed was run, that of chat.py with another picture, about which it answered.
    here = str(root) + os.sep
    python = sys.executable.replace(here, "", 1)
    commands = [line[29:] for line in printed.splitlines() if line[29:].startswith(python)]
    assert len(commands) == 2
    logged = "".join((out / "logs" / f"{name}.log").read_text(encoding="utf-8") for name in ("score", "chat"))
    # What is printed is typed in the top folder.
    logged = logged.replace(here, "").replace("ad0.jpg", "ad1.jpg")
    assert all(f"$ {command}\n" in logged for command in commands)
    assert "response: " in logged
    for name in ("report.html", "data/ad1.jpg"):
        assert (out / name).stat().st_size > 1000


def test_finished_stages_are_not_run_again(demo):
    out, run, _ = demo
    merged = os.stat(out / "merged" / "config.json").st_mtime_ns
    (out / "logs" / "caption.json").unlink()
    (out / "blank.txt").unlink()
    again = run()
    assert again.returncode == 0, again.stderr
    # The stage without a record, and those behind it.
    assert again.stdout.count("skipped: finished before") == 6
    assert (out / "blank.txt").is_file()
    assert os.stat(out / "merged" / "config.json").st_mtime_ns == merged
    assert run().stdout.count("skipped: finished before") == 9


def test_a_stage_whose_files_are_missing_runs_again(demo, root, monkeypatch):
    out, run, _ = demo
    (out / "report.html").unlink()
    assert run().stdout.count("skipped: finished before") == 7 and (out / "report.html").is_file()
    monkeypatch.syspath_prepend(str(root / "tools"))
    from tools.demo import finished, parse_arguments, plan

    stages = plan(parse_arguments(run.command[2:]))
    for stage in stages:
        files = json.loads((out / "logs" / f"{stage.name}.json").read_text())["files"]
        assert files or stage.name == "chat"
        for path in files:
            os.rename(path, path + ".away")
            assert finished(str(out), stage) is None, path
            os.rename(path + ".away", path)
        assert finished(str(out), stage) is not None
    assert {"tune.tsv", "held_out_captions.tsv", "ad0.jpg"} < {path.name for path in (out / "data").iterdir()}


def test_a_folder_of_other_things_is_refused(root, tmp_path):
    (tmp_path / "lora").mkdir()
    for tool, words in (("demo", ["--out", tmp_path]), ("make_tiny_model", [tmp_path, "--captions", "none.tsv"]),
                        ("overfit_real_samples", ["none.tsv", "none.tsv", tmp_path])):  # fmt: skip
        command = [sys.executable, str(root / "tools" / f"{tool}.py"), *map(str, words)]
        failed = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert failed.returncode == 2 and failed.stderr.startswith(f"error: {tmp_path} is not empty"), tool
        assert failed.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_what_a_killed_run_left_is_not_in_the_way(demo):
    out, run, _ = demo
    (out / "logs" / "tune.json").unlink()
    # As SIGTERM leaves it: a checkpoint that a new run would refuse to write over.
    (out / "lora" / "checkpoint-3").mkdir()
    (out / "base.txt.partial").write_text("half a line")
    again = run()
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert again.stdout.count("skipped: finished before") == 4
    assert not (out / "lora" / "checkpoint-3").exists() and not (out / "base.txt.partial").exists()


def test_a_missed_target_is_a_failure(demo):
    _, run, _ = demo
    missed = run("--target", "1.01")
    assert missed.returncode == 1
    assert "NO   tuned: at least 101%" in missed.stdout


def test_a_failing_stage_says_where_to_look(root, tmp_path):
    command = [sys.executable, str(root / "tools" / "demo.py"), "--out", str(tmp_path / "out")]
    failed = subprocess.run(command + ["--held_out_rows", "999999999"], capture_output=True, encoding="utf-8")
    assert failed.returncode == 1
    assert "different ads" in failed.stderr
    assert "stage draw ended with status 2" in failed.stderr and "draw.log" in failed.stderr
