"""The keys of a finetuning run: every name, type, default and meaning, and the strict reading of them.

A run is described by a JSON file, by `--key value` pairs, or by a file with pairs after it that override it. Nothing
is dropped silently: an unknown key is refused and the nearest known one named, a value of the wrong kind is refused,
and a key that cannot work here is accepted only with the value that leaves it off.

The keys stand in four blocks, as the training log prints them: Model, Data, Generation, Training. Training
keys carry PaddleNLP's names, types and defaults and are handed to its TrainingArguments by `finetune`. This
module imports neither Paddle nor PaddleNLP, so that `--help` and a typo are answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import os
import typing
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.runtime import world_size


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field with its meaning and rules.

    Rules: choices=(…) the only values; at_least=n, above=n, at_most=n for numbers; refused="why" when only
    the default (or one of `neutral`) can work here.
    """
    metadata = dict(rules, help=meaning)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_AISTUDIO = "weights come from and go to local folders, nothing is fetched or uploaded"
_PREFIX = "prefix tuning is not built here; use lora, or full tuning with freeze_include and freeze_exclude"
_ONE_TASK = "name the files in `dataset`"


@dataclass
class ModelArguments:
    """Which model, and which of its parameters train."""

    model_name_or_path: Optional[str] = key(None, "Folder of the model to tune (config.json, weights, tokenizer).")
    text_model_name_or_path: Optional[str] = key(
        None, "Folder of another MGen-VL model; its transformer.llm.* and lm_head replace the first's."
    )
    freeze_include: Optional[List[str]] = key(
        None, "Parameter name patterns (* matches anything) that do not train, such as *visual*."
    )
    freeze_exclude: Optional[List[str]] = key(
        None,
        "Patterns that train although freeze_include matches them. With lora, what they match trains "
        "whole beside the adapters and is saved with them.",
    )
    lora: bool = key(False, "Train low-rank adapters in place of the weights they stand beside.")
    lora_path: Optional[str] = key(None, "Folder of a LoRA checkpoint to start from.")
    lora_rank: int = key(64, "Rank r of the adapters.", at_least=1)
    lora_alpha: int = key(16, "Adapters are scaled by lora_alpha / lora_rank.", at_least=1)
    lora_dropout: float = key(0.05, "Dropout on the adapters' input.", at_least=0, at_most=0.99)
    lora_target_modules: List[str] = key(
        [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"],
        "Regular expressions; Linear layers whose whole name matches get an adapter.",
    )
    neftune: bool = key(False, "Add uniform noise to the token embeddings while training (NEFTune).")
    neftune_noise_alpha: float = key(5.0, "Noise scale of neftune.", above=0)
    use_flash_attention: bool = key(False, "Use Paddle's fused attention kernel: less memory on a GPU.")
    aistudio_repo_id: Optional[str] = key(None, "AI Studio upload.", refused=_AISTUDIO)
    aistudio_repo_license: str = key("Apache License 2.0", "AI Studio upload.", refused=_AISTUDIO)
    aistudio_repo_private: bool = key(True, "AI Studio upload.", refused=_AISTUDIO)
    aistudio_token: Optional[str] = key(None, "AI Studio upload.", refused=_AISTUDIO)
    from_aistudio: bool = key(False, "AI Studio download.", refused=_AISTUDIO)
    save_to_aistudio: bool = key(False, "AI Studio upload.", refused=_AISTUDIO)
    prefix_tuning: bool = key(False, "Prefix tuning.", refused=_PREFIX)
    num_prefix_tokens: int = key(128, "Prefix tuning.", refused=_PREFIX)


@dataclass
class DataArguments:
    """Which samples, and how they become token sequences."""

    dataset: Optional[Dict[str, Any]] = key(
        None,
        'The data: {"train": [{"name": "chatml_dataset", "data_files": FILE, "chat_template": FILE}], '
        '"eval": […]}. '
        "data_files is a path, a list of paths, or a pattern with *; chat_template may be left out.",
    )
    chat_template: Optional[str] = key(None, "Chat template of entries that name none (default: chatml).")
    max_length: int = key(2048, "Longest sample in tokens; longer texts are shortened, image spans never.", at_least=16)
    label_all_turn_markers: bool = key(
        True, "Learn the <|im_start|>, <|im_end|> and newline of every turn too; false: the captions alone."
    )
    lazy: bool = key(False, "Kept for older configs: samples are always read by index and decoded when needed.")
    mixtoken: bool = key(
        False,
        "Pack samples into sequences of at most max_length tokens, each attending to itself alone. Batch sizes then "
        "count sequences.",
    )
    eval_with_do_generation: bool = key(
        False, "At each evaluation, also generate the validation captions and score them (eval_cider)."
    )
    save_generation_output: bool = key(
        False, "Write those captions to output_dir/generation-<step>.tsv: id, caption, reference."
    )
    shown_captions: int = key(
        4,
        "Validation captions generated and shown at each evaluation, in the log and in report_to; 0: none. With "
        "eval_with_do_generation they are the first of those.",
        at_least=0,
    )
    src_length: int = key(1024, "Longest prompt of generation at evaluation.", refused="max_length bounds a sample")
    splits: Optional[str] = key(None, "Dataset splits.", refused=_ONE_TASK)
    task_name: Optional[str] = key(None, "Dataset task.", refused=_ONE_TASK)


@dataclass
class GenerationArguments:
    """How captions are generated at evaluation (eval_with_do_generation)."""

    top_k: int = key(1, "Sample among the k most likely tokens; 1 is greedy, 0 all tokens.", at_least=0)
    top_p: float = key(1.0, "Sample among the most likely tokens of this total probability.", above=0, at_most=1)
    max_new_tokens: int = key(512, "Longest caption in tokens.", at_least=1)


_STRATEGIES = ("no", "steps", "epoch")
_PIPELINE = "pipeline parallelism needs the model as a PipelineLayer, which it is not; use sharding"
_TENSOR = "what all cards hold is kept alike (sync_grad); the other options are for models of another layout"
_SEQUENCE = "one sample is a single short sequence with its image span, which is not split over cards"
_EXPERT = "the model has no experts"
_UNIFIED = "checkpoints are written in one layout (lora_model_state or model_state files), see docs/config.md"
_RATE = "the rate is set by learning_rate, lr_scheduler_type, warmup_ratio or warmup_steps"
_INPUTS = "the model's inputs are fixed"
_LOGGING = "the first process logs"
_PROFILE = "use benchmark"


@dataclass
class TrainingKeys:
    """Keys of PaddleNLP's TrainingArguments that work here, with its defaults, and a few of our own."""

    output_dir: Optional[str] = key(None, "Where checkpoints, logs and the result are written.")
    overwrite_output_dir: bool = key(
        False, "Replace the result of a finished run in output_dir. An unfinished run is never thrown away: see resume."
    )
    resume: bool = key(False, "Go on from the last whole checkpoint in output_dir, or start anew if there is none.")
    resume_from_checkpoint: Optional[str] = key(
        None, "Go on from this checkpoint folder, the newest in output_dir or one elsewhere."
    )
    do_train: bool = key(False, "Train.")
    do_eval: bool = key(
        False, 'Evaluate. With evaluation_strategy "no": once, after training. A strategy implies do_eval.'
    )
    do_predict: bool = key(False, "Predict.", refused="predict.py does that")
    do_export: bool = key(False, "Export.", refused="merge_lora_params.py writes the folder that predict.py reads")
    per_device_train_batch_size: int = key(8, "Samples (with mixtoken: sequences) per step and card.", at_least=1)
    per_device_eval_batch_size: int = key(8, "Samples per evaluation step and card.", at_least=1)
    gradient_accumulation_steps: int = key(
        1, "Batches per optimizer step; their losses are averaged batch by batch.", at_least=1
    )
    eval_accumulation_steps: Optional[int] = key(None, "Evaluation steps kept on the card at a time.", at_least=1)
    num_train_epochs: float = key(1.0, "Passes over the data.", above=0)
    max_steps: int = key(-1, "Optimizer steps; when positive it wins over num_train_epochs.", at_least=-1)
    learning_rate: float = key(5e-5, "Highest learning rate.", at_least=0)
    mm_projector_lr: Optional[float] = key(
        None, "Learning rate of visual.attn_pool, ln_post and proj (default: learning_rate).", above=0
    )
    lr_scheduler_type: str = key(
        "linear",
        "How the rate falls after warmup.",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )
    warmup_ratio: float = key(0.0, "Part of all steps over which the rate rises from 0.", at_least=0, at_most=1)
    warmup_steps: int = key(0, "The same in steps; wins when positive.", at_least=0)
    num_cycles: float = key(0.5, "Cosine: half waves over the run (0.5 falls to 0).", above=0)
    lr_end: float = key(1e-7, "Polynomial: last rate.", at_least=0)
    power: float = key(1.0, "Polynomial: power.", above=0)
    optim: str = key("adamw", "Optimizer.", choices=("adamw",))
    weight_decay: float = key(0.0, "Decay of matrices; biases and norms have none.", at_least=0)
    adam_beta1: float = key(0.9, "AdamW beta1.", at_least=0, at_most=0.9999999)
    adam_beta2: float = key(0.999, "AdamW beta2.", at_least=0, at_most=0.9999999)
    adam_epsilon: float = key(1e-8, "AdamW epsilon.", above=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm; 0: not clipped.", at_least=0)
    fp16: bool = key(False, "Train in float16 (GPU; float32 on the CPU).")
    bf16: bool = key(False, "Train in bfloat16 (A100 and newer; float32 on the CPU).")
    fp16_opt_level: str = key(
        "O1", "O1: float32 weights, half-precision matmuls. O2: half-precision weights.", choices=("O1", "O2")
    )
    amp_master_grad: bool = key(False, "O2: keep gradients in float32.")
    amp_custom_black_list: Optional[List[str]] = key(None, "Operators kept in float32.")
    amp_custom_white_list: Optional[List[str]] = key(None, "Operators run in half precision.")
    fp16_full_eval: bool = key(False, "float16 at evaluation alone.", refused="evaluation uses the dtype of training")
    bf16_full_eval: bool = key(False, "bfloat16 at evaluation alone.", refused="evaluation uses the dtype of training")
    scale_loss: float = key(32768.0, "float16: first loss scale.", above=0)
    recompute: bool = key(False, "Recompute activations in the backward pass: less memory, more time.")
    seed: int = key(42, "Seed of the adapters, dropout and the order of samples.", at_least=0)
    device: Optional[str] = key(None, "cpu, gpu or gpu:N (default: a GPU where there is one).")
    no_cuda: bool = key(False, "Use the CPU although there is a GPU.")
    dataloader_num_workers: int = key(0, "Processes that read and decode samples; 0: the training process.", at_least=0)
    dataloader_drop_last: bool = key(False, "Leave out a last batch that is not full.")
    remove_unused_columns: bool = key(
        True, "Kept for older configs: the collator hands over only what the model takes."
    )
    logging_strategy: str = key("steps", "When to log.", choices=_STRATEGIES)
    logging_steps: int = key(500, "Steps between log lines.", at_least=1)
    logging_first_step: bool = key(False, "Log the first step too.")
    logging_dir: Optional[str] = key(None, "Folder of report_to (default: output_dir/runs/DATE_HOST).")
    run_name: Optional[str] = key(None, "Name of the run in the logs (default: output_dir).")
    report_to: Optional[List[str]] = key(
        None,
        "Where scalars and captions go (default: visualdl and tensorboard).",
        choices=("visualdl", "tensorboard", "none"),
    )
    disable_tqdm: bool = key(False, "No progress bar, log lines only.")
    skip_memory_metrics: bool = key(
        True, "Leave memory out of the log. Watching it slows small runs on the CPU several times."
    )
    benchmark: bool = key(False, "Measure only: nothing is saved, and samples and tokens per second are printed.")
    save_strategy: str = key("steps", "When to write a checkpoint.", choices=_STRATEGIES)
    save_steps: int = key(500, "Steps between checkpoints.", at_least=1)
    save_total_limit: Optional[int] = key(None, "Newest checkpoints kept; the best one is kept besides.", at_least=1)
    evaluation_strategy: str = key("no", "When to evaluate while training.", choices=_STRATEGIES)
    eval_steps: Optional[int] = key(None, "Steps between evaluations (default: logging_steps).", at_least=1)
    max_evaluate_steps: int = key(-1, "Batches of an evaluation; -1: all.", at_least=-1)
    load_best_model_at_end: bool = key(False, "End with the weights of the best evaluation, not the last ones.")
    metric_for_best_model: Optional[str] = key(
        None,
        "What best means (default: loss); cider needs eval_with_do_generation.",
        choices=("loss", "eval_loss", "cider", "eval_cider"),
    )
    greater_is_better: Optional[bool] = key(None, "Whether more of it is better (default: not for a loss).")
    ignore_data_skip: bool = key(False, "On resume, begin the epoch's data again in place of going on where it stood.")
    sharding: str = key(
        "", "Split optimizer states (stage1) and gradients (stage2) over cards.", choices=("", "stage1", "stage2")
    )
    sharding_parallel_degree: int = key(-1, "Cards that share them.", at_least=-1)
    sharding_parallel_config: str = key("", "PaddleNLP's sharding options, separated by spaces.")
    tensor_parallel_degree: int = key(-1, "Cards that share each matrix of the LLM; needs GPUs.", at_least=-1)
    tensor_parallel_config: str = key("", "Tensor parallel.", refused=_TENSOR)
    hybrid_parallel_topo_order: Optional[str] = key(
        None, "Order of the parallel groups.", choices=("pp_first", "sharding_first")
    )
    pipeline_parallel_degree: int = key(-1, "Pipeline.", refused=_PIPELINE, neutral=(0, 1))
    pipeline_parallel_config: str = key("", "Pipeline.", refused=_PIPELINE)
    sep_parallel_degree: int = key(-1, "Sequence split.", refused=_SEQUENCE, neutral=(0, 1))
    context_parallel_degree: int = key(-1, "Sequence split.", refused=_SEQUENCE, neutral=(0, 1))
    sequence_parallel: bool = key(False, "Sequence split.", refused=_SEQUENCE)
    use_expert_parallel: bool = key(False, "Experts.", refused=_EXPERT)
    unified_checkpoint: bool = key(False, "PaddleNLP's unified checkpoint.", refused=_UNIFIED)
    unified_checkpoint_config: str = key("", "PaddleNLP's unified checkpoint.", refused=_UNIFIED)
    use_async_save: bool = key(False, "Save in the background.", refused="a checkpoint counts only when it is whole")
    group_by_modality_length: bool = key(
        False, "Make batches of samples of like length, those with and without an image apart."
    )
    to_static: bool = key(False, "Static graph.", refused="the model runs in dynamic mode")
    use_auto_parallel: bool = key(False, "Auto parallel.", refused="use sharding")
    enable_auto_parallel: bool = key(False, "Auto parallel.", refused="use sharding")
    distributed_dataloader: bool = key(False, "One loader for all cards.", refused="each card reads its own samples")
    flatten_param_grads: bool = key(False, "NPU.", refused="it works on NPUs only")
    prediction_loss_only: bool = key(False, "Kept for older configs: evaluation reports the loss.")
    lr_scheduler_name: str = key("CosineDecayWithWarmup", "Schedule.", refused=_RATE)
    eta_min: float = key(1e-5, "Last rate.", refused=_RATE)
    warmup_start_lr: float = key(1e-6, "First rate.", refused=_RATE)
    lazy_data_processing: bool = key(True, "Data.", refused="data is always read when needed")
    ignore_load_lr_and_optim: bool = key(False, "Resuming.", refused="a checkpoint is resumed as a whole")
    minimum_eval_times: Optional[int] = key(None, "Evaluations.", refused="set eval_steps")
    label_names: Optional[List[str]] = key(None, "Inputs.", refused=_INPUTS)
    past_index: int = key(-1, "Inputs.", refused=_INPUTS)
    save_on_each_node: bool = key(False, "Layout.", refused=_UNIFIED)
    save_sharded_model: bool = key(False, "Layout.", refused=_UNIFIED)
    load_sharded_model: bool = key(False, "Layout.", refused=_UNIFIED)
    force_reshard_pp: bool = key(False, "Layout.", refused=_PIPELINE)
    log_level: int = key(-1, "Logging.", refused=_LOGGING)
    log_level_replica: int = key(-1, "Logging.", refused=_LOGGING)
    log_on_each_node: bool = key(True, "Logging.", refused=_LOGGING)
    profiler_options: Optional[str] = key(None, "Profiling.", refused=_PROFILE)
    skip_profile_timer: bool = key(True, "Profiling.", refused=_PROFILE)
    sharding_degree: int = key(-1, "Sharding.", refused="write sharding_parallel_degree")


# Names of PaddleNLP's keys, or printed in the notebook's blocks, that are no setting of a run here, and why.
NOT_SETTINGS: Dict[str, str] = {
    **dict.fromkeys(("decay_steps",), _RATE),
    **dict.fromkeys(
        ("train_batch_size", "eval_batch_size"), "it follows from per_device_train_batch_size and its like"
    ),
    **dict.fromkeys(
        (
            "local_rank", "process_index", "local_process_index", "logical_process_index", "world_size",
            "data_parallel_rank", "data_parallel_degree", "dataset_rank", "dataset_world_size",
            "sharding_parallel_rank", "tensor_parallel_rank", "pipeline_parallel_rank",
        ),
        "the launcher (python -m paddle.distributed.launch) decides it",
    ),
    **dict.fromkeys(
        (
            "should_log", "should_save", "should_save_model_state", "should_save_sharding_stage1_model",
            "should_load_dataset", "should_load_sharding_stage1_model", "optimizer_name_suffix", "weight_name_suffix",
            "use_hybrid_parallel", "_no_sync_in_gradient_accumulation",
        ),
        "it follows from the degrees and from which process it is",
    ),
    **dict.fromkeys(("current_device",), "write device"),
    **dict.fromkeys(("bf16_opt_level", "amp_level"), "write fp16_opt_level; it serves bf16 too"),
    **dict.fromkeys(("ignore_save_lr_and_optim",), "a checkpoint is resumed as a whole"),
    **dict.fromkeys(("output_signal_dir",), _UNIFIED),
    **dict.fromkeys(("expert_parallel_degree", "expert_tensor_parallel_degree"), _EXPERT),
    **dict.fromkeys(("chat_template_file",), "write chat_template inside the entry of `dataset`"),
}  # fmt: skip

BLOCKS = (
    ("Model", ModelArguments),
    ("Data", DataArguments),
    ("Generation", GenerationArguments),
    ("Training", TrainingKeys),
)
DATASET_ENTRY_KEYS = ("name", "data_files", "chat_template")
DATASET_NAMES = ("chatml_dataset",)


class KnownKey(NamedTuple):
    """One key of a block. `hint` is its type as a typing object; `default` a fresh value."""

    name: str
    block: str
    hint: Any
    default: Any
    meaning: str
    rules: Dict[str, Any]


class Arguments(NamedTuple):
    """A checked run: what `parse` gives and `finetune` takes. `given` names the keys the user set."""

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    training: TrainingKeys
    given: frozenset


def known_keys() -> Dict[str, KnownKey]:
    """Every accepted key by name, in the order of the blocks."""
    found = {}
    for block, arguments in BLOCKS:
        hints = typing.get_type_hints(arguments)
        for field in dataclasses.fields(arguments):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found[field.name] = KnownKey(
                field.name, block, hints[field.name], default, field.metadata["help"], dict(field.metadata)
            )
    return found


def _parts(hint: Any) -> tuple:
    """(whether None is allowed, the type without it, the type of a list's items or None)."""
    optional = False
    if typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = True, inner[0]
    if typing.get_origin(hint) is list:
        return optional, list, typing.get_args(hint)[0]
    if typing.get_origin(hint) is dict:
        return optional, dict, None
    return optional, hint, None


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of texts",
    dict: "an object",
}


def type_name(hint: Any) -> str:
    """The type as docs and errors say it: "a whole number", "a text or null", …"""
    optional, kind, _ = _parts(hint)
    return _KINDS[kind] + (" or null" if optional else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _wrong_kind(known: KnownKey, value: Any) -> ConfigError:
    return ConfigError(f"{known.name} must be {type_name(known.hint)}, not {_shown(value)}")


def _from_json(known: KnownKey, value: Any) -> Any:
    """A JSON value as the key's type. Texts are not read as numbers, nor numbers as texts."""
    optional, kind, item = _parts(known.hint)
    if value is None:
        if optional:
            return None
        raise _wrong_kind(known, value)
    if kind is list:
        items = [value] if isinstance(value, item) else value
        if not isinstance(items, list) or not all(isinstance(part, item) for part in items):
            raise _wrong_kind(known, value)
        return items
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_kind(known, value)
    return value


_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def _from_text(known: KnownKey, words: List[str]) -> Any:
    """The words after `--key` on the command line as the key's type."""
    optional, kind, _ = _parts(known.hint)
    if kind is bool and not words:
        return True
    if not words:
        raise ConfigError(f"--{known.name} needs a value: {type_name(known.hint)}")
    if kind is list and not (len(words) == 1 and words[0].lstrip().startswith("[")):
        if optional and words in (["null"], ["None"]):
            return None
        return list(words)
    if len(words) > 1:
        raise ConfigError(f"--{known.name} takes one value, not {len(words)}: {' '.join(words)}")
    word = words[0]
    if optional and word in ("null", "None"):
        return None
    if kind is str:
        return word
    if kind is bool:
        if word.lower() in _TRUE + _FALSE:
            return word.lower() in _TRUE
        raise _wrong_kind(known, word)
    try:
        value = float(word) if kind in (int, float) and word.lower() not in ("nan", "inf") else json.loads(word)
    except ValueError:
        raise _wrong_kind(known, word) from None
    return _from_json(known, value)


def _check_rules(known: KnownKey, value: Any) -> None:
    rules = known.rules
    if "refused" in rules:
        if value != known.default and value not in rules.get("neutral", ()):
            raise ConfigError(f"{known.name}={_shown(value)} cannot be used here: {rules['refused']}")
        return
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    for one in values:
        if "choices" in rules and one not in rules["choices"]:
            choices = ", ".join(_shown(choice) for choice in rules["choices"])
            near = difflib.get_close_matches(str(one), [str(choice) for choice in rules["choices"]], 1)
            hint = f"; did you mean {_shown(near[0])}?" if near else ""
            raise ConfigError(f"{known.name} must be one of {choices}, not {_shown(one)}{hint}")
        if "at_least" in rules and not one >= rules["at_least"]:
            raise ConfigError(f"{known.name} must be at least {rules['at_least']}, not {one}")
        if "above" in rules and not one > rules["above"]:
            raise ConfigError(f"{known.name} must be above {rules['above']}, not {one}")
        if "at_most" in rules and not one <= rules["at_most"]:
            raise ConfigError(f"{known.name} must be at most {rules['at_most']}, not {one}")


def _unknown(name: str, known: Dict[str, KnownKey]) -> ConfigError:
    if name in NOT_SETTINGS:
        return ConfigError(f"{name} is not a setting here: {NOT_SETTINGS[name]}")
    name = name[:80]
    near = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(name.lower(), known, 1, 0.6)
    hint = f'did you mean "{near[0]}"?' if near else "docs/config.md lists all keys"
    return ConfigError(f"unknown key {json.dumps(name, ensure_ascii=False)}; {hint}")


def _no_duplicates(pairs: list) -> dict:
    found: Dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{json.dumps(name[:80], ensure_ascii=False)} is given twice")
        found[name] = value
    return found


def _check_texts(value: Any) -> None:
    """No path can hold half a character (a lone surrogate) or a zero byte; here both are said in one line."""
    if isinstance(value, dict):
        for pair in value.items():
            _check_texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_texts(item)
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ConfigError(f"{json.dumps(value)[:80]} holds a character that no text or path can have")


def read_config(path: str) -> Dict[str, Any]:
    """The keys and raw values of a JSON config file. Raises ConfigError with the line of a syntax error."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = json.load(file, object_pairs_hook=_no_duplicates)
        _check_texts(config)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: the config must be a JSON object of keys and values")
    return config


def _split_words(argv: Sequence[str]) -> tuple:
    """argv as (config path or None, {key: words after it})."""
    path, pairs, current = None, {}, None
    for index, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            pairs[name] = [value] if equals else []
            current = None if equals else name
        elif current is not None:
            pairs[current].append(word)
        elif index == 0:
            path = word
        else:
            raise ConfigError(f'"{word}" stands alone; write the config file first, then --key value pairs')
    return path, pairs


def split_dry_run(argv: Sequence[str]) -> Tuple[bool, Optional[str], List[str]]:
    """(whether `--dry_run` is asked, the value of `--plan_for` or None, the other words).

    They are no keys of a run, so they stand on the command line only.
    """
    dry_run, cards, rest = False, None, []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if name == "__dry_run":
            if equals or (words and words[0] in _TRUE + _FALSE):
                raise ConfigError("--dry_run takes no value")
            dry_run = True
        elif name == "__plan_for":
            if not equals and (not words or words[0].startswith("--")):
                raise ConfigError("--plan_for needs cards, such as 8xA100-80GB")
            cards = value if equals else words.pop(0)
        else:
            rest.append(word)
    if cards is not None and not dry_run:
        raise ConfigError("--plan_for goes with --dry_run")
    return dry_run, cards, rest


def parse(argv: Sequence[str]) -> Arguments:
    """Read `[CONFIG.json] [--key value …]` into checked arguments.

    Raises ConfigError, in one line that says what to mend, on anything that cannot work.
    """
    values, problems = read_values(argv)
    if problems:
        raise ConfigError("; ".join(problems))
    return from_values(values)


def read_values(argv: Sequence[str]) -> Tuple[Dict[str, Any], List[str]]:
    """The keys that `[CONFIG.json] [--key value …]` sets, and a sentence for each that cannot be taken.

    Raises:
        ConfigError: there is no such config file, it is not JSON, or a word stands where none can.
    """
    known = known_keys()
    path, pairs = _split_words(argv)
    values: Dict[str, Any] = {}
    problems: List[str] = []

    def take(name: str, read: Callable[[KnownKey, Any], Any], raw: Any, where: str) -> None:
        try:
            if name not in known:
                raise _unknown(name, known)
            value = read(known[name], raw)
            _check_rules(known[name], value)
        except ConfigError as error:
            problems.append(f"{where}{error}")
        else:
            values[name] = value

    for name, raw in (read_config(path) if path is not None else {}).items():
        take(name, _from_json, raw, f"{path}: ")
    for name, words in pairs.items():
        take(name, _from_text, words, "")
    return values, problems


def from_values(values: Dict[str, Any]) -> Arguments:
    """Checked arguments from keys and values of the right types (a config read elsewhere, a test)."""
    known = known_keys()
    for name, value in values.items():
        if name not in known:
            raise _unknown(name, known)
        _check_rules(known[name], _from_json(known[name], value))
    arguments = blocks_of(values)
    problems = find_problems(arguments)
    if problems:
        raise ConfigError("; ".join(problems))
    return arguments


def blocks_of(values: Dict[str, Any]) -> Arguments:
    """Arguments with these values, each of the right type, and not checked against each other."""
    blocks = [
        arguments(**{field.name: values[field.name] for field in dataclasses.fields(arguments) if field.name in values})
        for _, arguments in BLOCKS
    ]
    return Arguments(*blocks, given=frozenset(values))


def dataset_entries(data: DataArguments, part: str) -> List[Dict[str, Any]]:
    """The checked entries of `dataset` for "train" or "eval": name, data_files (a list), chat_template."""
    entries = (data.dataset or {}).get(part) or []
    entries = [entries] if isinstance(entries, dict) else entries
    checked = []
    for entry in entries:
        files = entry["data_files"]
        checked.append(
            {
                "name": entry.get("name", DATASET_NAMES[0]),
                "data_files": [files] if isinstance(files, str) else list(files),
                "chat_template": entry.get("chat_template") or data.chat_template,
            }
        )
    return checked


def _dataset_problems(data: DataArguments) -> List[str]:
    if data.dataset is None:
        return []
    problems = []
    for part, entries in data.dataset.items():
        if part not in ("train", "eval"):
            problems.append(f'dataset: unknown part "{part}"; the parts are "train" and "eval"')
            continue
        for entry in [entries] if isinstance(entries, dict) else entries or []:
            where = f"dataset.{part}"
            if not isinstance(entry, dict):
                problems.append(f'{where} must be a list of objects with "data_files", not {_shown(entry)}')
                continue
            for name in entry:
                if name not in DATASET_ENTRY_KEYS:
                    near = difflib.get_close_matches(name, DATASET_ENTRY_KEYS, 1)
                    hint = f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(DATASET_ENTRY_KEYS)}"
                    problems.append(f'{where}: unknown key "{name}"{hint}')
            if entry.get("name", DATASET_NAMES[0]) not in DATASET_NAMES:
                problems.append(f'{where}: unknown dataset "{entry["name"]}"; known: {", ".join(DATASET_NAMES)}')
            files = entry.get("data_files")
            if not files or not isinstance(files, (str, list)):
                problems.append(f'{where}: "data_files" must be a path or a list of paths')
                continue
            for path in [files] if isinstance(files, str) else files:
                if not os.path.isfile(path) and not glob.glob(path, recursive=True):
                    problems.append(f"{where}: no file matches {path}")
            template = entry.get("chat_template")
            if template is not None and not os.path.isfile(template):
                problems.append(f"{where}: there is no chat template at {template}")
    return problems


def _within(path: str, folder: str) -> bool:
    """Whether a path is this folder or lies in it."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def find_problems(arguments: Arguments, processes: Optional[int] = None) -> List[str]:
    """What cannot work together, or is missing, one sentence each. Files are looked for, none is read.

    processes: cards of the run, as `world_size` by default.
    """
    model, data, _, training, given = arguments
    problems = []
    if not training.do_train and not training.do_eval:
        problems.append("nothing to do: set do_train or do_eval")
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
    problems += _dataset_problems(data)
    if data.chat_template is not None and not os.path.isfile(data.chat_template):
        problems.append(f"chat_template: there is no file at {data.chat_template}")
    wants_eval = training.do_eval or training.evaluation_strategy != "no"
    for part, wanted, by in (
        ("train", training.do_train, "do_train"),
        ("eval", wants_eval, "do_eval" if training.do_eval else "evaluation_strategy"),
    ):
        if wanted and not (data.dataset or {}).get(part):
            problems.append(f'{by} needs data: give dataset {{"{part}": [{{"data_files": …}}]}}')
    if data.mixtoken and training.group_by_modality_length:
        problems.append("set mixtoken or group_by_modality_length, not both: packed sequences are of like length")
    if data.mixtoken and model.neftune:
        problems.append("mixtoken cannot go with neftune, whose noise depends on the length of one sample")
    if training.fp16 and training.bf16:
        problems.append("set fp16 or bf16, not both")
    if model.lora_path is not None:
        if not model.lora:
            problems.append("lora_path needs lora=true")
        elif not os.path.isfile(os.path.join(model.lora_path, "lora_config.json")):
            problems.append(f"lora_path: {model.lora_path} has no lora_config.json")
    if not model.lora:
        of_lora = ("lora_alpha", "lora_dropout", "lora_rank", "lora_target_modules")
        set_anyway = [name for name in of_lora if name in given]
        if set_anyway:
            problems.append(f"{set_anyway[0]} needs lora=true")
    if model.lora and not model.lora_target_modules:
        problems.append("lora_target_modules is empty; without adapters set lora=false")
    if training.lr_scheduler_type == "constant" and (training.warmup_steps or training.warmup_ratio):
        problems.append("lr_scheduler_type=constant has no warmup: set constant_with_warmup, or leave warmup_* at 0")
    if training.lr_scheduler_type == "polynomial" and training.learning_rate <= training.lr_end:
        problems.append(f"learning_rate={training.learning_rate} must be above lr_end={training.lr_end}")
    if training.mm_projector_lr is not None and training.learning_rate == 0:
        problems.append("mm_projector_lr is scheduled as a multiple of learning_rate, which must not be 0")
    if training.load_best_model_at_end:
        if training.evaluation_strategy == "no" or training.evaluation_strategy != training.save_strategy:
            problems.append("load_best_model_at_end needs evaluation_strategy and save_strategy to be the same")
        elif training.save_strategy == "steps" and training.save_steps % (
            training.eval_steps or training.logging_steps
        ):
            problems.append("load_best_model_at_end needs save_steps to be a multiple of eval_steps")
    if training.metric_for_best_model in ("cider", "eval_cider") and not data.eval_with_do_generation:
        problems.append("metric_for_best_model=cider needs eval_with_do_generation")
    if data.save_generation_output and not data.eval_with_do_generation:
        problems.append("save_generation_output needs eval_with_do_generation")
    if data.eval_with_do_generation and not wants_eval:
        problems.append("eval_with_do_generation needs do_eval or evaluation_strategy")
    if training.benchmark and (training.load_best_model_at_end or training.resume or training.resume_from_checkpoint):
        problems.append("benchmark saves nothing, so it cannot resume or load the best model")
    if training.resume and training.resume_from_checkpoint:
        problems.append("set resume or resume_from_checkpoint, not both")
    if training.resume_from_checkpoint and not os.path.isdir(training.resume_from_checkpoint):
        problems.append(f"resume_from_checkpoint: there is no folder {training.resume_from_checkpoint}")
    if (training.resume or training.resume_from_checkpoint) and not training.do_train:
        problems.append("resume needs do_train")
    problems += _parallel_problems(training, world_size() if processes is None else processes)
    return problems


# Said when the steps are counted, by the run and by its plan.
TOO_FEW_EPOCHS = "num_train_epochs={} ends before the first optimizer step: raise it, or set max_steps"

# Options that keep optimizer states by pieces of fused buffers, and not by parameter.
_CUT_STATES = {
    "split_param",
    "enable_stage1_tensor_fusion",
    "enable_stage1_allgather_overlap",
    "enable_fuse_optimizer_states",
}


def _parallel_problems(training: TrainingKeys, processes: int) -> List[str]:
    launch = "start it with python -m paddle.distributed.launch"
    problems = []
    tensor, shards = max(training.tensor_parallel_degree, 1), max(training.sharding_parallel_degree, 1)
    if processes == 1:
        if tensor > 1:
            problems.append(f"tensor_parallel_degree={tensor} needs {tensor} processes: {launch}")
        if training.sharding or shards > 1:
            problems.append(f"sharding needs several processes: {launch}")
    else:
        if processes % (tensor * shards):
            problems.append(
                f"{processes} processes cannot be divided by tensor_parallel_degree × "
                f"sharding_parallel_degree = {tensor * shards}"
            )
        cut = sorted(_CUT_STATES & set(training.sharding_parallel_config.replace(",", " ").split()))
        if cut:
            problems.append(f"sharding_parallel_config: with {cut[0]} a checkpoint could not be resumed; leave it out")
        if shards > 1 and not training.sharding:
            problems.append("sharding_parallel_degree needs sharding=stage1 or stage2")
    return problems


_MAIN_KEYS = (
    ("the model", ("model_name_or_path", "output_dir")),
    ("the data", ("dataset", "max_length", "label_all_turn_markers", "dataloader_num_workers")),
    ("what trains", ("freeze_include", "freeze_exclude", "lora", "lora_rank", "lora_alpha", "lora_target_modules")),
    (
        "the run",
        (
            "do_train",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_ratio",
            "weight_decay",
            "fp16",
            "bf16",
            "fp16_opt_level",
            "recompute",
        ),
    ),
    (
        "logs, checkpoints, evaluation",
        (
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "evaluation_strategy",
            "resume",
            "overwrite_output_dir",
            "disable_tqdm",
        ),
    ),
)


def help_text(program: str = "supervised_finetune.py") -> str:
    """What `--help` prints: how to call it, three examples, and the keys most runs set."""
    import textwrap

    known = known_keys()
    lines = [
        f"usage: python {program} CONFIG.json [--key value …]",
        f"       python {program} --key value …",
        "",
        "Tune MGen-VL on image captions: LoRA adapters, chosen parts, or the whole model. CONFIG.json is one",
        "JSON object of the keys below; a --key on the command line wins over the file. An unknown key ends",
        "the run with status 2.",
        "",
        "examples:",
        f"  python {program} config/mgen_vl/lora_sft_argument.json",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --max_steps 100 --learning_rate 2e-5",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --resume",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --dry_run",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --dry_run --plan_for 8xA100-80GB",
        "",
        "--dry_run trains nothing and reads no weights: it prints what would train, steps, lengths, memory and",
        "disk, and every problem it finds; status 0 when the run can start, 2 when not. --plan_for names other",
        "cards to plan for than this machine's.",
        "",
        "lists take several words (--freeze_include '*visual*' '*lm_head*'), objects JSON.",
    ]
    for title, names in _MAIN_KEYS:
        lines += ["", f"{title}:"]
        for name in names:
            one = known[name]
            text = f"{one.meaning} ({type_name(one.hint)}; default {_shown(one.default)})"
            wrapped = textwrap.wrap(text, 82, break_long_words=False, break_on_hyphens=False)
            lines.append(f"  {name:<28} {wrapped[0]}")
            lines += [f"  {'':<28} {line}" for line in wrapped[1:]]
    lines += ["", f"docs/config.md describes all {len(known)} keys."]
    return "\n".join(lines)


def config_tables() -> str:
    """The tables of docs/config.md: a row per key, a table per block, and the names that are no settings."""
    lines = []
    for block, _ in BLOCKS:
        lines += [f"## {block}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for one in known_keys().values():
            if one.block == block:
                meaning = one.meaning
                if "choices" in one.rules:
                    choices = ", ".join(f"`{_shown(choice)}`" for choice in one.rules["choices"])
                    meaning += f" One of {choices}."
                if "refused" in one.rules:
                    meaning = f"Only the default: {one.rules['refused']}."
                default = json.dumps(one.default, ensure_ascii=False)
                cells = (f"`{one.name}`", type_name(one.hint), f"`{default}`", meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## Names that are no settings", "", "| name | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in NOT_SETTINGS.items()]
    return "\n".join(lines) + "\n"
