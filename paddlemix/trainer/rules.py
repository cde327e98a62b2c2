"""What keys rule out among each other, as a table that docs/config.md prints, and the files that keys must name."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Callable, Dict, List, NamedTuple

from paddlemix.datasets.entries import read_entries
from paddlemix.trainer.keys import Arguments


class Rule(NamedTuple):
    """says: what is wrong, where {key} stands for the value of that key. broken: whether these arguments break it."""

    says: str
    broken: Callable[[Arguments], Any]


# Those of PaddleNLP that work here, and those that keep optimizer states by pieces of fused buffers, not by parameter.
_SHARDING_OPTIONS = (
    "enable_stage1_overlap", "enable_stage2_overlap", "disable_stage1_reduce_avg", "enable_stage1_broadcast_overlap",
    "enable_release_grads",
)  # fmt: skip
_CUT_STATES = (
    "split_param", "enable_stage1_tensor_fusion", "enable_stage1_allgather_overlap", "enable_fuse_optimizer_states",
)  # fmt: skip
_LAUNCH = "start it with python -m paddle.distributed.launch"


def _tensor(a: Arguments) -> int:
    return max(a.training.tensor_parallel_degree, 1)


def _shards(a: Arguments) -> int:
    return max(a.training.sharding_parallel_degree, 1)


def _sharding_options(a: Arguments) -> set:
    return set(a.training.sharding_parallel_config.replace(",", " ").split()) if a.cards > 1 else set()


def _has_data(a: Arguments, part: str) -> bool:
    return bool((a.data.dataset or {}).get(part))


def _save_misses_evaluation(a: Arguments) -> bool:
    training = a.training
    steps = training.evaluation_strategy == training.save_strategy == "steps"
    return bool(steps and training.save_steps % (training.eval_steps or training.logging_steps))


RULES = (
    Rule("nothing to do: set do_train or do_eval", lambda a: not a.training.do_train and not a.training.do_eval),
    Rule(
        'do_train needs data: give dataset {{"train": [{{"data_files": …}}]}}',
        lambda a: a.training.do_train and not _has_data(a, "train"),
    ),
    Rule(
        'do_eval needs data: give dataset {{"eval": [{{"data_files": …}}]}}',
        lambda a: a.training.do_eval and not _has_data(a, "eval"),
    ),
    Rule(
        'evaluation_strategy needs data: give dataset {{"eval": [{{"data_files": …}}]}}',
        lambda a: a.training.evaluates and not a.training.do_eval and not _has_data(a, "eval"),
    ),
    # What trains.
    Rule("lora_path needs lora=true", lambda a: a.model.lora_path is not None and not a.model.lora),
    *(
        Rule(f"{name} needs lora=true", lambda a, name=name: name in a.given and not a.model.lora)
        for name in ("lora_alpha", "lora_dropout", "lora_rank", "lora_target_modules")
    ),
    Rule(
        "lora_target_modules is empty; without adapters set lora=false",
        lambda a: a.model.lora and not a.model.lora_target_modules,
    ),
    # Batches.
    Rule(
        "set mixtoken or group_by_modality_length, not both: packed sequences are of like length",
        lambda a: a.data.mixtoken and a.training.group_by_modality_length,
    ),
    Rule(
        "mixtoken cannot go with neftune, whose noise depends on the length of one sample",
        lambda a: a.data.mixtoken and a.model.neftune,
    ),
    # Precision, rates.
    Rule("set fp16 or bf16, not both", lambda a: a.training.fp16 and a.training.bf16),
    Rule(
        "lr_scheduler_type=constant has no warmup: set constant_with_warmup, or leave warmup_* at 0",
        lambda a: a.training.lr_scheduler_type == "constant" and (a.training.warmup_steps or a.training.warmup_ratio),
    ),
    Rule(
        "learning_rate={learning_rate} must be above lr_end={lr_end} with lr_scheduler_type=polynomial",
        lambda a: a.training.lr_scheduler_type == "polynomial" and a.training.learning_rate <= a.training.lr_end,
    ),
    Rule(
        "mm_projector_lr is scheduled as a multiple of learning_rate, which must not be 0",
        lambda a: a.training.mm_projector_lr is not None and a.training.learning_rate == 0,
    ),
    # Evaluation.
    Rule(
        "load_best_model_at_end needs evaluation_strategy and save_strategy to be the same",
        lambda a: a.training.load_best_model_at_end
        and (a.training.evaluation_strategy == "no" or a.training.evaluation_strategy != a.training.save_strategy),
    ),
    Rule(
        "load_best_model_at_end needs save_steps to be a multiple of eval_steps",
        lambda a: a.training.load_best_model_at_end and _save_misses_evaluation(a),
    ),
    Rule(
        "metric_for_best_model=cider needs eval_with_do_generation",
        lambda a: a.training.metric_for_best_model in ("cider", "eval_cider") and not a.data.eval_with_do_generation,
    ),
    Rule(
        "save_generation_output needs eval_with_do_generation",
        lambda a: a.data.save_generation_output and not a.data.eval_with_do_generation,
    ),
    Rule(
        "eval_with_do_generation needs do_eval or evaluation_strategy",
        lambda a: a.data.eval_with_do_generation and not a.training.evaluates,
    ),
    # Resuming.
    Rule(
        "benchmark saves nothing, so it cannot resume or load the best model",
        lambda a: a.training.benchmark
        and (a.training.load_best_model_at_end or a.training.resume or a.training.resume_from_checkpoint),
    ),
    Rule(
        "set resume or resume_from_checkpoint, not both",
        lambda a: a.training.resume and a.training.resume_from_checkpoint,
    ),
    Rule(
        "resume needs do_train",
        lambda a: (a.training.resume or a.training.resume_from_checkpoint) and not a.training.do_train,
    ),
    # Several cards.
    Rule(
        f"tensor_parallel_degree={{tensor_parallel_degree}} needs {{tensor_parallel_degree}} processes: {_LAUNCH}",
        lambda a: a.cards == 1 and _tensor(a) > 1,
    ),
    Rule(
        f"sharding needs several processes: {_LAUNCH}",
        lambda a: a.cards == 1 and (a.training.sharding or _shards(a) > 1),
    ),
    Rule(
        "{cards} processes cannot be divided by tensor_parallel_degree × sharding_parallel_degree",
        lambda a: a.cards > 1 and a.cards % (_tensor(a) * _shards(a)),
    ),
    Rule(
        "sharding_parallel_degree needs sharding=stage1 or stage2",
        lambda a: a.cards > 1 and _shards(a) > 1 and not a.training.sharding,
    ),
    Rule(
        f"sharding_parallel_config: the options are {', '.join(_SHARDING_OPTIONS)}",
        lambda a: not _sharding_options(a) <= {*_SHARDING_OPTIONS, *_CUT_STATES},
    ),
    *(
        Rule(
            f"sharding_parallel_config: with {option} a checkpoint could not be resumed; leave it out",
            lambda a, option=option: option in _sharding_options(a),
        )
        for option in _CUT_STATES
    ),
    Rule(
        "sharding_parallel_config: enable_stage2_overlap needs sharding=stage2",
        lambda a: "enable_stage2_overlap" in _sharding_options(a) and a.training.sharding != "stage2",
    ),
    Rule(
        "sharding_parallel_config: disable_stage1_reduce_avg and enable_stage1_broadcast_overlap need sharding=stage1",
        lambda a: a.training.sharding != "stage1"
        and _sharding_options(a) & {"disable_stage1_reduce_avg", "enable_stage1_broadcast_overlap"},
    ),
    Rule(
        "sharding_parallel_config: enable_stage2_overlap, enable_stage1_broadcast_overlap need logging_steps above 1",
        lambda a: a.training.logging_steps == 1
        and _sharding_options(a) & {"enable_stage2_overlap", "enable_stage1_broadcast_overlap"},
    ),
)  # fmt: skip


def broken_rules(arguments: Arguments) -> List[str]:
    """What cannot go together or is missing, one sentence each. Files are looked for, none is read."""
    values: Dict[str, Any] = {"cards": arguments.cards}
    for block in arguments[:4]:
        values.update((field.name, getattr(block, field.name)) for field in dataclasses.fields(block))
    broken = [rule.says.format(**values) for rule in RULES if rule.broken(arguments)]
    return broken + _path_problems(arguments)


def rule_lines() -> List[str]:
    """The rules in words, without the values of a run: "learning_rate must be above lr_end …"."""
    without = [re.sub(r"=\{\w+\}", "", rule.says) for rule in RULES]
    return [says.format(cards="N", tensor_parallel_degree="N") for says in without]


def _path_problems(arguments: Arguments) -> List[str]:
    model, data, training = arguments.model, arguments.data, arguments.training
    problems = []
    if model.model_name_or_path is None:
        problems.append("model_name_or_path is missing: the folder of the model to tune")
    for name in ("model_name_or_path", "text_model_name_or_path"):
        folder = getattr(model, name)
        if folder is not None and not os.path.isfile(os.path.join(folder, "config.json")):
            state = "is no folder" if not os.path.isdir(folder) else "has no config.json"
            problems.append(f"{name}: {folder} {state}")
    if training.output_dir is None:
        problems.append("output_dir is missing: where to write the result")
    elif os.path.exists(training.output_dir) and not os.path.isdir(training.output_dir):
        problems.append(f"output_dir: {training.output_dir} is a file")
    else:
        for name in ("model_name_or_path", "text_model_name_or_path", "lora_path"):
            folder = getattr(model, name)
            if folder is not None and _within(folder, training.output_dir):
                problems.append(f"{name} lies in output_dir, where a run writes and deletes: choose another output_dir")
    problems += read_entries(data.dataset)[1]
    if data.chat_template is not None and not os.path.isfile(data.chat_template):
        problems.append(f"chat_template: there is no file at {data.chat_template}")
    if model.lora and model.lora_path and not os.path.isfile(os.path.join(model.lora_path, "lora_config.json")):
        problems.append(f"lora_path: {model.lora_path} has no lora_config.json")
    if training.resume_from_checkpoint and not os.path.isdir(training.resume_from_checkpoint):
        problems.append(f"resume_from_checkpoint: there is no folder {training.resume_from_checkpoint}")
    return problems


def _within(path: str, folder: str) -> bool:
    """Whether a path is this folder or lies in it."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))
