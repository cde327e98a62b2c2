"""The model of a run: load, freeze, add adapters, save, and load again.

What is saved depends on what trains:
  adapters        PaddleNLP's LoRA files, which include fully trained parameters
  a part          partial_model_state.pdparams with the tensors that train
  everything      a model folder
each with tuned_from.json, which names the models that the run started from.
merge_lora_params.py merges the first two into their base.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Dict, Iterator, Optional, Sequence

import paddle
from paddlenlp.peft import LoRAModel

from paddlemix.auto import AutoModelMIX
from paddlemix.checkpoint import PARTIAL_WEIGHTS_NAME, WeightsReader, open_weights, write_items
from paddlemix.checkpoint.model_folder import inside
from paddlemix.checkpoint.origin import Origin
from paddlemix.checkpoint.structure import is_language
from paddlemix.models.lora import apply_lora, load_lora_weights, open_lora_weights
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.models.mgen_vl.parameters import Shape, check_weights, parameter_shapes
from paddlemix.trainer import freeze
from paddlemix.trainer.keys import ModelArguments
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.log import logger


def base_of(model):
    """The MGenLMHeadModel inside a LoRAModel, or the model itself."""
    return model.model if isinstance(model, LoRAModel) else model


def load_base_model(model_args: ModelArguments, config: MGenConfig, dtype: str, cards: int = 1, card: int = 0):
    """The model to tune, in train mode and not yet frozen.

    config: of the model folder. dtype: "float32", "float16" or "bfloat16". cards, card: degree and rank of tensor
    parallelism.
    """
    if cards > 1:
        config.tensor_parallel_degree, config.tensor_parallel_rank = cards, card
    model = AutoModelMIX.from_pretrained(model_args.model_name_or_path, config=config, dtype=dtype)
    if model_args.text_model_name_or_path is not None:
        # Checked by guard.check_text_model.
        with open_weights(model_args.text_model_name_or_path) as reader:
            model.fill(reader, {name for name in reader.keys() if is_language(name)})
    if model_args.neftune:
        add_neftune(model, model_args.neftune_noise_alpha)
    model.train()
    return model


def add_neftune(model, alpha: float) -> None:
    """NEFTune (Jain et al. 2023): uniform noise of alpha / sqrt(T · D) on embeddings [B, T, D]."""

    def add_noise(layer, inputs, output):
        if not layer.training:
            return output
        bound = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + paddle.uniform(output.shape, "float32", -bound, bound).astype(output.dtype)

    model.get_input_embeddings().register_forward_post_hook(add_noise)


def choose_trainable(model, model_args: ModelArguments, trainable: Sequence[str]):
    """Freeze all but `trainable` and add adapters; returns the model to train, a LoRAModel with lora."""
    include, exclude = model_args.freeze_include, model_args.freeze_exclude
    if include or exclude:
        logger.info(f"Freeze parameters: {include} and exclude parameters: {exclude}")
    freeze.apply_freeze(model, trainable)
    if include or exclude:
        logger.info("Freeze parameters successfully.")
    if not model_args.lora:
        return model
    model = apply_lora(
        model,
        rank=model_args.lora_rank,
        alpha=model_args.lora_alpha,
        dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        trainable=trainable,
        base_model_name_or_path=model_args.model_name_or_path,
    )
    if model_args.lora_path is not None:
        load_lora_weights(model, model_args.lora_path)
        logger.info(f"Adapters loaded from {model_args.lora_path}")
    return model


def _trained(model) -> Optional[dict]:
    """Full shapes of the tensors that train in a MGenLMHeadModel; None if all of them train."""
    shapes = model.whole_shapes()
    trained = {name: shapes[name] for name, t in model.state_dict().items() if not t.stop_gradient}
    return None if freeze.is_everything(trained, shapes) else trained


def save_tuned(model, folder: str, origin: Origin, is_main_process: bool) -> None:
    """Write what this run changes into `folder` (see the module's docstring), with the model's configuration.

    All processes that share matrices must call it; only the main process writes.
    """
    adapters = isinstance(model, LoRAModel)
    trained = None if adapters else _trained(model)
    if adapters:
        model.save_pretrained(folder, merge_tensor_parallel=True, is_main_process=is_main_process)
    elif trained is None:
        model.save_pretrained(folder, is_main_process=is_main_process)
    else:
        items = model.whole_items(trained)
        if is_main_process:
            write_items(os.path.join(folder, PARTIAL_WEIGHTS_NAME), items)
            model.config.save_pretrained(folder)
        else:
            for *_, read in items:
                read()
    if is_main_process:
        origin.write(folder)


@contextlib.contextmanager
def open_tuned(folder: str, shapes: Dict[str, Shape], kind: str, origin: Origin) -> Iterator[WeightsReader]:
    """The weights that save_tuned wrote in a run of the same kind ("adapters", "part" or "everything").

    shapes: of what such a run saves. Executes nothing in the folder.

    Raises:
        WeightsError: the folder is broken, or belongs to a run of another kind or on another base.
    """
    if kind != "everything" and not Origin.read(folder).same_weights(origin):
        raise WeightsError(
            f"{folder} was tuned from other weights than {origin.base} holds now: resume with the original ones",
            "other-weights",
        )
    if kind == "adapters":
        with open_lora_weights(folder, shapes) as reader:
            yield reader
        return
    with open_weights(folder if kind == "everything" else inside(folder, PARTIAL_WEIGHTS_NAME)) as reader:
        check_weights(reader, shapes, folder)
        yield reader


def load_tuned(model, folder: str, origin: Origin) -> None:
    """Load the parameters that save_tuned wrote. Raises WeightsError: see open_tuned."""
    base = base_of(model)
    trained = _trained(base)
    kind = "adapters" if isinstance(model, LoRAModel) else "part" if trained is not None else "everything"
    with open_tuned(folder, trained or parameter_shapes(base.config), kind, origin) as reader:
        base.fill(reader, trained)
