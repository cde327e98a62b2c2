"""The folders of a model for inference: a model folder, optionally with tuned weights on top of it."""

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
from paddlemix.checkpoint.origin import Origin, check_same_vocabulary
from paddlemix.inference.facts import fingerprint_folder
from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line


class Source(NamedTuple):
    """base: a model folder. tuned: the folder of a run on it, whose adapters or parts are applied. text: the folder
    whose LLM the run used instead of the base's."""

    base: str
    tuned: Optional[str] = None
    text: Optional[str] = None

    def folder_of(self, *names: str) -> str:
        """The folder of a tokenizer or template: the tuned one if it has a file with one of these names."""
        if self.tuned is not None and any(os.path.isfile(os.path.join(self.tuned, name)) for name in names):
            return self.tuned
        return self.base

    def fingerprints(self) -> Dict[str, str]:
        """fingerprint_folder of each, for the run.json of a prediction."""
        named = {"sha256": self.base, "tuned_sha256": self.tuned, "text_sha256": self.text}
        return {key: fingerprint_folder(folder) for key, folder in named.items() if folder is not None}


def find_model_folder(path: str) -> str:
    """The model folder at `path`, or the only one inside it (`weights/` holds one model folder).

    Raises:
        UserError: there is none, or more than one.
    """
    if os.path.isfile(path):
        raise UserError(f"{path} is a file, not a model folder: --help has the order of the arguments", "is-a-file")
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}: give a model folder, or the folder that holds it", "no-folder")
    if _is_model(path):
        return path
    inside = [name for name in sorted(os.listdir(path)) if _is_model(os.path.join(path, name))]
    if not inside:
        raise UserError(f"no config.json in {path} nor in a folder inside it: give a model folder", "no-model")
    if len(inside) > 1:
        raise UserError(f"{path} holds several models ({', '.join(inside)}): name one of them", "several-models")
    return os.path.join(path, inside[0])


def _is_model(folder: str) -> bool:
    marks = ("config.json", LORA_WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME)
    return any(os.path.isfile(os.path.join(folder, name)) for name in marks)


def is_tuned(folder: str) -> bool:
    """Whether a folder holds adapters or tuned parts, and no full model."""
    return find_tuned_weights(folder) is not None and not files_of(folder, WEIGHTS, TORCH_WEIGHTS)


def find_source(path: str, lora_path: Optional[str] = None) -> Source:
    """The folders of the model at `path` (see find_model_folder), with the tuned weights of `lora_path`.

    `path` may itself be a tuned folder, whose tuned_from.json names the base; its fingerprint must match.

    Raises:
        UserError: the base is not found, or is not the model that was tuned; the message holds the merge command.
    """
    folder = find_model_folder(path)
    if lora_path is None:
        return _with_its_base(folder) if is_tuned(folder) else Source(folder)
    if is_tuned(folder):
        text = f"{folder} is the folder of a tuning run: give its base, and the one of {lora_path} on top"
        raise UserError(text, "tuned-folder")
    if not os.path.isdir(lora_path) or find_tuned_weights(lora_path) is None:
        raise UserError(f"--lora_path {lora_path}: give the folder of a tuning run, with adapters or trained parts")
    origin = Origin.read(lora_path)
    _, text = origin.find()
    if origin.text is not None and text is None:
        command = merge_command(lora_path, folder, origin.text)
        text = f"{lora_path} took its LLM from {_missing(origin.text, ' or')} merge it first: {command}"
        raise UserError(text, "no-text-model")
    origin.check(lora_path, folder)
    return Source(folder, lora_path, text)


def _missing(recorded: str, last: str = "") -> str:
    """That a recorded model is not there, and what helps if its path is relative, in a list that goes on."""
    remedy = "" if os.path.isabs(recorded) else f" run this in the directory where it was tuned,{last}"
    return f"{one_line(recorded, 300)}, and that model is not there:{remedy}"


def _with_its_base(tuned: str) -> Source:
    origin = Origin.read(tuned)
    base, text = origin.find()
    if base is None or (origin.text is not None and text is None):
        named = origin.base
        if named is None and os.path.isfile(os.path.join(tuned, LORA_CONFIG_NAME)):
            named = read_lora_config(tuned).get("base_model_name_or_path")
        if not isinstance(named, str):
            named, why = None, "does not name the model that it was tuned from:"
        elif origin.base_fingerprint is None:
            why = f"names its base, {one_line(named, 300)}, without a fingerprint (an older version wrote it):"
        elif base is None:
            why = f"was tuned from {_missing(named)}"
        else:
            why = f"took its LLM from {_missing(origin.text)}"
        raise UserError(
            f"{tuned} {why} give the base as the model, with --lora_path {shlex.quote(tuned)}, "
            f"or merge them: {merge_command(tuned, named, origin.text)}",
            "lora_path",
        )
    check_same_vocabulary(tuned, base)
    logger.info("%s was tuned from %s, which has the fingerprint in tuned_from.json", tuned, base)
    return Source(base, tuned, text)
