"""Generated checkpoints with the 7B's shapes and fewer layers."""

from __future__ import annotations

import json
import os
from typing import Any, Dict

# (decoder layers, vision layers, vocabulary); quick is narrower too.
SIZES = {"quick": (1, 1, 1024), "normal": (1, 1, 32000), "large": (4, 4, 151936)}
RANK, ALPHA = 64, 32


def config(size: str) -> Dict[str, Any]:
    from paddlemix.checkpoint.structure import LANGUAGE_KEYS
    from paddlemix.models.mgen_vl.config_values import VISUAL_7B

    layers, vision_layers, vocabulary = SIZES[size]
    visual = {**VISUAL_7B, "layers": vision_layers, "image_start_id": vocabulary - 3}
    values = {
        **LANGUAGE_KEYS, "model_type": "mgen", "num_hidden_layers": layers, "vocab_size": vocabulary, "visual": visual,
        "dtype": "bfloat16", "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if size == "quick":
        values.update(hidden_size=256, num_attention_heads=2, intermediate_size=512)
        visual.update(width=64, heads=2, output_dim=256)
    return values


def write(folder: str, size: str, format: str) -> int:
    """A model folder with random weights in bfloat16; the bytes of its tensors."""
    import numpy as np

    from paddlemix.checkpoint.shards import write_sharded
    from paddlemix.models.mgen_vl.parameters import parameter_shapes

    values = config(size)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(values, file)
    noise = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32) * np.float32(0.02)
    noise = (noise.view(np.uint32) >> 16).astype(np.uint16)
    shapes = parameter_shapes(values)
    items = [(name, "bfloat16", shape, lambda shape=shape: np.resize(noise, shape)) for name, shape in shapes.items()]
    write_sharded(folder, items, format=format)
    return sum(noise.itemsize * int(np.prod(shape)) for shape in shapes.values())


def write_lora(folder: str, size: str) -> None:
    """Adapters of rank 64 on the four matrices of each decoder layer that the shipped config tunes."""
    import numpy as np

    from paddlemix.checkpoint import LORA_WEIGHTS_NAME, write_pdparams
    from paddlemix.models.mgen_vl.parameters import parameter_shapes

    os.makedirs(folder, exist_ok=True)
    rng, tensors = np.random.default_rng(1), {}
    for name, shape in parameter_shapes(config(size)).items():
        if name.endswith((".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.w1.weight", ".mlp.w2.weight")):
            module = name[: -len(".weight")]
            for part, sizes in (("lora_A", (shape[0], RANK)), ("lora_B", (RANK, shape[1]))):
                tensors[f"{module}.{part}"] = ("float32", rng.normal(0, 0.01, sizes).astype(np.float32))
    write_pdparams(os.path.join(folder, LORA_WEIGHTS_NAME), tensors)
    with open(os.path.join(folder, "lora_config.json"), "w") as file:
        json.dump({"r": RANK, "lora_alpha": ALPHA, "target_modules": [".*attn.c_attn.*"]}, file)
