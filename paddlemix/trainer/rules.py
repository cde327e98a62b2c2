"""Rules between keys, as a table that docs/config.md prints, and checks of the files that keys name."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple

from paddlemix.datasets.entries import read_entries
from paddlemix.trainer.keys import Arguments, known_keys
from paddlemix.utils.errors import Problem


class Rule(NamedTuple):
    """says: the message; {key} is replaced by that key's value. broken(all_keys(…)): whether it is
    broken."""

    says: str
    broken: Callable[[Any], Any]

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


def _options(k: Any) -> set:
    return set(k.sharding_parallel_config.replace(",", " ").split()) if k.cards > 1 else set()


def _no_data(k: Any, part: str) -> bool:
    return not (k.dataset or {}).get(part)


def _weighted(k: Any) -> bool:
    return any(entry.weight is not None for entry in read_entries(k.dataset)[0].get("train", []))


def _by_steps(k: Any) -> bool:
    return k.evaluation_strategy == k.save_strategy == "steps"


# fmt: off
RULES = (
    Rule("nothing to do: set do_train or do_eval", lambda k: not k.do_train and not k.do_eval),
    Rule('do_train needs data: give dataset {{"train": [{{"data_files": …}}]}}',
         lambda k: k.do_train and _no_data(k, "train")),
    Rule('do_eval needs data: give dataset {{"eval": [{{"data_files": …}}]}}, or do_eval=false and '
         "evaluation_strategy=no",
         lambda k: k.do_eval and _no_data(k, "eval")),
    Rule('evaluation_strategy needs data: give dataset {{"eval": [{{"data_files": …}}]}}, or evaluation_strategy=no',
         lambda k: k.evaluates and not k.do_eval and _no_data(k, "eval")),
    # What trains.
    Rule("lora_path needs lora=true", lambda k: k.lora_path is not None and not k.lora),
    *(
        Rule(f"{name} needs lora=true", lambda k, name=name: name in k.given and not k.lora)
        for name in ("lora_alpha", "lora_dropout", "lora_rank", "lora_target_modules")
    ),
    Rule("lora_target_modules is empty; without adapters set lora=false",
         lambda k: k.lora and not k.lora_target_modules),
    # Batches.
    Rule("set mixtoken or group_by_modality_length, not both: packed sequences already have similar lengths",
         lambda k: k.mixtoken and k.group_by_modality_length),
    Rule("mixtoken cannot be combined with neftune, whose noise depends on the length of each sample",
         lambda k: k.mixtoken and k.neftune),
    *(
        Rule(f"{name} plans all epochs at once, and weights in dataset.train draw for each: use repeat and limit",
             lambda k, name=name: getattr(k, name) and _weighted(k))
        for name in ("mixtoken", "group_by_modality_length")
    ),
    # Precision, rates.
    Rule("set fp16 or bf16, not both", lambda k: k.fp16 and k.bf16),
    Rule("lr_scheduler_type=constant has no warmup: set constant_with_warmup, or leave warmup_* at 0",
         lambda k: k.lr_scheduler_type == "constant" and (k.warmup_steps or k.warmup_ratio)),
    Rule("learning_rate={learning_rate} must be above lr_end={lr_end} with lr_scheduler_type=polynomial",
         lambda k: k.lr_scheduler_type == "polynomial" and k.learning_rate <= k.lr_end),
    Rule("mm_projector_lr is scheduled as a multiple of learning_rate, which must not be 0",
         lambda k: k.mm_projector_lr is not None and k.learning_rate == 0),
    # Evaluation.
    Rule("load_best_model_at_end needs evaluation_strategy and save_strategy to be the same",
         lambda k: k.load_best_model_at_end and not k.save_strategy == k.evaluation_strategy != "no"),
    Rule("load_best_model_at_end needs save_steps to be a multiple of eval_steps",
         lambda k: k.load_best_model_at_end and _by_steps(k) and k.save_steps % (k.eval_steps or k.logging_steps)),
    Rule("metric_for_best_model=cider needs eval_with_do_generation",
         lambda k: "cider" in (k.metric_for_best_model or "") and not k.eval_with_do_generation),
    Rule("metric_for_best_model needs evaluation_strategy",
         lambda k: k.metric_for_best_model and not k.load_best_model_at_end and k.evaluation_strategy == "no"),
    Rule("greater_is_better needs metric_for_best_model or load_best_model_at_end",
         lambda k: k.greater_is_better is not None and not (k.metric_for_best_model or k.load_best_model_at_end)),
    Rule("save_generation_output needs eval_with_do_generation",
         lambda k: k.save_generation_output and not k.eval_with_do_generation),
    *(
        Rule(f"{name} needs do_eval or evaluation_strategy",
             lambda k, name=name: getattr(k, name) and not k.evaluates)
        for name in ("eval_with_do_generation", "eval_image_gain")
    ),
    # Resuming.
    Rule("benchmark saves nothing, so it cannot resume or load the best model",
         lambda k: k.benchmark and (k.load_best_model_at_end or k.resume or k.resume_from_checkpoint)),
    Rule("set resume or resume_from_checkpoint, not both",
         lambda k: k.resume and k.resume_from_checkpoint),
    Rule("resume needs do_train", lambda k: (k.resume or k.resume_from_checkpoint) and not k.do_train),
    # Several cards.
    Rule(f"tensor_parallel_degree={{tensor_parallel_degree}} needs {{tensor_parallel_degree}} processes: {_LAUNCH}",
         lambda k: k.cards == 1 and k.tensor_parallel_degree > 1),
    Rule(f"sharding needs several processes: {_LAUNCH}",
         lambda k: k.cards == 1 and (k.sharding or k.sharding_parallel_degree > 1)),
    Rule("{cards} processes cannot be divided by tensor_parallel_degree × sharding_parallel_degree",
         lambda k: k.cards > 1 and k.cards % (max(k.tensor_parallel_degree, 1) * max(k.sharding_parallel_degree, 1))),
    Rule("sharding_parallel_degree needs sharding=stage1 or stage2",
         lambda k: k.cards > 1 and k.sharding_parallel_degree > 1 and not k.sharding),
    Rule(f"sharding_parallel_config: the options are {', '.join(_SHARDING_OPTIONS)}",
         lambda k: not _options(k) <= {*_SHARDING_OPTIONS, *_CUT_STATES}),
    *(
        Rule(f"sharding_parallel_config: checkpoints saved with {option} cannot be resumed; remove it",
             lambda k, option=option: option in _options(k))
        for option in _CUT_STATES
    ),
    Rule("sharding_parallel_config: enable_stage2_overlap needs sharding=stage2",
         lambda k: "enable_stage2_overlap" in _options(k) and k.sharding != "stage2"),
    Rule("sharding_parallel_config: disable_stage1_reduce_avg and enable_stage1_broadcast_overlap need sharding=stage1",
         lambda k: k.sharding != "stage1" and _options(k) & _STAGE1_ONLY),
    Rule("sharding_parallel_config: enable_stage2_overlap, enable_stage1_broadcast_overlap need logging_steps above 1",
         lambda k: k.logging_steps == 1 and _options(k) & _SEVERAL_STEPS),
)
# fmt: on


def all_keys(arguments: Arguments) -> SimpleNamespace:
    """The keys of all blocks, and what else rules ask for."""
    values: Dict[str, Any] = {"evaluates": arguments.training.evaluates}
    for block in arguments[:4]:
        values.update(vars(block))
    return SimpleNamespace(cards=arguments.cards, given=arguments.given, **values)


def broken_rules(arguments: Arguments) -> List[str]:
    """A problem for each broken rule and each missing file. No file is read."""
    k = all_keys(arguments)
    broken = [Problem(rule.says.format(**vars(k)), *rule.about) for rule in RULES if rule.broken(k)]
    return broken + _path_problems(k)


def rule_lines() -> List[str]:
    """The messages of the rules, without a run's values: "learning_rate must be above lr_end …"."""
    without = [re.sub(r"=\{\w+\}", "", rule.says) for rule in RULES]
    return [says.format(cards="N", tensor_parallel_degree="N") for says in without]


