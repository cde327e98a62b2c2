"""The structure of a MGen-VL model: the keys of config.json that define it, and which tensors are the LLM's."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from paddlemix.utils.texts import some

Shape = Tuple[int, ...]

# The keys that decide how the LLM computes, with their defaults. Another value changes what the weights mean even where
# all shapes agree. (The number of positions is only a limit.)
LANGUAGE_KEYS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "seq_length": 2048,
    "layer_norm_epsilon": 1e-6,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
# The same for the vision tower and the connector, under "visual" in config.json.
VISUAL_KEYS = (
    "image_size",
    "patch_size",
    "width",
    "layers",
    "heads",
    "mlp_ratio",
    "output_dim",
    "image_start_id",
    "n_queries",
)


def is_language(name: str) -> bool:
    """Whether a tensor belongs to the LLM, whose structure must not change."""
    return not name.startswith("visual.") and not name.endswith((".lora_A", ".lora_B"))


def language(shapes: Dict[str, Shape]) -> Dict[str, Shape]:
    """The shapes of the LLM's tensors among these, by name."""
    return {name: shape for name, shape in shapes.items() if is_language(name)}


def differences(found: Dict[str, Shape], expected: Dict[str, Shape], limit: int = 10) -> List[str]:
    """How tensors differ from the expected ones, a line for each kind of difference with up to `limit` names."""
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    return [f"{len(names)} {kind}: {some(names, limit)}" for kind, names in kinds.items() if names]


def structure(config: Dict[str, Any]) -> Dict[str, Any]:
    """The values of a config.json that decide how its model computes; 1 and 1.0 are equal."""
    visual = config.get("visual")
    visual = {"n_queries": 256, **(visual if isinstance(visual, dict) else {})}
    values = {key: config.get(key, default) for key, default in LANGUAGE_KEYS.items()}
    values.update((f"visual.{key}", visual.get(key)) for key in VISUAL_KEYS)
    return {key: float(value) if type(value) is int else value for key, value in values.items()}
