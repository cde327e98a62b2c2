"""Scaled dot-product attention, shared by the ViT, the connector and the decoder.

Shapes: B batch, H heads, T queries, S keys, d head width.
"""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.utils.compat import autocast_dtype, cast, full_precision, layer_norm, linear, softmax_, widened

# float16 scores are divided by this factor, and multiplied by it in float32 (PaddleNLP uses 32, too).
GUARD = 32.0


def spread(tensor, shape):
    """`tensor`, expanded to `shape` on the CPU; unchanged on a GPU, where operators broadcast it.

    Paddle's CPU kernels take 10 to 70 times as long with operands of different shapes (scores [8, 4, 300, 300] plus a
    bias shared by all heads: 31 ms instead of 0.5); on a GPU broadcasting is free.
    """
    if not tensor.place.is_cpu_place() or tensor.shape == shape:
        return tensor
    return tensor.tile([size // part for size, part in zip(shape, tensor.shape)])


def call(layer, *args):
    """layer(*args), faster: without hooks, a Linear or LayerNorm is called as its operator, others by their forward.
    The Python code in between takes as long as the launch."""
    if layer._forward_pre_hooks or layer._forward_post_hooks:
        return layer(*args)
    parameters = layer._parameters  # attribute lookup on a layer takes 0.5 µs
    if type(layer) is nn.Linear:
        return linear(*args, parameters["weight"], parameters.get("bias"))
    if type(layer) is nn.LayerNorm:
        return layer_norm(*args, parameters["weight"], parameters["bias"], layer._epsilon)
    return layer.forward(*args)


def compute_dtype(tensor):
    """The dtype in which matmuls of `tensor` compute: autocast's if it is on, else the tensor's own."""
    half = autocast_dtype()
    return tensor.dtype if half is None else getattr(paddle, half)


def fused_bias(bias, dtype):
    """`bias` in `dtype`, clipped: -1e30 would be -inf in float16."""
    return bias if bias.dtype == dtype else bias.clip(min=float(paddle.finfo(dtype).min)).astype(dtype)


def score_scale(width, dtype):
    """The factor on queries of `width` for scores computed in `dtype`; float16 scores are smaller by GUARD.

    float16 ends at 65504: with GUARD, scores up to 2 million fit. It is a power of two, so that only values close to
    zero are rounded.
    """
    return 1.0 / (math.sqrt(width) * (GUARD if dtype == paddle.float16 else 1.0))


def attend(query, key, value, bias=None, dropout=0.0, training=False, use_flash=False, scaled=False):
    """softmax(q kᵀ / √d + bias) v ("Attention Is All You Need", §3.2.1), softmax in float32.

    query [B, H, T, d]; key, value [B, H, S, d], contiguous; bias broadcast to [B, H, T, S], or None.
    use_flash: Paddle's fused kernel, which does not store the [T, S] scores. scaled: query was already multiplied by
    score_scale (except for the fused kernel). Returns [B, T, H × d].
    """
    B, H, T, d = query.shape
    dtype = compute_dtype(query)
    if use_flash:
        # The kernel needs [B, T, H, d], one half dtype for all inputs and a bias for every row. Paddle 2.6 has it on no
        # autocast list, and Paddle 3 silently falls back to plain matmuls if the dtypes differ.
        with full_precision():
            query, key, value = (x.transpose([0, 2, 1, 3]).astype(dtype) for x in (query, key, value))
            if bias is not None:
                bias = fused_bias(bias, dtype).expand([B, -1, -1, -1])
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=dropout, training=training
            )
        return out.reshape([B, T, H * d])
    if not scaled:
        query = query * score_scale(d, dtype)
    scores = widened(paddle.matmul(query, key, transpose_y=True))
    with full_precision():
        if dtype == paddle.float16:
            scores = scores * GUARD
        if bias is not None:
            scores = scores + bias
        # In place: the scores are the largest tensor (2 GB in the ViT for 32 images).
        weights = cast(softmax_(scores), value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout, training=training)
    out = paddle.matmul(weights, value)
    return (out.transpose([0, 2, 1, 3]) if T > 1 else out).reshape([B, T, H * d])


def attend_within(query, key, value, segments, **options):
    """attend within each segment of a row.

    query, key, value [B, H, T, d]. segments: a list per row of consecutive (length, bias) from the row's start, bias as
    in attend for `length` tokens; positions after the last segment get 0. options: as attend. Returns [B, T, H × d].

    Scores between segments are not computed: a row of 2048 tokens in 6 samples costs a sixth of one long sample, and
    each sample uses the same kernel, fused or not, as on its own.
    """
    B, H, T, d = query.shape
    rows = []
    # Split, not sliced: the gradient of a slice is as large as the full tensor.
    by_row = [paddle.split(x, B, axis=0) if B > 1 else [x] for x in (query, key, value)]
    for parts, *row in zip(segments, *by_row):
        lengths = [length for length, _ in parts]
        rest = T - sum(lengths)
        own = [paddle.split(x, lengths + [rest] * (rest > 0), axis=2) for x in row]
        pieces = [attend(*qkv, bias, **options) for (_, bias), *qkv in zip(parts, *own)]
        if rest:
            pieces.append(paddle.zeros([1, rest, H * d], pieces[0].dtype if pieces else value.dtype))
        rows.append(paddle.concat(pieces, axis=1))
    return paddle.concat(rows) if B > 1 else rows[0]
