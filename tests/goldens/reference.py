"""MGen-VL in plain numpy, float64, one sequence at a time, without Paddle: the reference of the goldens.

It is the tests' second opinion on the model. `python -m tests.goldens.reference` writes model.npz anew.

Shapes: T tokens, S image side, P patches, w ViT width, Q queries, D hidden, H heads, V vocabulary.
"""

from __future__ import annotations

import math
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("model.npz")


def weights(shapes, seed=0):
    """Random float32 values for parameter_shapes' names: norms near 1, biases near 0, the rest of unit gain."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = values * 0.1 + (name.endswith("weight"))
        elif name.startswith("visual") and ("pos" in name or "query" in name):
            values = values * 0.5
        elif "wte" not in name:
            values = values / math.sqrt(np.prod(shape[1:]) if "conv1" in name else shape[0])
        made[name] = values.astype(np.float32)
    return made


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def heads(x, count):
    """[T, count × d] → [count, T, d]."""
    return x.reshape(len(x), count, -1).transpose(1, 0, 2)


def attention(q, k, v, allowed=None):
    """[H, T, d], [H, S, d] twice → [T, H × d]."""
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return (softmax(scores) @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def cubic(t):
    """Keys' bicubic kernel with a = -0.75."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def resize_matrix(source, target):
    """[target, source]: bicubic interpolation of a line of samples, edges repeated."""
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        first = math.floor(centre)
        for k in range(first - 1, first + 3):
            matrix[i, min(max(k, 0), source - 1)] += cubic(centre - k)
    return matrix


def resize_grid(table, count):
    """[L, c] → [count, c], both square grids."""
    source, target = math.isqrt(len(table)), math.isqrt(count)
    if source == target:
        return table
    m = resize_matrix(source, target)
    return np.einsum("ai,bj,ijc->abc", m, m, table.reshape(source, source, -1)).reshape(count, -1)


def visual(w, config, pixels):
    """pixels [3, S, S] → [Q, D]."""
    v = config["visual"]
    patch, side = v["patch_size"], v["image_size"] // v["patch_size"]
    patches = pixels.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    x = patches @ w["visual.vit.conv1.weight"].reshape(v["width"], -1).T
    x = x + resize_grid(w["visual.vit.positional_embedding"], side * side)
    x = layer_norm(x, w["visual.vit.ln_pre.weight"], w["visual.vit.ln_pre.bias"])

    def linear(name, x):
        return x @ w[name + ".weight"] + w.get(name + ".bias", 0.0)

    for i in range(v["layers"]):
        block = f"visual.vit.transformer.resblocks.{i}"
        h = layer_norm(x, w[block + ".ln_1.weight"], w[block + ".ln_1.bias"])
        mixed = linear(block + ".attn.in_proj", h).reshape(len(x), v["heads"], 3, -1)
        q, k, value = (mixed[:, :, part].transpose(1, 0, 2) for part in range(3))
        x = x + linear(block + ".attn.out_proj", attention(q, k, value))
        h = layer_norm(x, w[block + ".ln_2.weight"], w[block + ".ln_2.bias"])
        x = x + linear(block + ".mlp.c_proj", gelu(linear(block + ".mlp.c_fc", h)))

    pool = "visual.attn_pool"
    x = linear(pool + ".kv_proj", x) if pool + ".kv_proj.weight" in w else x
    x = layer_norm(x, w[pool + ".ln_kv.weight"], w[pool + ".ln_kv.bias"])
    q = layer_norm(w[pool + ".query"], w[pool + ".ln_q.weight"], w[pool + ".ln_q.bias"]) + w[pool + ".pos_embed"]
    k = x + resize_grid(w[pool + ".pos_embed"], len(x))
    D, count = v["output_dim"], v["output_dim"] // 128
    weight, bias = w[pool + ".attn.in_proj_weight"], w[pool + ".attn.in_proj_bias"]
    q, k, value = (
        heads(source @ weight[:, i * D : (i + 1) * D] + bias[i * D : (i + 1) * D], count)
        for i, source in enumerate((q, k, x))
    )
    x = linear(pool + ".attn.out_proj", attention(q, k, value))
    return layer_norm(x, w["visual.ln_post.weight"], w["visual.ln_post.bias"]) @ w["visual.proj"]


