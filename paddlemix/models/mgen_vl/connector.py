"""attn_pool: a one-layer cross-attention resampler with learned queries (Qwen-VL, arXiv 2308.12966, §2.1).

Shapes: N images, P patches, w ViT width, Q queries, D output_dim, H heads.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from einops import rearrange
from paddle import nn

from paddlemix.models.mgen_vl.attention import attend
from paddlemix.models.mgen_vl.config_values import RESAMPLER_HEAD_DIM
from paddlemix.utils.compat import full_precision, keep_from_decorate

# Epsilon of all LayerNorms in the visual part.
EPSILON = 1e-6


def resize_positions(table, count):
    """Interpolate a square grid of position vectors bicubically to another size: [L, c] → [count, c].

    Computes in float32 and returns the table's dtype. L and count are squares.
    """
    length, channels = table.shape
    if length == count:
        return table
    source, target = math.isqrt(length), math.isqrt(count)
    grid = rearrange(table.astype("float32"), "(y x) c -> 1 c y x", y=source)
    with full_precision():
        grid = F.interpolate(grid, size=[target, target], mode="bicubic", align_corners=False)
    return rearrange(grid, "1 c y x -> (y x) c").astype(table.dtype)


def sincos_positions(channels: int, side: int) -> np.ndarray:
    """2-d sin-cos table of MAE (He et al. 2021): float32 [side², channels].

    The first half of the channels has the column's sines and cosines, the second half the row's.
    """
    omega = 10000.0 ** (-np.arange(channels // 4, dtype=np.float64) / (channels / 4))

    def encode(position):
        angle = np.outer(position.reshape(-1), omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class CrossAttention(nn.Layer):
    """Multi-head attention with a joint [q; k; v] projection, with the names of the public checkpoints."""

    def __init__(self, dim):
        super().__init__()
        self.heads = dim // RESAMPLER_HEAD_DIM
        self.in_proj_weight = self.create_parameter([dim, 3 * dim])
        self.in_proj_bias = self.create_parameter([3 * dim], is_bias=True)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query, key, value, use_flash=False):
        """query [1 or N, Q, D]; key, value [N, P, D] → [N, Q, D]."""
        weights = paddle.split(self.in_proj_weight, 3, axis=1)
        biases = paddle.split(self.in_proj_bias, 3)

        def project(x, weight, bias):
            x = F.linear(x, weight, bias)
            return rearrange(x, "n p (h d) -> n h p d", h=self.heads)

        query, key, value = (project(x, *wb) for x, wb in zip((query, key, value), zip(weights, biases)))
        # The queries are shared by all images, so they are projected once.
        query = query.expand([key.shape[0], -1, -1, -1])
        return self.out_proj(attend(query, key, value, use_flash=use_flash))


class AttentionPool(nn.Layer):
    """Q learned queries attend to P patch features: [N, P, w] → [N, Q, D].

    `pos_embed` is a constant, stored in checkpoints and never trained. It is added to the queries and, interpolated to
    the patch grid, to the keys, not to the values.
    """

    def __init__(self, output_dim, width, n_queries):
        super().__init__()
        self.register_buffer(
            "pos_embed", paddle.to_tensor(sincos_positions(output_dim, math.isqrt(n_queries))), persistable=True
        )
        # The table stays float32 in a bfloat16 model; the query parameter has the dtype it trains in.
        keep_from_decorate(self)
        self.query = self.create_parameter([n_queries, output_dim], default_initializer=nn.initializer.Normal(std=0.02))
        self.kv_proj = nn.Linear(width, output_dim, bias_attr=False) if width != output_dim else nn.Identity()
        self.attn = CrossAttention(output_dim)
        self.ln_q = nn.LayerNorm(output_dim, epsilon=EPSILON)
        self.ln_kv = nn.LayerNorm(output_dim, epsilon=EPSILON)

    def forward(self, x, use_flash=False):
        x = self.ln_kv(self.kv_proj(x))
        positions = self.pos_embed.astype(x.dtype)
        query = self.ln_q(self.query) + positions
        key = x + resize_positions(positions, x.shape[1])
        return self.attn(query.unsqueeze(0), key, x, use_flash)
