"""A run is resolved once: the dry run prints what training does.

Each case in which the two once differed is taken through both here.
"""

import json
import re

import pytest

from paddlemix.trainer import command_line, dry_run, forecast, reports, trainer
from paddlemix.trainer.freeze import count_groups
from paddlemix.trainer.run import resolve
from paddlemix.trainer.tuned_model import base_of
from paddlemix.utils.errors import ConfigError, UserError
from tests.helpers import save_tiny_model
from tests.trainer.runs import LORA, LORA_POOL, run, start


@pytest.fixture
def words(run_keys, world, tmp_path):
    """The command line of a run in the tiny world."""

    def make(**changes):
        entry = [{"data_files": world[1]}]
        values = {
            "model_name_or_path": world[0], "output_dir": str(tmp_path / "out"),
            "dataset": {"train": entry, "eval": entry}, "do_train": True, "max_steps": 1, "save_strategy": "no",
            "per_device_train_batch_size": 4, "shown_captions": 0, "disable_tqdm": True, **changes,
        }  # fmt: skip
        path = tmp_path / "run.json"
        path.write_text(json.dumps(values))
        return [str(path)]

    return make


@pytest.mark.parametrize(
    "keys, note",
    [
        ({"fp16": True}, "float16 is not supported on the CPU, change to float32"),
        ({"device": "gpu"}, "running on the CPU"),
        ({"gradient_accumulation_steps": 9}, "fewer than gradient_accumulation_steps=9: a step uses all of them"),
        (dict(LORA, lora_target_modules=[".*llm.*mlp.*"]), None),
        (dict(LORA, lora_target_modules=[".*llm.*attn"]), None),
    ],
)
def test_what_goes_on_in_the_run_is_no_problem_in_the_plan(words, log, capsys, keys, note):
    assert dry_run.dry_run(words(**keys)) == 0
    out = capsys.readouterr().out
    assert note is None or note in out
    run(command_line.parse(words(**keys)))
    warnings = [record.message for record in log.records if record.levelname == "WARNING"]
    assert note is None or any(note in warning for warning in warnings)


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(LORA, lora_target_modules=["lm_head"]), "lm_head is not a Linear layer"),
        (dict(LORA, lora_target_modules=[".*norm"]), '".*norm" matches no module'),
        ({"num_train_epochs": 0.1, "max_steps": -1}, "ends before the first optimizer step"),
        ({"lr_scheduler_type": "polynomial", "warmup_ratio": 1.0}, "fewer warmup steps (1) than steps (1)"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 13}, "do not fill one batch of 13"),
        ({"resume_from_checkpoint": "no/checkpoint"}, "no/checkpoint"),
        ({"output_dir": "FILE/out"}, "FILE is a file"),
        ({"freeze_include": ["*nothing*"]}, "matches no parameter"),
        ({"sharding": "stage2"}, "sharding=stage2 needs GPUs"),
    ],
)
def test_what_stops_the_run_is_a_problem_in_the_plan_in_the_same_words(words, tmp_path, keys, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    found = forecast.foresee(words(**keys))
    assert any(says in problem for problem in found.problems)
    arguments, _ = command_line.read(words(**keys))
    with pytest.raises(ConfigError) as caught:
        start(arguments)
    assert str(caught.value) == "; ".join(found.problems)


def test_training_does_what_was_resolved(run_keys):
    arguments = run_keys(**LORA_POOL, gradient_accumulation_steps=4, num_train_epochs=3, max_steps=...)
    found = resolve(arguments)
    assert (found.order.steps, found.order.batches_per_step, found.order.accumulation) == (3, 3, 4)
    started = start(arguments)
    state, shapes = base_of(started.model).state_dict(), base_of(started.model).whole_shapes()
    counted = count_groups((name, shapes[name], not tensor.stop_gradient) for name, tensor in state.items())
    assert found.counts() == counted
    assert {name for name, tensor in state.items() if not tensor.stop_gradient} == set(found.trained)
    started.train()
    assert started.state.global_step == 3 and started.args.gradient_accumulation_steps == 3


def test_a_config_is_read_once(run_keys, monkeypatch):
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    read = []
    stock = MGenConfig.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        read.append(args)
        return stock(cls, *args, **kwargs)

    monkeypatch.setattr(MGenConfig, "from_pretrained", classmethod(counted))
    start(run_keys())
    assert len(read) == 1


def test_a_run_changes_nothing_before_it_trains(run_keys, tmp_path):
    run(run_keys(**LORA, save_steps=1))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    found = resolve(run_keys(**LORA, overwrite_output_dir=True))
    assert found.problems == [] and len(found.old_files) > 5
    start(run_keys(**LORA, overwrite_output_dir=True))
    assert sorted(str(path) for path in tmp_path.rglob("*") if "runs" not in path.parts) == [
        path for path in before if "/runs" not in path
    ]


def test_a_checkpoint_that_does_not_belong_to_the_run_is_seen_by_both(words, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "num_train_epochs": 1}
    run(command_line.parse(words(**LORA, **keys)))
    other = save_tiny_model(tmp_path / "other", seed=9)
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    resumed = dict(keys, resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "new"))
    assert forecast.foresee(words(**LORA, **resumed)).problems == []
    for changes, says in (
        ({"lora": False}, "is a LoRA checkpoint, not a model"),
        (dict(LORA, lora_rank=8), "of another shape"),
        (dict(LORA, lora_target_modules=[".*attn.c_attn"]), "unexpected"),
        (dict(LORA, model_name_or_path=other), "was tuned from other weights than"),
    ):
        command = words(**{**resumed, **changes})
        (problem,) = forecast.foresee(command).problems
        assert says in problem
        with pytest.raises(UserError) as caught:
            run(command_line.parse(command))
        assert str(caught.value) == problem
        assert not (tmp_path / "new").exists()


def test_adapters_of_another_base_are_a_warning_in_both(words, tmp_path, log):
    run(command_line.parse(words(**LORA)))
    other = save_tiny_model(tmp_path / "other", seed=9)
    keys = dict(LORA, lora_path=str(tmp_path / "out"), model_name_or_path=other, output_dir=str(tmp_path / "new"))
    found = forecast.foresee(words(**keys))
    assert found.problems == [] and any("is another model" in note for note in found.notes)
    run(command_line.parse(words(**keys)))
    assert "is another model" in log.text


def test_the_trainers_head_names_every_override():
    from paddlenlp.trainer import Trainer

    overrides = {name for name in vars(trainer.FinetuneTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    named = set(re.findall(r"^  (\w+)", trainer.__doc__, flags=re.MULTILINE))
    # PaddleNLP 2.8 has no _check_loss_valid.
    assert overrides <= named <= set(vars(trainer.FinetuneTrainer)) and len(overrides) > 15


def test_a_report_without_its_package_is_a_problem_in_both(words, monkeypatch):
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda package: None)
    (problem,) = forecast.foresee(words(report_to=["tensorboard"])).problems
    assert problem.startswith("report_to tensorboard needs the package tensorboardX")
