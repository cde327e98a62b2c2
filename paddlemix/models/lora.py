"""LoRA adapters (Hu et al. 2021) on PaddleNLP's LoRAModel: adding, loading and checking them.

A module `name` of weight W [in, out] gets `name.lora_A` [in, r] and `name.lora_B` [r, out]; its output becomes x·W +
(alpha / r) · dropout(x)·A·B. Other parameters may train in full; they are saved with the adapters.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from paddlemix.checkpoint import LORA_WEIGHTS_NAME, WeightsReader, open_weights
from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.model_folder import inside
from paddlemix.models.mgen_vl.parameters import check_weights
from paddlemix.utils.errors import ConfigError, WeightsError


def adapted_modules(shapes: Dict[str, Tuple[int, ...]], target_modules: Sequence[str]) -> List[str]:
    """Linear layers that get an adapter: those whose full name matches one of the regular expressions, and all inside a
    container whose name does (`.*attn` selects its c_attn and c_proj).

    shapes: of the model's parameters by name.

    Raises:
        ConfigError: lists expressions that are invalid, match nothing, or match a layer that is not Linear.
    """
    # Two matrices are not of Linear layers: the embeddings, and lm_head (PaddleNLP's QWenLMHead).
    linear = {
        name[: -len(".weight")]: len(shape) == 2 and not name.endswith(("wte.weight", "lm_head.weight"))
        for name, shape in shapes.items()
        if name.endswith(".weight")
    }
    containers = {name[:end] for name in shapes for end, letter in enumerate(name) if letter == "."} - set(linear)
    chosen, problems = set(), []
    for pattern in target_modules:
        try:
            matches = re.compile(pattern).fullmatch
        except re.error as error:
            problems.append(f'lora_target_modules: "{pattern}" is not a regular expression ({error})')
            continue
        around = tuple(container + "." for container in containers if matches(container))
        direct = {module for module in linear if matches(module)}
        found = {module for module in linear if linear[module] and (module in direct or module.startswith(around))}
        others = [module for module in linear if module in direct and not linear[module]]
        # Within a container, other layers are skipped.
        others = [module for module in others if not module.startswith(around)]
        if others:
            weight = list(shapes[others[0] + ".weight"])
            problems.append(f"lora_target_modules: {others[0]} is not a Linear layer (its weight is {weight})")
        elif not found:
            problems.append(f'lora_target_modules: "{pattern}" matches no module (names are like {list(linear)[-2]})')
        chosen |= found
    if problems:
        raise ConfigError("; ".join(problems), "lora_target_modules")
    return [module for module in linear if module in chosen]


def adapter_shapes(
    shapes: Dict[str, Tuple[int, ...]], target_modules: Sequence[str], rank: int
) -> Dict[str, Tuple[int, ...]]:
    """Names and shapes of the adapters on a model with these parameter shapes."""
    found = {}
    for module in adapted_modules(shapes, target_modules):
        n_in, n_out = shapes[module + ".weight"]
        found[module + ".lora_A"] = (n_in, rank)
        found[module + ".lora_B"] = (rank, n_out)
    return found


def check_claims(adapters: Iterable[str], trainable: Iterable[str]) -> None:
    """Raise ConfigError if a weight would both train in full and have an adapter. adapters: their names."""
    weights = {name.rpartition(".")[0] + ".weight" for name in adapters}
    both = sorted(set(trainable) & weights)
    if both:
        keys = "freeze_exclude", "lora_target_modules"
        raise ConfigError(f"{' and '.join(keys)} both claim {both[0]}; leave it out of one of them", *keys)


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
    """Add new adapters to `model` and return the LoRAModel around it. A is random, B zero, so the output is unchanged.

    trainable: names of base parameters that train in full. All others are frozen.

    Raises:
        ConfigError: a target matches nothing or is not a Linear layer, or a weight would both train and have an
        adapter.
    """
    from paddlenlp.peft import LoRAConfig

    from paddlemix.models.mgen_vl.tensor_parallel import MGenLoRAModel

    modules = adapted_modules(model.whole_shapes(), target_modules)
    check_claims([module + ".lora_A" for module in modules], trainable)
    config = LoRAConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, modules, target_modules),
        # PaddleNLP takes regular expressions.
        trainable_modules=[re.escape(name) for name in trainable] or None,
        tensor_parallel_degree=model.config.tensor_parallel_degree,
        dtype=str(model.config.dtype).replace("paddle.", ""),
        base_model_name_or_path=base_model_name_or_path,
    )
    return MGenLoRAModel(model, config)


def _targets(model, modules: Sequence[str], target_modules: Sequence[str]) -> List[str]:
    """The expressions as given, or the layers' names if PaddleNLP would match, and refuse, further layers."""
    matched = {name for name, _ in model.named_sublayers() if any(re.fullmatch(one, name) for one in target_modules)}
    return list(target_modules) if matched == set(modules) else list(modules)


