"""Rules between keys, as a table that docs/config.md prints, and checks of the files that keys name."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Callable, Dict, List, NamedTuple

from paddlemix.datasets.entries import read_entries
from paddlemix.trainer.keys import Arguments, DataArguments, ModelArguments, TrainingKeys, known_keys
from paddlemix.utils.errors import Problem


class Rule(NamedTuple):
    """says: the message; {key} is replaced by that key's value. broken(model, data, training, arguments): whether it
    is broken."""

    says: str
    broken: Callable[[ModelArguments, DataArguments, TrainingKeys, Arguments], Any]

    @property
    def about(self) -> List[str]:
        """The keys that it names."""
        keys = known_keys()
        return [word for word in re.findall(r"\w+", self.says) if word in keys]


# The options of PaddleNLP that work here, and those that store optimizer states as slices of fused buffers.
_SHARDING_OPTIONS = (
    "enable_stage1_overlap", "enable_stage2_overlap", "disable_stage1_reduce_avg", "enable_stage1_broadcast_overlap",
    "enable_release_grads",
)  # fmt: skip
_CUT_STATES = (
    "split_param", "enable_stage1_tensor_fusion", "enable_stage1_allgather_overlap", "enable_fuse_optimizer_states",
)  # fmt: skip
_STAGE1_ONLY = {"disable_stage1_reduce_avg", "enable_stage1_broadcast_overlap"}
_SEVERAL_STEPS = {"enable_stage2_overlap", "enable_stage1_broadcast_overlap"}
_LAUNCH = "start it with python -m paddle.distributed.launch"


def _options(a: Arguments) -> set:
    return set(a.training.sharding_parallel_config.replace(",", " ").split()) if a.cards > 1 else set()


def _no_data(d: DataArguments, part: str) -> bool:
    return not (d.dataset or {}).get(part)


def _weighted(d: DataArguments) -> bool:
    return any(entry.weight is not None for entry in read_entries(d.dataset)[0].get("train", []))


def _by_steps(t: TrainingKeys) -> bool:
    return t.evaluation_strategy == t.save_strategy == "steps"


# fmt: off
RULES = (
    Rule("nothing to do: set do_train or do_eval", lambda m, d, t, a: not t.do_train and not t.do_eval),
    Rule('do_train needs data: give dataset {{"train": [{{"data_files": …}}]}}',
         lambda m, d, t, a: t.do_train and _no_data(d, "train")),
    Rule('do_eval needs data: give dataset {{"eval": [{{"data_files": …}}]}}, or do_eval=false and '
         "evaluation_strategy=no",
         lambda m, d, t, a: t.do_eval and _no_data(d, "eval")),
    Rule('evaluation_strategy needs data: give dataset {{"eval": [{{"data_files": …}}]}}, or evaluation_strategy=no',
         lambda m, d, t, a: t.evaluates and not t.do_eval and _no_data(d, "eval")),
    # What trains.
    Rule("lora_path needs lora=true", lambda m, d, t, a: m.lora_path is not None and not m.lora),
    *(
        Rule(f"{name} needs lora=true", lambda m, d, t, a, name=name: name in a.given and not m.lora)
        for name in ("lora_alpha", "lora_dropout", "lora_rank", "lora_target_modules")
    ),
    Rule("lora_target_modules is empty; without adapters set lora=false",
         lambda m, d, t, a: m.lora and not m.lora_target_modules),
    # Batches.
    Rule("set mixtoken or group_by_modality_length, not both: packed sequences already have similar lengths",
         lambda m, d, t, a: d.mixtoken and t.group_by_modality_length),
    Rule("mixtoken cannot be combined with neftune, whose noise depends on the length of each sample",
         lambda m, d, t, a: d.mixtoken and m.neftune),
    *(
        Rule(f"{name} plans all epochs at once, and weights in dataset.train draw for each: use repeat and limit",
             lambda m, d, t, a, name=name: (d.mixtoken if name == "mixtoken" else t.group_by_modality_length)
             and _weighted(d))
        for name in ("mixtoken", "group_by_modality_length")
    ),
    # Precision, rates.
    Rule("set fp16 or bf16, not both", lambda m, d, t, a: t.fp16 and t.bf16),
    Rule("lr_scheduler_type=constant has no warmup: set constant_with_warmup, or leave warmup_* at 0",
         lambda m, d, t, a: t.lr_scheduler_type == "constant" and (t.warmup_steps or t.warmup_ratio)),
    Rule("learning_rate={learning_rate} must be above lr_end={lr_end} with lr_scheduler_type=polynomial",
         lambda m, d, t, a: t.lr_scheduler_type == "polynomial" and t.learning_rate <= t.lr_end),
    Rule("mm_projector_lr is scheduled as a multiple of learning_rate, which must not be 0",
         lambda m, d, t, a: t.mm_projector_lr is not None and t.learning_rate == 0),
    # Evaluation.
    Rule("load_best_model_at_end needs evaluation_strategy and save_strategy to be the same",
         lambda m, d, t, a: t.load_best_model_at_end and not t.save_strategy == t.evaluation_strategy != "no"),
    Rule("load_best_model_at_end needs save_steps to be a multiple of eval_steps",
         lambda m, d, t, a: t.load_best_model_at_end and _by_steps(t)
         and t.save_steps % (t.eval_steps or t.logging_steps)),
    Rule("metric_for_best_model=cider needs eval_with_do_generation",
         lambda m, d, t, a: "cider" in (t.metric_for_best_model or "") and not d.eval_with_do_generation),
    Rule("save_generation_output needs eval_with_do_generation",
         lambda m, d, t, a: d.save_generation_output and not d.eval_with_do_generation),
    *(
        Rule(f"{name} needs do_eval or evaluation_strategy",
             lambda m, d, t, a, name=name: getattr(d, name) and not t.evaluates)
        for name in ("eval_with_do_generation", "eval_image_gain")
    ),
    # Resuming.
    Rule("benchmark saves nothing, so it cannot resume or load the best model",
         lambda m, d, t, a: t.benchmark and (t.load_best_model_at_end or t.resume or t.resume_from_checkpoint)),
    Rule("set resume or resume_from_checkpoint, not both",
         lambda m, d, t, a: t.resume and t.resume_from_checkpoint),
    Rule("resume needs do_train", lambda m, d, t, a: (t.resume or t.resume_from_checkpoint) and not t.do_train),
    # Several cards.
    Rule(f"tensor_parallel_degree={{tensor_parallel_degree}} needs {{tensor_parallel_degree}} processes: {_LAUNCH}",
         lambda m, d, t, a: a.cards == 1 and t.tensor_parallel_degree > 1),
    Rule(f"sharding needs several processes: {_LAUNCH}",
         lambda m, d, t, a: a.cards == 1 and (t.sharding or t.sharding_parallel_degree > 1)),
    Rule("{cards} processes cannot be divided by tensor_parallel_degree × sharding_parallel_degree",
         lambda m, d, t, a: a.cards > 1
         and a.cards % (max(t.tensor_parallel_degree, 1) * max(t.sharding_parallel_degree, 1))),
    Rule("sharding_parallel_degree needs sharding=stage1 or stage2",
         lambda m, d, t, a: a.cards > 1 and t.sharding_parallel_degree > 1 and not t.sharding),
    Rule(f"sharding_parallel_config: the options are {', '.join(_SHARDING_OPTIONS)}",
         lambda m, d, t, a: not _options(a) <= {*_SHARDING_OPTIONS, *_CUT_STATES}),
    *(
        Rule(f"sharding_parallel_config: checkpoints saved with {option} cannot be resumed; remove it",
             lambda m, d, t, a, option=option: option in _options(a))
        for option in _CUT_STATES
    ),
    Rule("sharding_parallel_config: enable_stage2_overlap needs sharding=stage2",
         lambda m, d, t, a: "enable_stage2_overlap" in _options(a) and t.sharding != "stage2"),
    Rule("sharding_parallel_config: disable_stage1_reduce_avg and enable_stage1_broadcast_overlap need sharding=stage1",
         lambda m, d, t, a: t.sharding != "stage1" and _options(a) & _STAGE1_ONLY),
    Rule("sharding_parallel_config: enable_stage2_overlap, enable_stage1_broadcast_overlap need logging_steps above 1",
         lambda m, d, t, a: t.logging_steps == 1 and _options(a) & _SEVERAL_STEPS),
)
# fmt: on


def broken_rules(arguments: Arguments) -> List[str]:
    """A problem for each broken rule and each missing file. No file is read."""
    values: Dict[str, Any] = {"cards": arguments.cards}
    for block in arguments[:4]:
        values.update((field.name, getattr(block, field.name)) for field in dataclasses.fields(block))
    model, data, _, training = arguments[:4]
    broken = [
        Problem(rule.says.format(**values), *rule.about)
        for rule in RULES
        if rule.broken(model, data, training, arguments)
    ]
    return broken + _path_problems(arguments)


def rule_lines() -> List[str]:
    """The messages of the rules, without a run's values: "learning_rate must be above lr_end …"."""
    without = [re.sub(r"=\{\w+\}", "", rule.says) for rule in RULES]
    return [says.format(cards="N", tensor_parallel_degree="N") for says in without]


