"""Memory of a training step on one card, by component, computed from shapes alone. docs/memory.md explains each term.

Activations are counted from the layers' code (language.py, vision.py, connector.py, PaddleNLP's LoRALinear): what each
operation saves for its gradient. benchmarks/memory_estimate.py compares the sum with measured peaks in float32 on the
CPU, tests/half_precision/test_memory.py the layers with what autograd saves in half precision; neither those nor
several cards were measured on a GPU. Pure Python: nothing is allocated and Paddle is not imported.

Shapes: B rows, T tokens, N = B × T, n images, P patches, Q queries, D hidden, F inner width of the MLP, H heads,
V vocabulary, w ViT width, m ViT MLP width, r LoRA rank.
"""

from __future__ import annotations

import math
import re
from typing import Any, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple

from paddlemix.models.mgen_vl.config_values import RESAMPLER_HEAD_DIM
from paddlemix.models.mgen_vl.parameters import CONSTANTS

GPU_ALLOWANCE = 1 << 30

Shapes = Dict[str, Tuple[int, ...]]


class Setting(NamedTuple):
    """How a step runs.

    precision: "float32", "O1" (float32 weights, half-precision products) or "O2" (half-precision weights). gpu: on a
    GPU some operations are fused and masks need not be expanded. paddle_3: Paddle 3 fuses SwiGLU on a GPU, and its
    autocast treats a Linear with its bias as one operation; 2.6 does neither. recompute, flash: the keys recompute and
    use_flash_attention. tensor: degree of tensor parallelism. sharding: cards that share optimizer states (stage 1) and
    gradients (stage 2). clip: gradients are clipped by norm. master_grad: O2 with float32 gradients.
    """

    precision: str = "float32"
    gpu: bool = False
    paddle_3: bool = True
    recompute: bool = False
    flash: bool = False
    lora_dropout: float = 0.0
    clip: bool = True
    master_grad: bool = False
    tensor: int = 1
    sharding: int = 1
    stage: int = 1

    @property
    def weight_bytes(self) -> int:
        return 2 if self.precision == "O2" else 4


class Batch(NamedTuple):
    """A card's batch: rows, tokens per row (padded), images and labelled positions.

    packed: for packed samples, the sum of their squared lengths over all rows, and the longest length; attention stays
    within a sample.
    """

    rows: int
    tokens: int
    images: int
    labels: int
    packed: Optional[Tuple[int, int]] = None

    @property
    def pairs(self) -> int:
        """Query-key pairs per head."""
        return self.rows * self.tokens**2 if self.packed is None else self.packed[0]

    @property
    def masked(self) -> int:
        """Elements of the attention mask, which all heads share."""
        return self.rows * self.tokens**2 if self.packed is None else self.packed[1] ** 2


class Trained(NamedTuple):
    """shapes: of all parameters, base and adapters; trainable: names of those that train."""

    shapes: Shapes
    trainable: Sequence[str]


class Estimate(NamedTuple):
    """Bytes on one card.

    held: kept from step to step (weights, gradients, optimizer states). stored: saved by the forward for the backward,
    by component. working: the largest temporary memory on top of both. vision: needed by the ViT's forward before
    anything else is stored. clipped: the second set of gradients that clipping makes, when activations are already
    freed. allowance: for a GPU's driver and libraries.
    """

    held: Dict[str, int]
    stored: Dict[str, int]
    working: int
    vision: int
    clipped: int
    allowance: int

    @property
    def peak(self) -> int:
        step = sum(self.stored.values()) + self.working
        return sum(self.held.values()) + max(step, self.vision, self.clipped) + self.allowance

    def rows(self) -> Dict[str, int]:
        """Bytes by the name under which the dry run shows them."""
        return {
            **self.held,
            **self.stored,
            "working memory (backward pass)": self.working,
            "(then: clipping of the gradients)": self.clipped,
            "driver and libraries (allowance)": self.allowance,
            "peak": self.peak,
        }


# ---- parameters and optimizer states

_COLUMNS = re.compile(r".*(attn\.c_attn|mlp\.w1|mlp\.w2|lm_head)\.(weight|bias|lora_B)")
_ROWS = re.compile(r".*(attn\.c_proj|h\.\d+\.mlp\.c_proj|wte)\.(weight|lora_A)")


def share(name: str, tensor: int) -> int:
    """Into how many pieces tensor parallelism of this degree splits a parameter; 1: it is replicated."""
    if tensor == 1 or name.startswith("visual."):
        return 1
    return tensor if _COLUMNS.fullmatch(name) or _ROWS.fullmatch(name) else 1


