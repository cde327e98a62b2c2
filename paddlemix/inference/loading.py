"""A model folder, found and loaded with everything that is needed to ask it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Optional

from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger


class Loaded(NamedTuple):
    """model: MGenLMHeadModel in eval mode. template: its ChatTemplate, from chat_template.json or the default."""

    model: Any
    tokenizer: Any
    processor: Any
    image_processor: Any
    template: Any


def find_model_folder(path: str) -> str:
    """The model folder at `path`, or the only one inside it (`weights/` holds one model folder).

    Raises:
        UserError: there is none, or more than one.
    """
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}: give a model folder, or the folder that holds it")
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    inside = [name for name in sorted(os.listdir(path)) if os.path.isfile(os.path.join(path, name, "config.json"))]
    if not inside:
        raise UserError(f"no config.json in {path} nor in a folder inside it: give a model folder")
    if len(inside) > 1:
        raise UserError(f"{path} holds several models ({', '.join(inside)}): name one of them")
    return os.path.join(path, inside[0])


def load_model(folder: str, dtype: Optional[str] = None, device: Optional[str] = None) -> Loaded:
    """Load a model folder (see find_model_folder) for inference; device, dtype and threads are logged.

    dtype: by default as the weights are stored, where the device can compute in it. device: see
    resolve_device.

    Raises:
        UserError: the folder is not a whole model.
    """
    from paddlemix.auto import AutoConfigMIX, AutoModelMIX, AutoProcessorMIX
    from paddlemix.utils.runtime import describe_threads, resolve_device

    chosen = resolve_device(device)
    if chosen.reason:
        logger.warning(chosen.reason)
    config = AutoConfigMIX.from_pretrained(folder, dtype=dtype)
    processor, image_processor = AutoProcessorMIX.from_pretrained(folder)
    model = AutoModelMIX.from_pretrained(folder, config=config, dtype=dtype)
    fused = ", fused attention" if model.generates_fused() else ""
    logger.info("%s on %s in %s%s; %s", folder, chosen.value, model.config.dtype, fused, describe_threads())
    return Loaded(model, processor.tokenizer, processor, image_processor, processor.template)
