"""The keys of a finetuning run: names, types, defaults and meanings.

They form four blocks, as the training log prints them: Model, Data, Generation, Training. Training keys have
PaddleNLP's names, types and defaults and are passed to its TrainingArguments. REFUSED lists names in notebooks and
older configs that have no effect here, with the reason. Imports neither Paddle nor PaddleNLP, so that `--help` and
typos are answered at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional

from paddlemix.trainer.reading import Key
from paddlemix.utils.runtime import world_size


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """A dataclass field with its meaning and limits (see reading.Key)."""
    metadata = dict(limits, help=meaning)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model, and which of its parameters train."""

    model_name_or_path: Optional[str] = key(
        None, "Folder of the model to tune (config.json, weights, tokenizer).", path=True
    )
    text_model_name_or_path: Optional[str] = key(
        None, "Folder of another MGen-VL model; its transformer.llm.* and lm_head replace the first's.", path=True
    )
    freeze_include: Optional[List[str]] = key(
        None, "Patterns of parameter names to freeze (* matches anything), such as *visual*."
    )
    freeze_exclude: Optional[List[str]] = key(
        None,
        "Patterns of parameters to train even if freeze_include matches them. With lora, these parameters are "
        "trained in full and saved with the adapters.",
    )
    lora: bool = key(False, "Train LoRA adapters; the adapted weights stay frozen.")
    lora_path: Optional[str] = key(None, "Folder of a LoRA checkpoint to start from.", path=True)
    lora_rank: int = key(64, "Rank r of the adapters.", at_least=1, at_most=65536)
    lora_alpha: int = key(16, "Adapters are scaled by lora_alpha / lora_rank.", at_least=1)
    lora_dropout: float = key(0.05, "Dropout on the adapters' input.", at_least=0, at_most=0.99)
    lora_target_modules: List[str] = key(
        [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"],
        "Regular expressions on full names; Linear layers that match, or are inside a matching module, get an "
        "adapter.",
    )
    neftune: bool = key(False, "Add uniform noise to the token embeddings while training (NEFTune).")
    neftune_noise_alpha: float = key(5.0, "Noise scale of neftune.", above=0)
    use_flash_attention: bool = key(False, "Use Paddle's fused attention kernel, which takes less GPU memory.")


@dataclass
class DataArguments:
    """Which samples, and how they become token sequences."""

    dataset: Optional[Dict[str, Any]] = key(
        None,
        'The data: {"train": [{"name": "chatml_dataset", "data_files": FILE, "chat_template": FILE}], '
        '"eval": […]}. '
        "data_files is a path, a list of paths, or a pattern with *; chat_template may be left out. "
        "An entry can also have weight, repeat, limit and prompt (see Mixing).",
    )
    chat_template: Optional[str] = key(None, "Chat template of entries without their own (default: chatml).", path=True)
    max_length: int = key(
        2048, "Maximum tokens per sample; longer text is truncated, image spans never are.", at_least=16
    )
    label_all_turn_markers: bool = key(
        True, "Also learn the <|im_start|>, <|im_end|> and newline of every turn; false: only the captions."
    )
    lazy: bool = key(False, "Accepted for older configs: samples are always read by index and decoded on demand.")
    mixtoken: bool = key(
        False,
        "Pack samples into sequences of at most max_length tokens; attention never crosses sample boundaries. Batch "
        "sizes then count sequences.",
    )
    eval_with_do_generation: bool = key(
        False, "At each evaluation, also caption the validation set and score the captions (eval_cider)."
    )
    eval_image_gain: bool = key(
        False,
        "At each evaluation, also log how much the loss rises if every image is blank (eval_image_gain); near 0, "
        "the model ignores the images.",
    )
    save_generation_output: bool = key(
        False, "Write these captions to output_dir/generation-<step>.tsv: id, caption, reference."
    )
    shown_captions: int = key(
        4,
        "Number of validation captions to generate and show at each evaluation, in the log and in report_to; 0: "
        "none. With eval_with_do_generation, the first of its captions are shown.",
        at_least=0,
    )


@dataclass
class GenerationArguments:
    """How captions are generated at evaluation (eval_with_do_generation)."""

    top_k: int = key(1, "Sample from the k most probable tokens; 1: greedy, 0: all tokens.", at_least=0)
    top_p: float = key(1.0, "Sample from the smallest set of tokens with this total probability.", above=0, at_most=1)
    max_new_tokens: int = key(512, "Maximum tokens of a caption.", at_least=1)


_STRATEGIES = ("no", "steps", "epoch")


@dataclass
class TrainingKeys:
    """Keys of PaddleNLP's TrainingArguments that work here, with its defaults, and a few of our own."""

    output_dir: Optional[str] = key(None, "Folder for checkpoints, logs and the result.", path=True)
    overwrite_output_dir: bool = key(
        False,
        "Replace the result of a finished run in output_dir. An unfinished run is never overwritten: see resume.",
    )
    resume: bool = key(
        False, "Resume from the newest complete checkpoint in output_dir; start from scratch if there is none."
    )
    resume_from_checkpoint: Optional[str] = key(
        None, "Resume from this checkpoint folder: the newest in output_dir, or one elsewhere.", path=True
    )
    do_train: bool = key(False, "Train.")
    do_eval: bool = key(
        False, 'Evaluate; with evaluation_strategy "no", once after training. Any other strategy implies do_eval.'
    )
    per_device_train_batch_size: int = key(
        8, "Samples per batch and card (with mixtoken: sequences).", at_least=1, at_most=4096
    )
    per_device_eval_batch_size: int = key(8, "Samples per evaluation batch and card.", at_least=1, at_most=4096)
    gradient_accumulation_steps: int = key(
        1, "Batches per optimizer step; their losses are averaged batch by batch.", at_least=1
    )
    eval_accumulation_steps: Optional[int] = key(
        None, "Evaluation batches whose losses are kept on the card before they are fetched.", at_least=1
    )
    num_train_epochs: float = key(1.0, "Epochs: passes over the data.", above=0, at_most=1_000_000)
    max_steps: int = key(-1, "Optimizer steps; if positive, overrides num_train_epochs.", at_least=-1)
    learning_rate: float = key(5e-5, "Peak learning rate.", at_least=0)
    mm_projector_lr: Optional[float] = key(
        None, "Learning rate of visual.attn_pool, ln_post and proj (default: learning_rate).", above=0
    )
    lr_scheduler_type: str = key(
        "linear",
        "Learning rate schedule after warmup.",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )
    warmup_ratio: float = key(0.0, "Fraction of all steps over which the rate rises from 0.", at_least=0, at_most=1)
    warmup_steps: int = key(0, "Warmup in steps; if positive, overrides warmup_ratio.", at_least=0)
    num_cycles: float = key(0.5, "Cosine schedule: waves over the run (0.5: decay to 0).", above=0)
    lr_end: float = key(1e-7, "Polynomial schedule: final rate.", at_least=0)
    power: float = key(1.0, "Polynomial schedule: power.", above=0)
    optim: str = key("adamw", "Optimizer.", choices=("adamw",))
    weight_decay: float = key(0.0, "Weight decay of matrices; biases and norms are not decayed.", at_least=0)
    adam_beta1: float = key(0.9, "AdamW beta1.", at_least=0, at_most=0.9999999)
    adam_beta2: float = key(0.999, "AdamW beta2.", at_least=0, at_most=0.9999999)
    adam_epsilon: float = key(1e-8, "AdamW epsilon.", above=0)
    max_grad_norm: float = key(1.0, "Clip gradients to this global norm; 0: no clipping.", at_least=0)
    fp16: bool = key(False, "Train in float16 (GPU; float32 on the CPU).")
    bf16: bool = key(False, "Train in bfloat16 (A100 and newer; float32 on the CPU).")
    fp16_opt_level: str = key(
        "O1", "O1: float32 weights, half-precision matmuls. O2: half-precision weights.", choices=("O1", "O2")
    )
    amp_master_grad: bool = key(False, "O2: keep gradients in float32.")
    amp_custom_black_list: Optional[List[str]] = key(None, "Operators kept in float32.")
    amp_custom_white_list: Optional[List[str]] = key(None, "Operators run in half precision.")
    scale_loss: float = key(32768.0, "float16: initial loss scale.", above=0)
    recompute: bool = key(False, "Recompute activations in the backward pass: less memory, more time.")
    seed: int = key(42, "Random seed of adapter initialisation, dropout and sample order.", at_least=0)
    device: Optional[str] = key(None, "cpu, gpu or gpu:N (default: a GPU if there is one).")
    no_cuda: bool = key(False, "Use the CPU even if there is a GPU.")
    dataloader_num_workers: int = key(
        0, "Worker processes that load samples; 0: load in the training process.", at_least=0, at_most=1024
    )
    dataloader_drop_last: bool = key(False, "Drop the last batch if it is not full.")
    remove_unused_columns: bool = key(
        True, "Accepted for older configs: the collator only returns the model's inputs."
    )
    logging_strategy: str = key("steps", "When to log.", choices=_STRATEGIES)
    logging_steps: int = key(500, "Steps between log lines.", at_least=1)
    logging_first_step: bool = key(False, "Log the first step too.")
    logging_dir: Optional[str] = key(None, "Folder for report_to (default: output_dir/runs/DATE_HOST).", path=True)
    run_name: Optional[str] = key(None, "Name of the run in the logs (default: output_dir).")
    report_to: Optional[List[str]] = key(
        None,
        "Where scalars and captions are reported (default: visualdl and tensorboard).",
        choices=("visualdl", "tensorboard", "none"),
    )
    disable_tqdm: bool = key(False, "Show no progress bar, only log lines.")
    skip_memory_metrics: bool = key(
        True,
        "Do not log host memory, whose monitoring needs a busy thread that slows down every step. GPU memory is "
        "always logged.",
    )
    benchmark: bool = key(False, "Only measure speed: print samples and tokens per second, save nothing.")
    save_strategy: str = key("steps", "When to write a checkpoint.", choices=_STRATEGIES)
    save_steps: int = key(500, "Steps between checkpoints.", at_least=1)
    save_total_limit: Optional[int] = key(
        None, "Number of newest checkpoints to keep; the best one is kept, too.", at_least=1
    )
    evaluation_strategy: str = key("no", "When to evaluate during training.", choices=_STRATEGIES)
    eval_steps: Optional[int] = key(None, "Steps between evaluations (default: logging_steps).", at_least=1)
    max_evaluate_steps: int = key(-1, "Batches per evaluation; -1: all.", at_least=-1)
    load_best_model_at_end: bool = key(
        False, "Use the weights of the best evaluation as the result, not the last ones."
    )
    metric_for_best_model: Optional[str] = key(
        None,
        "Metric by which the best is chosen (default: loss); cider needs eval_with_do_generation.",
        choices=("loss", "eval_loss", "cider", "eval_cider"),
    )
    greater_is_better: Optional[bool] = key(None, "Whether higher values of it are better (default: not for a loss).")
    ignore_data_skip: bool = key(False, "On resume, restart the epoch's data instead of continuing where it stopped.")
    sharding: str = key(
        "",
        "Shard optimizer states (stage1), and also gradients (stage2), over cards.",
        choices=("", "stage1", "stage2"),
    )
    sharding_parallel_degree: int = key(-1, "Number of cards to shard over.", at_least=-1)
    sharding_parallel_config: str = key("", "PaddleNLP's sharding options, separated by spaces.")
    tensor_parallel_degree: int = key(
        -1, "Number of cards over which each matrix of the LLM is split; needs GPUs.", at_least=-1
    )
    hybrid_parallel_topo_order: Optional[str] = key(
        None, "Order of the parallel groups.", choices=("pp_first", "sharding_first")
    )
    group_by_modality_length: bool = key(
        False, "Build batches from samples of similar length, with and without images separately."
    )
    prediction_loss_only: bool = key(False, "Accepted for older configs: evaluation reports the loss.")

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation, while training or after it."""
        return self.do_eval or self.evaluation_strategy != "no"


BLOCKS = (
    ("Model", ModelArguments),
    ("Data", DataArguments),
    ("Generation", GenerationArguments),
    ("Training", TrainingKeys),
)


class Refused(NamedTuple):
    """Why a name has no effect here, and the values it may still have: those that leave it off."""

    why: str
    may_be: tuple = ()


def _off(why: str, **values: Any) -> Dict[str, Refused]:
    """Names that may only have the value, or one of a tuple of values, that leaves them off."""
    return {name: Refused(why, value if isinstance(value, tuple) else (value,)) for name, value in values.items()}


def _never(why: str, names: str) -> Dict[str, Refused]:
    return dict.fromkeys(names.split(), Refused(why))


_RATE = "the rate is set by learning_rate, lr_scheduler_type, warmup_ratio or warmup_steps"
_WHOLE = "a checkpoint is always resumed completely"
_LAYOUT = "checkpoints are written in one layout (lora_model_state or model_state files), see docs/config.md"
_PIPELINE = "the model is not a PipelineLayer, which pipeline parallelism needs; use sharding"
_EXPERTS = "the model has no experts"

REFUSED: Dict[str, Refused] = {
    **_off(
        "weights are read from and written to local folders only",
        aistudio_repo_id=None, aistudio_repo_license="Apache License 2.0", aistudio_repo_private=True,
        aistudio_token=None, from_aistudio=False, save_to_aistudio=False,
    ),
    **_off(
        "prefix tuning is not implemented; use lora, or full tuning with freeze_include and freeze_exclude",
        prefix_tuning=False, num_prefix_tokens=128,
    ),
    **_off("use max_length, which limits the sample", src_length=1024),
    **_off("name the files in `dataset`", splits=None, task_name=None),
    **_off("data is always read on demand", lazy_data_processing=True),
    **_off("each card reads its own samples", distributed_dataloader=False),
    **_off("the model's inputs are fixed", label_names=None, past_index=-1),
    **_off("use predict.py", do_predict=False),
    **_off("use merge_lora_params.py, which writes the folder for predict.py", do_export=False),
    **_off("evaluation uses the dtype of training", fp16_full_eval=False, bf16_full_eval=False),
    **_off("set eval_steps", minimum_eval_times=None),
    **_off(_RATE, lr_scheduler_name="CosineDecayWithWarmup", eta_min=1e-5, warmup_start_lr=1e-6),
    **_off(
        "replicated parameters are always kept in sync (sync_grad); the other options are for other model layouts",
        tensor_parallel_config="",
    ),
    **_off(_PIPELINE, pipeline_parallel_degree=(-1, 0, 1), pipeline_parallel_config="", force_reshard_pp=False),
    **_off(
        "samples are short sequences, which are not split over cards",
        sep_parallel_degree=(-1, 0, 1), context_parallel_degree=(-1, 0, 1), sequence_parallel=False,
    ),
    **_off(_EXPERTS, use_expert_parallel=False),
    **_off("use sharding", use_auto_parallel=False, enable_auto_parallel=False),
    **_off("use sharding_parallel_degree", sharding_degree=-1),
    **_off(
        _LAYOUT, unified_checkpoint=False, unified_checkpoint_config="", save_on_each_node=False,
        save_sharded_model=False, load_sharded_model=False,
    ),
    **_off("checkpoints are written synchronously, so that they are complete", use_async_save=False),
    **_off(_WHOLE, ignore_load_lr_and_optim=False),
    **_off("the model runs in dynamic graph mode", to_static=False),
    **_off("only effective on NPUs", flatten_param_grads=False),
    **_off("only the first process logs", log_level=-1, log_level_replica=-1, log_on_each_node=True),
    **_off("use benchmark", profiler_options=None, skip_profile_timer=True),
    **_never(_RATE, "decay_steps"),
    **_never("derived from per_device_train_batch_size and related keys", "train_batch_size eval_batch_size"),
    **_never(
        "set by the launcher (python -m paddle.distributed.launch)",
        "local_rank process_index local_process_index logical_process_index world_size data_parallel_rank "
        "data_parallel_degree dataset_rank dataset_world_size sharding_parallel_rank tensor_parallel_rank "
        "pipeline_parallel_rank",
    ),
    **_never(
        "derived from the parallel degrees and the process rank",
        "should_log should_save should_save_model_state should_save_sharding_stage1_model should_load_dataset "
        "should_load_sharding_stage1_model optimizer_name_suffix weight_name_suffix use_hybrid_parallel "
        "_no_sync_in_gradient_accumulation",
    ),
    **_never("use device", "current_device"),
    **_never("use fp16_opt_level, which also applies to bf16", "bf16_opt_level amp_level"),
    **_never(_WHOLE, "ignore_save_lr_and_optim"),
    **_never(_LAYOUT, "output_signal_dir"),
    **_never(_EXPERTS, "expert_parallel_degree expert_tensor_parallel_degree"),
    **_never("set chat_template in the entry of `dataset`", "chat_template_file"),
}  # fmt: skip


def known_keys() -> Dict[str, Key]:
    """All keys that have an effect, by name, in the order of the blocks."""
    found = {}
    for block, arguments in BLOCKS:
        hints = typing.get_type_hints(arguments)
        for field in dataclasses.fields(arguments):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            limits = {name: value for name, value in field.metadata.items() if name != "help"}
            found[field.name] = Key(field.name, hints[field.name], default, field.metadata["help"], block, limits)
    return found


class Arguments(NamedTuple):
    """The arguments of a run. given: the keys that were set. cards: processes of the run, one card each."""

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    training: TrainingKeys
    given: frozenset
    cards: int


def blocks_of(values: Dict[str, Any], cards: Optional[int] = None) -> Arguments:
    """Arguments with these values, which must have the right types; rules between keys are not checked.

    cards: by default those of the launcher.
    """
    blocks = [
        arguments(**{field.name: values[field.name] for field in dataclasses.fields(arguments) if field.name in values})
        for _, arguments in BLOCKS
    ]
    return Arguments(*blocks, frozenset(values), world_size() if cards is None else cards)
