"""Floating-point operations of training, counted from the matrices; norms, activations and optimizer are left out."""

from __future__ import annotations

import math
from typing import Any, Dict

from paddlemix.models.mgen_vl.parameters import group_of
from paddlemix.trainer.memory import Trained

# Assumed share of a card's published peak; a published training figure reaches 30 % (docs/performance.md).
FLOPS_SHARE = 0.35


def vit(config: Any) -> float:
    """Forward of one image through the ViT. config: an MGenConfig, here and below."""
    v = config.visual
    width, patches = v["width"], (v["image_size"] // v["patch_size"]) ** 2
    mlp = int(width * v["mlp_ratio"])
    layer = 2 * patches * (4 * width * width + 2 * width * mlp) + 4 * patches * patches * width
    return 2 * patches * 3 * v["patch_size"] ** 2 * width + v["layers"] * layer


def connector(config: Any) -> float:
    """Forward of one image through attn_pool and proj."""
    v = config.visual
    w, D, Q, P = v["width"], v["output_dim"], v["n_queries"], (v["image_size"] // v["patch_size"]) ** 2
    return 2 * P * w * D + 4 * P * D * D + 2 * Q * D * D + 4 * Q * P * D + 4 * Q * D * D


def attention(config: Any, tokens: int, keys: int) -> float:
    """Products of `tokens` queries with `keys` keys and values, in all decoder layers."""
    return tokens * 4 * keys * config.hidden_size * config.num_hidden_layers


def _matrices(trained: Trained) -> Dict[str, int]:
    """Elements of matrices by group, and of those that train as "group trained"."""
    found: Dict[str, int] = {}
    trains = set(trained.trainable)
    for name, shape in trained.shapes.items():
        if len(shape) == 2:
            for key in (group_of(name), *([f"{group_of(name)} trained"] if name in trains else [])):
                found[key] = found.get(key, 0) + math.prod(shape)
    return found


def sample(
    config: Any, trained: Trained, tokens: int, labels: int, recompute: bool = False, images: float = 1
) -> float:
    """Forward and backward of one sample.

    A frozen matrix costs its forward and the gradient of its input; a trained one its own gradient in addition; a ViT
    without trained parameters only its forward.
    """
    size = _matrices(trained)
    products = attention(config, tokens, tokens)
    layers = size["llm layers"]
    total = 2 * tokens * (2 * layers + size.get("llm layers trained", 0)) + 3 * products
    total += recompute * (2 * tokens * layers + products) + 6 * tokens * size.get("lora", 0)
    total += 2 * labels * (2 * size["lm_head"] + size.get("lm_head trained", 0))
    groups = {group_of(name) for name in trained.trainable}
    of_vit = 3 + recompute if "vit" in groups else 1
    of_connector = 3 if groups & {"vit", "attn_pool", "ln_post and proj"} else 1
    return total + images * (of_vit * vit(config) + of_connector * connector(config))