def _path_problems(k: Any) -> List[str]:
    problems = []
    if k.model_name_or_path is None:
        problems.append(Problem("model_name_or_path is missing: the folder of the model to tune", "model_name_or_path"))
    for name in ("model_name_or_path", "text_model_name_or_path"):
        folder = getattr(k, name)
        if folder is not None and not os.path.isfile(os.path.join(folder, "config.json")):
            state = "is not a folder" if not os.path.isdir(folder) else "has no config.json"
            problems.append(Problem(f"{name}: {folder} {state}", name))
    if not k.output_dir:
        problems.append(Problem("output_dir is missing: where to write the result", "output_dir"))
    elif os.path.exists(k.output_dir) and not os.path.isdir(k.output_dir):
        problems.append(Problem(f"output_dir: {k.output_dir} is a file", "output_dir"))
    else:
        for name in ("model_name_or_path", "text_model_name_or_path", "lora_path"):
            folder = getattr(k, name)
            if folder is not None and _within(folder, k.output_dir):
                text = f"{name} is inside output_dir, where a run writes and deletes files: choose another output_dir"
                problems.append(Problem(text, name, "output_dir"))
    problems += read_entries(k.dataset)[1]
    if k.chat_template is not None and not os.path.isfile(k.chat_template):
        problems.append(Problem(f"chat_template: no file {k.chat_template}", "chat_template"))
    if k.lora and k.lora_path and not os.path.isfile(os.path.join(k.lora_path, "lora_config.json")):
        problems.append(Problem(f"lora_path: {k.lora_path} has no lora_config.json", "lora_path"))
    if k.resume_from_checkpoint and not os.path.isdir(k.resume_from_checkpoint):
        text = f"resume_from_checkpoint: no folder {k.resume_from_checkpoint}"
        problems.append(Problem(text, "resume_from_checkpoint"))
    return problems


def _within(path: str, folder: str) -> bool:
    """Whether a path is this folder or inside it."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder
