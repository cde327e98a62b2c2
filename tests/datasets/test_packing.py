"""Which samples share a row, and the order that groups samples by length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets.packing import SampleLengths, group_by_length, plan_packs


def rng(*seed):
    return np.random.default_rng(list(seed) or 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=80), st.integers(0, 3), st.sampled_from([1, 3, 16, 512]))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(lengths, seed, window):
    tokens = np.array(lengths, dtype=np.int64)
    packs = plan_packs(tokens, 40, seed, window)
    found = [packs.samples(pack) for pack in range(packs.count)]
    assert sorted(sum(found, ())) == list(range(len(tokens)))
    assert all(pack and tokens[list(pack)].sum() <= 40 for pack in found)


def test_packs_depend_on_lengths_and_seed_alone():
    tokens = rng(1).integers(10, 100, 2000)
    one, same, other = plan_packs(tokens, 256, 7), plan_packs(tokens, 256, 7), plan_packs(tokens, 256, 8)
    assert one.digest() == same.digest() != other.digest()
    tokens[5] += 1
    assert plan_packs(tokens, 256, 7).digest() != one.digest()


def test_little_room_is_lost():
    # Samples as the contest's: 256 queries and a caption; a third of them text alone.
    tokens = rng(2).integers(300, 400, 5000)
    tokens[::3] -= 258
    packs = plan_packs(tokens, 2048, 0)
    assert tokens.sum() / (packs.count * 2048) > 0.97


def test_a_sample_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="41 tokens"):
        plan_packs(np.array([41]), 40, 0)


def lengths_of(n, images=0.5):
    return SampleLengths(rng(3).integers(20, 400, n), rng(4).random(n) < images)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 100, 1003])
@pytest.mark.parametrize("processes", [1, 2])
def test_grouping_is_an_order_of_all_samples(n, processes):
    lengths = lengths_of(n)
    order = group_by_length(lengths, 4, processes, rng(5))
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == group_by_length(lengths, 4, processes, rng(5)).tolist()


def test_groups_are_of_like_length_and_kind():
    lengths = lengths_of(4096)
    order = group_by_length(lengths, 8, 2, rng(6))
    assert (order != group_by_length(lengths, 8, 2, rng(7))).any()
    steps = order.reshape(-1, 2, 8)
    tokens, kinds = lengths.tokens[steps], lengths.has_image[steps]
    mixed = (kinds.any(axis=(1, 2)) & ~kinds.all(axis=(1, 2))).sum()
    assert mixed <= 1
    longest = tokens.max(axis=2)
    padded = (longest[:, :, None] - tokens).sum() / tokens.sum()
    shuffled = lengths.tokens[rng(8).permutation(4096)].reshape(-1, 8)
    assert padded < 0.03 < 0.5 < (shuffled.max(axis=1, keepdims=True) - shuffled).sum() / shuffled.sum()
    # Cards have as much to do as each other, and no card always has more.
    work = tokens.sum(axis=2)
    assert np.abs(work[:, 0] - work[:, 1]).max() / work.mean() < 0.1
    assert abs(work[:, 0].sum() / work[:, 1].sum() - 1) < 0.002
    # Short and long batches come mixed.
    assert np.abs(np.corrcoef(longest[:-1, 0], longest[1:, 0])[0, 1]) < 0.2
