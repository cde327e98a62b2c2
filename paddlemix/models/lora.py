"""LoRA adapters (Hu et al. 2021) on PaddleNLP's LoRAModel: put on, read back, checked.

A module `name` of weight W [in, out] gets `name.lora_A` [in, r] and `name.lora_B` [r, out]; its output
becomes x·W + (alpha / r) · dropout(x)·A·B. Further parameters may train whole beside the adapters; they are
saved with them.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from paddlemix.checkpoint import LORA_WEIGHTS_NAME, WeightsReader, open_weights
from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.shards import inside
from paddlemix.models.mgen_vl.parameters import check_weights
from paddlemix.utils.errors import ConfigError, WeightsError


def adapted_modules(names: Sequence[str], target_modules: Sequence[str]) -> List[str]:
    """Modules that get an adapter: those whose whole name matches one of the regular expressions.

    names: parameter names of the model; a module is one that has a `.weight`.

    Raises:
        ConfigError: expressions are broken or match no module (each is named).
    """
    modules = [name[: -len(".weight")] for name in names if name.endswith(".weight")]
    chosen, problems = set(), []
    for pattern in target_modules:
        try:
            matches = [module for module in modules if re.fullmatch(pattern, module)]
        except re.error as error:
            problems.append(f'lora_target_modules: "{pattern}" is no regular expression ({error})')
            continue
        if not matches:
            problems.append(f'lora_target_modules: "{pattern}" matches no module (names are like {modules[-2]})')
        chosen.update(matches)
    if problems:
        raise ConfigError("; ".join(problems))
    return [module for module in modules if module in chosen]


def adapter_shapes(
    shapes: Dict[str, Tuple[int, ...]], target_modules: Sequence[str], rank: int
) -> Dict[str, Tuple[int, ...]]:
    """Names and shapes of the adapters on a model with these parameter shapes."""
    found = {}
    for module in adapted_modules(list(shapes), target_modules):
        weight = shapes[module + ".weight"]
        # The one matrix that is no Linear layer's.
        if len(weight) != 2 or module.endswith(".wte"):
            raise ConfigError(f"lora_target_modules: {module} is no Linear layer (its weight is {list(weight)})")
        found[module + ".lora_A"] = (weight[0], rank)
        found[module + ".lora_B"] = (rank, weight[1])
    return found


def check_claims(adapters: Iterable[str], trainable: Iterable[str]) -> None:
    """Raise ConfigError when a weight would both train whole and carry an adapter. adapters: their names."""
    weights = {name.rpartition(".")[0] + ".weight" for name in adapters}
    both = sorted(set(trainable) & weights)
    if both:
        raise ConfigError(f"freeze_exclude and lora_target_modules both claim {both[0]}; leave it out of one of them")


def apply_lora(
    model,
    *,
    rank: int,
    alpha: int,
    target_modules: Sequence[str],
    dropout: float = 0.0,
    trainable: Sequence[str] = (),
    base_model_name_or_path: Optional[str] = None,
):
    """Put fresh adapters on `model` and return the LoRAModel around it: A random, B zero, so nothing
    changes yet.

    trainable: names of base parameters that train whole beside the adapters. All others are frozen.

    Raises:
        ConfigError: a target matches nothing or is no Linear layer, or a weight would both train and carry
        an adapter.
    """
    from paddle import nn
    from paddlenlp.peft import LoRAConfig

    from paddlemix.models.mgen_vl.tensor_parallel import MGenLoRAModel

    names = list(model.state_dict())
    modules = adapted_modules(names, target_modules)
    layers = dict(model.named_sublayers())
    for module in modules:
        if not isinstance(layers[module], nn.Linear) and "Parallel" not in type(layers[module]).__name__:
            raise ConfigError(f"lora_target_modules: {module} is no Linear layer but a {type(layers[module]).__name__}")
    check_claims([module + ".lora_A" for module in modules], trainable)
    config = LoRAConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        # Expressions again, so each name is spelled out.
        trainable_modules=[re.escape(name) for name in trainable] or None,
        tensor_parallel_degree=model.config.tensor_parallel_degree,
        dtype=str(model.config.dtype).replace("paddle.", ""),
        base_model_name_or_path=base_model_name_or_path,
    )
    return MGenLoRAModel(model, config)


@contextlib.contextmanager
def open_lora_weights(folder: str, trained: Dict[str, Tuple[int, ...]]) -> Iterator[WeightsReader]:
    """The weights of a LoRA folder, which must be of these names and shapes: adapters and what trained beside them.

    Raises:
        WeightsError: there are none, or others; the message lists them.
    """
    path = inside(folder, LORA_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise WeightsError(f"no {LORA_WEIGHTS_NAME} in {folder}")
    with open_weights(path) as reader:
        check_weights(reader, trained, path)
        yield reader


def load_lora_weights(lora_model, folder: str) -> None:
    """Set the adapters, and what trained beside them, of a LoRAModel from a LoRA folder, without executing anything.

    Raises:
        WeightsError: as open_lora_weights.
    """
    model = lora_model.model
    shapes = model.whole_shapes()
    expected = {name for name, tensor in model.state_dict().items() if not tensor.stop_gradient}
    with open_lora_weights(folder, {name: shapes[name] for name in expected}) as reader:
        model.fill(reader, expected)


def load_lora(model, folder: str):
    """Put the adapters of a LoRA folder on `model`; returns the LoRAModel, in eval mode.

    Parameters that trained whole beside the adapters take the place of the base's.

    Raises:
        WeightsError: the configuration or the weights are broken or do not fit the model.
    """
    config = read_lora_config(folder)
    names = list(model.state_dict())
    patterns = config.get("trainable_modules") or []
    whole = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    try:
        lora_model = apply_lora(
            model,
            rank=int(config["r"]),
            alpha=config["lora_alpha"],
            target_modules=config["target_modules"],
            dropout=float(config.get("lora_dropout") or 0.0),
            trainable=whole,
            base_model_name_or_path=config.get("base_model_name_or_path"),
        )
    except ConfigError as error:
        raise WeightsError(f"{folder} does not fit the model: {error}") from None
    load_lora_weights(lora_model, folder)
    lora_model.eval()
    return lora_model
