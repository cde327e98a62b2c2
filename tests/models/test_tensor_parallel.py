"""python -m pytest tests/models/test_tensor_parallel.py

PaddleNLP's mappings of the base weights, and what stands against training with them (docs/many_cards.md).
"""

import types

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddlenlp.peft import LoRAModel

from paddlemix.models.mgen_vl.language import rotary_factors, rotate
from tests.helpers import make_tiny_model

HEADS = 8
DEGREES = (2, 4, 8)


@pytest.fixture(scope="module")
def model():
    return make_tiny_model(num_attention_heads=HEADS, kv_channels=16)


@pytest.fixture(scope="module")
def pieces(model):
    """degree → name → the pieces of a weight, one per card; weights that every card has whole are missing."""

    def actions(degree, rank, is_split):
        model.config.tensor_parallel_degree, model.config.tensor_parallel_rank = degree, rank
        try:
            return type(model)._get_tensor_parallel_mappings(model.config, is_split)
        finally:
            model.config.tensor_parallel_degree, model.config.tensor_parallel_rank = 1, 0

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {}
    for degree in DEGREES:
        splits = [actions(degree, rank, True) for rank in range(degree)]
        merge = actions(degree, 0, False)
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
    expected = block.attn(x, bias, rotary)
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


def test_paddlenlp_cuts_the_adapter_of_c_attn_elsewhere_than_its_weight(model):
    """The reason why a run with tensor_parallel_degree is refused. When this fails, PaddleNLP has mended it."""
    columns = np.arange(3 * HEADS * 16, dtype="float32")[None]
    name = "transformer.llm.h.0.attn.c_attn"
    adapters = types.SimpleNamespace(lora_split_mapping={name + ".lora_B": True}, model=model)
    config = types.SimpleNamespace(**dict(vars_of(model.config), tensor_parallel_degree=2, tensor_parallel_rank=0))
    ours = type(model)._get_tensor_parallel_mappings(config)[name + ".weight"](columns)
    theirs = LoRAModel._get_tensor_parallel_mappings(adapters, config)[name + ".lora_B"](columns)
    assert ours.shape == theirs.shape and not np.array_equal(ours, theirs)


def vars_of(config):
    names = ("num_attention_heads", "num_hidden_layers", "fuse_attention_ffn")
    return {name: getattr(config, name) for name in names}
