"""Names, shapes and groups of the parameters, computed from a configuration alone.

Nothing is allocated and Paddle is not imported, so that checking a 7B's weights takes milliseconds. Tests compare this
table with the built model and with the public list of 853 names.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List

from paddlemix.checkpoint import WeightsReader
from paddlemix.checkpoint.structure import Shape, differences
from paddlemix.checkpoint.tensors import FLOATS
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.texts import some

# Stored in checkpoints like a parameter, but a constant sin-cos table that is never trained.
CONSTANTS = frozenset({"visual.attn_pool.pos_embed"})

# Parameter groups in data-flow order; the first matching prefix names the group.
GROUPS = (
    ("vit", "visual.vit."),
    ("attn_pool", "visual.attn_pool."),
    ("ln_post and proj", "visual."),
    ("llm embeddings", "transformer.llm.wte."),
    ("llm layers", "transformer.llm."),
    ("lm_head", "lm_head."),
)


def group_of(name: str) -> str:
    """The group of a parameter: its module group, or "lora" for an adapter's matrix."""
    if name.endswith((".lora_A", ".lora_B")):
        return "lora"
    for group, prefix in GROUPS:
        if name.startswith(prefix):
            return group
    raise KeyError(f"{name} belongs to no module of MGen-VL")


def _read(config: Any, key: str, default: Any = None) -> Any:
    if isinstance(config, dict):
        return config.get(key, default)
    return getattr(config, key, default)


def parameter_shapes(config: Any) -> Dict[str, Shape]:
    """Names and shapes of all parameters, in the model's order.

    config: an MGenConfig, or the dict in config.json. Linear weights are [in, out].
    """
    visual = dict(_read(config, "visual"))
    width, layers, output_dim = visual["width"], visual["layers"], visual["output_dim"]
    patch = visual["patch_size"]
    queries = visual.get("n_queries", 256)
    mlp_width = int(width * visual["mlp_ratio"])

    shapes: Dict[str, Shape] = {
        "visual.proj": (output_dim, output_dim),
        # A 16 × 16 grid for every image size: it is interpolated to the patch grid.
        "visual.vit.positional_embedding": (256, width),
        "visual.vit.conv1.weight": (width, 3, patch, patch),
        "visual.vit.ln_pre.weight": (width,),
        "visual.vit.ln_pre.bias": (width,),
    }

    def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> None:
        shapes[name + ".weight"] = (n_in, n_out)
        if bias:
            shapes[name + ".bias"] = (n_out,)

    def norm(name: str, n: int) -> None:
        shapes[name + ".weight"] = (n,)
        shapes[name + ".bias"] = (n,)

    for i in range(layers):
        block = f"visual.vit.transformer.resblocks.{i}"
        norm(block + ".ln_1", width)
        norm(block + ".ln_2", width)
        linear(block + ".attn.in_proj", width, 3 * width)
        linear(block + ".attn.out_proj", width, width)
        linear(block + ".mlp.c_fc", width, mlp_width)
        linear(block + ".mlp.c_proj", mlp_width, width)

    pool = "visual.attn_pool"
    shapes[pool + ".pos_embed"] = (queries, output_dim)
    shapes[pool + ".query"] = (queries, output_dim)
    if width != output_dim:
        linear(pool + ".kv_proj", width, output_dim, bias=False)
    shapes[pool + ".attn.in_proj_weight"] = (output_dim, 3 * output_dim)
    shapes[pool + ".attn.in_proj_bias"] = (3 * output_dim,)
    linear(pool + ".attn.out_proj", output_dim, output_dim)
    norm(pool + ".ln_q", output_dim)
    norm(pool + ".ln_kv", output_dim)
    norm("visual.ln_post", output_dim)

    hidden, vocab = _read(config, "hidden_size"), _read(config, "vocab_size")
    projection = _read(config, "kv_channels") * _read(config, "num_attention_heads")
    inner = _read(config, "intermediate_size") // 2
    bias = not _read(config, "no_bias", True)
    shapes["transformer.llm.wte.weight"] = (vocab, hidden)
    for i in range(_read(config, "num_hidden_layers")):
        block = f"transformer.llm.h.{i}"
        shapes[block + ".ln_1.weight"] = (hidden,)
        linear(block + ".attn.c_attn", hidden, 3 * projection)
        linear(block + ".attn.c_proj", hidden, projection, bias=bias)
        shapes[block + ".ln_2.weight"] = (hidden,)
        linear(block + ".mlp.w1", hidden, inner, bias=bias)
        linear(block + ".mlp.w2", hidden, inner, bias=bias)
        linear(block + ".mlp.c_proj", inner, hidden, bias=bias)
    shapes["transformer.llm.ln_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (hidden, vocab)
    return shapes


def cut_problems(config: Any, cards: int) -> List[str]:
    """Problems that prevent tensor parallelism of a model with this MGenConfig over so many cards."""
    if cards == 1:
        return []
    key = f"tensor_parallel_degree={cards}"
    widths = {
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "the MLP's inner width": config.intermediate_size // 2,
    }
    problems = [f"{key} does not divide {what} ({count})" for what, count in widths.items() if count % cards]
    if not config.no_bias:
        problems.append(f"{key} needs no_bias in config.json: PaddleNLP's split MLP has no biases")
    return problems


def check_weights(reader: WeightsReader, shapes: Dict[str, Shape], where: str, others: bool = False) -> None:
    """Compare stored keys and shapes with the model's. others: whether further keys are allowed.

    Raises:
        WeightsError: lists missing, unexpected, misshapen and integer keys (the first ten of each).
    """
    stored = {name: shape for name, shape in reader.shapes().items() if name in shapes or not others}
    problems = differences(stored, shapes)
    integers = [f"{name} is {reader.info(name).dtype}" for name in stored if reader.info(name).dtype not in FLOATS]
    if integers:
        problems.append(f"{len(integers)} not floating-point: {some(integers)}")
    if problems:
        raise WeightsError(f"the weights in {where} are not this model's: " + "; ".join(problems), "keys")


def count(shapes: Dict[str, Shape]) -> int:
    """Total elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
