"""The memory estimate against what Paddle's allocator counts, and its arithmetic over cards and precisions."""

import importlib
import pathlib

import pytest

from paddlemix.models.lora import adapter_shapes
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.trainer import memory

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks"
TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]


@pytest.fixture
def script(monkeypatch):
    from paddle.base import core

    if not hasattr(core, "host_memory_stat_reset_peak_value"):
        pytest.skip("this Paddle cannot count a second peak in one process")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory_estimate")


@pytest.mark.parametrize(
    "case",
    ["LoRA", "LoRA and attn_pool, recompute", "full", "the two upper layers", "LoRA, two rows of six packed"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(script, case):
    found = script.measure(script.CASES[case])
    assert found["measured"] > 50e6, "too small to mean anything"
    assert 0.85 < found["estimated"] / found["measured"] < 1.15, found


@pytest.fixture(scope="module")
def config_7b():
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    return MGenConfig()


@pytest.fixture(scope="module")
def lora_7b(config_7b):
    shapes = parameter_shapes(config_7b)
    adapters = adapter_shapes(shapes, TARGETS, 64)
    return memory.Trained({**shapes, **adapters}, list(adapters))


BATCH = memory.Batch(1, 512, 1, 128)


def needed(config, trained, batch=BATCH, **setting):
    return memory.estimate(config, trained, batch, memory.Setting(gpu=True, **setting))


def test_what_is_held_at_each_precision(config_7b, lora_7b):
    every, trains = 9_656_935_168 + 112_197_632, 112_197_632
    for precision, weight, states in (("float32", 4, 8), ("O1", 4, 8), ("O2", 2, 12)):
        held = needed(config_7b, lora_7b, precision=precision).held
        assert held["weights"] == every * weight and held["gradients"] == trains * weight
        assert held["optimizer moments"] + held.get("master weights", 0) == trains * states
    assert needed(config_7b, lora_7b, precision="O2", master_grad=True).held["gradients"] == trains * 4


def test_sharding_shares_states_and_in_stage_2_gradients(config_7b, lora_7b):
    whole = needed(config_7b, lora_7b, precision="O2").held
    first = needed(config_7b, lora_7b, precision="O2", sharding=8, stage=1).held
    second = needed(config_7b, lora_7b, precision="O2", sharding=8, stage=2).held
    for part in ("optimizer moments", "master weights"):
        assert first[part] == second[part] == whole[part] // 8
    assert first["gradients"] == whole["gradients"] and second["gradients"] == whole["gradients"] // 8
    assert first["weights"] == second["weights"] == whole["weights"]


def test_tensor_parallel_pieces_are_those_of_the_model(config_7b, lora_7b):
    """memory.share says of each name what the model's mappings say."""
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    config_7b.tensor_parallel_degree = 2
    try:
        split = set(MGenLMHeadModel._get_tensor_parallel_mappings(config_7b))
    finally:
        config_7b.tensor_parallel_degree = 1
    assert {name for name in lora_7b.shapes if memory.share(name, 2) == 2} == split & set(lora_7b.shapes)


def test_more_cards_and_recompute_need_less_on_each(config_7b, lora_7b):
    batch = memory.Batch(4, 512, 4, 512)
    plain = needed(config_7b, lora_7b, batch, precision="O2")
    assert needed(config_7b, lora_7b, batch, precision="O2", tensor=4).peak < plain.peak / 2
    assert needed(config_7b, lora_7b, batch, precision="O2", recompute=True).peak < plain.peak - (5 << 30)
    assert needed(config_7b, lora_7b, batch, precision="O2", flash=True).peak < plain.peak


def test_nothing_in_front_of_what_trains_is_stored(config_7b):
    shapes = parameter_shapes(config_7b)

    def stored(*prefixes):
        trained = memory.Trained(shapes, [name for name in shapes if name.startswith(prefixes)])
        return needed(config_7b, trained, precision="O2").stored

    upper = stored(*(f"transformer.llm.h.{i}." for i in range(16, 32)))
    every = stored("transformer.llm.h.")
    assert upper["decoder activations"] * 2 == every["decoder activations"]
    assert "connector activations" not in every and "vision activations" not in every
    assert "connector activations" in stored("visual.attn_pool.") and "vision activations" not in stored("visual.proj")
    assert stored("visual.attn_pool.")["decoder activations"] == every["decoder activations"]
    half = stored("visual.vit.transformer.resblocks.24.")["vision activations"]
    assert half * 2 == stored("visual.vit.conv1")["vision activations"]


def test_packed_samples_need_scores_for_themselves_only(config_7b, lora_7b):
    whole = needed(config_7b, lora_7b, memory.Batch(1, 2048, 6, 600), precision="O2")
    packed = needed(config_7b, lora_7b, memory.Batch(1, 2048, 6, 600, (6 * 341**2, 341)), precision="O2")
    scores = 32 * 32 * 6 * (2048**2 - 6 * 341**2)
    assert whole.stored["decoder activations"] - packed.stored["decoder activations"] == scores
