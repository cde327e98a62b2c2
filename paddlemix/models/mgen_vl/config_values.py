"""Reading and checking a model folder's config.json, without Paddle."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any, Dict

from paddlemix.checkpoint.structure import LANGUAGE_KEYS
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.json_files import read_config_object

# The 7B's ViT-bigG and connector.
VISUAL_7B = {
    "image_size": 448,
    "patch_size": 14,
    "width": 1664,
    "layers": 48,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "image_start_id": 151857,
    "n_queries": 256,
}

# Head width of the resampler (heads = output_dim // 128).
RESAMPLER_HEAD_DIM = 128

# Upper bounds, far above real values: a configuration file may be untrusted, and beyond them it would allocate more
# memory than any machine has.
_LIMITS = {
    "hidden_size": 65536,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "kv_channels": 1024,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "seq_length": 1 << 22,
    "max_position_embeddings": 1 << 22,
}
_VISUAL_LIMITS = {
    "image_size": 4096,
    "patch_size": 512,
    "width": 65536,
    "layers": 1024,
    "heads": 1024,
    "output_dim": 65536,
    "n_queries": 65536,
    "image_start_id": 1 << 22,
}

# PaddleNLP's defaults of other keys that are checked.
_DEFAULTS = {"max_position_embeddings": 8192, "dtype": None, "use_long_sequence_strategies": False}


def check_values(config: Any) -> None:
    """Check the values of a configuration.

    config: a MGenConfig, or anything with its attributes.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another one.
    """

    def positive(value, key: str, limit: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise ConfigError(f"config.json: {key} must be an integer from 1 to {limit}, not {value!r}", key)

    for key, limit in _LIMITS.items():
        positive(getattr(config, key), key, limit)
    for key, limit in _VISUAL_LIMITS.items():
        positive(config.visual[key], "visual." + key, limit)
    visual = config.visual
    ratio = visual["mlp_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
        raise ConfigError(
            f"config.json: visual.mlp_ratio must be a number from 0 to 64, not {ratio!r}", "visual.mlp_ratio"
        )

    def must(condition: bool, text: str) -> None:
        if not condition:
            raise ConfigError("config.json: " + text)

    must(
        config.kv_channels * config.num_attention_heads == config.hidden_size,
        "kv_channels × num_attention_heads must be hidden_size",
    )
    must(config.rotary_pct == 1.0, "rotary_pct must be 1.0")
    base = config.rotary_emb_base
    must(type(base) in (int, float) and 1 < base < 1e12, "rotary_emb_base must be a number from 1 to 10¹²")
    epsilon = config.layer_norm_epsilon
    must(type(epsilon) in (int, float) and 0 < epsilon < 1, "layer_norm_epsilon must be a number between 0 and 1")
    for key in ("no_bias", "use_dynamic_ntk", "use_logn_attn", "tie_word_embeddings"):
        # Any string would count as true, even "false".
        must(isinstance(getattr(config, key), bool), f"{key} must be true or false")
    must(config.seq_length > 1, "seq_length must be at least 2")
    must(
        config.dtype is None or str(config.dtype).replace("paddle.", "") in ("float32", "float16", "bfloat16"),
        "dtype must be float32, float16 or bfloat16",
    )
    # PaddleNLP would import and call objects that the configuration names.
    must(not config.use_long_sequence_strategies, "use_long_sequence_strategies is not supported")
    must(config.kv_channels % 2 == 0, "kv_channels must be even")
    must(config.intermediate_size % 2 == 0, "intermediate_size must be even")
    must(not config.tie_word_embeddings, "tie_word_embeddings must be false: MGen-VL has an lm_head of its own")
    must(visual["output_dim"] == config.hidden_size, "visual.output_dim must be hidden_size")
    must(visual["output_dim"] % RESAMPLER_HEAD_DIM == 0, "visual.output_dim must be a multiple of 128")
    must(visual["width"] % visual["heads"] == 0, "visual.width must be a multiple of visual.heads")
    must(visual["image_size"] % visual["patch_size"] == 0, "visual.image_size must be a multiple of patch_size")
    must(math.isqrt(visual["n_queries"]) ** 2 == visual["n_queries"], "visual.n_queries must be a square")
    must(visual["image_start_id"] + 2 < config.vocab_size, "visual.image_start_id + 2 must lie in the vocabulary")


def read_values(folder: str) -> Dict[str, Any]:
    """The values in config.json of a model folder.

    Raises:
        ConfigError: no config.json, not a JSON object, or another kind of model.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ConfigError(f"no config.json in {folder}: give the folder of a MGen-VL model", "no-config")
    values = read_config_object(path)
    if values.get("model_type", "mgen") not in ("mgen", "qwen"):
        raise ConfigError(f"{path}: model_type is {values['model_type']!r}, not mgen (or qwen)", "model_type")
    if "visual" not in values:
        raise ConfigError(f"{path} has no visual part: this is a text model, not MGen-VL", "visual")
    return values


def plain_config(folder: str) -> SimpleNamespace:
    """The configuration of a model folder, checked, with the attributes of a MGenConfig that decide its structure.

    Raises:
        ConfigError: as read_values and check_values.
    """
    values = read_values(folder)
    if not isinstance(values["visual"], dict):
        raise ConfigError("config.json: visual must be an object", "visual")
    config = SimpleNamespace(**{**LANGUAGE_KEYS, **_DEFAULTS, **values})
    config.visual = dict(VISUAL_7B, **values["visual"])
    check_values(config)
    return config
