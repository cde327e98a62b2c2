"""What a run of hours says and keeps: progress, rates, histories, what to do next.

Run: pytest tests/trainer/test_long_runs.py
"""

import dataclasses
import json
import re
import shlex

import pytest
from paddlenlp.trainer import TrainerState

from paddlemix.trainer import callbacks, reports, resume, throughput
from paddlemix.trainer.resume import thinned
from paddlemix.trainer.trainer import FinetuneTrainer
from tests.trainer.runs import LORA, run


def test_a_history_is_thinned_but_for_its_evaluations_and_its_newest_line():
    lines = [{"loss": 1.0, "global_step": step} for step in range(1, 8)]
    lines.insert(3, {"eval_loss": 2.0, "global_step": 3})
    assert [line["global_step"] for line in thinned(lines)] == [1, 3, 3, 5, 7]
    assert thinned(lines[:1]) == lines[:1] and thinned([]) == []


def test_the_history_of_a_long_run_is_bounded(run_keys, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "MOST_LINES", 6)
    run(run_keys(**LORA, max_steps=12, save_steps=12, report_to=["none"]))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-12"):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [line["global_step"] for line in history if "loss" in line]
        assert len(history) <= 7 and steps[-1] == 12 and steps == sorted(steps)


def test_the_state_is_written_once_a_checkpoint_and_on_one_line(run_keys, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerState, "save_to_json", None)
    run(run_keys(**LORA, max_steps=2, save_steps=1, report_to=["none"]))
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        text = (folder / "trainer_state.json").read_text()
        assert text.count("\n") == 1 and ": " not in text
    state = resume.read_trainer_state(str(tmp_path / "out" / "checkpoint-2"), 2)
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(state)}
    assert [line["global_step"] for line in state.log_history] == [1, 2]


@pytest.mark.parametrize("bar", [True, False])
def test_an_evaluation_shows_its_progress(run_keys, monkeypatch, log, capsys, bar):
    from paddlemix.utils import progress

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(callbacks, "LINE_SECONDS", 0.0)
    keys = dict(evaluation_strategy="steps", eval_steps=2, max_steps=2, eval_with_do_generation=True, max_new_tokens=2)
    run(run_keys(**LORA, **keys, per_device_eval_batch_size=4, disable_tqdm=not bar, report_to=["none"]))
    drawn = capsys.readouterr().err
    lines = [line for line in log.messages if re.match(r"evaluation: |captions: ", line)]
    if bar:
        assert re.search(r"evaluation: 100%.* 3/3 ", drawn) and re.search(r"captions: 100%.* 12/12 ", drawn)
        assert not lines
    else:
        assert [re.sub(r"\d+:\d\d:\d\d", "T", line) for line in lines[:2]] == [
            "evaluation: 1 of 3, time left: T",
            "evaluation: 2 of 3, time left: T",
        ]
        assert sum(line.startswith("captions: ") for line in lines) == 11
        assert "%|" not in drawn


def test_time_left():
    assert callbacks.time_left(25, 100, 50.0) == "0:02:30"
    assert callbacks.time_left(0, 100, 400.0) == "11:06:40"
    assert callbacks.time_left(100, 100, 400.0) == "0:00:00"


class Clock:
    """time.time that evaluations move forward."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 0.25
        return self.now


@pytest.mark.parametrize("seconds", [500, 5])
def test_rates_leave_evaluations_out_and_long_ones_are_said_once(run_keys, monkeypatch, log, seconds):
    clock = Clock()
    monkeypatch.setattr(throughput.time, "time", clock)
    evaluate = FinetuneTrainer._evaluate

    def slow(self, *words):
        clock.now += seconds
        return evaluate(self, *words)

    monkeypatch.setattr(FinetuneTrainer, "_evaluate", slow)
    keys = dict(evaluation_strategy="steps", eval_steps=1, max_steps=3, report_to=["none"])
    metrics = run(run_keys(**LORA, **keys))
    lines = [line for line in log.messages if line.startswith("loss: ")]
    assert all(float(re.search(r"interval_runtime: ([\d.]+)", line).group(1)) < 30 for line in lines)
    steps = [float(re.search(r"interval_steps_per_second: ([\d.]+)", line).group(1)) for line in lines]
    assert max(steps) < 20 * min(steps)
    assert metrics["train_runtime"] > 3 * seconds > 30 * 3 / metrics["train_steps_per_second"] or seconds == 5
    said = [line for line in log.messages if "this evaluation took" in line]
    assert len(said) == (seconds == 500)
    assert not said or re.match(r"this evaluation took 5\d\d s, the training before it \d+ s: raise", said[0])


def test_a_finished_run_says_where_its_result_is_and_what_to_do_with_it(run_keys, tmp_path, log):
    run(run_keys(**LORA, do_eval=True, max_steps=2))
    out = str(tmp_path / "out")
    said = dict(line.split(": ", 1) for line in log.messages if re.match(r"result|loss c|more|try|merge it", line))
    assert said["result"] == out and said["loss curve"] == f"{out}/loss_curve.png"
    assert shlex.split(said["try it"]) == ["python", "chat.py", out]
    words = shlex.split(said["merge it"])
    assert words[:2] == ["python", "merge_lora_params.py"] and words[words.index("--lora_path") + 1] == out
    assert list(said)[2] == "more curves" and out in list(said.values())[2]


def test_the_final_evaluation_is_in_the_curve(run_keys, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports, "loss_figure", lambda history, title: drawn.append(history))
    run(run_keys(**LORA, do_eval=True, max_steps=2, report_to=["none"]))
    assert "eval_loss" in drawn[-1][-1]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert "eval_loss" in state["log_history"][-1]
