"""The contest's rule on the LLM: its weights may be tuned, its structure and parameter count must not change.

A run that would change them is refused: before it starts, and again whenever it saves.
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
        raise ConfigError(f"{where}: {_RULE}: {some(lines, 3, '; ')}")


class LanguageGuard:
    """Names and shapes of the LLM as the base model's weights hold them. Reads headers only.

    config, reader: the MGenConfig and the opened weights of base_folder.

    Raises:
        ConfigError: config.json promises another LLM than the weights are.
    """

    def __init__(self, base_folder: str, config, reader: WeightsReader):
        self.shapes = _language_shapes(reader)
        promised = {name: shape for name, shape in parameter_shapes(config).items() if is_language(name)}
        _refuse(f"config.json and weights of {base_folder}", _differences(promised, self.shapes))

    def check(self, model) -> None:
        """Compare a MGenLMHeadModel, with or without adapters.

        Raises:
            ConfigError: it has other LLM parameters than the base model, or of other shapes.
        """
        found = {name: shape for name, shape in model.whole_shapes().items() if is_language(name)}
        _refuse("the model to train", _differences(found, self.shapes))


def check_text_model(config, folder: str) -> None:
    """Whether the LLM of another model folder can take the place of that in a model with this MGenConfig.

    Raises:
        ConfigError: it is of another structure, or computes otherwise.
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


def check_vocabulary(tokenizer, config) -> None:
    """Whether every id of the tokenizer has its row in the embeddings, and the image tags are the model's.

    Raises:
        ConfigError: the tokenizer has more ids (the embeddings would have to grow), or other ids for images.
    """
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} ids, the model {config.vocab_size} rows of embeddings: {_RULE}, so no "
            "rows are added; use the tokenizer that belongs to the model"
        )
    if tokenizer.img_start_id != config.image_start_id:
        raise ConfigError(
            f"<img> is {tokenizer.img_start_id} in the tokenizer and {config.image_start_id} in config.json "
            "(visual.image_start_id): use the tokenizer that belongs to the model"
        )
    if tokenizer.n_queries != config.n_queries:
        raise ConfigError(
            f"an image span has {tokenizer.n_queries} ids in the tokenizer and {config.n_queries} in config.json "
            "(visual.n_queries): use the tokenizer that belongs to the model"
        )
