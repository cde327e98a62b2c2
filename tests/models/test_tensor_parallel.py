"""How each parameter and its adapter are split over cards; the parts compute what the full matrix does.

The runs: tests/trainer/test_tensor_parallel_runs.py.
"""

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from paddlemix.models.lora import adapter_shapes, apply_lora
from paddlemix.models.mgen_vl.attention import attend
from paddlemix.models.mgen_vl.language import attention_factors, rotary_factors, rotate
from paddlemix.models.mgen_vl.parameters import cut_problems
from tests.helpers import make_tiny_model, tiny_config

HEADS = 8
DEGREES = (2, 4, 8)


@pytest.fixture(scope="module")
def model():
    return make_tiny_model(num_attention_heads=HEADS, kv_channels=16)


def actions(model, degree, rank, is_split):
    """How this card splits, or merges, each parameter that is split."""
    config = copy.copy(model.config)
    config.tensor_parallel_degree, config.tensor_parallel_rank = degree, rank
    return type(model)._get_tensor_parallel_mappings(config, is_split)


@pytest.fixture(scope="module")
def pieces(model):
    """degree → name → the pieces of a weight, one per card; weights that every card has whole are missing."""

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {}
    for degree in DEGREES:
        splits = [actions(model, degree, rank, True) for rank in range(degree)]
        merge = actions(model, degree, 0, False)
        names = [name for name in state if name in splits[0]]
        found[degree] = {name: [split[name](state[name]) for split in splits] for name in names}
        for name in names:
            np.testing.assert_array_equal(merge[name](found[degree][name]), state[name], err_msg=name)
    return found


@pytest.mark.parametrize("degree", DEGREES)
def test_every_matrix_of_the_decoder_is_split_and_comes_back_bit_for_bit(model, pieces, degree):
    """The fixture merges. What is whole on every card: norms and the vision part."""
    whole = {name for name in model.state_dict() if name not in pieces[degree]}
    assert all(name.startswith("visual.") or ".ln_" in name for name in whole)
    for name, parts in pieces[degree].items():
        assert sum(part.size for part in parts) == math_size(model, name) and len({p.shape for p in parts}) == 1


def math_size(model, name):
    return int(np.prod(model.state_dict()[name].shape))


def tensor(array):
    return paddle.to_tensor(np.ascontiguousarray(array))


