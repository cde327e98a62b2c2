"""What a run leaves to look at (history, curve, scalars), read back."""

import errno
import json
import os
import struct
import types

import numpy as np
import pytest

from paddlemix.trainer import reports
from paddlemix.utils.errors import ConfigError
from tests.helpers import refused
from tests.trainer.runs import COLOURS, LORA, run, write_data


@pytest.fixture(scope="module")
def finished(run_keys_in, tmp_path_factory):
    """The folder of a run of four steps with two evaluations that show two captions."""
    folder = tmp_path_factory.mktemp("reports") / "out"
    keys = run_keys_in(
        folder,
        **LORA,
        max_steps=4,
        save_strategy="no",
        evaluation_strategy="steps",
        eval_steps=2,
        shown_captions=2,
        max_new_tokens=3,
    )
    run(keys)
    return folder


def tensorboard(folder):
    """Summary values of the event files: length, checksum, record, checksum; step and value by tag."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag.replace("/text_summary", ""), []).append((event.step, value))
    return found


def visualdl(folder, kind):
    """Records of a kind by tag."""
    from visualdl import LogReader

    (path,) = folder.rglob("vdlrecords*")
    reader = LogReader(file_path=str(path))
    return {tag: reader.get_data(kind, tag) for tag in reader.get_tags().get(kind, [])}


SCALARS = ("loss", "learning_rate", "grad_norm", "interval_tokens_per_second", "skipped_samples")


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_scalars_in_both_kinds_of_file_are_those_of_the_log(finished):
    board, vdl = tensorboard(finished / "runs"), visualdl(finished / "runs", "scalar")
    lines = [line for line in history(finished) if "loss" in line]
    assert [line["global_step"] for line in lines] == [1, 2, 3, 4]
    for name in SCALARS:
        expected = pytest.approx([line[name] for line in lines], rel=1e-5)
        steps = [(step, value.simple_value) for step, value in board[f"train/{name}"]]
        assert [step for step, _ in steps] == [1, 2, 3, 4] and [value for _, value in steps] == expected
        records = vdl[f"train/{name}"]
        assert [record.id for record in records] == [1, 2, 3, 4] and [record.value for record in records] == expected
    losses = [line["eval_loss"] for line in history(finished) if "eval_loss" in line]
    assert [record.value for record in vdl["eval/loss"]] == pytest.approx(losses, rel=1e-5) and len(losses) == 2


def test_captions_are_a_table_at_each_evaluation(finished):
    records = visualdl(finished / "runs", "text")["eval/captions"]
    texts = {record.id: record.text.encoded_text_string for record in records}
    assert set(texts) == {2, 4}
    for text in texts.values():
        head, rule, *rows = text.split("\n")
        assert head == "| id | caption | reference |" and rule == "|---|---|---|"
        assert [row.split(" | ")[0] for row in rows] == ["| identity_0#0", "| identity_1#1"]
        assert [row.split(" | ")[2] for row in rows] == ["red |", "green |"]
    board = tensorboard(finished / "runs")["eval/captions"]
    assert {step: value.tensor.string_val[0].decode() for step, value in board} == texts


def test_the_images_of_the_table_are_there_once(finished):
    from io import BytesIO

    from PIL import Image

    board, vdl = tensorboard(finished / "runs"), visualdl(finished / "runs", "image")
    for number, colour in enumerate(list(COLOURS.values())[:2]):
        tag = f"eval/identity_{number}_{number}"
        ((step, value),) = board[tag]
        pixels = np.asarray(Image.open(BytesIO(value.image.encoded_image_string)))
        assert step == 2 and pixels.shape == (56, 56, 3)
        np.testing.assert_allclose(pixels[20, 20], colour, atol=2)
        assert len(vdl[tag]) == 1


def test_a_sample_without_an_image_has_its_row_and_no_picture(run_keys, tmp_path):
    path = tmp_path / "mixed.json"
    write_data(path, ["red", "green"])
    records = json.loads(path.read_text())
    records[0]["image"] = ""
    path.write_text(json.dumps(records))
    entry = [{"data_files": str(path)}]
    keys = {"evaluation_strategy": "steps", "shown_captions": 2, "max_new_tokens": 3, "max_steps": 1}
    run(run_keys(**LORA, **keys, save_strategy="no", dataset={"train": entry, "eval": entry}))
    runs = tmp_path / "out" / "runs"
    (table,) = visualdl(runs, "text")["eval/captions"]
    assert table.text.encoded_text_string.count("| identity_") == 2
    assert list(visualdl(runs, "image")) == ["eval/identity_1_1"]


def test_the_loss_is_drawn(finished):
    from PIL import Image

    picture = Image.open(finished / "loss_curve.png")
    assert picture.format == "PNG" and picture.size == (900, 600)
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_curves_leave_out_what_is_no_number():
    lines = [{"loss": 2.0, "global_step": 1}, {"loss": float("nan"), "global_step": 2}, {"train_loss": 1.0}]
    lines += [{"eval_loss": 3.0, "global_step": 2}, {"loss": 1.0, "learning_rate": 0.1, "global_step": 3}]
    found = reports.curves(lines)
    assert found == {"loss": ([1, 3], [2.0, 1.0]), "eval_loss": ([2], [3.0]), "learning_rate": ([3], [0.1])}


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert not reports.draw_loss([{"train_loss": 1.0, "global_step": 3}], str(tmp_path / "x.png"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["no room", "write"])
def test_a_full_disk_ends_the_event_files_not_the_run(tmp_path, monkeypatch, log, fails):
    state = types.SimpleNamespace(global_step=1)
    events = reports.EventFiles(str(tmp_path / "runs"), ["visualdl", "tensorboard"])
    events.on_log(None, state, None, {"loss": 1.0})
    if fails == "no room":
        full = types.SimpleNamespace(free=reports._ROOM - 1)
        monkeypatch.setattr(reports.shutil, "disk_usage", lambda folder: full)
    else:
        fsync = os.fsync

        def refuse(handle):
            if os.readlink(f"/proc/self/fd/{handle}").startswith(str(tmp_path)):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", refuse)
    state.global_step = 2
    events.on_log(None, state, None, {"loss": 2.0})
    events.text("more", "text", 2)
    events.close()
    assert [line for line in log.messages if "event files" in line] == [
        f"event files in {tmp_path / 'runs'} end here: No space left on device"
    ]
    assert visualdl(tmp_path / "runs", "scalar")["train/loss"][0].value == 1.0
    # Nothing of them is open for a write that would fail while the program exits.
    handles = [os.path.join("/proc/self/fd", handle) for handle in os.listdir("/proc/self/fd")]
    assert not any(os.readlink(path).startswith(str(tmp_path)) for path in handles if os.path.exists(path))


def test_a_table_keeps_its_columns():
    assert reports.caption_table([("a", "b|c", "d")]).splitlines()[2] == "| a | b\\|c | d |"


def test_where_to_report(monkeypatch):
    assert reports.choose_reports(None) == ["visualdl", "tensorboard"]
    assert reports.choose_reports(["none"]) == ["none"]
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else name)
    assert reports.choose_reports(None) == ["visualdl"]
    with refused(ConfigError, "report_to", match="tensorboardX"):
        reports.choose_reports(["tensorboard"])


def test_the_bar_shows_rates_and_time_left(run_keys, monkeypatch, capsys):
    from paddlemix.utils import progress

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    run(run_keys(**LORA, disable_tqdm=False, report_to=["none"], save_strategy="no", max_steps=4))
    drawn = capsys.readouterr().err
    assert "training: " in drawn and "<00:" in drawn
    assert " samples/s, " in drawn and " tokens/s" in drawn and "loss " in drawn


def test_no_captions_when_none_are_wanted(run_keys, tmp_path, caplog):
    caplog.set_level("INFO")
    run(run_keys(**LORA, evaluation_strategy="epoch", save_strategy="no", report_to=["none"]))
    assert "reference:" not in caplog.text and not (tmp_path / "out" / "runs").exists()
