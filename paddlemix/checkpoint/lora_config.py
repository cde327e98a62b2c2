"""The configuration of a LoRA checkpoint, read as what it is: a file from anywhere."""

from __future__ import annotations

import math
import os
from typing import Dict

from paddlemix.checkpoint.model_folder import LORA_CONFIG_NAME
from paddlemix.checkpoint.tensors import printable
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.json_files import read_json_object

# Variants of LoRA that PaddleNLP knows. Their scale or their matrices differ, and merging here does not
# cover them.
_VARIANTS = ("rslora", "pissa", "loraga", "use_mora", "lora_use_mixer", "do_qat")


def read_lora_config(folder: str) -> Dict:
    """lora_config.json of a LoRA folder, checked.

    Raises:
        WeightsError: missing, no JSON object, without rank, scale or targets, with a scale that is not alpha / rank, or
        a variant that this project cannot merge.
    """
    path = os.path.join(folder, LORA_CONFIG_NAME)
    if not os.path.lexists(path):
        raise WeightsError(f"no {LORA_CONFIG_NAME} in {folder}: give the folder of a LoRA checkpoint")
    config = read_json_object(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise WeightsError(f"{path}: r must be a number above 0 without a fraction, not {printable(repr(rank))}")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise WeightsError(f"{path}: lora_alpha must be a number above 0, not {printable(repr(alpha))}")
    targets = config.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise WeightsError(f"{path}: target_modules must be a list of regular expressions")
    config["target_modules"] = targets
    for name in _VARIANTS:
        if config.get(name):
            raise WeightsError(f"{path}: {name} is a variant of LoRA that is not built here")
    if config.get("enable_lora_list"):
        raise WeightsError(f"{path}: enable_lora_list is a variant of LoRA that is not built here")
    scaling = config.get("scaling")
    if scaling is not None and scaling != alpha / rank:
        raise WeightsError(
            f"{path}: scaling is {printable(str(scaling))}, but lora_alpha / r is {alpha / rank}; which one is right?"
        )
    return config
