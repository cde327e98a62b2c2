"""tools/demo_data.py: the faults that it plants, and what it prints of them. (Its stages have tests of their own.)"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from paddlemix.processors.images import decode_base64, open_image
from paddlemix.utils import cli
from tests.helpers import image_base64, without_coverage
from tools import make_demo_data

N, UNSEEN = 200, 20


@pytest.fixture
def demo_data(monkeypatch, root):
    """The script, which imports its neighbours by name."""
    monkeypatch.syspath_prepend(str(root / "tools"))
    from tools import demo_data

    monkeypatch.setattr(demo_data, "UNSEEN", UNSEEN)
    return demo_data


@pytest.fixture
def demo(tmp_path):
    """What make demo leaves of its data, with other images."""
    data = tmp_path / "demo" / "data"
    data.mkdir(parents=True)
    ads = make_demo_data.sample_ads(N + UNSEEN + 10, 3)
    captions = [make_demo_data.write_caption(ad, "ad") for ad in ads]
    rows = [(image_base64(number, size=(32, 32)), caption) for number, caption in enumerate(captions)]
    (data / "tune.tsv").write_text("".join(f"t{i}\t{a}\t{b}\n" for i, (a, b) in enumerate(rows[10:])))
    (data / "held_out.tsv").write_text("".join(f"ad{i}\t{a}\n" for i, (a, _) in enumerate(rows[:10])))
    (data / "held_out_captions.tsv").write_text("".join(f"ad{i}\t{b}\n" for i, (_, b) in enumerate(rows[:10])))
    return str(tmp_path / "demo"), dict(rows), rows


def table(path):
    return {row[0]: row[1:] for row in (line.split("\t") for line in path.read_text().splitlines())}


def test_planted_faults_are_what_they_are_called(demo_data, demo, tmp_path):
    folder, true, rows = demo
    planted = demo_data.plant(folder, str(tmp_path), 1)
    counts = {fault: len(names) for fault, names in planted.items()}
    wanted = {"swapped caption": 10, "near duplicate": 10, "copied": 10, "leak from val": 4, "broken row": 4, "": 180}
    assert counts == wanted
    written = table(tmp_path / "rows.tsv")
    assert {name for names in planted.values() for name in names.values()} == {*written}
    assert len(written) == sum(counts.values())
    for fault, names in planted.items():
        for place, name in names.items():
            image, caption = written[name]
            if fault in ("", "copied"):
                assert true[image] == caption
            elif fault == "swapped caption":
                assert true[image] != caption and caption in true.values()
            elif fault == "near duplicate":
                original, said = written[planted["copied"][place]]
                copy, first = (np.asarray(open_image(decode_base64(one)).resize((8, 8))) for one in (image, original))
                assert image != original and said == caption and abs(copy.astype(int) - first).mean() < 20
            elif fault == "leak from val":
                assert caption in [text for _, text in table(tmp_path / "val.tsv").values()] and image not in true
            else:
                assert caption in true.values() and image != rows[0][0]
    # What is asked at the end was in no set.
    unseen = [image for image, _ in table(tmp_path / "unseen.tsv").values()]
    assert len(unseen) == UNSEEN and not {*unseen} & {image for image, _ in written.values()}
    again = demo_data.plant(folder, str(tmp_path), 1)
    assert again == planted and table(tmp_path / "rows.tsv") == written


def test_the_report_counts_what_was_left_out(demo_data, demo, tmp_path, capsys):
    folder, true, _ = demo
    planted = demo_data.plant(folder, str(tmp_path), 1)
    written = table(tmp_path / "rows.tsv")
    copies, originals = planted["near duplicate"], planted["copied"]
    first, second, third = list(copies)[:3]
    out = {*list(planted["swapped caption"].values())[:9], *list(planted[""].values())[:5]}
    out |= {*planted["broken row"].values()}
    # A copy, an original, and both.
    out |= {copies[first], originals[second], copies[third], originals[third]}
    kept = [f"{name}\t{image}\t{caption}\n" for name, (image, caption) in written.items() if name not in out]
    (tmp_path / "curated.tsv").write_text("".join(kept))
    gains = {name: 1.0 + number for number, name in enumerate(written)}
    gains.update((name, 0.1) for name in list(planted["swapped caption"].values())[:8])
    (tmp_path / "scores.tsv").write_text("".join(f"{name}\t1\t1\t{gain}\t[]\n" for name, gain in gains.items()))
    unseen = table(tmp_path / "unseen.tsv")
    right = "".join(f"{name}\t{caption}\n" for name, (_, caption) in unseen.items())
    (tmp_path / "after.txt").write_text(right)
    (tmp_path / "before.txt").write_text(right.replace("左侧", "中间").replace("右侧", "中间"))
    demo_data.report(str(tmp_path), planted)
    said = capsys.readouterr().out
    rows = said.split("\n\n")[0].splitlines()[2:]
    lines = {line[:18].strip(): [int(word) for word in line[18:].split()] for line in rows}
    assert lines == {
        "swapped caption": [10, 9], "near duplicate": [10, 3], "leak from val": [4, 0], "broken row": [4, 4],
        "sound row": [190, 6],
    }  # fmt: skip
    swapped = set(planted["swapped caption"].values())
    pairs = [(gains[a] < gains[b]) for a in swapped for b in gains if b not in swapped]
    assert f"area under the ROC {np.mean(pairs):.3f}, 80% in the lowest 6%" in said
    assert "tuned after curation, on 196 rows: attributes of unseen ads right 100.0%, all of an ad 100.0%" in said
    moved = sum("中间" not in caption for _, caption in unseen.values())
    assert f"on 218 rows: attributes of unseen ads right {1 - moved / UNSEEN / 8:.1%}" in said


@pytest.fixture
def call(demo_data, demo, monkeypatch, capsys):
    """call(--out) → (status, stderr), with stages that do nothing."""
    monkeypatch.setattr(demo_data, "run_stage", lambda *_: None)
    monkeypatch.setattr(demo_data, "report", lambda *_: None)

    def call(out):
        monkeypatch.setattr(sys, "argv", ["demo_data.py", "--demo", demo[0], "--out", str(out)])
        return cli.run(demo_data.main), capsys.readouterr().err

    return call


def pretrained(demo):
    folder = pathlib.Path(demo[0], "pretrained")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder.parent


@pytest.mark.parametrize("missing", ["pretrained/config.json", "data/tune.tsv", "data/held_out_captions.tsv"])
def test_without_the_demo_it_says_what_to_run(call, demo, tmp_path, missing):
    (pretrained(demo) / missing).unlink()
    status, said = call(tmp_path / "out")
    assert status == 2 and said == f"error: no {missing} in {demo[0]}: run make demo first\n"
    assert not (tmp_path / "out").exists()


def test_too_few_ads_are_one_line(call, demo, tmp_path):
    path = pretrained(demo) / "data" / "tune.tsv"
    path.write_text("".join(path.read_text().splitlines(True)[: UNSEEN + 10]))
    status, said = call(tmp_path / "out")
    assert status == 2 and f"has {UNSEEN + 10} ads to tune on" in said and said.count("\n") == 1


def test_only_what_it_wrote_is_removed(call, demo, tmp_path):
    folder, out, thesis = pretrained(demo), tmp_path / "out", tmp_path / "thesis"
    assert call(out)[0] == 0
    (out / "notes.md").write_text("mine")
    (out / "before.txt.partial").write_text("half a line")
    (out / "lora_after").mkdir()
    assert call(out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["logs", "notes.md", "rows.tsv", "unseen.tsv", "val.tsv"]
    (thesis / "report").mkdir(parents=True)
    (thesis / "report" / "rows.tsv").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(folder / "data")
    there = sorted(folder.rglob("*"))
    for path in (thesis, folder, folder / "data", folder / "data" / "new", tmp_path, link):
        status, said = call(path)
        assert status == 2 and said.count("\n") == 1 and ("overlap" in said or "is not empty" in said)
    assert sorted(folder.rglob("*")) == there and (thesis / "report" / "rows.tsv").read_text() == "mine"
    assert sorted(thesis.iterdir()) == [thesis / "report"]


def test_a_kill_ends_the_stage_and_what_it_started(root, tmp_path):
    code = """if True:
        import os, sys
        sys.path.insert(0, "tools")
        import demo
        os.makedirs(os.path.join(sys.argv[1], "logs"))
        child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        demo.run_stage(sys.argv[1], demo.Stage("sleep", "sleep", [[sys.executable, "-c", child]]), "sleep")
    """
    log = tmp_path / "out" / "logs" / "sleep.log"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=root, env=without_coverage(), stdout=subprocess.DEVNULL)
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().splitlines()[1]), 0)
