"""The contest's rule on the LLM: its weights may be tuned, its structure and parameter count must not change.

Checked before a run starts, and again whenever it saves.
"""

from __future__ import annotations

from typing import List

from paddlemix.auto import AutoConfigMIX
from paddlemix.checkpoint import WeightsReader, open_weights
from paddlemix.checkpoint.structure import LANGUAGE_KEYS, differences, language
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.utils.errors import ConfigError

_SHOWN = 3


def _refuse(where: str, lines: List[str]) -> None:
    if lines:
        text = f"{where}: the language model's structure must not change: {'; '.join(lines)}"
        raise ConfigError(text, "language-model")


class LanguageGuard:
    """Names and shapes of the LLM's tensors in the base model's weights. Reads headers only.

    config, reader: the MGenConfig and the opened weights of base_folder.

    Raises:
        ConfigError: config.json describes another LLM than the weights hold.
    """

    def __init__(self, base_folder: str, config, reader: WeightsReader):
        self.shapes = language(reader.shapes())
        lines = differences(language(parameter_shapes(config)), self.shapes, _SHOWN)
        _refuse(f"config.json and weights of {base_folder}", lines)

    def check(self, model) -> None:
        """Check a MGenLMHeadModel, with or without adapters.

        Raises:
            ConfigError: its LLM parameters differ from those of the base model in name or shape.
        """
        _refuse("the model to train", differences(language(model.whole_shapes()), self.shapes, _SHOWN))


def check_text_model(config, folder: str) -> None:
    """Check that the LLM of another model folder can replace the LLM of a model with this MGenConfig.

    Raises:
        ConfigError: it has another structure or other settings.
    """
    other = AutoConfigMIX.from_pretrained(folder)
    pairs = {key: (getattr(other, key), getattr(config, key)) for key in LANGUAGE_KEYS}
    lines = [f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    with open_weights(folder) as reader:
        lines += differences(language(reader.shapes()), language(parameter_shapes(config)), _SHOWN)
    _refuse(f"text_model_name_or_path {folder}", lines)
