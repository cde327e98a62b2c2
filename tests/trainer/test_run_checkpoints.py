"""Checkpoint folders of a run: seals, damage, which are kept, and which a run goes on from."""

import json

import pytest

from paddlemix.trainer import run_checkpoints
from paddlemix.utils.errors import ConfigError
from tests.helpers import refused


def make(folder, step, state=None, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * step)
    if whole:
        run_checkpoints.seal(str(path), state or {"global_step": step})
    return str(path)


def prepare(folder, overwrite=False, resume=False, resume_from=None):
    """Check the folder and clear it; returns the checkpoint to resume from."""
    resume_from, old = run_checkpoints.check_output(
        str(folder), overwrite=overwrite, resume=resume, resume_from=resume_from
    )
    run_checkpoints.clear_output(str(folder), old)
    return resume_from


def test_seal_holds_state_and_sizes(tmp_path):
    path = make(tmp_path, 3, {"loss_sum": 1.5})
    assert run_checkpoints.read_seal(path) == {"loss_sum": 1.5}


@pytest.mark.parametrize("name", ["../outside", "sub/weights", "/etc/hostname", "..", ""])
def test_a_seal_that_names_files_elsewhere_seals_nothing(tmp_path, name):
    path = make(tmp_path, 3)
    (tmp_path / "outside").write_bytes(b"www")
    target = tmp_path / "checkpoint-3" / name
    size = target.stat().st_size if target.exists() else 3
    (tmp_path / "checkpoint-3" / run_checkpoints.SEAL_NAME).write_text(json.dumps({"files": {name: size}, "state": {}}))
    assert run_checkpoints.read_seal(path) is None


@pytest.mark.parametrize("damage", ["shorter", "missing", "seal cut", "no seal", "seal of another kind"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, log, damage):
    good, bad = make(tmp_path, 3), make(tmp_path, 12)
    seal = tmp_path / "checkpoint-12" / run_checkpoints.SEAL_NAME
    if damage == "shorter":
        (tmp_path / "checkpoint-12" / "weights").write_bytes(b"w")
    elif damage == "missing":
        (tmp_path / "checkpoint-12" / "weights").unlink()
    elif damage == "seal cut":
        seal.write_text(seal.read_text()[:-9])
    elif damage == "no seal":
        seal.unlink()
    else:
        seal.write_text(json.dumps([1]))
    assert run_checkpoints.read_seal(bad) is None
    assert run_checkpoints.last_complete(str(tmp_path)) == good
    assert "checkpoint-12 is incomplete" in log.text


def test_order_is_by_step_not_by_name(tmp_path):
    for step in (9, 100, 20):
        make(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [run_checkpoints.step_of(path) for path in run_checkpoints.checkpoints(str(tmp_path))] == [9, 20, 100]
    assert run_checkpoints.last_complete(str(tmp_path)).endswith("-100")


def test_thin_out_keeps_the_newest_and_the_best(tmp_path):
    paths = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    run_checkpoints.thin_out(str(tmp_path), None, None)
    assert len(run_checkpoints.checkpoints(str(tmp_path))) == 4
    run_checkpoints.thin_out(str(tmp_path), 2, paths[0])
    assert run_checkpoints.checkpoints(str(tmp_path)) == [paths[0], paths[2], paths[3]]


def test_a_broken_checkpoint_does_not_count(tmp_path):
    """A run that began anew beside a newer, broken one must keep what it has just saved."""
    old, new = make(tmp_path, 2), make(tmp_path, 4)
    broken = [make(tmp_path, step, whole=False) for step in (1, 20)][1]
    run_checkpoints.thin_out(str(tmp_path), 2, None)
    assert run_checkpoints.checkpoints(str(tmp_path)) == [old, new, broken]
    run_checkpoints.thin_out(str(tmp_path), 1, None)
    assert run_checkpoints.checkpoints(str(tmp_path)) == [new, broken]
    assert run_checkpoints.last_complete(str(tmp_path)) == new


def test_fresh_folder_starts_anew_with_or_without_resume(tmp_path):
    assert prepare(tmp_path / "none") is None
    assert prepare(tmp_path / "none", resume=True) is None


def test_resume_finds_the_last_whole_one(tmp_path):
    make(tmp_path, 2)
    path = make(tmp_path, 4)
    make(tmp_path, 6, whole=False)
    assert prepare(tmp_path, resume=True) == path
    assert prepare(tmp_path, resume_from=path) == path
    with refused(ConfigError, "resume_from_checkpoint"):
        prepare(tmp_path, resume_from=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("inside", [True, False])
def test_going_on_from_another_checkpoint_leaves_none_behind_unsaid(tmp_path, inside):
    """A newer one of this folder would be what the next --resume takes."""
    path = make(tmp_path if inside else tmp_path / "elsewhere", 2)
    last = make(tmp_path, 4)
    with refused(ConfigError, "resume_from_checkpoint", match="checkpoint-4.*--resume.*/checkpoint-2"):
        prepare(tmp_path, resume_from=path)
    assert run_checkpoints.read_seal(last) is not None
    assert prepare(tmp_path / "other", resume_from=path) == path


def test_a_run_from_elsewhere_replaces_a_result_only_on_demand(tmp_path):
    path = make(tmp_path / "elsewhere", 2)
    for name in ("train_results.json", "lora_model_state.pdparams"):
        (tmp_path / name).write_text("x")
    with refused(ConfigError, "overwrite_output_dir"):
        prepare(tmp_path, resume_from=path)
    assert len(list(tmp_path.iterdir())) == 3
    assert prepare(tmp_path, overwrite=True, resume_from=path) == path
    assert [left.name for left in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("left", ["train_results.json", "lora_model_state.pdparams", "a broken checkpoint"])
def test_resuming_without_a_checkpoint_never_replaces_a_result(tmp_path, left, overwrite):
    if left == "a broken checkpoint":
        make(tmp_path, 3, whole=False)
    else:
        (tmp_path / left).write_text("x")
    with refused(ConfigError, "resume", match="lora_path.*--resume"):
        prepare(tmp_path, overwrite=overwrite, resume=True)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unfinished_run_is_never_thrown_away(tmp_path, overwrite):
    path = make(tmp_path, 4)
    with refused(ConfigError, "unfinished-run", match="checkpoint-4.*--resume"):
        prepare(tmp_path, overwrite=overwrite)
    assert run_checkpoints.read_seal(path) is not None


def test_a_finished_run_that_went_on_is_unfinished_again(tmp_path):
    path = make(tmp_path, 4)
    (tmp_path / "train_results.json").write_text("x")
    assert prepare(tmp_path, overwrite=True, resume=True) == path
    with refused(ConfigError, "unfinished-run", match="checkpoint-4.*--resume"):
        prepare(tmp_path, overwrite=True)
    assert run_checkpoints.read_seal(path) is not None


def test_a_finished_run_is_replaced_only_on_demand_and_said(tmp_path, log):
    make(tmp_path, 4)
    for name in ("train_results.json", "lora_model_state.pdparams", "model_state-00001-of-00002.pdparams", "notes"):
        (tmp_path / name).write_text("x")
    (tmp_path / "runs").mkdir()
    with refused(ConfigError, "overwrite_output_dir"):
        prepare(tmp_path)
    assert prepare(tmp_path, overwrite=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "runs"]
    for name in ("checkpoint-4", "train_results.json", "lora_model_state.pdparams", "00001-of-00002"):
        assert name in log.text


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    (tmp_path / ".partial-5" / "checkpoint-5").mkdir(parents=True)
    assert prepare(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
