"""MGenConfig: config.json of a model folder (docs/formats.md), validated on reading."""

from __future__ import annotations

import copy
import os

from paddlenlp.transformers import QWenConfig

from paddlemix.models.mgen_vl.config_values import VISUAL_7B, check_values, read_values
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.texts import one_line

# Settings of the run that wrote a configuration, not of the model.
_OF_A_RUN = ("tensor_parallel_degree", "tensor_parallel_rank", "tensor_parallel_output", "sequence_parallel")


class MGenConfig(QWenConfig):
    """The configuration of MGen-VL. The defaults are the 7B's.

    seq_length: trained context; dynamic NTK and log-n scaling apply beyond it.
    visual: the ViT and connector (see VISUAL_7B); missing keys default to the 7B's values.
    llm_pretrained_model_name_or_path: a name in the baseline's files, unused here.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another one.
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
        # Files of related models may have another one.
        kwargs.pop("model_type", None)
        flash = kwargs.pop("use_flash_attention", False)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        # PaddleNLP 2.8 resets it to its default.
        self.use_flash_attention = flash
        check_values(self)

    def save_pretrained(self, folder, **kwargs):
        """Write config.json, without settings of the run."""
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
            ConfigError: no config.json, not a JSON object, another model_type, or invalid values.
        """
        values, path = read_values(folder), os.path.join(folder, "config.json")
        dtype = kwargs.pop("dtype", None)
        config = cls.from_values(values, path, **kwargs)
        if dtype is not None:
            config.dtype = dtype
        return config

    @classmethod
    def from_values(cls, values, path, **kwargs):
        """The configuration with the values of a config.json at `path`; `kwargs` override them.

        Raises:
            ConfigError: an invalid key or value.
        """
        for key in values:
            # These would replace a method.
            if key == "self" or key.startswith("__") or callable(getattr(cls, key, None)):
                raise ConfigError(f"{path}: {key[:80]!r} is not a configuration key")
        values = {key: value for key, value in values.items() if key not in _OF_A_RUN}
        if not isinstance(values.get("quantization_config") or {}, dict):
            raise ConfigError(f"{path}: quantization_config must be an object or null")
        if not values.get("quantization_config", ...):
            del values["quantization_config"]
        try:
            config = cls(**{**values, **kwargs})
            # PaddleNLP does this later, and only then checks some values.
            config.to_dict()
            return config
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # from PaddleNLP
            raise ConfigError(f"{path}: {one_line(str(error), 200)}") from None
