"""A checkpoint is data: whatever its files hold, nothing is executed, and a wrong value is one line."""

import json
import os
import re
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.checkpoint import load_pdparams_object
from paddlemix.datasets import chatml
from paddlemix.trainer import resume, run_checkpoints
from paddlemix.trainer.finetune import build
from paddlemix.trainer.run import resolve
from paddlemix.utils.errors import UserError, WeightsError
from tests import helpers
from tests.checkpoint.test_untrusted import NAMES, canary, refused  # noqa: F401
from tests.pickles import attacks, text
from tests.trainer import half_states
from tests.trainer.runs import COLOURS, LORA, LORA_POOL, final_weights, run, start

KEYS = dict(LORA, save_steps=1, lora_dropout=0.2)


@pytest.fixture(scope="module")
def one_go(tmp_path_factory, run_keys_in):
    """The folder of a run of five steps that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(run_keys_in(folder, **KEYS, max_steps=5))
    return folder


@pytest.fixture
def stopped(one_go, tmp_path):
    """The folder of a run that was killed after checkpoint-4 of 5 steps."""
    shutil.copytree(one_go, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-5", "*_results.json"))
    return tmp_path / "out"


def go_on(run_keys, **changes):
    return run(run_keys(**dict(KEYS, max_steps=5, resume=True, **changes)))


def reseal(folder):
    """What somebody who changed a checkpoint would do too."""
    state = json.loads((folder / run_checkpoints.SEAL_NAME).read_text())["state"]
    (folder / run_checkpoints.SEAL_NAME).unlink()
    run_checkpoints.seal(str(folder), state)


# ---- half precision

POOL = {"freeze_include": ["*"], "freeze_exclude": ["*visual.attn_pool*"]}
O2 = {d: {"fp16": d == "float16", "bf16": d == "bfloat16", "fp16_opt_level": "O2"} for d in ("float16", "bfloat16")}


@pytest.fixture
def in_half_precision(monkeypatch):
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    half_states.install(monkeypatch)
    yield
    paddle.set_flags(before)


@pytest.mark.parametrize(
    "tuned",
    [LORA, LORA_POOL, dict(LORA, amp_master_grad=True), POOL, {}],
    ids=["LoRA", "LoRA and attn_pool", "float32 gradients", "attn_pool", "full"],
)
@pytest.mark.parametrize("dtype", list(O2))
def test_half_precision_resumes_bit_for_bit(run_keys, in_half_precision, capsys, dtype, tuned):
    """Moments, beta powers, master weights, weights and loss scale; see half_states."""
    keys = dict(O2[dtype], **tuned)
    start(run_keys(**keys)).train()
    resumed = resolve(run_keys(**keys, resume=True))
    again = build(resumed)
    again.train(resume_from_checkpoint=resumed.resume_from)
    trained = sum(not p.stop_gradient for p in again.model.parameters())
    assert f"{5 * trained} states are as they were" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(O2))
def test_each_shard_of_half_precision_resumes_bit_for_bit(start_run, dtype):
    keys = dict(O2[dtype], sharding="stage1", sharding_parallel_degree=2)
    first = start_run("run", 2, "half_states", **keys)
    assert first.status() == 0, first.log.read_text()[-3000:]
    again = start_run("run", 2, "half_states", **keys, resume=True)
    assert again.status() == 0, again.log.read_text()[-3000:]
    counts = []
    for rank in (0, 1):
        found = re.search(r"^(\d+) states are as they were$", again.log.with_suffix(f".{rank}").read_text(), re.M)
        counts.append(int(found[1]))
    assert min(counts) > 0


def half_adamw(dtype):
    """An AdamW whose one parameter is of this dtype, named as in a new process, and the parameter."""
    paddle.utils.unique_name.switch()
    weight = paddle.create_parameter([2, 3], dtype, default_initializer=paddle.nn.initializer.Constant(0.5))
    return paddle.optimizer.AdamW(parameters=[weight], multi_precision=dtype != "float32"), weight


@pytest.mark.parametrize("before, now", [("float16", "float32"), ("float32", "float16"), ("bfloat16", "float16")])
def test_another_precision_takes_the_moments_and_the_most_exact_weights(tmp_path, before, now):
    path = str(tmp_path / resume.OPTIMIZER_NAME)
    optimizer, _ = half_adamw(before)
    half_states.make_states(optimizer)
    for kind, tensors in optimizer._accumulators.items():
        for tensor in tensors.values():
            tensor.set_value(half_states.drawn(kind, tensor.shape))
    for tensor in optimizer._master_weights.values():
        tensor.set_value(half_states.drawn("master", tensor.shape))
    paddle.save(optimizer.state_dict(), path)
    optimizer, weight = half_adamw(now)
    resume.load_optimizer(optimizer, [weight], path)
    half_states.make_states(optimizer)
    for kind, tensors in optimizer._accumulators.items():
        for tensor in tensors.values():
            assert np.array_equal(tensor.numpy(), half_states.drawn(kind, tensor.shape))
    exact = [weight] if now == "float32" else list(optimizer._master_weights.values())
    assert exact[0].dtype == paddle.float32
    if before != "float32":
        assert np.array_equal(exact[0].numpy(), half_states.drawn("master", [2, 3]))


def test_a_lost_master_weight_is_not_made_of_the_rounded_one(tmp_path):
    path = str(tmp_path / resume.OPTIMIZER_NAME)
    optimizer, weight = half_adamw("float16")
    half_states.make_states(optimizer)
    state = optimizer.state_dict()
    del state["master_weights"]
    paddle.save(state, path)
    with pytest.raises(WeightsError, match=f"lacks the master weight of {weight.name}"):
        resume.load_optimizer(optimizer, [weight], path)


# ---- other runs


def test_parameters_that_no_gradient_has_reached_are_no_obstacle(run_keys, tmp_path, log):
    """Texts alone, and attn_pool trains: Paddle makes no state for it."""
    records = [{"id": f"{n}", "conversations": [["?", colour]]} for n, colour in enumerate(list(COLOURS) * 3)]
    (tmp_path / "texts.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    keys = dict(LORA_POOL, save_steps=1, dataset={"train": [{"data_files": str(tmp_path / "texts.json")}]})
    run(run_keys(**keys))
    whole = final_weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    for path in (tmp_path / "out").glob("*_results.json"):
        path.unlink()
    run(run_keys(**keys, resume=True))
    assert "Loading model from" in log.text
    resumed = final_weights(tmp_path / "out")
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


def test_a_run_in_which_more_trains_is_another_run(run_keys, stopped):
    with pytest.raises(UserError, match="checkpoint-4"):
        go_on(run_keys, freeze_include=["*visual*"], freeze_exclude=["*visual.attn_pool*"])


# ---- broken checkpoints


@pytest.mark.parametrize("damage", ["weights cut", "no optimizer", "no seal"])
def test_a_broken_checkpoint_is_passed_over_and_the_run_ends_the_same(run_keys, one_go, stopped, log, damage):
    broken = stopped / "checkpoint-4"
    if damage == "weights cut":
        with open(broken / "lora_model_state.pdparams", "rb+") as file:
            file.truncate(1000)
    elif damage == "no optimizer":
        (broken / resume.OPTIMIZER_NAME).unlink()
    else:
        (broken / run_checkpoints.SEAL_NAME).unlink()
    go_on(run_keys)
    assert "checkpoint-4 is incomplete" in log.text and "Loading model from" in log.text and "checkpoint-3" in log.text
    ours, theirs = final_weights(stopped), final_weights(one_go)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_samples_before_the_checkpoint_are_not_read(run_keys, stopped, monkeypatch):
    """Three batches of four make an epoch: step 5 is the second batch of the second one."""
    read = []
    one = chatml.ChatmlDataset.__getitem__
    monkeypatch.setattr(chatml.ChatmlDataset, "__getitem__", lambda self, index: read.append(index) or one(self, index))
    go_on(run_keys)
    order = np.random.default_rng([42, 1]).permutation(12)
    # The loader may be a batch ahead.
    assert read[:4] == order[4:8].tolist() and not set(read) & set(order[:4].tolist())


def test_another_folder_for_the_run_is_no_obstacle(run_keys, stopped, tmp_path, one_go):
    """The paths in the checkpoint are those of where the run was."""
    stopped.rename(tmp_path / "moved")
    run(run_keys(**dict(KEYS, max_steps=5, resume=True), output_dir=str(tmp_path / "moved")))
    ours, theirs = final_weights(tmp_path / "moved"), final_weights(one_go)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


# ---- files that would like to be executed


@pytest.mark.parametrize("name", [resume.OPTIMIZER_NAME, resume.SCHEDULER_NAME])
def test_a_resume_executes_nothing(run_keys, stopped, canary, name):  # noqa: F811
    folder = stopped / "checkpoint-4"
    (folder / name).write_bytes(b"\x80\x04}(" + text("x") + attacks(canary)["reduce"] + b"u.")
    reseal(folder)
    with pytest.raises(UserError) as caught:
        go_on(run_keys)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_training_args_and_generators_are_never_read(run_keys, stopped, canary):  # noqa: F811
    for name in ("training_args.bin", "rng_state.pth"):
        (stopped / "checkpoint-4" / name).write_bytes(attacks(canary)["reduce"] + b".")
    (stopped / "training_args.bin").write_bytes(attacks(canary)["reduce"] + b".")
    reseal(stopped / "checkpoint-4")
    go_on(run_keys)


class Scaler:
    """Stands for GradScaler, which is off without a GPU."""

    def __init__(self):
        self.state = None

    def load_state_dict(self, state):
        self.state = state


def loaders():
    """Every way by which a file of a checkpoint is read on a resume: file name → reading it."""
    optimizer = paddle.optimizer.AdamW(parameters=[paddle.create_parameter([2, 3], "float32")])
    return {
        resume.OPTIMIZER_NAME: lambda path: resume.load_optimizer(optimizer, optimizer._parameter_list, path),
        resume.SCHEDULER_NAME: lambda path: resume.load_scheduler(paddle.optimizer.lr.LambdaDecay(1.0, float), path, 4),
        resume.SCALER_NAME: lambda path: resume.load_scaler(Scaler(), path),
    }


@pytest.mark.parametrize("file", list(loaders()))
def test_every_attack_on_every_file(tmp_path, canary, file):  # noqa: F811
    path = tmp_path / file
    for name in NAMES:
        for data in (attacks(canary)[name] + b".", b"\x80\x04}(" + text("x") + attacks(canary)[name] + b"u."):
            path.write_bytes(b"\x80\x04" + data if data[:1] != b"\x80" else data)
            assert str(path) in refused(loaders()[file], str(path)), name


# ---- files that hold something else


def change(path, edit):
    state = load_pdparams_object(str(path))
    edit(state)
    paddle.save(state, str(path))


def adamw():
    """An AdamW that has done a step, and its parameter."""
    weight = paddle.create_parameter([2, 3], "float32")
    optimizer = paddle.optimizer.AdamW(parameters=[weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer, weight


def set_to(name, value):
    return lambda state, weight: state.__setitem__(name.format(weight.name), value)


@pytest.mark.parametrize(
    "edit, code",
    [
        (lambda state, weight: state.pop(weight.name + "_moment1_0"), "incomplete"),
        (lambda state, weight: state.clear(), "incomplete"),
        (set_to("other_moment1_0", np.zeros([2, 3], "float32")), "not-trained"),
        (set_to("{}_moment2_0", np.zeros([3, 2], "float32")), "shape"),
        (set_to("{}_beta1_pow_acc_0", np.zeros([2, 3], "float32")), "shape"),
        (set_to("{}_moment1_0", 7), "shape"),
        (set_to("{}_moment1_0", np.zeros([2, 3], "float64")), "shape"),
        (set_to("master_weights", [1]), "master_weights"),
        (set_to("master_weights", {"other": np.zeros([2, 3], "float32")}), "master_weights"),
        (set_to("LR_Scheduler", {"last_epoch": -1, "last_lr": 0.1}), "schedule"),
    ],
)
def test_an_optimizer_state_of_something_else(tmp_path, edit, code):
    optimizer, weight = adamw()
    path = tmp_path / resume.OPTIMIZER_NAME
    state = {name: tensor.numpy() for name, tensor in optimizer.state_dict().items()}
    paddle.save(state, str(path))
    resume.load_optimizer(optimizer, [weight], str(path))
    edit(state, weight)
    paddle.save(state, str(path))
    with helpers.refused(WeightsError, code):
        resume.load_optimizer(optimizer, [weight], str(path))


def test_a_missing_file_is_named(tmp_path):
    with helpers.refused(WeightsError, "missing", match="optimizer.pdopt"):
        resume.load_optimizer(None, [], str(tmp_path / resume.OPTIMIZER_NAME))


@pytest.mark.parametrize(
    "state",
    [
        {"last_epoch": 3},
        {"last_epoch": 5, "last_lr": 0.1},
        {"last_epoch": True, "last_lr": 0.1},
        {"last_epoch": 3, "last_lr": float("nan")},
        {"last_epoch": 3, "last_lr": "0.1"},
        {"last_epoch": 3, "last_lr": 0.1, "get_lr": 1},
        [1],
    ],
)
def test_a_schedule_of_something_else(tmp_path, state):
    path = str(tmp_path / resume.SCHEDULER_NAME)
    paddle.save(state, path)
    with helpers.refused(WeightsError, "schedule" if type(state) is dict else "not-a-dict", match="scheduler.pdparams"):
        resume.load_scheduler(None, path, 4)


SCALE = {
    "scale": np.array([1024.0], "float32"),
    "incr_ratio": 2.0,
    "decr_ratio": 0.5,
    "incr_every_n_steps": 2000,
    "decr_every_n_nan_or_inf": 1,
    "incr_count": 7,
    "decr_count": 0,
    "use_dynamic_loss_scaling": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {"scale": np.array([np.inf], "float32")},
        {"scale": np.array([1.0, 2.0], "float32")},
        {"scale": 5},
        {"incr_ratio": -2.0},
        {"incr_count": 2.5},
        {"use_dynamic_loss_scaling": 1},
        {"more": 1},
    ],
)
def test_a_loss_scale_of_something_else(tmp_path, change):
    path = str(tmp_path / resume.SCALER_NAME)
    paddle.save(SCALE, path)
    scaler = Scaler()
    resume.load_scaler(scaler, path)
    assert scaler.state == SCALE
    paddle.save(dict(SCALE, **change), path)
    with pytest.raises(WeightsError, match="scaler.pdparams does not hold a loss scaler's state"):
        resume.load_scaler(scaler, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_step": 3},
        {"global_step": "4"},
        {"global_step": -4},
        {"epoch": [1]},
        {"max_steps": 10**19},
        {"log_history": {"a": 1}},
        {"best_model_checkpoint": 7},
        {"best_metric": "0"},
        {"is_world_process_zero": 1},
        {"trial_name": "x"},
        {"__class__": 1},
    ],
)
def test_a_trainer_state_of_something_else(stopped, changes):
    path = stopped / "checkpoint-4" / resume.STATE_NAME
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **changes)))
    message = refused(resume.read_trainer_state, str(path.parent), 4)
    assert str(path) in message


def test_a_trainer_state_that_is_no_json_ends_in_one_line(run_keys, stopped):
    for content in ("[", "[1]", "[" * 10**5, '{"epoch": ' + "1" * 10**5 + "}"):
        (stopped / "checkpoint-4" / resume.STATE_NAME).write_text(content)
        reseal(stopped / "checkpoint-4")
        with pytest.raises(WeightsError, match="trainer_state.json"):
            start(run_keys(**dict(KEYS, max_steps=5, resume=True))).train(str(stopped / "checkpoint-4"))


@pytest.mark.parametrize("best, found", [("/etc/checkpoint-3", 3), ("/etc", None), ("x/checkpoint-9", None)])
def test_the_best_checkpoint_is_one_of_this_run(stopped, best, found):
    path = stopped / "checkpoint-4" / resume.STATE_NAME
    state = dict(json.loads(path.read_text()), best_model_checkpoint=best, best_metric=0.5)
    path.write_text(json.dumps(state))
    read = resume.read_trainer_state(str(path.parent), 4)
    assert read.best_model_checkpoint == (None if found is None else str(stopped / f"checkpoint-{found}"))
    assert read.best_metric == (None if found is None else 0.5)


@pytest.mark.parametrize(
    "state",
    [None, [1], {}, {"global_step": 4}, {"global_step": 0, "loss_sum": 1.0, "order": {}}]
    + [{"global_step": 4, "loss_sum": "x", "order": {}}, {"global_step": 4, "loss_sum": 1.0, "order": {"seed": "7"}}],
)
def test_a_seal_of_something_else(tmp_path, state):
    os.makedirs(tmp_path / "checkpoint-4")
    run_checkpoints.seal(str(tmp_path / "checkpoint-4"), state)
    refused(resume.read_position, str(tmp_path / "checkpoint-4"))
