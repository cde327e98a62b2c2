"""The image encoder: OpenCLIP's ViT (Dosovitskiy et al. 2020) without a class token, and the tower around it.

Shapes: N images, S image side in pixels, P patches, w width, H heads, Q queries, D output_dim.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from einops import rearrange
from paddle import nn

from paddlemix.models.mgen_vl.attention import attend, call
from paddlemix.models.mgen_vl.connector import EPSILON, AttentionPool, resize_positions

# Rows of the position table: a 16 × 16 grid for every image size.
POSITIONS = 256


class VisualAttention(nn.Layer):
    """Self-attention with a fused projection, laid out by head: [head][q, k, v][head width]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, use_flash=False):
        """[N, P, w] → [N, P, w]."""
        layers = self._sub_layers
        N, P, _ = x.shape
        mixed = call(layers["in_proj"], x).reshape([N, P, self.heads, 3, -1])
        query, key, value = mixed.transpose([3, 0, 2, 1, 4]).unbind(0)
        return call(layers["out_proj"], attend(query, key, value, use_flash=use_flash))


class VisualMLP(nn.Layer):
    def __init__(self, width, mlp_width):
        super().__init__()
        self.c_fc = nn.Linear(width, mlp_width)
        self.c_proj = nn.Linear(mlp_width, width)

    def forward(self, x):
        layers = self._sub_layers
        return call(layers["c_proj"], F.gelu(call(layers["c_fc"], x)))


class VisualBlock(nn.Layer):
    """Pre-norm transformer block: [N, P, w] → [N, P, w]."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, epsilon=EPSILON)
        self.ln_2 = nn.LayerNorm(width, epsilon=EPSILON)
        self.attn = VisualAttention(width, heads)
        self.mlp = VisualMLP(width, mlp_width)

    def forward(self, x, use_flash=False):
        layers = self._sub_layers
        x = x + call(layers["attn"], call(layers["ln_1"], x), use_flash)
        return x + call(layers["mlp"], call(layers["ln_2"], x))


class VisualTransformer(nn.Layer):
    """The stack of blocks. With `recompute_enable()` on the model, activations are recomputed in the backward."""

    def __init__(self, width, layers, heads, mlp_width):
        super().__init__()
        self.enable_recompute = False
        self.resblocks = nn.LayerList([VisualBlock(width, heads, mlp_width) for _ in range(layers)])

    def forward(self, x, use_flash=False):
        for block in self.resblocks:
            if self.enable_recompute and self.training and not x.stop_gradient:
                x = paddle.distributed.fleet.utils.recompute(block, x, use_flash)
            else:
                x = call(block, x, use_flash)
        return x


class VisionTransformer(nn.Layer):
    """Pixels to patch features: [N, 3, S, S] → [N, P, w]."""

    def __init__(self, visual):
        super().__init__()
        width = visual["width"]
        self.grid = visual["image_size"] // visual["patch_size"]
        self.conv1 = nn.Conv2D(3, width, visual["patch_size"], stride=visual["patch_size"], bias_attr=False)
        self.positional_embedding = self.create_parameter(
            [POSITIONS, width], default_initializer=nn.initializer.Normal(std=width**-0.5)
        )
        self.ln_pre = nn.LayerNorm(width, epsilon=EPSILON)
        self.transformer = VisualTransformer(
            width, visual["layers"], visual["heads"], int(width * visual["mlp_ratio"])
        )

    def forward(self, pixel_values, use_flash=False):
        patches = rearrange(self.conv1(pixel_values), "n w y x -> n (y x) w")
        x = patches + resize_positions(self.positional_embedding, self.grid**2)
        return self.transformer(self.ln_pre(x), use_flash)


class Vision(nn.Layer):
    """The visual part: ViT, attn_pool, ln_post, proj.

    visual: config.json's `visual` object. Everything before the first trained parameter builds no gradient graph.
    """

    def __init__(self, visual, use_flash_attention=False):
        super().__init__()
        self.image_size = visual["image_size"]
        self.use_flash_attention = use_flash_attention
        output_dim = visual["output_dim"]
        self.proj = self.create_parameter(
            [output_dim, output_dim], default_initializer=nn.initializer.Normal(std=output_dim**-0.5)
        )
        self.vit = VisionTransformer(visual)
        self.attn_pool = AttentionPool(output_dim, visual["width"], visual["n_queries"])
        self.ln_post = nn.LayerNorm(output_dim, epsilon=EPSILON)

    def forward(self, pixel_values):
        """pixel_values: [N, 3, S, S], normalised (processors.images). Returns [N, Q, D].

        Raises:
            ValueError: the pixel values are not [N, 3, S, S] of the configured size.
        """
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1:] != [3, self.image_size, self.image_size]:
            raise ValueError(f"images must be [N, 3, {self.image_size}, {self.image_size}], not {shape}")
        x = self.vit(pixel_values.astype(self.proj.dtype), self.use_flash_attention)
        pooled = self.attn_pool(x, self.use_flash_attention)
        return paddle.matmul(self.ln_post(pooled), self.proj)
