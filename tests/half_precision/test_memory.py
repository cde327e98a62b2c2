"""What a layer keeps for its backward under the rules of half precision, against paddlemix/trainer/memory.py.

Layers with the 7B's proportions: heads of 128, an MLP of 11008 / 4096 of the width, a ViT's of 4.9231, 256 queries, 376
tokens.
"""

import numpy as np
import paddle
import pytest

from paddlemix.models.lora import adapter_shapes, apply_lora
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.trainer import freeze, memory
from tests.half_precision.simulator import Simulation
from tests.half_precision.world import TARGETS, tensors

START, QUERIES, TOKENS, LABELS = 1990, 256, 376, 76
SIZES = {
    "hidden_size": 512, "intermediate_size": 2752, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 128,
    "vocab_size": 2000, "seq_length": 2048, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
    "visual": {
        "heads": 4, "image_size": 224, "image_start_id": START, "layers": 2, "mlp_ratio": 4.9231, "n_queries": QUERIES,
        "output_dim": 512, "patch_size": 14, "width": 208,
    },
}  # fmt: skip


def new_batch(rows):
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 1000, [rows, TOKENS])
    ids[:, 2], ids[:, 3 + QUERIES] = START, START + 1
    labels = ids.copy()
    labels[:, : TOKENS - LABELS] = -100
    images = rng.standard_normal((rows, 3, 224, 224)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, "images": images}


def kept_and_estimated(lora, level, paddle_3, dropout=0.0, flash=False, rows=1):
    """(bytes kept, estimated) of a decoder layer, a ViT layer (with full tuning), the connector, and in all."""
    config = MGenConfig(use_flash_attention=flash, **SIZES)
    model = base = MGenLMHeadModel(config)
    shapes = parameter_shapes(config)
    if lora:
        trainable = freeze.plan_freeze(list(shapes), ["*visual*"], ["*visual.attn_pool*"], True)
        freeze.apply_freeze(model, trainable)
        model = apply_lora(
            model, rank=64, alpha=16, dropout=dropout, target_modules=TARGETS, trainable=trainable
        )
        shapes = {**shapes, **adapter_shapes(shapes, TARGETS, 64)}
    model.train()
    simulation = Simulation("float16", paddle_3)
    simulation.decorate(model, level)
    simulation.rounded = lambda tensor, what: tensor  # sizes alone matter
    block = base.visual.vit.transformer.resblocks[1]
    watched = [("connector", base.visual), ("ViT", base.visual.vit), ("ViT layer", block)]
    watched.append(("decoder layer", base.transformer.llm.h[1]))
    with simulation, simulation.kept(model, watched) as kept:
        values = tensors(new_batch(rows))
        with simulation.autocast(level):
            loss = model(**values).loss
    assert loss.dtype == paddle.float64
    trained = memory.Trained(shapes, [n for n, p in base.state_dict().items() if not p.stop_gradient])
    setting = memory.Setting(level, gpu=True, paddle_3=paddle_3, lora_dropout=dropout, flash=flash)
    batch = memory.Batch(rows, TOKENS, rows, rows * LABELS)
    estimated = {
        "decoder layer": memory._decoder_layer(config, shapes, 1, batch, setting).kept,
        "connector": memory._connector(config, shapes, batch, setting),
        "all": sum(memory.estimate(config, trained, batch, setting).stored.values()),
    }
    if not lora:
        estimated["ViT layer"] = memory._vision_layer(config.visual, shapes, rows, setting).kept
    found = dict(kept.layers, all=sum(kept.layers.values()))
    return {name: (found[name], size) for name, size in estimated.items()}


@pytest.mark.parametrize("paddle_3", [False, True])
@pytest.mark.parametrize("level", ["O2", "O1"])
@pytest.mark.parametrize(
    "way",
    [{"lora": True, "dropout": 0.05}, {"lora": True, "rows": 2}, {"lora": False}],
    ids=["LoRA with dropout", "LoRA, 2 rows", "full"],
)
@pytest.mark.parametrize("flash", [False, True], ids=["plain", "fused"])
def test_layers_keep_what_is_estimated(way, level, paddle_3, flash):
    sizes = kept_and_estimated(level=level, paddle_3=paddle_3, flash=flash, **way)
    for name, (kept, estimated) in sizes.items():
        assert 0.95 < kept / estimated < 1.05, (name, sizes)