def logits(w, config, ids, images=(), lora=None, scale=0.0):
    """ids [T], images a list of [3, S, S] in the order of their spans → [T, V].

    lora: {module: (A, B)}, added with `scale`.
    """
    w = {name: value.astype(np.float64) for name, value in w.items()}
    for module, (a, b) in (lora or {}).items():
        w[module + ".weight"] = w[module + ".weight"] + scale * a.astype(np.float64) @ b
    ids = np.asarray(ids)
    x = w["transformer.llm.wte.weight"][ids]
    starts = np.nonzero(ids == config["visual"]["image_start_id"])[0]
    for start, image in zip(starts, images):
        x[start + 1 : start + 1 + config["visual"]["n_queries"]] = visual(w, config, image.astype(np.float64))

    T, count, length = len(ids), config["num_attention_heads"], config["seq_length"]
    d = config["kv_channels"]
    alpha = max(2 ** math.ceil(math.log2(T / length) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (d / (d - 2))
    angle = np.outer(np.arange(T), base ** (-np.arange(0, d, 2) / d))

    def rotate(x):
        turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    logn = np.maximum(np.log(np.arange(1, T + 1)) / math.log(length), 1.0)[:, None]
    causal = np.tril(np.ones((T, T), dtype=bool))
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.llm.h.{i}"
        h = rms_norm(x, w[block + ".ln_1.weight"])
        mixed = h @ w[block + ".attn.c_attn.weight"] + w[block + ".attn.c_attn.bias"]
        q, k, v = (heads(part, count) for part in np.split(mixed, 3, axis=1))
        x = x + attention(rotate(q) * logn, rotate(k), v, causal) @ w[block + ".attn.c_proj.weight"]
        h = rms_norm(x, w[block + ".ln_2.weight"])
        gate = h @ w[block + ".mlp.w2.weight"]
        x = x + (h @ w[block + ".mlp.w1.weight"] * gate / (1 + np.exp(-gate))) @ w[block + ".mlp.c_proj.weight"]
    return rms_norm(x, w["transformer.llm.ln_f.weight"]) @ w["lm_head.weight"]


def cases(config):
    """What the golden file holds: (name, ids, how many images)."""
    rng = np.random.default_rng(1)
    start, queries = config["visual"]["image_start_id"], config["visual"]["n_queries"]
    span = [start] + [start + 2] * queries + [start + 1]
    text = rng.integers(0, 256, 40).tolist()
    return [("text", text[:12], 0), ("one", span + text[:9], 1), ("two", text[:3] + span * 2 + text[:5], 2)]


def pixel_values(config, count):
    size = config["visual"]["image_size"]
    return np.random.default_rng(2).standard_normal((count, 3, size, size)).astype(np.float32)


def lora_of(shapes, rank=3, seed=3):
    """Adapters on every c_attn and w1: {module: (A, B)}."""
    rng = np.random.default_rng(seed)
    return {
        name[: -len(".weight")]: tuple(
            rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((shape[0], rank), (rank, shape[1]))
        )
        for name, shape in shapes.items()
        if name.endswith(("c_attn.weight", "mlp.w1.weight"))
    }


def main():
    from paddlemix.models.mgen_vl.parameters import parameter_shapes
    from tests.helpers import tiny_config

    config = tiny_config().to_dict()
    shapes = parameter_shapes(config)
    w, images = weights(shapes), pixel_values(config, 2)
    golden = {"features": np.stack([visual({k: v.astype(float) for k, v in w.items()}, config, p) for p in images])}
    for name, ids, count in cases(config):
        golden[name] = logits(w, config, ids, images[:count])
    _, ids, _ = cases(config)[1]
    golden["lora"] = logits(w, config, ids, images[:1], lora_of(shapes), scale=2.0)
    golden["long"] = logits(w, dict(config, seq_length=8), ids, images[:1])
    np.savez_compressed(FILE, **{name: value.astype(np.float32) for name, value in golden.items()})
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
