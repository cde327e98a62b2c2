"""Entries of `dataset` with weight, repeat, limit and prompt: what an epoch holds, and that it is resumed exactly."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from paddlemix.trainer import dry_run, forecast
from paddlemix.trainer.order import EpochSampler, Order, plan_draws
from paddlemix.utils.errors import ConfigError
from tests.helpers import refused
from tests.trainer.runs import COLOURS, LORA, LORA_POOL, final_weights, killed_at, run, start, write_data


@pytest.fixture
def entries(tmp_path):
    """Eight pictures of four colours, and six texts without one."""
    pictures = write_data(tmp_path / "pictures.json", list(COLOURS) * 2)
    texts = [json.dumps({"id": f"text_{i}", "conversations": [["say", f"word {i}"]]}) for i in range(6)]
    (tmp_path / "texts.json").write_text("\n".join(texts))
    return {"data_files": pictures}, {"data_files": str(tmp_path / "texts.json")}


def epochs(order, count, rank=0):
    sampler = EpochSampler(order, rank)
    found = []
    for epoch in range(count):
        sampler.start_at(epoch, 0)
        found.append(list(sampler))
    return found


def test_weights_share_an_epoch_and_reach_every_sample():
    draws = plan_draws([90, 10], [1, 3])
    assert [(draw.samples, draw.first, draw.count) for draw in draws] == [(90, 0, 25), (10, 90, 75)]
    order = Order(100, 5, seed=4, draws=draws)
    found = [sum(epoch, []) for epoch in epochs(order, 8)]
    for epoch in found:
        assert len(epoch) == 100 and sum(index < 90 for index in epoch) == 25
    # 200 of 90: each twice or three times; 600 of 10: each sixty times. None is left out by chance.
    times = Counter(sum(found, []))
    assert {times[i] for i in range(90)} == {2, 3} and {times[i] for i in range(90, 100)} == {60}
    assert found[0] != found[1] and found == [sum(epoch, []) for epoch in epochs(order, 8)]
    assert found != [sum(epoch, []) for epoch in epochs(order._replace(seed=5), 8)]
    # Two processes take the batches in turn; a start within an epoch is its rest.
    shared = [epochs(order._replace(batch=5, cards=2), 1, rank)[0] for rank in (0, 1)]
    assert sum(shared[0] + shared[1], []) != found[0] and sorted(sum(shared[0] + shared[1], [])) == sorted(found[0])
    sampler = EpochSampler(order)
    sampler.start_at(3, 7)
    assert sum(sampler, []) == found[3][35:]


@pytest.mark.parametrize("sizes, weights", [([7, 5, 1], [1, 1, 1]), ([3, 1000], [0.2, 0.8]), ([5], [7])])
def test_shares_are_whole_numbers_that_add_up(sizes, weights):
    draws = plan_draws(sizes, weights)
    assert sum(draw.count for draw in draws) == sum(sizes)
    for draw, weight in zip(draws, weights):
        assert abs(draw.count - sum(sizes) * weight / sum(weights)) < 1


def test_a_weight_that_draws_nothing_is_a_problem():
    (problem,) = Order(10, 2, draws=plan_draws([5, 5], [1, 1e-6])).problems()
    assert "draws none" in problem


def test_a_limit_that_is_drawn_often_says_how_often(run_keys, entries, log):
    pictures, texts = entries
    start(run_keys(dataset={"train": [dict(pictures, limit=2, weight=3), dict(texts, weight=1)]}))
    assert f"6 samples (75.0%) from the 8 records of {pictures['data_files']}; limit 2 (3.0 × 2); weight 3" in log.text


def test_log_and_dry_run_say_what_each_entry_contributes(run_keys, entries, log, tmp_path):
    pictures, texts = entries
    train = [dict(pictures, weight=3), dict(texts, weight=1, limit=4, prompt=["?", "!"])]
    keys = run_keys(dataset={"train": train, "eval": [dict(pictures, limit=2)]}, do_eval=True)
    start(keys)
    lines = [
        f"dataset.train: 9 samples (75.0%) from the 8 records of {pictures['data_files']}; weight 3",
        f"dataset.train: 3 samples (25.0%) from the 6 records of {texts['data_files']}; limit 4; weight 1; prompt 2",
        f"dataset.eval: 2 samples (100.0%) from the 8 records of {pictures['data_files']}; limit 2",
    ]
    logged = [record.message for record in log.records]
    assert [line for line in logged if line.startswith("dataset.")] == lines
    path = tmp_path / "run.json"
    values = {"model_name_or_path": keys.model.model_name_or_path, "output_dir": str(tmp_path / "plan")}
    path.write_text(json.dumps(dict(values, do_train=True, dataset={"train": train}, max_length=256)))
    planned = dry_run.render(forecast.foresee([str(path)]))
    assert [line.split(": ", 1)[1] for line in lines[:2]] == planned[planned.index("==== data: train") + 1 :][:2]


MIXES = {
    "weights": ({"weight": 1, "prompt": ["?", "what is it?"]}, {"weight": 2}),
    "repeat and limit": ({"repeat": 2, "limit": 5}, {"repeat": 3}),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_resumed_run_ends_with_the_weights_of_one_go(run_keys, entries, tmp_path, monkeypatch, name):
    train = [dict(entry, **mix) for entry, mix in zip(entries, MIXES[name])]
    keys = dict(LORA, save_steps=5, max_steps=9, lora_dropout=0.1, dataset={"train": train})
    run(run_keys(**keys, output_dir=str(tmp_path / "whole")))
    part = str(tmp_path / "part")
    killed_at(start(run_keys(**keys, output_dir=part)), 5, monkeypatch)
    run(run_keys(**keys, output_dir=part, resume=True))
    whole, resumed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "part")
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    # Another mix of as many samples is another run.
    other = [dict(train[0], prompt="now?"), train[1]]
    with refused(ConfigError, "mixing"):
        begin = os.path.join(part, "checkpoint-5")
        run(run_keys(**dict(keys, dataset={"train": other}), output_dir=part, resume_from_checkpoint=begin))


def test_texts_alone_after_a_resume_move_the_connector_as_in_one_go(run_keys, entries, tmp_path, monkeypatch):
    """They give it no gradient, and AdamW's moments move it."""
    keys = dict(LORA_POOL, save_steps=1, max_steps=6, per_device_train_batch_size=1, dataset={"train": list(entries)})
    run(run_keys(**keys, output_dir=str(tmp_path / "whole")))
    whole = final_weights(tmp_path / "whole")
    for stop in (2, 4):
        part = str(tmp_path / f"part {stop}")
        killed_at(start(run_keys(**keys, output_dir=part)), stop, monkeypatch)
        run(run_keys(**keys, output_dir=part, resume=True))
        resumed = final_weights(tmp_path / f"part {stop}")
        assert [key for key in whole if not np.array_equal(whole[key], resumed[key])] == []


def test_packs_and_groups_take_repeats_and_limits(run_keys, entries):
    pictures, texts = entries
    train = [dict(pictures, repeat=2), dict(texts, limit=3, repeat=4)]
    for mode in ("mixtoken", "group_by_modality_length"):
        keys = {mode: True, "max_length": 160, "per_device_train_batch_size": 2}
        trainer = start(run_keys(dataset={"train": train}, **keys))
        assert trainer.order.samples == 16 + 12
        if mode == "mixtoken":
            packs = trainer.order.packs
            assert sorted(sum(map(packs.samples, range(packs.count)), ())) == list(range(28))
