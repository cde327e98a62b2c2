"""Which folders a model to ask is made of: a model folder, or what a run tuned on top of its base."""

from __future__ import annotations

import os
import shlex
from typing import Dict, NamedTuple, Optional

from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.model_folder import (
    LORA_CONFIG_NAME,
    LORA_WEIGHTS_NAME,
    PARTIAL_WEIGHTS_NAME,
    TORCH_WEIGHTS,
    WEIGHTS,
    files_of,
    find_tuned_weights,
    merge_command,
)
from paddlemix.checkpoint.origin import Origin
from paddlemix.checkpoint.tensors import printable
from paddlemix.inference.facts import fingerprint_folder
from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger


class Source(NamedTuple):
    """base: a model folder. tuned: the folder of a run on it, whose adapters or parts are put on. text: the folder
    whose LLM the run took in place of the base's."""

    base: str
    tuned: Optional[str] = None
    text: Optional[str] = None

    def folder_of(self, *names: str) -> str:
        """The folder to read a tokenizer or a template from: the tuned one if it has a file of one of these names."""
        if self.tuned is not None and any(os.path.isfile(os.path.join(self.tuned, name)) for name in names):
            return self.tuned
        return self.base

    def fingerprints(self) -> Dict[str, str]:
        """fingerprint_folder of each, as the run.json of a prediction holds them."""
        named = {"sha256": self.base, "tuned_sha256": self.tuned, "text_sha256": self.text}
        return {key: fingerprint_folder(folder) for key, folder in named.items() if folder is not None}


def find_model_folder(path: str) -> str:
    """The model folder at `path`, or the only one inside it (`weights/` holds one model folder).

    Raises:
        UserError: there is none, or more than one.
    """
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}: give a model folder, or the folder that holds it")
    if _is_model(path):
        return path
    inside = [name for name in sorted(os.listdir(path)) if _is_model(os.path.join(path, name))]
    if not inside:
        raise UserError(f"no config.json in {path} nor in a folder inside it: give a model folder")
    if len(inside) > 1:
        raise UserError(f"{path} holds several models ({', '.join(inside)}): name one of them")
    return os.path.join(path, inside[0])


def _is_model(folder: str) -> bool:
    marks = ("config.json", LORA_WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME)
    return any(os.path.isfile(os.path.join(folder, name)) for name in marks)


def is_tuned(folder: str) -> bool:
    """Whether a folder holds what a run tuned, and no weights of a whole model."""
    return find_tuned_weights(folder) is not None and not files_of(folder, WEIGHTS, TORCH_WEIGHTS)


def find_source(path: str, lora_path: Optional[str] = None) -> Source:
    """The folders of the model at `path` (see find_model_folder), with what was tuned in `lora_path` put on it.

    `path` may itself be a tuned folder. Then its tuned_from.json names the base, which is taken if it has the
    fingerprint in there.

    Raises:
        UserError: the base is not found, or is not the model that was tuned; the message holds the command to merge.
    """
    folder = find_model_folder(path)
    if lora_path is None:
        return _with_its_base(folder) if is_tuned(folder) else Source(folder)
    if is_tuned(folder):
        raise UserError(f"{folder} is the folder of a tuning run: give its base, and the one of {lora_path} on top")
    if not os.path.isdir(lora_path) or find_tuned_weights(lora_path) is None:
        raise UserError(f"--lora_path {lora_path}: give the folder of a tuning run, with adapters or trained parts")
    origin = Origin.read(lora_path)
    _, text = origin.find()
    if origin.text is not None and text is None:
        command = merge_command(lora_path, folder, origin.text)
        text = f"{lora_path} took its LLM from a model that is not where it was: merge it first: {command}"
        raise UserError(text, "no-text-model")
    origin.check(lora_path, folder)
    return Source(folder, lora_path, text)


def _with_its_base(tuned: str) -> Source:
    origin = Origin.read(tuned)
    base, text = origin.find()
    if base is None or (origin.text is not None and text is None):
        named = origin.base
        if named is None and os.path.isfile(os.path.join(tuned, LORA_CONFIG_NAME)):
            named = read_lora_config(tuned).get("base_model_name_or_path")
        if not isinstance(named, str):
            named, why = None, "does not name the model that it was tuned from"
        elif origin.base_fingerprint is None:
            why = f"names its base, {printable(named, 300)}, without a fingerprint (it is of an older version)"
        elif base is None:
            why = f"was tuned from {printable(named, 300)}, and that model is not there"
        else:
            why = f"took its LLM from {printable(str(origin.text), 300)}, and that model is not there"
        raise UserError(
            f"{tuned} {why}: give the base as the model, with --lora_path {shlex.quote(tuned)}, "
            f"or merge them: {merge_command(tuned, named, origin.text)}",
            "lora_path",
        )
    logger.info("%s was tuned from %s, which has the fingerprint in tuned_from.json", tuned, base)
    return Source(base, tuned, text)
