"""A tiny model that has learnt to caption pictures of four coloured quarters, and its tuning to other captions.

What it has learnt matters: the captions of a random model are decided by ties, which any rounding turns over.
"""

from __future__ import annotations

import numpy as np
import paddle

from paddlemix.models.lora import apply_lora
from paddlemix.models.mgen_vl.modeling import IGNORE_INDEX
from tests.helpers import RANKS, make_tiny_model, prompt_ids
from tools.make_tiny_model import prepare_vision

# A colour's name, the word that a fifth of the captions have for it (the loss keeps a floor), its pixels.
COLOURS = [
    ("red", "scarlet", (0.9, 0.1, 0.1)), ("green", "emerald", (0.1, 0.8, 0.2)), ("blue", "azure", (0.1, 0.2, 0.9)),
    ("white", "ivory", (0.95, 0.95, 0.95)), ("black", "ebony", (0.05, 0.05, 0.05)), ("pink", "rose", (0.95, 0.5, 0.7)),
]  # fmt: skip
SIDE, QUERIES, END = 56, 16, RANKS
TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
BEFORE, AFTER = "{} {} {} {}", "{0}, {1}; {2} on {3}"


def new_model():
    model = make_tiny_model(3, visual={"n_queries": QUERIES}, emb_dropout_prob=0.0, attn_dropout_prob=0.0)
    paddle.seed(3)
    prepare_vision(model.visual)
    return model


def pictures(count, seed):
    """(pixels, float32 [count, 3, SIDE, SIDE] about 0; words for the colours of each one's quarters)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(COLOURS), [count, 2, 2])
    colours = np.array([colour for _, _, colour in COLOURS])[drawn]
    pixels = colours.transpose(0, 3, 1, 2).repeat(SIDE // 2, axis=2).repeat(SIDE // 2, axis=3)
    pixels = 4 * (pixels - 0.5) + rng.normal(0, 0.3, pixels.shape)
    rare = rng.random([count, 4]) < 0.2
    words = [[COLOURS[i][r] for i, r in zip(*one)] for one in zip(drawn.reshape(count, 4), rare.astype(int))]
    return pixels.astype(np.float32), words


def batch(count, seed, caption=AFTER):
    """A training batch in numpy, one image a row, padded at the end."""
    pixels, words = pictures(count, seed)
    prompt = prompt_ids(b":", QUERIES)
    answers = [list(caption.format(*one).encode()) + [END] for one in words]
    width = len(prompt) + max(map(len, answers))
    ids = np.full([count, width], RANKS, np.int64)
    labels = np.full([count, width], IGNORE_INDEX, np.int64)
    mask = np.zeros([count, width], np.int64)
    for i, answer in enumerate(answers):
        end = len(prompt) + len(answer)
        ids[i, :end], labels[i, len(prompt) : end], mask[i, :end] = prompt + answer, answer, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels}


def tensors(values):
    return {name: paddle.to_tensor(value) for name, value in values.items()}


def pretrained(steps=100, rows=16):
    """Weights by name, after full tuning in float32."""
    model = new_model()
    model.train()
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(2e-3, steps)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), grad_clip=clip)
    for step in range(steps):
        model(**tensors(batch(rows, [1, step], BEFORE))).loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def with_lora(model, dropout=0.0):
    """The LoRA model over this one, the ViT frozen and attn_pool trained as the shipped configs have it."""
    from paddlemix.trainer import freeze

    model.train()
    trainable = freeze.plan_freeze(list(model.state_dict()), ["*visual*"], ["*visual.attn_pool*"], True)
    freeze.apply_freeze(model, trainable)
    paddle.seed(5)
    lora = apply_lora(
        model, rank=16, alpha=32, dropout=dropout, target_modules=TARGETS, trainable=trainable
    )
    lora.train()
    return lora
