"""The decoder: parameters and tensor-parallel layout come from PaddleNLP's QWen layers, the forward is our own.

PaddleNLP's forward attends over a strided cache that it copies at every step, derives rotary positions from the cache
length, and stores a log-n table per layer. Here the cache is contiguous and preallocated, positions are explicit, and
rotary and log-n factors are computed once per forward.

Shapes: B batch, T new tokens, L tokens before them in the cache, S cache capacity, D hidden, H heads, d head width.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import paddle
from paddle import nn
from paddlenlp.transformers.qwen.modeling import QWenAttention, QWenMLP, QWenPretrainedModel, QWenRMSNorm

from paddlemix.models.mgen_vl.attention import (
    attend,
    attend_within,
    call,
    compute_dtype,
    fused_bias,
    score_scale,
    spread,
)
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.utils.compat import cast, full_precision, fused_rms_norm, norm_is_fused, over_rms, swiglu, widened

# A masked score. Finite, so that fully masked rows (padding) give numbers instead of NaN.
MASKED = -1e30


def position_ids_from_mask(attention_mask):
    """Positions that count only real tokens: int64 [B, T] from a 0/1 mask [B, T]; padding is at 0."""
    return (attention_mask.astype("int64").cumsum(-1) - 1).clip(min=0)


def ntk_alpha(length: int, seq_length: int) -> int:
    """The factor on the rotary base for a context of `length` tokens: 1 up to seq_length, then 3, 7, …

    Dynamic NTK scaling as in the public Qwen code.
    """
    if length <= seq_length:
        return 1
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


@functools.lru_cache(maxsize=16)
def frequencies(dim: int, base: float, alphas, place: str):
    """Rotary frequencies, float32 [len(alphas), 1, dim / 2], kept: copying them to a GPU waits for all its kernels."""
    bases = [base * alpha ** (dim / (dim - 2)) for alpha in alphas]
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    values = np.stack([1.0 / np.power(np.float32(b), exponents) for b in bases]).astype(np.float32)
    return paddle.to_tensor(values).unsqueeze(1)


def rotary_factors(position_ids, dim: int, base: float, alphas):
    """cos and sin of RoFormer's angles (Su et al. 2021), in float32.

    position_ids: int64 [B, T]; alphas: one NTK factor per row, a list of B or of 1. Returns two [B, 1, T, dim], for
    rotate: the sine of the second half is negated.
    """
    kept = frequencies(dim, base, tuple(alphas), str(position_ids.place))
    angles = position_ids.astype("float32").unsqueeze(-1) * kept
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return paddle.concat([cos, cos], axis=-1), paddle.concat([sin, -sin], axis=-1)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + d/2]) by its angle (NeoX style): x […, d]; cos, sin: from rotary_factors."""
    return x * cos + paddle.roll(x * sin, x.shape[-1] // 2, axis=-1)


def attention_factors(cos, sin, query_scale):
    """Combined factors that rotate queries and keys, scale queries and keep values: two [3, B, 1, T, dim].

    cos, sin: from rotary_factors. query_scale: a number, or [B, 1, T, 1].
    """
    return (
        paddle.stack([cos * query_scale, cos, paddle.ones_like(cos)]),
        paddle.stack([sin * query_scale, sin, paddle.zeros_like(sin)]),
    )


class KVCache:
    """Keys and values of the tokens so far: a contiguous [B, H, S, d] buffer of each per layer.

    Capacity grows in blocks, so that a step only writes one position in place.

    length: positions written. alphas: the NTK factors of the cached keys (fixed at prefill). mask: the prompt's, 0/1
    [B, T], None if nothing is masked; later tokens are never masked.
    """

    BLOCK = 128

    def __init__(self):
        self.keys, self.values = [], []
        self.length = 0
        self.alphas = self.mask = None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def reserve(self, length: int) -> None:
        """Grow the capacity to at least `length` positions."""
        missing = length - self.capacity
        if self.keys and missing > 0:
            missing += -missing % self.BLOCK
            for buffers in (self.keys, self.values):
                for i, buffer in enumerate(buffers):
                    B, H, _, d = buffer.shape
                    buffers[i] = paddle.concat([buffer, paddle.zeros([B, H, missing, d], buffer.dtype)], axis=2)

    def append(self, layer: int, key, value):
        """Append [B, H, T, d] to the cached positions of `layer` and return the keys and values to attend over.

        These are the arguments themselves at prefill, the full buffers afterwards (unused positions are masked).
        """
        T = key.shape[2]
        if layer == len(self.keys):
            B, H, _, d = key.shape
            room = paddle.zeros([B, H, -T % self.BLOCK or self.BLOCK, d], key.dtype)
            self.keys.append(paddle.concat([key, room], axis=2))
            self.values.append(paddle.concat([value, room], axis=2))
            return key, value
        start = self.length
        self.keys[layer][:, :, start : start + T] = key
        self.values[layer][:, :, start : start + T] = value
        return self.keys[layer], self.values[layer]

    def reordered(self, rows):
        """A new cache with these rows (beam search): rows int64 [B']."""
        copy = KVCache()
        copy.length = self.length
        alphas = self.alphas
        copy.alphas = alphas if len(alphas) == 1 else [alphas[i] for i in rows.numpy().tolist()]
        copy.keys = [paddle.index_select(buffer, rows) for buffer in self.keys]
        copy.values = [paddle.index_select(buffer, rows) for buffer in self.values]
        if self.mask is not None:
            copy.mask = paddle.index_select(self.mask, rows)
        return copy


class MGenAttention(QWenAttention):
    """Self-attention of the decoder, with the parameters and parallel layout of QWenAttention."""

    def __init__(self, config):
        super().__init__(config)
        # Tables of the stock forward; the decoder computes ours once per forward.
        del self.rotary_emb, self.logn_tensor

    def forward(self, x, bias, cos, sin, cache=None, layer=0):
        """x [B, T, D] → [B, T, D], or [B, 1, D] of the last token where bias has one row.

        bias: broadcast to [B, H, T, keys], or segments for attend_within; cos, sin: from attention_factors, broadcast
        to [3, B, H, T, d], for one token to [B, 3, H, 1, d]; cache: a KVCache to read and extend at `layer`, or None.
        """
        B, T, _ = x.shape
        layers = self._sub_layers  # lookup is five times as fast as by attribute
        mixed = call(layers["c_attn"], x)
        if T == 1:
            mixed = mixed.reshape([B, 3, self.num_heads, 1, self.head_dim])
        else:
            # Contiguous: otherwise both products would copy the strided view.
            mixed = mixed.reshape([B, T, 3, self.num_heads, self.head_dim]).transpose([2, 0, 3, 1, 4]).contiguous()
        query, key, value = rotate(mixed, cos, sin).unbind(1 if T == 1 else 0)  # each [B, H, T, d]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        if not isinstance(bias, list) and bias.shape[2] < T:
            query = query[:, :, -1:]
        out = (attend_within if isinstance(bias, list) else attend)(
            query,
            key,
            value,
            bias,
            dropout=self.config.attn_dropout_prob,
            training=self.training,
            # A single query reads each key once in any case, and the kernel needs another cache layout.
            use_flash=self.config.use_flash_attention and T > 1,
            scaled=True,
        )
        return call(layers["c_proj"], out)


class MGenMLP(QWenMLP):
    """c_proj(w1(x) · silu(w2(x))): [B, T, D] → [B, T, D] (SwiGLU, Shazeer 2020)."""

    def forward(self, x):
        layers = self._sub_layers
        return call(layers["c_proj"], swiglu(call(layers["w2"], x), call(layers["w1"], x)))


class MGenRMSNorm(QWenRMSNorm):
    """x / rms(x) · weight, the mean square in float32 (Zhang & Sennrich 2019)."""

    def forward(self, x, added=None, fused=False):
        """The norm of x; with `added`, (the norm of x + added, x + added). fused: see norm_is_fused."""
        if fused:
            normed, x = fused_rms_norm(x, self._parameters["weight"], self.eps, added)
            return normed if added is None else (normed, x)
        if added is not None:
            x = x + added
        with full_precision():
            normed = cast(over_rms(widened(x), self.eps), x.dtype)
        normed = normed * self._parameters["weight"]
        return normed if added is None else (normed, x)


class MGenBlock(nn.Layer):
    """Pre-norm decoder block: [B, T, D] → [B, T, D] (or the last token's, see MGenAttention)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = MGenRMSNorm(config)
        self.attn = MGenAttention(config)
        self.ln_2 = MGenRMSNorm(config)
        self.mlp = MGenMLP(config)

    def forward(self, x, bias, cos, sin, cache=None, layer=0, fused_norm=False):
        layers = self._sub_layers
        attended = call(layers["attn"], call(layers["ln_1"], x, None, fused_norm), bias, cos, sin, cache, layer)
        if attended.shape[1] < x.shape[1]:
            x = x[:, -1:]
        normed, x = call(layers["ln_2"], x, attended, fused_norm)
        return x + call(layers["mlp"], normed)


class MGenPretrainedModel(QWenPretrainedModel):
    """Base of the decoder and of the full model: configuration class, initialisation, tensor-parallel layout."""

    config_class = MGenConfig
    base_model_prefix = "transformer"

    def init_weights(self):
        """Parameters are initialised on creation; the stock second pass would allocate a lazy model."""

    @classmethod
    def _get_tensor_parallel_mappings(cls, config, is_split=True):
        """PaddleNLP's split and merge actions of each decoder parameter, under this model's names, and of its adapters.

        An adapter is split like its weight: lora_B by columns, lora_A by rows. (PaddleNLP's LoRAModel splits lora_B in
        equal columns, so a card's part of the fused c_attn would get columns of other heads than its weight has.)
        """
        stock = super()._get_tensor_parallel_mappings(config, is_split)
        actions = {name.replace("qwen.", "transformer.llm."): action for name, action in stock.items()}
        for name, action in list(actions.items()):
            module, _, kind = name.rpartition(".")
            if kind == "weight":
                actions[module + (".lora_B" if action.keywords["is_column"] else ".lora_A")] = action
        return actions


class MGenDecoder(MGenPretrainedModel):
    """Embeddings, blocks and the final norm. The names follow the public checkpoints: wte, h, ln_f."""

    def __init__(self, config):
        super().__init__(config)
        self.enable_recompute = False
        if config.tensor_parallel_degree > 1:
            from paddle.distributed.fleet.meta_parallel import VocabParallelEmbedding

            self.wte = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        else:
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.LayerList([MGenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = MGenRMSNorm(config)

    def get_input_embeddings(self):
        return self.wte

    def packed(self, lengths, T):
        """Segments for attend_within, and positions, int64 [B, T], of packed samples.

        lengths: lists or a host array [B, K] (a tensor would synchronise), 0 where a row has fewer samples.
        """
        lengths = np.asarray(lengths)
        longest, scaled = int(lengths.max()), self.config.use_dynamic_ntk and not self.training
        if lengths.sum(axis=1).max() > T:
            raise ValueError(f"sample_lengths {lengths.tolist()} are more than {T} tokens")
        if scaled and longest > self.config.seq_length:
            raise ValueError(f"NTK scaling beyond {self.config.seq_length} tokens is per row, not per packed sample")
        causal = self._bias(None, 1, longest, 0, longest)
        causal = spread(causal, [1, self.h[0].attn.num_heads, longest, longest])
        biases = {length: causal[:, :, :length, :length] for length in set(lengths[lengths > 0].tolist())}
        positions = np.zeros([len(lengths), T], dtype=np.int64)
        segments = []
        for row, parts in zip(positions, lengths.tolist()):
            restarts = [np.arange(length) for length in parts]
            row[: sum(parts)] = np.concatenate(restarts)
            segments.append([(length, biases[length]) for length in parts if length])
        return segments, paddle.to_tensor(positions)

    def _bias(self, attention_mask, B, T, past, capacity):
        """Attention bias: 0 where token t may attend to key s, MASKED elsewhere. float32, broadcast to [B, 1, T, keys].
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            # A custom pattern, [B, 1, T, T].
            allowed = attention_mask.astype("bool")
        else:
            keys = capacity if past else T
            last = paddle.arange(past, past + T).unsqueeze(-1)
            allowed = (paddle.arange(keys).unsqueeze(0) <= last).reshape([1, 1, T, keys])
            if attention_mask is not None:
                mask = attention_mask.astype("bool")
                if mask.shape[1] < keys:
                    mask = paddle.concat([mask, paddle.zeros([B, keys - mask.shape[1]], "bool")], axis=1)
                allowed = paddle.logical_and(allowed, mask.reshape([B, 1, 1, keys]))
        return paddle.where(
            allowed, paddle.zeros([1], "float32"), paddle.full([1], MASKED, "float32")
        )

    def factors(self, position_ids, alphas, end, fused, dtype):
        """attention_factors of these positions, all below `end`, with log-n scaling beyond the trained context.

        Log-n and NTK scaling are off in training. fused: the kernel scales queries itself.
        """
        config = self.config
        cos, sin = rotary_factors(position_ids, config.kv_channels, config.rotary_emb_base, alphas)
        scale = 1.0 if fused else score_scale(config.kv_channels, dtype)
        if config.use_logn_attn and not self.training and end > config.seq_length:
            logn = (position_ids.astype("float32") + 1).log() / math.log(config.seq_length)
            scale = logn.clip(min=1.0).unsqueeze([1, 3]) * scale
        return attention_factors(cos, sin, scale)

    def _alphas(self, position_ids, T):
        """NTK factors of prompts of T tokens including padding."""
        if not self.config.use_dynamic_ntk or self.training or T <= self.config.seq_length:
            return [1]
        lengths = (position_ids.max(axis=1) + 1).numpy().tolist()
        return [ntk_alpha(length, self.config.seq_length) for length in lengths]

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None, packed=None, last_only=False):
        """inputs_embeds [B, T, D] → hidden states [B, T, D] after the final norm; last_only: [B, 1, D].

        attention_mask: 0/1 over past and new tokens [B, L + T], or a full pattern [B, 1, T, T]; None masks only what
        the cache's prompt masked. position_ids: int64 [B, T]; by default derived from the mask. cache: a KVCache, empty
        at prefill; extended. packed: from `packed`; each sample of a row is then computed as if it were alone.
        """
        cos, sin, bias = self._pass(inputs_embeds, attention_mask, position_ids, cache, packed)
        hidden = self.through(inputs_embeds, cos, sin, bias, cache, last_only)
        if cache is not None:
            cache.length += inputs_embeds.shape[1]
        return hidden

    def through(self, inputs_embeds, cos, sin, bias, cache=None, last_only=False):
        """Blocks and final norm: [B, T, D] → [B, T, D]; last_only: [B, 1, D].

        cos, sin: from attention_factors; for one token with the first two axes swapped. bias: added to the attention
        scores, or segments for attend_within. cache: an object whose `append` stores the keys and values of a layer and
        returns those to attend over.
        """
        B, T, _ = inputs_embeds.shape
        heads = self.h[0].attn.num_heads
        cos, sin = (spread(t, [*([B, 3] if T == 1 else [3, B]), heads, *t.shape[3:]]) for t in (cos, sin))
        if not isinstance(bias, list):
            bias = spread(bias, [B, heads, T, bias.shape[-1]])

        x = self.drop(inputs_embeds)
        fused_norm = norm_is_fused(x)
        for i, block in enumerate(self.h):
            if last_only and i == len(self.h) - 1 and not self.config.use_flash_attention:
                # The last layer's keys and values are all that is needed of the other tokens.
                bias = bias[:, :, -1:]
            if self.enable_recompute and self.training and not x.stop_gradient:
                x = paddle.distributed.fleet.utils.recompute(block, x, bias, cos, sin)
            else:
                x = call(block, x, bias, cos, sin, cache, i, fused_norm)
        return self.ln_f(x[:, -1:] if last_only else x, None, fused_norm)

    def _pass(self, inputs_embeds, attention_mask, position_ids, cache, packed):
        """(cos, sin, bias) of any forward; bias may be segments for attend_within."""
        B, T, _ = inputs_embeds.shape
        past = cache.length if cache is not None else 0
        bias = None
        if packed is not None:
            if cache is not None:
                raise ValueError("packed samples have no cache")
            bias, position_ids = packed
        if past:
            cache.reserve(past + T)
            if attention_mask is None and cache.mask is not None:
                later = paddle.ones([B, past + T - cache.mask.shape[1]], cache.mask.dtype)
                attention_mask = paddle.concat([cache.mask, later], axis=1)
        elif cache is not None and attention_mask is not None and attention_mask.ndim == 2:
            cache.mask = attention_mask.astype("int64")
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = position_ids_from_mask(attention_mask)[:, past:]
            else:
                position_ids = paddle.arange(past, past + T).unsqueeze(0)
        fused, dtype = self.config.use_flash_attention and T > 1, compute_dtype(inputs_embeds)
        with full_precision():
            alphas = cache.alphas if past else self._alphas(position_ids, T)
            factors = self.factors(position_ids, alphas, past + T, fused, dtype)
            if cache is not None:
                cache.alphas = alphas
            if bias is None:
                bias = self._bias(attention_mask, B, T, past, cache.capacity if past else T)
                # Once for all layers.
                bias = fused_bias(bias, dtype) if fused else bias
        if T == 1:
            factors = [t.transpose([1, 0, 2, 3, 4]) for t in factors]
        return (*(t.astype(inputs_embeds.dtype) for t in factors), bias)