def elements(shapes: Shapes, names: Iterable[str], tensor: int = 1) -> int:
    """Elements on one card."""
    return sum(math.prod(shapes[name]) // share(name, tensor) for name in names)


def checkpoint_bytes(trained: Trained, setting: Setting, saved: Iterable[str]) -> Tuple[int, int]:
    """(bytes of the saved weights, bytes of the optimizer states in a checkpoint)."""
    per_element = 12 if setting.precision == "O2" else 8
    states = elements(trained.shapes, trained.trainable) * per_element
    return elements(trained.shapes, saved) * setting.weight_bytes, states


def _held(trained: Trained, setting: Setting) -> Dict[str, int]:
    weight = setting.weight_bytes
    count = elements(trained.shapes, trained.shapes, setting.tensor)
    trains = elements(trained.shapes, trained.trainable, setting.tensor)
    gradient = 4 if setting.master_grad else weight
    held = {
        "weights": count * weight,
        "gradients": trains * gradient // (setting.sharding if setting.stage == 2 else 1),
        "optimizer moments": trains * 8 // setting.sharding,
    }
    if setting.precision == "O2":
        held["master weights"] = trains * 4 // setting.sharding
    return held


# ---- activations: bytes saved for the backward


def _first_layer(names: Iterable[str], prefix: str, before: Sequence[str], layers: int) -> int:
    """The first layer of a stack that gradients reach; `layers` if none. before: prefixes of what precedes it."""
    first = layers
    for name in names:
        if any(name.startswith(one) for one in before):
            return 0
        if name.startswith(prefix):
            first = min(first, int(name[len(prefix) :].split(".")[0]))
    return first


def _copies(shapes: Shapes, prefix: str, setting: Setting) -> int:
    """Bytes of the half-precision copies of matrices that autocast makes and the backward needs."""
    if setting.precision != "O1":
        return 0
    return 2 * elements(shapes, [n for n in shapes if n.startswith(prefix) and len(shapes[n]) == 2], setting.tensor)


class _Counts(NamedTuple):
    """Bytes of one layer: kept for its backward, and the temporary memory while its backward runs."""

    kept: int
    working: int


def _adapters(shapes: Shapes, block: str, N: int, setting: Setting) -> int:
    """Bytes that the adapters in `block` save: x·A, and with dropout its mask and the dropped input.

    O1 without dropout: a copy of x where that is float32.
    """
    half = setting.precision != "float32"
    total = 0
    for name, shape in shapes.items():
        if name.startswith(block) and name.endswith(".lora_A"):
            width = shape[0] // share(name, setting.tensor)
            total += N * shape[1] * (2 if half else 4)
            if setting.lora_dropout:
                total += N * width * (3 if half else 5)
            elif setting.precision == "O1" and not name.endswith("c_proj.lora_A"):
                total += N * width * 2
    return total


def _decoder_layer(config: Any, shapes: Shapes, layer: int, batch: Batch, setting: Setting) -> _Counts:
    D, F = config.hidden_size, config.intermediate_size // 2 // setting.tensor
    N, H = batch.rows * batch.tokens, config.num_attention_heads // setting.tensor
    A = D // setting.tensor  # width of this card's heads
    act = 4 if setting.precision == "float32" else 2
    wide = 4 if setting.precision != "O2" else 2  # residual stream
    # Both RMSNorms: the residual stream in float32 (at O2 a copy), the normalised x and its product with the weight.
    # O1: these are float32, and c_attn, w1 and w2 keep a half copy each instead of the product.
    norms = {"float32": 24, "O1": 22, "O2": 16}[setting.precision]
    # Queries, keys and values before the rotation, 3 A: float32 at O1, where both of their products keep a copy if
    # c_attn's result is half. After it, and the result: A each.
    turned = {"float32": 12, "O1": 24 if setting.paddle_3 else 12, "O2": 6}[setting.precision]
    heads = N * A * (turned + 4 * act)
    # Softmax in float32, and its copy in half precision.
    scores = batch.pairs * H * (4 if act == 4 else 6)
    if setting.flash:
        # No scores; the mask in the queries' dtype, log-sums in float32.
        scores = batch.masked * act + N * H * 4
    # w1, w2, their product, and silu where SwiGLU is not fused.
    mlp = N * F * act * (3 if setting.gpu and setting.paddle_3 else 4)
    kept = N * D * norms + heads + scores + mlp
    block = f"transformer.llm.h.{layer}."
    kept += _adapters(shapes, block, N, setting) + _copies(shapes, block, setting)
    in_mlp = N * F * act * 2 + N * D * wide
    in_attention = 2 * (0 if setting.flash else batch.pairs * H * 4) + 4 * N * A * act + N * D * wide
    in_attention -= mlp + N * D * norms // 2  # freed before the attention's backward
    return _Counts(kept, max(in_mlp, in_attention))


def _vision_layer(visual: Dict[str, Any], shapes: Shapes, images: int, setting: Setting) -> _Counts:
    w, P = visual["width"], (visual["image_size"] // visual["patch_size"]) ** 2
    m = int(w * visual["mlp_ratio"])
    act = 2 if setting.precision != "float32" else 4
    wide = 2 if setting.precision == "O2" else 4
    x = images * P * w
    scores = images * visual["heads"] * P * P * (4 if act == 4 else 6)
    if setting.flash:
        scores = images * visual["heads"] * P * 4
    # Two norms' inputs and outputs, scaled queries, keys, values, result; both sides of the GELU, whose input is
    # float32 at O1 where the bias is a separate addition.
    gelu = act + (4 if setting.precision == "O1" and not setting.paddle_3 else act)
    kept = x * (2 * wide + 2 * act + 4 * act) + scores + images * P * m * gelu
    kept += _copies(shapes, "visual.vit.transformer.resblocks.0.", setting)
    return _Counts(kept, images * P * m * act + x * wide)


def _connector(config: Any, shapes: Shapes, batch: Batch, setting: Setting) -> int:
    visual = config.visual
    n, D, w, Q = batch.images, visual["output_dim"], visual["width"], visual["n_queries"]
    P = (visual["image_size"] // visual["patch_size"]) ** 2
    act = 2 if setting.precision != "float32" else 4
    # The ViT's output; input and output of ln_kv, keys with positions, projected keys and values; scaled queries,
    # result, input and output of ln_post; once, the queries and the three parts of in_proj_weight. O1: the norms'
    # inputs in float32.
    wide = 2 if setting.precision == "O1" else 0
    kept = n * P * w * act + n * P * D * (5 * act + wide) + n * Q * D * (4 * act + wide) + (Q + 3 * D) * D * act
    for name in ("visual.attn_pool.kv_proj.", "visual.attn_pool.attn.out_proj.", "visual.proj"):
        kept += _copies(shapes, name, setting)
    heads = D // RESAMPLER_HEAD_DIM
    if not setting.flash:
        kept += n * heads * Q * P * (4 if act == 4 else 6)
    return kept


def estimate(config: Any, trained: Trained, batch: Batch, setting: Setting) -> Estimate:
    """The memory of a training step on one card. config: an MGenConfig."""
    shapes = trained.shapes
    trainable = [name for name in trained.trainable if name not in CONSTANTS]
    visual, D, V = config.visual, config.hidden_size, config.vocab_size // setting.tensor
    n = batch.images
    N, layers = batch.rows * batch.tokens, config.num_hidden_layers
    half = setting.precision != "float32"
    act = 2 if half else 4
    wide = 2 if setting.precision == "O2" else 4

    stored: Dict[str, int] = {}
    working = [0]
    # Vision. Gradients reach back to the first part that trains.
    blocks = "visual.vit.transformer.resblocks."
    in_front = ("visual.vit.conv1", "visual.vit.ln_pre", "visual.vit.positional")
    first = _first_layer(trainable, blocks, in_front, visual["layers"]) if n else visual["layers"]
    layer = _vision_layer(visual, shapes, n, setting)
    P = (visual["image_size"] // visual["patch_size"]) ** 2
    vision_trains = n > 0 and any(name.startswith("visual.") for name in trainable)
    stored["images"] = n * 3 * visual["image_size"] ** 2 * 4
    with_graph = visual["layers"] - first
    if with_graph:
        if setting.recompute:
            stored["vision activations"] = with_graph * n * P * visual["width"] * wide
            working.append(layer.kept + layer.working)
        else:
            stored["vision activations"] = with_graph * layer.kept
    if vision_trains:
        stored["connector activations"] = _connector(config, shapes, batch, setting)

    # Decoder.
    embeds = vision_trains or "transformer.llm.wte.weight" in trainable
    first = 0 if embeds else _first_layer(trainable, "transformer.llm.h.", (), layers)
    counts = [_decoder_layer(config, shapes, i, batch, setting) for i in range(first, layers)]
    if counts:
        kept = sum(one.kept for one in counts)
        stored["decoder activations"] = kept
        if setting.recompute:
            # The first block whose input has no gradient is not recomputed.
            first_kept = 0 if embeds else counts[0].kept
            stored["decoder activations"] = first_kept + (len(counts) - (not embeds)) * N * D * wide
            working.append(counts[-1].kept + counts[-1].working)
        else:
            working.append(max(one.working for one in counts))
    # Masks and rotary tables (for queries, keys, values), shared by all layers; on the CPU expanded to full shape.
    H = config.num_attention_heads // setting.tensor
    if setting.gpu:
        stored["masks and tables"] = batch.masked * 4 + 6 * N * config.kv_channels * wide
    else:
        stored["masks and tables"] = batch.masked * H * 4 + 6 * N * D * wide
    # Final norm, hidden states of labelled positions, and their logits: the float32 softmax, and its gradient on top.
    stored["logits and loss"] = N * D * (8 if not half else 6) + batch.labels * D * act + batch.labels * V * 4
    stored["logits and loss"] += _copies(shapes, "lm_head.", setting)
    working.append(batch.labels * V * (4 if not half else 6))

    held = _held(trained, setting)
    clipped = held["gradients"] if setting.clip else 0
    in_vision = stored["images"] + stored.get("vision activations", 0) + (layer.kept + layer.working if n else 0)
    return Estimate(held, stored, max(working), in_vision, clipped, GPU_ALLOWANCE if setting.gpu else 0)
