"""The check of a GPU, by its rows on the CPU: all pass, and each fails when what it checks is broken."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.models.mgen_vl.engine import Engine
from paddlemix.models.mgen_vl.vision import Vision
from paddlemix.trainer import resume
from paddlemix.trainer.trainer import FinetuneTrainer
from paddlemix.utils.errors import UserError
from tools import check_gpu

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool():
    return check_gpu


@pytest.fixture(scope="module")
def world(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("check_gpu")
    tool.make_world(str(folder), ["tiny"])
    return str(folder)


@pytest.fixture(scope="module")
def run(tool):
    return tool.Run("cpu", "float32", "O1", False)


@pytest.fixture(autouse=True)
def own_level():
    """The tool silences the log of the process it runs in."""
    from paddlenlp.utils.log import logger as paddlenlp_logger

    from paddlemix.utils.log import logger

    yield
    for one in (logger, paddlenlp_logger.logger):
        one.setLevel("INFO")


def verdicts(rows):
    return {row.check: row.verdict for row in rows}


def test_all_rows_pass_on_the_cpu(tool, tmp_path, capsys):
    assert tool.main(["--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    printed, logged = capsys.readouterr()
    assert "\n| check            | model | precision   | attention | verdict  | found |\n| ---" in printed
    assert "INFO" not in logged
    assert "these rows say nothing about a GPU" in printed and ", 0 failed," in printed
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = [row for row in found["rows"] if not row["run"]["fused"]]
    assert {row["check"]: row["verdict"] for row in rows} == {
        "a LoRA step": "measured", "loss, gradients": "ok", "LoRA, resumed": "ok", "batched captions": "ok",
        "a token": "measured",
    }  # fmt: skip
    (resumed,) = (row["found"] for row in rows if row["check"] == "LoRA, resumed")
    assert " in 10 steps; resumed: " in resumed and resumed.endswith(" tensors equal bit for bit")
    numbers = {name: number for row in rows for name, number in row["numbers"].items()}
    assert numbers["equal"] == 16 and len(numbers["losses"]) == 10
    assert "paddle" in found["machine"].lower()


def test_a_broken_model_ends_with_status_1(tool, monkeypatch, tmp_path, capsys):
    """All rows of a batch see the first one's image."""
    whole = Vision.forward

    def forward(self, images):
        return whole(self, paddle.tile(images[:1], [images.shape[0], 1, 1, 1]))

    monkeypatch.setattr(Vision, "forward", forward)
    assert tool.main(["--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    failed = {row["check"] for row in rows if row["verdict"] == "FAIL"}
    assert failed == {"loss, gradients", "batched captions"}
    assert "| FAIL     |" in capsys.readouterr().out


def test_a_resume_without_the_moments_fails(tool, world, run, monkeypatch):
    monkeypatch.setattr(resume, "load_optimizer", lambda *words: None)
    assert [ok for _, ok, _ in tool.Checks(world, run).training("tiny")] == [False]


def test_a_gradient_that_is_not_scaled_back_fails(tool, world, run, monkeypatch):
    """As float16 would leave it whose smallest numbers are gone."""
    compute = FinetuneTrainer.compute_loss

    def cut_off(self, model, inputs, **options):
        for parameter in model.parameters():
            parameter.register_hook(lambda g: paddle.where(g.abs() < g.abs().max() * 0.5, paddle.zeros_like(g), g))
        return compute(self, model, inputs, **options)

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", cut_off)
    ((found, ok, numbers),) = tool.Checks(world, run).gradients("tiny")
    assert not ok and numbers["off"] < 1e-4 and numbers["cosine"] < 0.99


def test_a_check_that_breaks_is_a_row(tool, world, run, monkeypatch):
    def broken(self, prompts):
        raise RuntimeError("(External) CUDNN error(3)\nno kernel for \x1b[31mthis")

    monkeypatch.setattr(Engine, "run", broken)
    rows = list(tool.Checks(world, run).rows(["tiny"]))
    assert verdicts(rows)["batched captions"] == verdicts(rows)["a token"] == "FAIL"
    assert [row.found for row in rows if row.ok is False][0] == "RuntimeError: no kernel for \\x1b[31mthis"
    assert verdicts(rows)["LoRA, resumed"] == "ok"


def test_loss_scale_rows_tell_a_run_that_recovers(tool, world, run, monkeypatch):
    """Without a card no scaler runs, so the log is given here."""
    good, bad = np.ones(3, np.float16), np.array([1, np.nan], np.float16)

    def lines(skipped):
        return [{"skipped_steps": skipped, "loss_scale": 2.0**17}] * 16

    for history, weights, ok in (
        (lines(9), good, True), (lines(0), good, False), (lines(16), good, False), (lines(9), bad, False),
    ):  # fmt: skip
        monkeypatch.setattr(tool.Checks, "train", lambda *words: (history, {"a": weights}))  # noqa: B023
        found = list(tool.Checks(world, run._replace(dtype="float16", level="O2")).overflow("tiny"))
        assert [one for _, one, _ in found] == [ok, ok] and "float32 gradients" in found[1][0]


def test_a_run_in_a_process_of_its_own(tool, world, run):
    rows = list(tool.in_child(world, run, ["tiny"]))
    assert len(rows) == 5 and not any(row.ok is False for row in rows) and rows[0].run == run
    rows = list(tool.in_child(world, run, ["none"]))
    assert {row.verdict for row in rows} == {"FAIL"} and "none is not a folder" in rows[1].found


def test_a_process_that_ends_is_a_row(tool, world, run, monkeypatch):
    monkeypatch.setattr(tool.sys, "executable", "false")
    rows = list(tool.in_child(world, run, ["tiny"]))
    assert [(row.check, row.verdict) for row in rows] == [("its process", "FAIL")]


def test_runs_of_a_card(tool, monkeypatch):
    from paddlemix.utils import runtime

    def on(capability, bf16):
        def decide(requested, compute, device):
            return runtime.decide_flash(requested, compute, device, capability, False)

        monkeypatch.setattr(runtime, "resolve_flash", decide)
        monkeypatch.setattr(runtime, "resolve_dtype", lambda dtype, device: runtime.decide_dtype(dtype, device, bf16))
        runs, reasons = tool.choose_runs("gpu:0")
        return [(run.dtype, run.level, run.fused) for run in runs], " ".join(reasons)

    runs, reasons = on((8, 0), True)
    both = [(level, fused) for level in ("O1", "O2") for fused in (False, True)]
    assert runs == [("float32", "O1", False)] + [(d, *rest) for d in ("float16", "bfloat16") for rest in both]
    runs, reasons = on((7, 0), False)
    assert runs == [("float32", "O1", False), ("float16", "O1", False), ("float16", "O2", False)]
    assert "bfloat16 is not supported" in reasons and "this card has 7.0" in reasons


def test_a_card_that_is_asked_for_must_be_there(capfd, monkeypatch):
    from paddlemix.utils import runtime
    from paddlemix.utils.runtime import Choice

    monkeypatch.setattr(runtime, "resolve_device", lambda asked: Choice("cpu", "no card"))
    with pytest.raises(UserError, match="--device gpu: no card"):
        check_gpu.main(["--device", "gpu"])


def test_only_a_report_is_replaced(tmp_path):
    (tmp_path / "train.json").write_text('[{"id": "1"}]')
    with pytest.raises(UserError, match="train.json exists and is not a JSON report"):
        check_gpu.main(["--json", str(tmp_path / "train.json"), "--device", "gpu:99"])