def _path_problems(arguments: Arguments) -> List[str]:
    model, data, training = arguments.model, arguments.data, arguments.training
    problems = []
    if model.model_name_or_path is None:
        problems.append(Problem("model_name_or_path is missing: the folder of the model to tune", "model_name_or_path"))
    for name in ("model_name_or_path", "text_model_name_or_path"):
        folder = getattr(model, name)
        if folder is not None and not os.path.isfile(os.path.join(folder, "config.json")):
            state = "is not a folder" if not os.path.isdir(folder) else "has no config.json"
            problems.append(Problem(f"{name}: {folder} {state}", name))
    if training.output_dir is None:
        problems.append(Problem("output_dir is missing: where to write the result", "output_dir"))
    elif os.path.exists(training.output_dir) and not os.path.isdir(training.output_dir):
        problems.append(Problem(f"output_dir: {training.output_dir} is a file", "output_dir"))
    else:
        for name in ("model_name_or_path", "text_model_name_or_path", "lora_path"):
            folder = getattr(model, name)
            if folder is not None and _within(folder, training.output_dir):
                text = f"{name} is inside output_dir, where a run writes and deletes files: choose another output_dir"
                problems.append(Problem(text, name, "output_dir"))
    problems += read_entries(data.dataset)[1]
    if data.chat_template is not None and not os.path.isfile(data.chat_template):
        problems.append(Problem(f"chat_template: no file {data.chat_template}", "chat_template"))
    if model.lora and model.lora_path and not os.path.isfile(os.path.join(model.lora_path, "lora_config.json")):
        problems.append(Problem(f"lora_path: {model.lora_path} has no lora_config.json", "lora_path"))
    if training.resume_from_checkpoint and not os.path.isdir(training.resume_from_checkpoint):
        text = f"resume_from_checkpoint: no folder {training.resume_from_checkpoint}"
        problems.append(Problem(text, "resume_from_checkpoint"))
    return problems


def _within(path: str, folder: str) -> bool:
    """Whether a path is this folder or inside it."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))
