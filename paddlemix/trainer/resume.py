"""The state that a resumed run reads besides its weights: position, optimizer, learning rate, loss scaler.

PaddleNLP reads these files with paddle.load, which executes any code that a pickle names. Here they are read by
paddlemix.checkpoint as data, and every value is validated before Paddle sees it. In a run of several processes each
one reads the checkpoint, from a shared folder. `training_args.bin` and the generator states, which PaddleNLP saves, are
never read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import paddle
from paddlenlp.trainer import TrainerState

from paddlemix.checkpoint import load_pdparams_object
from paddlemix.trainer import run_checkpoints
from paddlemix.utils.compat import trainer_state
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.json_files import read_json_object
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line

OPTIMIZER_NAME = "optimizer.pdopt"
SCHEDULER_NAME = "scheduler.pdparams"
SCALER_NAME = "scaler.pdparams"
STATE_NAME = "trainer_state.json"

# An upper bound of steps; a larger number means a broken file.
_MOST_STEPS = 10**12
# AdamW's accumulators of a parameter; the beta powers are scalars.
_ACCUMULATORS = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_STEPS


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# ---- position


class Position(NamedTuple):
    """step: optimizer steps done. loss_sum: over those steps. order: the settings that determine the sample order."""

    step: int
    loss_sum: float
    order: Dict[str, int]


def read_position(folder: str) -> Position:
    """The position in the seal of a complete checkpoint.

    Raises:
        WeightsError: the folder is not a complete checkpoint, or its seal is malformed.
    """
    state = run_checkpoints.read_seal(folder)
    if state is None:
        raise WeightsError(f"{folder} is not a complete checkpoint", "incomplete")
    state = state if isinstance(state, dict) else {}
    position = Position(*(state.get(name) for name in ("global_step", "loss_sum", "order")))
    numbers = isinstance(position.order, dict) and all(map(_count, position.order.values()))
    # A float16 loss may be NaN for a skipped step.
    if not (_count(position.step) and position.step and type(position.loss_sum) is float and numbers):
        raise WeightsError(f"{os.path.join(folder, run_checkpoints.SEAL_NAME)} holds no valid position", "position")
    return position


def _text(value: Any) -> bool:
    return type(value) is str


def _logs(value: Any) -> bool:
    return type(value) is list and all(type(line) is dict for line in value)


_STATE: Dict[str, Callable[[Any], bool]] = {
    "epoch": _maybe(_number),
    "global_step": _count,
    "consumed_samples": _count,
    "max_steps": _count,
    "num_train_epochs": _count,
    "total_flos": _number,
    "log_history": _logs,
    "best_metric": _maybe(_number),
    "best_model_checkpoint": _maybe(_text),
    "is_local_process_zero": lambda value: type(value) is bool,
    "is_world_process_zero": lambda value: type(value) is bool,
    "trial_name": lambda value: value is None,
    "trial_params": lambda value: value is None,
}


# Maximum training lines in the history.
MOST_LINES = 10_000


def thinned(history: List[dict]) -> List[dict]:
    """The history without every second training line; evaluations and the newest line stay."""
    lines = [number for number, line in enumerate(history) if "loss" in line]
    left_out = set(lines[-2::-2])
    return [line for number, line in enumerate(history) if number not in left_out]


def write_trainer_state(state: TrainerState, folder: str) -> None:
    """Write trainer_state.json on one line: indenting the history of a long run takes seconds."""
    values = {one.name: getattr(state, one.name) for one in dataclasses.fields(state)}
    with atomic_write(os.path.join(folder, STATE_NAME)) as file:
        file.write(json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n")


def read_trainer_state(folder: str, step: int) -> TrainerState:
    """The trainer_state.json of a checkpoint after `step` steps, with every value type-checked.

    best_model_checkpoint is resolved to a sibling of this checkpoint, in case the run's folder was moved, or None.

    Raises:
        WeightsError: the file is missing, is not JSON, or has other contents.
    """
    path = os.path.join(folder, STATE_NAME)
    values = read_json_object(path, constants=True)
    for name, value in values.items():
        if name not in _STATE or not _STATE[name](value):
            raise WeightsError(f"{path}: {one_line(name)} cannot be {one_line(str(value))}", name)
    if values.get("global_step") != step:
        raise WeightsError(f"{path} is not of step {step}", "global_step")
    state = trainer_state(values)
    best = state.best_model_checkpoint
    if best is not None:
        best = os.path.join(os.path.dirname(os.path.normpath(folder)), os.path.basename(os.path.normpath(best)))
        whole = run_checkpoints.step_of(best) >= 0 and run_checkpoints.read_seal(best) is not None
        state.best_model_checkpoint = best if whole else None
        if not whole:
            logger.warning(f"{path}: the best checkpoint, {one_line(best)}, no longer exists; choosing it starts over")
            state.best_metric = None
    return state


# ---- optimizer, learning rate, loss scale


def _read(path: str) -> Dict[Any, Any]:
    if not os.path.isfile(path):
        raise WeightsError(f"{path} is missing", "missing")
    value = load_pdparams_object(path)
    if type(value) is not dict:
        raise WeightsError(f"{path}: expected a dict, found {type(value).__name__}", "not-a-dict")
    return value


def _tensor(array: np.ndarray) -> paddle.Tensor:
    # Paddle takes uint16 for bfloat16. A copy, since the array is a view of the file.
    return paddle.to_tensor(np.array(array))


class _OptimizerState(NamedTuple):
    """accumulators: (parameter, kind) → array. masters: parameter → its float32 copy."""

    accumulators: Dict[Tuple[str, str], np.ndarray]
    masters: Dict[str, np.ndarray]
    schedule: Optional[Dict[str, Any]]


def _accumulator(key: str) -> Tuple[str, str, bool]:
    """(parameter, kind, whether of a master weight) of a key; empty strings for any other key.

    Paddle writes "linear_0.w_0_moment1_0", or "linear_0.w_0_fp32_master_0_moment1_0" for a half-precision weight.
    """
    found = re.fullmatch(rf"(.+?)(_fp32_master_\d+)?_({'|'.join(_ACCUMULATORS)})_\d+", key)
    return (found[1], found[3], found[2] is not None) if found else ("", "", False)


def _read_optimizer(file: str, shapes: Dict[str, List[int]]) -> _OptimizerState:
    """The optimizer state of parameters with these names and shapes. Raises WeightsError if a file has another one."""
    state = _read(file)
    schedule, masters = state.pop("LR_Scheduler", None), state.pop("master_weights", {})
    if type(masters) is not dict:
        raise WeightsError(f"{file}: master_weights is not a dict", "master_weights")
    for name, value in masters.items():
        if name not in shapes or not _is_float32(value, shapes[name]):
            text = f"{file}: the master weight {one_line(str(name))} does not fit this run"
            raise WeightsError(text, "master_weights")
    accumulators = {}
    for key, value in state.items():
        name, kind, of_master = _accumulator(key) if type(key) is str else ("", "", False)
        if name not in shapes:
            raise WeightsError(f"{file} holds {one_line(str(key))}, which does not train in this run", "not-trained")
        fits = [shapes[name]] if kind.startswith("moment") else [[1], []]
        if not _is_float32(value, *fits):
            raise WeightsError(f"{file}: {one_line(key)} does not fit a parameter of shape {shapes[name]}", "shape")
        if of_master and name not in masters:
            raise WeightsError(f"{file} lacks the master weight of {one_line(name)}", "master_weights")
        accumulators[name, kind] = value
    schedule = None if schedule is None else _schedule(schedule, file, _MOST_STEPS)
    return _OptimizerState(accumulators, masters, schedule)


def _is_float32(value: Any, *shapes: List[int]) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32 and list(value.shape) in shapes


def load_optimizer(optimizer: Any, parameters: List[Any], path: str, others: Sequence[str] = ()) -> None:
    """Set AdamW's state from a file.

    The file may come from a run in another precision: float32 parameters are then set to their master weights.

    parameters: those that train in this process, with their weights loaded. others: files of the processes that share
    the state with this one (sharding); together they must cover all parameters.

    Raises:
        WeightsError: a file is missing or broken, or does not hold the state of these parameters.
    """
    shapes = {parameter.name: list(parameter.shape) for parameter in parameters}
    files = {file: _read_optimizer(file, shapes) for file in dict.fromkeys([path, *others])}
    held = set().union(*(state.accumulators for state in files.values()))
    lost = {name for name in shapes for kind in _ACCUMULATORS if (name, kind) not in held}
    if lost:
        raise WeightsError(f"{path} lacks the state of {len(lost)} parameters that train in this run", "incomplete")
    # Paddle looks up a half-precision parameter's accumulators by the name of its master weight.
    halves = (paddle.float16, paddle.bfloat16)
    half = {p.name for p in parameters if optimizer._multi_precision and p.dtype in halves}
    ours = files[path]
    owners = {name: f"{name}_fp32_master_0" if name in half else name for name in shapes}
    state: Dict[str, Any] = {
        f"{owners[name]}_{kind}_0": _tensor(value) for (name, kind), value in ours.accumulators.items()
    }
    masters = {name: _tensor(value) for name, value in ours.masters.items() if name in half}
    for name, master in masters.items():
        master.name = owners[name]
    if masters:
        state["master_weights"] = masters
    if ours.schedule is not None:
        state["LR_Scheduler"] = ours.schedule
    optimizer.set_state_dict(state)
    for parameter in parameters:
        for one in files.values():
            if parameter.name in one.masters and parameter.name not in half:
                parameter.set_value(_tensor(one.masters[parameter.name]))


def _schedule(state: Any, path: str, most: int) -> Dict[str, Any]:
    """A scheduler's state: at most `most` steps (float16 may have skipped some), and the rate."""
    if type(state) is dict and set(state) == {"last_epoch", "last_lr"}:
        step, rate = state["last_epoch"], state["last_lr"]
        rate = rate.item() if isinstance(rate, np.generic) else rate
        if _count(step) and step <= most and _number(rate) and rate >= 0:
            return {"last_epoch": step, "last_lr": float(rate)}
    raise WeightsError(f"{path} does not hold a learning rate schedule of at most {most} steps", "schedule")


def load_scheduler(scheduler: Any, path: str, step: int) -> None:
    """Set the learning rate schedule from a checkpoint after `step` steps. Raises WeightsError."""
    state = _schedule(_read(path), path, step)
    scheduler.set_state_dict(state)


def load_scaler(scaler: Any, path: str) -> None:
    """Set float16's loss scaler from a file. Raises WeightsError."""
    state = _read(path)
    numbers = ("incr_ratio", "decr_ratio")
    counts = ("incr_every_n_steps", "decr_every_n_nan_or_inf", "incr_count", "decr_count")
    scale = state.get("scale")
    fits = set(state) == {"scale", "use_dynamic_loss_scaling", *numbers, *counts}
    fits = fits and isinstance(scale, np.ndarray) and scale.size == 1 and 0 < float(scale.reshape(-1)[0]) < math.inf
    fits = fits and type(state["use_dynamic_loss_scaling"]) is bool
    fits = fits and all(_number(state[name]) and state[name] > 0 for name in numbers)
    if not fits or not all(_count(state[name]) for name in counts):
        raise WeightsError(f"{path} does not hold a loss scaler's state", "scaler")
    scaler.load_state_dict(dict(state, scale=np.array(scale.reshape([1]), "float32")))
