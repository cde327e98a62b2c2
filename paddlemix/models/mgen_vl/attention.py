"""Scaled dot-product attention, in the one form that the ViT, the connector and the decoder share.

Shapes: B batch, H heads, T queries, S keys, d head width.
"""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.utils.compat import autocast_dtype, cast, full_precision, layer_norm, linear, softmax_

# float16 scores are computed smaller by this factor, and float32 ones multiplied by it (PaddleNLP takes 32, too).
GUARD = 32.0


def spread(tensor, shape):
    """`tensor`, broadcast to `shape` by whoever adds it or multiplies with it; on the CPU already here, once.

    Paddle's CPU kernels take 10 to 70 times as long with operands of different shapes (scores [8, 4, 300, 300] plus a
    bias for all heads: 31 ms against 0.5); a GPU broadcasts for nothing.
    """
    if not tensor.place.is_cpu_place() or tensor.shape == shape:
        return tensor
    return tensor.tile([whole // part for whole, part in zip(shape, tensor.shape)])


def call(layer, *args):
    """layer(*args). Without hooks a Linear and a LayerNorm are their operator alone, others their forward: the Python
    around them takes as long as the launch."""
    if layer._forward_pre_hooks or layer._forward_post_hooks:
        return layer(*args)
    parameters = layer._parameters  # an attribute of a layer takes 0.5 µs to find
    if type(layer) is nn.Linear:
        return linear(*args, parameters["weight"], parameters.get("bias"))
    if type(layer) is nn.LayerNorm:
        return layer_norm(*args, parameters["weight"], parameters["bias"], layer._epsilon)
    return layer.forward(*args)


def compute_dtype(tensor):
    """The dtype in which matmuls of `tensor` compute: autocast's while it is on, else the tensor's own."""
    half = autocast_dtype()
    return tensor.dtype if half is None else getattr(paddle, half)


def fused_bias(bias, dtype):
    """`bias` in `dtype`, where a float32 -1e30 would be -inf in float16."""
    return bias if bias.dtype == dtype else bias.clip(min=float(paddle.finfo(dtype).min)).astype(dtype)


def score_scale(width, dtype):
    """What queries of `width` are multiplied with for scores computed in `dtype`. Those in float16 are GUARD too small.

    float16 ends at 65504: with the guard, scores up to 2 million pass. It is a power of two, so nothing is rounded but
    what is next to zero.
    """
    return 1.0 / (math.sqrt(width) * (GUARD if dtype == paddle.float16 else 1.0))


def attend(query, key, value, bias=None, dropout=0.0, training=False, use_flash=False, scaled=False):
    """softmax(q kᵀ / √d + bias) v ("Attention Is All You Need", §3.2.1), softmax in float32.

    query [B, H, T, d]; key, value [B, H, S, d], contiguous; bias broadcast to [B, H, T, S], or None.
    use_flash: Paddle's fused kernel, which never holds the [T, S] scores. scaled: query is multiplied by score_scale
    already, unless the kernel is fused. Returns [B, T, H × d].
    """
    B, H, T, d = query.shape
    dtype = compute_dtype(query)
    if use_flash:
        # The kernel wants [B, T, H, d], one half dtype for all inputs and a bias for every row. Autocast knows it on no
        # list of Paddle 2.6, and 3 takes the plain form, without a word, when the dtypes differ.
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
    scores = paddle.matmul(query, key, transpose_y=True).astype("float32")
    with full_precision():
        if dtype == paddle.float16:
            scores = scores * GUARD
        if bias is not None:
            scores = scores + bias
        # In place: the scores are the largest tensor there is (a ViT's of 32 images: 2 GB), and nobody else's.
        weights = cast(softmax_(scores), value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout, training=training)
    out = paddle.matmul(weights, value)
    return (out.transpose([0, 2, 1, 3]) if T > 1 else out).reshape([B, T, H * d])


def attend_within(query, key, value, segments, **options):
    """attend, in each segment of a row by itself.

    query, key, value [B, H, T, d]. segments: a list per row of (length, bias), one behind the other from the row's
    begin, bias as attend takes it for `length` tokens; what is behind the last one gets 0. options: as attend.
    Returns [B, T, H × d].

    Scores between segments are never computed: a row of 2048 tokens in 6 samples costs a sixth of one long sample,
    and each goes through the same kernel, fused or not, as it does alone.
    """
    B, H, T, d = query.shape
    rows = []
    # Split, not sliced: the gradient of a slice is as large as the whole.
    whole = [paddle.split(x, B, axis=0) if B > 1 else [x] for x in (query, key, value)]
    for parts, *row in zip(segments, *whole):
        lengths = [length for length, _ in parts]
        behind = T - sum(lengths)
        own = [paddle.split(x, lengths + [behind] * (behind > 0), axis=2) for x in row]
        pieces = [attend(*qkv, bias, **options) for (_, bias), *qkv in zip(parts, *own)]
        if behind:
            pieces.append(paddle.zeros([1, behind, H * d], pieces[0].dtype if pieces else value.dtype))
        rows.append(paddle.concat(pieces, axis=1))
    return paddle.concat(rows) if B > 1 else rows[0]
