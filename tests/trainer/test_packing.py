"""Runs with mixtoken and group_by_modality_length, of a tiny model on coloured squares and plain words."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.datasets.packing import PackedDataset, Packs, SampleLengths, plan_packs
from paddlemix.trainer import command_line
from paddlemix.trainer.order import EpochSampler, Order
from paddlemix.utils.errors import ConfigError, UserError
from tests.helpers import image_base64, refused, save_tiny_model
from tests.trainer.runs import LORA, final_weights, killed_at, run, start

MODES = [{"mixtoken": True, "max_length": 256}, {"group_by_modality_length": True}]


def write_data(path, count, bad=()):
    """A train.json of `count` records of many lengths, every third without an image; those in `bad` show none."""
    records = []
    for number in range(count):
        record = {"id": f"identity_{number}", "conversations": [["?", "word " * (1 + number * 7 % 11)]]}
        if number in bad:
            record["image"] = "AAAA"
        elif number % 3:
            record["image"] = image_base64(number, size=(24, 24))
        records.append(json.dumps(record))
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, data file) for all runs."""
    folder = tmp_path_factory.mktemp("world")
    return save_tiny_model(folder / "model"), write_data(folder / "train.json", 24)


@pytest.fixture
def run_keys(world, tmp_path):
    def keys(data=world[1], **changes):
        values = {
            "model_name_or_path": world[0],
            "output_dir": str(tmp_path / "out"),
            "dataset": {"train": [{"data_files": data}], "eval": [{"data_files": world[1]}]},
            "do_train": True,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": ["none"],
            "save_strategy": "no",
        }
        values.update(changes)
        return command_line.from_values(values)

    return keys


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# ---- what a packed run does


