"""The configuration of a LoRA checkpoint, read as what it is: a file from anywhere."""

from __future__ import annotations

import json
import os
from typing import Dict

from paddlemix.utils.errors import WeightsError

LORA_CONFIG_NAME = "lora_config.json"

# Variants of LoRA that PaddleNLP knows. Their scale or their matrices differ, and merging here does not
# cover them.
_VARIANTS = ("rslora", "pissa", "loraga", "use_mora", "lora_use_mixer", "do_qat")


def read_lora_config(folder: str) -> Dict:
    """lora_config.json of a LoRA folder, checked.

    Raises:
        WeightsError: missing, no JSON object, without rank, scale or targets, or a variant this project
        cannot merge.
    """
    path = os.path.join(folder, LORA_CONFIG_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise WeightsError(
            f"no {LORA_CONFIG_NAME} in {folder}: give the folder of a LoRA checkpoint"
        ) from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise WeightsError(f"{path}: {name} must be a number above 0, not {value!r}")
    targets = config.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise WeightsError(f"{path}: target_modules must be a list of regular expressions")
    config["target_modules"] = targets
    for name in _VARIANTS:
        if config.get(name):
            raise WeightsError(f"{path}: {name} is a variant of LoRA that is not built here")
    return config
