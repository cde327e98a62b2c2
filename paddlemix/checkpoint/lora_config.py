"""lora_config.json of a LoRA checkpoint, read as untrusted input."""

from __future__ import annotations

import math
import os
from typing import Dict

from paddlemix.checkpoint.model_folder import LORA_CONFIG_NAME
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.json_files import read_json_object
from paddlemix.utils.texts import one_line

# Variants of LoRA in PaddleNLP with another scale or other matrices, which merging here does not cover.
_VARIANTS = ("rslora", "pissa", "loraga", "use_mora", "lora_use_mixer", "do_qat", "enable_lora_list")


def read_lora_config(folder: str) -> Dict:
    """lora_config.json of a LoRA folder, checked.

    Raises:
        WeightsError: missing, not a JSON object, without rank, scale or targets, with a scale other than alpha / rank,
        or a variant that this project cannot merge.
    """
    path = os.path.join(folder, LORA_CONFIG_NAME)
    if not os.path.lexists(path):
        raise WeightsError(f"no {LORA_CONFIG_NAME} in {folder}: give the folder of a LoRA checkpoint", "no-lora-config")
    config = read_json_object(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise WeightsError(f"{path}: r must be a positive integer, not {one_line(repr(rank))}", "r")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise WeightsError(f"{path}: lora_alpha must be positive, not {one_line(repr(alpha))}", "lora_alpha")
    targets = config.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise WeightsError(f"{path}: target_modules must be a list of regular expressions", "target_modules")
    config["target_modules"] = targets
    for name in _VARIANTS:
        if config.get(name):
            raise WeightsError(f"{path}: {name} is a variant of LoRA that is not supported here", name)
    scaling = config.get("scaling")
    if scaling is not None and scaling != alpha / rank:
        text = f"{path}: scaling is {one_line(str(scaling))}, but lora_alpha / r is {alpha / rank}: which is right?"
        raise WeightsError(text, "scaling")
    return config
