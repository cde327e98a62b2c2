"""The contest's rule on the LLM: its weights may be tuned, its structure and parameter count must not change.

Checked before a run starts, and again whenever it saves.
"""

from __future__ import annotations

from typing import Dict, List

from paddlemix.auto import AutoConfigMIX
from paddlemix.checkpoint import WeightsReader, open_weights
from paddlemix.checkpoint.structure import LANGUAGE_KEYS, is_language
from paddlemix.models.mgen_vl.parameters import Shape, parameter_shapes
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.texts import some

_RULE = "the language model's structure must not change"


def _differences(found: Dict[str, Shape], expected: Dict[str, Shape]) -> List[str]:
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is new" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            lines.append(f"{name} is {list(found[name])}, not {list(shape)}")
    return lines


def _language_shapes(reader: WeightsReader) -> Dict[str, Shape]:
    return {name: tuple(reader.info(name).shape) for name in reader.keys() if is_language(name)}


def _refuse(where: str, lines: List[str]) -> None:
    if lines:
        raise ConfigError(f"{where}: {_RULE}: {some(lines, 3, '; ')}", "language-model")


class LanguageGuard:
    """Names and shapes of the LLM's tensors in the base model's weights. Reads headers only.

    config, reader: the MGenConfig and the opened weights of base_folder.

    Raises:
        ConfigError: config.json describes another LLM than the weights hold.
    """

    def __init__(self, base_folder: str, config, reader: WeightsReader):
        self.shapes = _language_shapes(reader)
        described = {name: shape for name, shape in parameter_shapes(config).items() if is_language(name)}
        _refuse(f"config.json and weights of {base_folder}", _differences(described, self.shapes))

    def check(self, model) -> None:
        """Check a MGenLMHeadModel, with or without adapters.

        Raises:
            ConfigError: its LLM parameters differ from those of the base model in name or shape.
        """
        found = {name: shape for name, shape in model.whole_shapes().items() if is_language(name)}
        _refuse("the model to train", _differences(found, self.shapes))


def check_text_model(config, folder: str) -> None:
    """Check that the LLM of another model folder can replace the LLM of a model with this MGenConfig.

    Raises:
        ConfigError: it has another structure or other settings.
    """
    other = AutoConfigMIX.from_pretrained(folder)
    lines = []
    for key in LANGUAGE_KEYS:
        ours, theirs = getattr(config, key), getattr(other, key)
        if ours != theirs:
            lines.append(f"{key} is {theirs}, not {ours}")
    expected = {name: shape for name, shape in parameter_shapes(config).items() if is_language(name)}
    with open_weights(folder) as reader:
        stored = _language_shapes(reader)
    _refuse(f"text_model_name_or_path {folder}", lines + _differences(stored, expected))