def test_an_epoch_trains_on_every_sample_once(run_keys, tmp_path, log):
    trainer = start(run_keys(mixtoken=True, max_length=256, num_train_epochs=2, gradient_accumulation_steps=1))
    assert f"packed 24 samples into {trainer.order.packs.count} sequences of at most 256 tokens" in log.text
    assert 4 < trainer.order.packs.count < 16
    seen, step = [], trainer.training_step

    def watch(model, inputs, **kwargs):
        lengths = np.array(inputs["sample_lengths"])
        seen.append((lengths[lengths > 0].tolist(), inputs["attention_mask"].sum(axis=1).max().item()))
        return step(model, inputs, **kwargs)

    trainer.training_step = watch
    metrics = trainer.train()
    steps = -(-trainer.order.packs.count // 2)
    assert trainer.order.steps == trainer.state.global_step == 2 * steps == len(seen)
    expected = sorted(trainer.train_dataset.dataset.lengths().tokens.tolist())
    for epoch in (seen[:steps], seen[steps:]):
        assert sorted(sum((lengths for lengths, _ in epoch), [])) == expected
    assert [lengths for lengths, _ in seen[:steps]] != [lengths for lengths, _ in seen[steps:]]
    assert max(longest for _, longest in seen) <= 256
    # The log counts samples and real tokens, not sequences and padding.
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(48, rel=1e-3)
    lines = [line for line in trainer._history if "interval_tokens_per_second" in line]
    ratios = [line["interval_tokens_per_second"] / line["interval_samples_per_second"] for line in lines]
    wanted = [np.mean(lengths) for lengths, _ in seen]
    np.testing.assert_allclose(ratios, wanted, rtol=1e-2)


def test_the_trained_loss_is_that_of_the_same_samples_unpacked(run_keys):
    trainer = start(run_keys(mixtoken=True, max_length=256))
    batch = next(iter(trainer.get_train_dataloader()))
    packs = next(iter(trainer._get_train_sampler()))
    indices = sum(map(trainer.order.packs.samples, packs), ())
    alone = trainer.data_collator([trainer.train_dataset.dataset[index] for index in indices])
    alone = {name: paddle.to_tensor(array) for name, array in alone.items()}
    trainer.model.eval()
    packed, expected = (trainer.compute_loss(trainer.model, inputs).item() for inputs in (batch, alone))
    assert packed == pytest.approx(expected, abs=1e-5)


def test_evaluation_is_not_packed(run_keys):
    same = [start(run_keys(do_eval=True, **keys)).evaluate()["eval_loss"] for keys in ({}, MODES[0])]
    assert same[0] == pytest.approx(same[1], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_sample_costs_itself_alone(run_keys, tmp_path, log, workers):
    data = write_data(tmp_path / "bad.json", 24, bad=(4, 7))
    metrics = run(run_keys(data, mixtoken=True, max_length=256, num_train_epochs=1, dataloader_num_workers=workers))
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(22, rel=1e-3)
    assert history(tmp_path / "out")[-1]["skipped_samples"] == 2
    # A worker logs in its own process.
    assert workers or "left out" in log.text


def test_data_without_a_good_sample_ends_the_run_in_words(run_keys, tmp_path):
    data = write_data(tmp_path / "bad.json", 4, bad=range(4))
    with pytest.raises(UserError, match="no good sample"):
        run(run_keys(data, mixtoken=True, max_length=256))


def test_a_pack_of_failures_is_another_good_sample(run_keys, tmp_path):
    data = write_data(tmp_path / "bad.json", 6, bad=(1, 2))
    dataset = start(run_keys(data)).train_dataset
    packed = PackedDataset(dataset, Packs(np.array([1, 2, 0, 1, 3]), np.array([0, 2, 5]), 256))
    found = packed[0]
    assert len(found) == 1 and (found[0]["input_ids"] == dataset.sample(3)["input_ids"]).all()
    assert dataset.n_skipped == 2 and len(packed[1]) == 2 and packed.n_skipped == 3


# ---- resuming


@pytest.mark.parametrize("mode", MODES, ids=["mixtoken", "grouped"])
def test_a_resumed_run_ends_with_the_weights_of_one_go(run_keys, tmp_path, monkeypatch, mode):
    keys = dict(LORA, **mode, save_strategy="steps", save_steps=4, max_steps=5, lora_dropout=0.3)
    keys.update(per_device_train_batch_size=4 if "mixtoken" in mode else 8)
    run(run_keys(**keys, output_dir=str(tmp_path / "whole")))
    trainer = start(run_keys(**keys))
    # Step 4 is the first of the second epoch, and not its last.
    assert len(trainer._get_train_sampler()) == 3

    killed_at(trainer, 4, monkeypatch)
    run(run_keys(**keys, resume=True))
    ours, theirs = final_weights(tmp_path / "out"), final_weights(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_with_other_packs_is_refused(run_keys):
    keys = dict(LORA, save_strategy="steps", save_steps=1, mixtoken=True)
    run(run_keys(**keys, max_length=256, max_steps=1))
    with refused(ConfigError, "mixtoken", "max_length", match="256.* 200"):
        run(run_keys(**keys, max_length=200, max_steps=2, resume=True))
    with refused(ConfigError, "mixtoken"):
        run(run_keys(**dict(keys, mixtoken=False), max_length=256, max_steps=2, resume=True))
    with refused(ConfigError, "group_by_modality_length"):
        changed = dict(keys, mixtoken=False, group_by_modality_length=True)
        run(run_keys(**changed, max_length=256, max_steps=2, resume=True))


# ---- the sampler


def sampler(rank=0, processes=1, batch=2, packs=None, lengths=None, **options):
    return EpochSampler(Order(30, batch, seed=3, cards=processes, packs=packs, lengths=lengths, **options), rank)


def lengths(n=30):
    rng = np.random.default_rng(0)
    return SampleLengths(rng.integers(10, 50, n), rng.random(n) < 0.5)


def test_processes_get_as_many_packs_each():
    packs = plan_packs(lengths().tokens, 100, 0)
    ranks = [list(sampler(rank, 2, packs=packs)) for rank in (0, 1)]
    alone = list(sampler(packs=packs))
    assert len(ranks[0]) == len(ranks[1]) == -(-packs.count // 4)
    assert [ranks[0][0], ranks[1][0], ranks[0][1]] == alone[:3]
    assert {index for batch in sum(ranks, []) for pack in batch for index in packs.samples(pack)} == set(range(30))


def test_processes_share_the_groups():
    found = [list(sampler(rank, 2, batch=4, lengths=lengths())) for rank in (0, 1)]
    assert len(found[0]) == len(found[1]) == 4
    assert set(sum(found[0] + found[1], [])) == set(range(30))


@pytest.mark.parametrize("kind", ["packs", "lengths"])
def test_starting_inside_an_epoch_is_its_rest(kind):
    plan = {"packs": plan_packs(lengths().tokens, 100, 0)} if kind == "packs" else {"lengths": lengths()}
    one = sampler(**plan, accumulation=2)
    one.start_at(1, 0)
    whole = list(one)
    assert len(whole) == len(one) and len(one) % 2 == 0
    again = sampler(**plan, accumulation=2)
    again.start_at(1, 2)
    assert list(again) == whole[2:]
    again.start_at(2, 0)
    assert list(again) != whole


def test_too_few_packs_for_a_batch():
    packs = plan_packs(np.array([10, 10]), 100, 0)
    (problem,) = Order(2, 2, packs=packs, drop_last=True).problems()
    assert problem.startswith("1 packed sequences do not fill one batch of 2")
