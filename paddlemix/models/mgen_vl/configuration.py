"""MGenConfig: config.json of a model folder (docs/formats.md), checked when it is read."""

from __future__ import annotations

import copy
import os

from paddlenlp.transformers import QWenConfig

from paddlemix.models.mgen_vl.config_values import VISUAL_7B, check_values, read_values
from paddlemix.utils.cli import one_line
from paddlemix.utils.errors import ConfigError

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
        check_values(self)

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
        values, path = read_values(folder), os.path.join(folder, "config.json")
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
                raise ConfigError(f"{path}: {key[:80]!r} is not a configuration key")
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
