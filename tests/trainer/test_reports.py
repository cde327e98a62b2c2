"""What a run leaves to look at (history, curve, scalars), read back."""

import errno
import json
import os
import struct
import types
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFont

from paddlemix.trainer import eval_captions, reports
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


def pixels_of(record):
    return np.asarray(Image.open(BytesIO(record.encoded_image_string)))


def pictures(folder):
    """{tag: {step: pixels}} of both kinds of event files."""
    board, vdl = tensorboard(folder), visualdl(folder, "image")
    found = {}
    for tag, records in vdl.items():
        found[tag] = {record.id: pixels_of(record.image) for record in records}
        for step, value in board[tag]:
            written = pixels_of(value.image)
            np.testing.assert_array_equal(written, found[tag][step])
        assert len(board[tag]) == len(found[tag])
    return found


def test_captions_are_a_line_at_each_evaluation(finished):
    vdl, board = visualdl(finished / "runs", "text"), tensorboard(finished / "runs")
    for number, colour in enumerate(("red", "green")):
        tag = f"captions/identity_{number}_{number}"
        texts = {record.id: record.text.encoded_text_string for record in vdl[tag]}
        assert set(texts) == {2, 4} and all(text.endswith(f" | reference: {colour}") for text in texts.values())
        assert {step: value.tensor.string_val[0].decode() for step, value in board[tag]} == texts


@pytest.mark.parametrize("font", ["there", "none"])
def test_captions_stand_beside_their_images_at_each_evaluation(run_keys, tmp_path, monkeypatch, log, font):
    said = iter(["红色的T恤", "plain words", "蓝色的T恤" * 30, "words"])
    monkeypatch.setattr(eval_captions, "generate_captions", lambda model, *_: _answers(_[1], said))
    # Not a Chinese one, but a font.
    monkeypatch.setattr(reports, "find_font", lambda *_: ImageFont.load_default() if font == "there" else None)
    keys = {"evaluation_strategy": "steps", "eval_steps": 1, "shown_captions": 2, "max_steps": 2}
    run(run_keys(**LORA, **keys, save_strategy="no"))
    found = pictures(tmp_path / "out" / "runs")
    for number, colour in enumerate(list(COLOURS.values())[:2]):
        for step, pixels in found[f"eval/identity_{number}_{number}"].items():
            np.testing.assert_allclose(pixels[20, 20], colour, atol=2)
            written = font == "there" or number == 1
            # Both captions of the first sample are Chinese, those of the other are not.
            assert pixels.shape[:2] != (56, 56) if written else pixels.shape[:2] == (56, 56)
            if written:
                assert (pixels[:, 60:] < 100).any() and step in (1, 2)
    (first, second) = (found["eval/identity_0_0"][step] for step in (1, 2))
    assert (first.shape != second.shape) == (font == "there")
    warnings = [line for line in log.messages if "no font with Chinese characters" in line]
    assert len(warnings) == (font == "none")
    promised = [line for line in log.messages if line.startswith("more curves, captions on their images: ")]
    assert len(promised) == (font == "there")


def _answers(prompts, said):
    for number, _ in enumerate(list(prompts)):
        yield number, [types.SimpleNamespace(text=next(said))]


def test_a_sample_without_an_image_has_its_line_and_no_picture(run_keys, tmp_path):
    path = tmp_path / "mixed.json"
    write_data(path, ["red", "green"])
    records = json.loads(path.read_text())
    records[0]["image"] = ""
    path.write_text(json.dumps(records))
    entry = [{"data_files": str(path)}]
    keys = {"evaluation_strategy": "steps", "shown_captions": 2, "max_new_tokens": 3, "max_steps": 1}
    run(run_keys(**LORA, **keys, save_strategy="no", dataset={"train": entry, "eval": entry}))
    runs = tmp_path / "out" / "runs"
    assert {"captions/identity_0_0", "captions/identity_1_1"} <= set(visualdl(runs, "text"))
    assert list(visualdl(runs, "image")) == ["eval/identity_1_1"]


def test_the_parameters_of_model_data_and_lora_are_there(finished):
    values = visualdl(finished / "runs", "hyper_parameters")
    (record,) = [record for records in values.values() for record in records]
    shown = {info.name: info for info in record.hparam.hparamInfos}
    assert shown["lora_rank"].int_value == 4 and shown["learning_rate"].float_value > 0
    assert {"max_length", "model_name_or_path", "lora_target_modules", "dataset", "max_new_tokens"} <= set(shown)
    assert "pdc_download_ckpt" not in shown
    assert {metric.name for metric in record.hparam.metricInfos} == set(reports.METRICS)
    board = tensorboard(finished / "runs")
    ((_, value),) = board["_hparams_/session_start_info"]
    plugin = value.metadata.plugin_data.content
    assert b"lora_rank" in plugin and b"model_name_or_path" in plugin


def test_the_loss_is_drawn(finished):
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


def test_a_long_loss_is_smoothed_and_drawn_on_a_logarithmic_scale():
    steps = range(1, 301)
    lines = [{"loss": 5 * 0.98**step + 0.02 * (step % 2), "learning_rate": 1e-4, "global_step": step} for step in steps]
    figure = reports.loss_figure([*lines, {"eval_loss": 0.1, "global_step": 300}], "run")
    losses = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in losses.lines}
    assert set(drawn) == {"training", "training, smoothed", "validation"} and losses.get_yscale() == "log"
    smooth, rough = (np.abs(np.diff(drawn[name])[100:]).max() for name in ("training, smoothed", "training"))
    assert smooth < rough * 0.6
    assert losses.get_title() == "run"
    # Neither helps a few losses that hardly change.
    losses = reports.loss_figure(lines[:5]).axes[0]
    assert len(losses.lines) == 1 and losses.get_yscale() == "linear"


def test_smoothing_leaves_a_straight_line_where_it_is():
    assert reports.smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    assert reports.smoothed(range(1000))[2:-2] == pytest.approx(range(2, 998))
    assert reports.smoothed([7.0]) == [7.0]


@pytest.mark.parametrize("count", [24, 1200])
@pytest.mark.parametrize("floor", [0.04, 4.0], ids=["logarithmic", "linear"])
def test_a_smoothed_loss_stays_within_its_neighbours(floor, count):
    steps = np.arange(20, 480, 20) if count == 24 else np.arange(1, count + 1)
    values = floor + 6 * np.exp(-steps / 20) + 0.01 * np.sin(steps * 2.5)
    axes = reports.loss_figure([{"loss": x, "global_step": int(step)} for step, x in zip(steps, values)]).axes[0]
    calm = next(line.get_ydata() for line in axes.lines if line.get_label() == "training, smoothed")
    assert axes.get_yscale() == ("log" if floor < 1 else "linear")
    for place, value in enumerate(calm):
        reach = max(2, count // 60)
        near = values[max(place - reach, 0) : place + reach + 1]
        assert near.min() <= value <= near.max()
    # Neither an average over a steep fall nor its long tail lies beside the curve.
    assert np.abs(np.log(calm / (values - 0.01 * np.sin(steps * 2.5))))[2:-2].max() < 0.25


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
