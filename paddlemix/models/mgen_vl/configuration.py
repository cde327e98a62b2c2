"""MGenConfig: config.json of a model folder (docs/formats.md), checked when it is read."""

from __future__ import annotations

import copy
import math
import os

from paddlenlp.transformers import QWenConfig

from paddlemix.utils.cli import one_line
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

# A resampler head is always this wide (heads = output_dim // 128).
RESAMPLER_HEAD_DIM = 128

# A configuration file comes with weights from strangers. Nothing real is near these; past them a typo or an attack
# would ask for more memory than any machine has before the first clear error.
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

# What a configuration says of the cards of the run that wrote it is nothing to another one.
_OF_A_RUN = ("tensor_parallel_degree", "tensor_parallel_rank", "tensor_parallel_output", "sequence_parallel")


class MGenConfig(QWenConfig):
    """The configuration of MGen-VL. The defaults are the 7B's.

    seq_length: trained context; dynamic NTK and log-n scaling set in beyond it.
    visual: the ViT and connector (see VISUAL_7B); missing keys take the 7B's values.
    llm_pretrained_model_name_or_path: a name that the baseline's files have. Nothing is fetched by it.

    Raises:
        ConfigError: a value is of the wrong kind, out of range, or does not fit another one.
    """

    model_type = "mgen"

    def __init__(
        self,
        seq_length=2048,
        visual=None,
        llm_pretrained_model_name_or_path="mgen-7b",
        pad_token_id=151643,
        bos_token_id=151643,
        eos_token_id=151643,
        **kwargs,
    ):
        if visual is not None and not isinstance(visual, dict):
            raise ConfigError("config.json: visual must be an object")
        self.seq_length = seq_length
        self.visual = dict(VISUAL_7B, **(visual or {}))
        self.llm_pretrained_model_name_or_path = llm_pretrained_model_name_or_path
        # A file of another family may say so; everything below this class is MGen-VL.
        kwargs.pop("model_type", None)
        flash = kwargs.pop("use_flash_attention", False)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        # PaddleNLP 2.8 sets it twice on the way, the second time to its default.
        self.use_flash_attention = flash
        self._check()

    def _check(self) -> None:
        def positive(value, key: str, limit: int) -> None:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
                raise ConfigError(f"config.json: {key} must be a whole number from 1 to {limit}, not {value!r}", key)

        for key, limit in _LIMITS.items():
            positive(getattr(self, key), key, limit)
        for key, limit in _VISUAL_LIMITS.items():
            positive(self.visual[key], "visual." + key, limit)
        visual = self.visual
        ratio = visual["mlp_ratio"]
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
            raise ConfigError(
                f"config.json: visual.mlp_ratio must be a number from 0 to 64, not {ratio!r}", "visual.mlp_ratio"
            )

        def must(condition: bool, text: str) -> None:
            if not condition:
                raise ConfigError("config.json: " + text)

        must(
            self.kv_channels * self.num_attention_heads == self.hidden_size,
            "kv_channels × num_attention_heads must be hidden_size",
        )
        must(self.rotary_pct == 1.0, "rotary_pct must be 1.0")
        base = self.rotary_emb_base
        must(type(base) in (int, float) and 1 < base < 1e12, "rotary_emb_base must be a number from 1 to 10¹²")
        epsilon = self.layer_norm_epsilon
        must(type(epsilon) in (int, float) and 0 < epsilon < 1, "layer_norm_epsilon must be a number between 0 and 1")
        for key in ("no_bias", "use_dynamic_ntk", "use_logn_attn", "tie_word_embeddings"):
            # Any text would count as true, "false" too.
            must(isinstance(getattr(self, key), bool), f"{key} must be true or false")
        must(self.seq_length > 1, "seq_length must be at least 2")
        must(
            self.dtype is None or str(self.dtype).replace("paddle.", "") in ("float32", "float16", "bfloat16"),
            "dtype must be float32, float16 or bfloat16",
        )
        # PaddleNLP would import and call what the configuration names.
        must(not self.use_long_sequence_strategies, "use_long_sequence_strategies is not supported")
        must(self.kv_channels % 2 == 0, "kv_channels must be even")
        must(self.intermediate_size % 2 == 0, "intermediate_size must be even")
        must(not self.tie_word_embeddings, "tie_word_embeddings must be false: MGen-VL has an lm_head of its own")
        must(visual["output_dim"] == self.hidden_size, "visual.output_dim must be hidden_size")
        must(visual["output_dim"] % RESAMPLER_HEAD_DIM == 0, "visual.output_dim must be a multiple of 128")
        must(visual["width"] % visual["heads"] == 0, "visual.width must be a multiple of visual.heads")
        must(visual["image_size"] % visual["patch_size"] == 0, "visual.image_size must be a multiple of patch_size")
        must(math.isqrt(visual["n_queries"]) ** 2 == visual["n_queries"], "visual.n_queries must be a square")
        must(visual["image_start_id"] + 2 < self.vocab_size, "visual.image_start_id + 2 must lie in the vocabulary")

    def save_pretrained(self, folder, **kwargs):
        """Write config.json, without what is of a run and not of the model."""
        stored = copy.copy(self)
        stored.use_flash_attention, stored.tensor_parallel_degree = False, -1
        super(MGenConfig, stored).save_pretrained(folder, **kwargs)

    @property
    def image_start_id(self) -> int:
        """Id of `<img>`; `</img>` is the next one and `<imgpad>` the one after."""
        return self.visual["image_start_id"]

    @property
    def n_queries(self) -> int:
        """Positions between `<img>` and `</img>`, one per feature of the connector."""
        return self.visual["n_queries"]

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Read config.json of a model folder. `kwargs` override its values. Nothing is ever downloaded.

        Raises:
            ConfigError: no config.json, not a JSON object, of another model_type, or with values that cannot be.
        """
        path = os.path.join(folder, "config.json")
        if not os.path.isfile(path):
            raise ConfigError(f"no config.json in {folder}: give the folder of a MGen-VL model")
        values = read_config_object(path)
        if values.get("model_type", "mgen") not in ("mgen", "qwen"):
            raise ConfigError(f"{path}: model_type is {values['model_type']!r}, not mgen (or qwen)")
        if "visual" not in values:
            raise ConfigError(f"{path} has no visual part: this is a text model, not MGen-VL")
        dtype = kwargs.pop("dtype", None)
        config = cls.from_values(values, path, **kwargs)
        if dtype is not None:
            config.dtype = dtype
        return config

    @classmethod
    def from_values(cls, values, path, **kwargs):
        """The configuration of what a config.json at `path` holds; `kwargs` override its values.

        Raises:
            ConfigError: a key or a value that cannot be.
        """
        for key in values:
            # They would take the place of a method.
            if key == "self" or key.startswith("__") or callable(getattr(cls, key, None)):
                raise ConfigError(f"{path}: {key[:80]!r} is no key of a configuration")
        values = {key: value for key, value in values.items() if key not in _OF_A_RUN}
        if not isinstance(values.get("quantization_config") or {}, dict):
            raise ConfigError(f"{path}: quantization_config must be an object or null")
        if not values.get("quantization_config", ...):
            del values["quantization_config"]
        try:
            config = cls(**{**values, **kwargs})
            # As PaddleNLP does later, with values that it has taken as they are.
            config.to_dict()
            return config
        except (AssertionError, AttributeError, TypeError, ValueError) as error:  # PaddleNLP's, of keys that it knows
            raise ConfigError(f"{path}: {one_line(str(error), 200)}") from None