@pytest.mark.parametrize("degree", DEGREES)
def test_the_cards_parts_add_up_to_the_whole(model, pieces, degree):
    """Each card computes with its pieces; row-split products are summed, as the all-reduce does, columns joined."""
    parts = pieces[degree]
    llm, block = model.transformer.llm, model.transformer.llm.h[0]
    prefix = "transformer.llm.h.0."
    ids = paddle.to_tensor(np.random.default_rng(0).integers(0, 480, [2, 6]))

    each = 480 // degree
    embedded = 0
    for rank, table in enumerate(parts["transformer.llm.wte.weight"]):
        ours = ((ids >= rank * each) & (ids < (rank + 1) * each)).astype("int64")
        rows = F.embedding((ids - rank * each) * ours, tensor(table))
        embedded = embedded + rows * ours.unsqueeze(-1).astype("float32")
    np.testing.assert_array_equal(embedded.numpy(), llm.wte(ids).numpy())

    x = block.ln_1(embedded)
    positions = paddle.arange(6).unsqueeze(0).expand([2, 6])
    rotary = rotary_factors(positions, 16, 10000.0, [1])
    bias = paddle.triu(paddle.full([6, 6], -1e30), diagonal=1).reshape([1, 1, 6, 6])
    attended = 0
    for rank in range(degree):
        weight, added = (tensor(parts[f"{prefix}attn.c_attn.{kind}"][rank]) for kind in ("weight", "bias"))
        mixed = F.linear(x, weight, added).reshape([2, 6, 3, HEADS // degree, 16]).transpose([2, 0, 3, 1, 4])
        query, key, value = mixed.unbind(0)
        scores = paddle.matmul(rotate(query, *rotary), rotate(key, *rotary), transpose_y=True) / 4.0 + bias
        out = paddle.matmul(F.softmax(scores), value).transpose([0, 2, 1, 3]).reshape([2, 6, -1])
        attended = attended + paddle.matmul(out, tensor(parts[prefix + "attn.c_proj.weight"][rank]))
    expected = block.attn(x, bias, *attention_factors(*rotary, 0.25))
    np.testing.assert_allclose(attended.numpy(), expected.numpy(), atol=1e-5)

    summed = 0
    for rank in range(degree):
        w1, w2, down = (tensor(parts[f"{prefix}mlp.{name}.weight"][rank]) for name in ("w1", "w2", "c_proj"))
        summed = summed + paddle.matmul(paddle.matmul(x, w1) * F.silu(paddle.matmul(x, w2)), down)
    np.testing.assert_allclose(summed.numpy(), block.mlp(x).numpy(), atol=1e-5)

    logits = paddle.concat([paddle.matmul(x, tensor(part)) for part in parts["lm_head.weight"]], axis=-1)
    whole = model._logits(x)
    np.testing.assert_allclose(logits.numpy(), whole.numpy(), atol=1e-5)
    targets = ids.reshape([-1])
    losses = [F.cross_entropy(one.reshape([12, -1]), targets).item() for one in (logits, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


TARGETS = (".*attn.c_attn", ".*attn.c_proj", ".*mlp.w1", ".*mlp.w2", r".*h\.\d+\.mlp.c_proj")
SCALE = 8 / 4


@pytest.fixture(scope="module")
def adapters(model):
    """Name → adapter matrix of random values, for every matrix of the blocks."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(1)
    found = adapter_shapes(shapes, TARGETS, rank=4)
    return {name: rng.normal(size=shape).astype("float32") * 0.1 for name, shape in found.items()}


@pytest.fixture(scope="module")
def adapter_pieces(model, adapters):
    """degree → name → the pieces, one per card; of what every card has whole, as many copies."""
    found = {}
    for degree in DEGREES:
        splits = [actions(model, degree, rank, True) for rank in range(degree)]
        found[degree] = {
            name: [split[name](array) if name in split else array for split in splits]
            for name, array in adapters.items()
        }
    return found


@pytest.mark.parametrize("degree", DEGREES)
def test_adapters_are_split_as_their_weights_and_come_back(model, pieces, adapters, adapter_pieces, degree):
    merge = actions(model, degree, 0, False)
    for name, whole in adapters.items():
        split_in_rows = "c_proj" in name
        assert (name in merge) == (name.endswith("lora_A") == split_in_rows), name
        if name in merge:
            np.testing.assert_array_equal(merge[name](adapter_pieces[degree][name]), whole, err_msg=name)
    split = [actions(model, degree, rank, True) for rank in range(degree)]
    for module in {name.rpartition(".")[0] for name in adapters}:
        product = adapters[module + ".lora_A"] @ adapters[module + ".lora_B"]
        for rank in range(degree):
            # What a card adds to its part of the weight is its part of what is added to the whole.
            A, B = (adapter_pieces[degree][f"{module}.lora_{kind}"][rank] for kind in "AB")
            assert pieces[degree][module + ".weight"][rank].shape == (A @ B).shape
            np.testing.assert_allclose(A @ B, split[rank][module + ".weight"](product), atol=1e-5, err_msg=module)


@pytest.mark.parametrize("degree", DEGREES)
def test_the_cards_parts_with_adapters_add_up_to_the_whole(model, pieces, adapters, adapter_pieces, degree):
    """As fleet's layers compute: a column layer adds x·A·(its B); a row layer adds (the sum of x·A)·B."""
    prefix = "transformer.llm.h.1."
    x = paddle.to_tensor(np.random.default_rng(2).normal(size=[2, 6, 128]).astype("float32"))

    def of(name, rank):
        return tensor((adapter_pieces if "lora" in name else pieces)[degree][prefix + name][rank])

    def column(name, rank, x):
        delta = paddle.matmul(paddle.matmul(x, of(name + ".lora_A", rank)), of(name + ".lora_B", rank)) * SCALE
        bias = of(name + ".bias", rank) if name == "attn.c_attn" else 0.0
        return paddle.matmul(x, of(name + ".weight", rank)) + bias + delta

    def row(name, inputs):
        summed = sum(paddle.matmul(x, of(name + ".weight", rank)) for rank, x in enumerate(inputs))
        low = sum(paddle.matmul(x, of(name + ".lora_A", rank)) for rank, x in enumerate(inputs))
        return summed + paddle.matmul(low, of(name + ".lora_B", 0)) * SCALE

    rotary = rotary_factors(paddle.arange(6).unsqueeze(0).expand([2, 6]), 16, 10000.0, [1])
    bias = paddle.triu(paddle.full([6, 6], -1e30), diagonal=1).reshape([1, 1, 6, 6])
    outputs = []
    for rank in range(degree):
        mixed = column("attn.c_attn", rank, x).reshape([2, 6, 3, HEADS // degree, 16]).transpose([2, 0, 3, 1, 4])
        query, key, value = mixed.unbind(0)
        outputs.append(attend(rotate(query, *rotary), rotate(key, *rotary), value, bias))
    attended = row("attn.c_proj", outputs)
    inner = [column("mlp.w1", rank, x) * F.silu(column("mlp.w2", rank, x)) for rank in range(degree)]
    summed = row("mlp.c_proj", inner)

    whole = make_tiny_model(num_attention_heads=HEADS, kv_channels=16)
    lora = apply_lora(whole, rank=4, alpha=8, target_modules=TARGETS)
    state = whole.state_dict()
    for name, array in adapters.items():
        state[name].set_value(array)
    lora.eval()
    block = whole.transformer.llm.h[1]
    expected = block.attn(x, bias, *attention_factors(*rotary, 0.25))
    np.testing.assert_allclose(attended.numpy(), expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(summed.numpy(), block.mlp(x).numpy(), atol=1e-4)
    assert np.abs(block.mlp(x).numpy() - model.transformer.llm.h[1].mlp(x).numpy()).max() > 0.01


def test_a_model_that_cannot_be_cut_is_refused():
    problems = cut_problems(tiny_config(vocab_size=480, no_bias=False), 3)
    assert [problem.partition("=3 ")[2].split(" (")[0] for problem in problems] == [
        "does not divide num_attention_heads",
        "does not divide the MLP's inner width",
        "needs no_bias in config.json: PaddleNLP's split MLP has no biases",
    ]
    assert cut_problems(tiny_config(no_bias=False), 1) == []