@contextlib.contextmanager
def open_lora_weights(folder: str, trained: Dict[str, Tuple[int, ...]]) -> Iterator[WeightsReader]:
    """The weights of a LoRA folder, which must have these names and shapes: adapters and fully trained parameters.

    Raises:
        WeightsError: there are none, or others; the message lists them.
    """
    path = inside(folder, LORA_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise WeightsError(f"no {LORA_WEIGHTS_NAME} in {folder}", "no-tuned-weights")
    with open_weights(path) as reader:
        check_weights(reader, trained, path)
        yield reader


def load_lora_weights(lora_model, folder: str) -> None:
    """Load the adapters and fully trained parameters of a LoRAModel from a LoRA folder, without executing anything.

    Raises:
        WeightsError: as open_lora_weights.
    """
    model = lora_model.model
    shapes = model.whole_shapes()
    expected = {name for name, tensor in model.state_dict().items() if not tensor.stop_gradient}
    with open_lora_weights(folder, {name: shapes[name] for name in expected}) as reader:
        model.fill(reader, expected)


def load_lora(model, folder: str):
    """Add the adapters of a LoRA folder to `model`; returns the LoRAModel, in eval mode.

    Fully trained parameters replace those of the base. The adapted layers follow from the weights' names, as in
    merging: the regular expressions of an untrusted configuration are never evaluated.

    Raises:
        WeightsError: the configuration or the weights are broken or do not fit the model.
    """
    config = read_lora_config(folder)
    shapes, rank = model.whole_shapes(), config["r"]
    path = inside(folder, LORA_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise WeightsError(f"no {LORA_WEIGHTS_NAME} in {folder}", "no-tuned-weights")
    with open_weights(path) as reader:
        keys = reader.keys()
        modules = dict.fromkeys(key[: -len(".lora_A")] for key in keys if key.endswith((".lora_A", ".lora_B")))
        expected = {key: shapes[key] for key in keys if key in shapes}
        for module in modules:
            weight = shapes.get(module + ".weight", ())
            if len(weight) == 2:
                expected[module + ".lora_A"], expected[module + ".lora_B"] = (weight[0], rank), (rank, weight[1])
        # Before allocating anything of this rank.
        check_weights(reader, expected, path)
    from paddlenlp.utils.log import logger as paddlenlp_logger

    # It would log that adapters are marked as trainable.
    level = paddlenlp_logger.logger.level
    paddlenlp_logger.logger.setLevel("WARNING")
    try:
        lora_model = apply_lora(
            model,
            rank=rank,
            alpha=config["lora_alpha"],
            target_modules=[re.escape(module) for module in modules],
            trainable=[key for key in keys if key in shapes],
            base_model_name_or_path=config.get("base_model_name_or_path"),
        )
    except ConfigError as error:
        raise WeightsError(f"{folder} does not fit the model: {error}") from None
    finally:
        paddlenlp_logger.logger.setLevel(level)
    load_lora_weights(lora_model, folder)
    lora_model.eval()
    return lora_model
