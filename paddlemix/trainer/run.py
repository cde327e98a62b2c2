"""The resolved run: everything about a run is decided once. `finetune` executes a Run, the dry run prints it.

Only headers of weights are read, and no images. All problems are collected, so that one pass reports them all.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.auto import AutoConfigMIX, AutoTokenizerMIX
from paddlemix.checkpoint import open_weights
from paddlemix.checkpoint.origin import Origin
from paddlemix.datasets.chatml import ChatmlDataset, build_dataset
from paddlemix.datasets.entries import Entry, read_entries
from paddlemix.datasets.packing import Packs, SampleLengths, plan_packs
from paddlemix.models.lora import adapter_shapes, check_claims, open_lora_weights
from paddlemix.models.mgen_vl.parameters import Shape, check_weights, cut_problems, parameter_shapes
from paddlemix.models.mgen_vl.tokenizer import check_vocabulary
from paddlemix.processors.images import MGenVLImageProcessor
from paddlemix.trainer import freeze, parallel, resume, run_checkpoints
from paddlemix.trainer.guard import LanguageGuard, check_text_model
from paddlemix.trainer.keys import Arguments
from paddlemix.trainer.machine import Machine, this_machine
from paddlemix.trainer.order import Draw, Order, plan_draws
from paddlemix.trainer.reports import choose_reports
from paddlemix.trainer.rules import broken_rules
from paddlemix.trainer.tuned_model import open_tuned
from paddlemix.utils import runtime
from paddlemix.utils.compat import FUSED_ATTENTION_ON_CPU
from paddlemix.utils.errors import ConfigError, Problem, UserError
from paddlemix.utils.outputs import nearest_folder
from paddlemix.utils.runtime import Precision
from paddlemix.utils.texts import some

# Files of an entry that a line names.
_NAMED_FILES = 3


class StoredWeights(NamedTuple):
    """The weights of a model folder, from their headers. dtypes: tensors of each."""

    tensors: int
    files: int
    bytes: int
    dtypes: Counter


@dataclass
class Run:
    """A run before its first step. A field that cannot be decided because of a problem is None or empty.

    problems: why the run cannot start; errors: the exceptions behind them. warnings: deviations from the request.
    notes: further information. shapes: of the base model's parameters. trainable: those that train in full. adapters:
    names and shapes of the LoRA matrices. resume_from: checkpoint to resume from. done: its steps. old_files:
    results of a finished run in output_dir that are to be deleted.
    """

    arguments: Arguments
    machine: Machine
    problems: List[str] = field(default_factory=list)
    errors: Dict[str, UserError] = field(default_factory=dict)
    warnings: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    precision: Precision = Precision("float32", "float32", False, False)
    flash: bool = False
    config: Optional[Any] = None
    shapes: Dict[str, Shape] = field(default_factory=dict)
    weights: Optional[StoredWeights] = None
    guard: Optional[LanguageGuard] = None
    trainable: Sequence[str] = ()
    adapters: Dict[str, Shape] = field(default_factory=dict)
    tokenizer: Optional[Any] = None
    entries: Dict[str, List[Entry]] = field(default_factory=dict)
    datasets: Dict[str, ChatmlDataset] = field(default_factory=dict)
    lengths: Optional[SampleLengths] = None
    order: Optional[Order] = None
    resume_from: Optional[str] = None
    done: int = 0
    old_files: List[str] = field(default_factory=list)

    def attempt(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result of a call; None if it raises a UserError, which becomes a problem."""
        try:
            return call(*arguments, **options)
        except UserError as error:
            self.problem(Problem.of(error))
            self.errors[str(error)] = error
        return None

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def refuse(self) -> None:
        """Raise one error for all problems, if any."""
        if len(self.problems) == 1 and self.problems[0] in self.errors:
            raise self.errors[self.problems[0]]
        if self.problems:
            raise ConfigError.of(self.problems)

    @property
    def tensor(self) -> int:
        """Cards that share each matrix."""
        return max(self.arguments.training.tensor_parallel_degree, 1)

    @property
    def data_parallel(self) -> int:
        """Cards that work on different samples."""
        return max(self.machine.cards // self.tensor, 1)

    @property
    def trained(self) -> List[str]:
        """Names of all parameters that train."""
        return [*self.trainable, *self.adapters]

    @property
    def packs(self) -> Optional[Packs]:
        return None if self.order is None else self.order.packs

    @functools.cached_property
    def origin(self) -> Origin:
        """The models that the run starts from, to be saved with its result."""
        return Origin.of(self.arguments.model.model_name_or_path, self.arguments.model.text_model_name_or_path)

    @property
    def kind(self) -> str:
        """What is saved: "adapters" (with fully trained parameters, if any), a "part" or "everything"."""
        if self.adapters:
            return "adapters"
        return "everything" if freeze.is_everything(self.trainable, self.shapes) else "part"

    @property
    def saved(self) -> Dict[str, Shape]:
        """Names and shapes of what is saved."""
        shapes = {**self.shapes, **self.adapters}
        return shapes if self.kind == "everything" else {name: shapes[name] for name in self.trained}

    def counts(self) -> Dict[str, freeze.GroupCount]:
        """Elements per module group."""
        trained = set(self.trained)
        shapes = {**self.shapes, **self.adapters}
        return freeze.count_groups((name, shape, name in trained) for name, shape in shapes.items())


def resolve(arguments: Arguments, machine: Optional[Machine] = None, problems: Sequence[str] = ()) -> Run:
    """Resolve a run.

    machine: None for this one. problems: those found while parsing the arguments.
    """
    run = _on_machine(arguments, machine)
    run.problems[:0] = [*problems, *broken_rules(arguments)]
    _decide_precision(run)
    _decide_model(run)
    _decide_output(run)
    _decide_data(run)
    if arguments.training.do_train and "train" in run.datasets:
        _decide_order(run)
        _check_resume(run)
    return run


def _on_machine(arguments: Arguments, machine: Optional[Machine]) -> Run:
    training = arguments.training
    requested = "cpu" if training.no_cuda else training.device
    if machine is not None:
        run = Run(arguments, machine)
        if requested == "cpu":
            run.problem("--plan_for names a GPU, but the config asks for the CPU (device or no_cuda)")
        return run
    try:
        machine, reason = this_machine(requested)
    except UserError as error:
        return Run(arguments, this_machine("cpu")[0], problems=[str(error)])
    return Run(arguments, machine, warnings=[reason] if reason else [])


def _decide_precision(run: Run) -> None:
    training, machine = run.arguments.training, run.machine
    run.attempt(parallel.check_device, training, machine.device)
    run.attempt(choose_reports, training.report_to)
    asked = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
    dtype = runtime.decide_dtype(asked, "gpu" if machine.gpu else "cpu", machine.bf16)
    run.precision = runtime.decide_precision(dtype.value, training.fp16_opt_level)
    run.flash, reason = runtime.decide_flash(
        run.arguments.model.use_flash_attention,
        run.precision.compute,
        "gpu" if machine.gpu else "cpu",
        machine.capability,
        FUSED_ATTENTION_ON_CPU,
    )
    run.warnings += [text for text in (dtype.reason, reason) if text]


def _decide_model(run: Run) -> None:
    """Configuration, shapes, what trains; checks the headers of the weights."""
    model = run.arguments.model
    folder, text_folder = model.model_name_or_path, model.text_model_name_or_path
    if not _is_model(folder):
        return
    run.config = run.attempt(AutoConfigMIX.from_pretrained, folder, use_flash_attention=run.flash)
    if run.config is None:
        return
    run.shapes = parameter_shapes(run.config)
    run.attempt(_open_base, run, folder)
    if _is_model(text_folder):
        run.attempt(check_text_model, run.config, text_folder)
    for problem in cut_problems(run.config, run.tensor):
        run.problem(problem)
    trainable = run.attempt(
        freeze.plan_freeze, list(run.shapes), model.freeze_include, model.freeze_exclude, lora=model.lora
    )
    run.trainable = trainable or ()
    if not model.lora or not model.lora_target_modules:
        return
    run.adapters = run.attempt(adapter_shapes, run.shapes, model.lora_target_modules, model.lora_rank) or {}
    run.attempt(check_claims, run.adapters, run.trainable)
    if model.lora_path is not None and os.path.isfile(os.path.join(model.lora_path, "lora_config.json")):
        run.attempt(freeze.check_lora_path, model, run.shapes)
        if trainable is not None and run.adapters:
            run.attempt(_check_lora_path, run, model.lora_path)


def contributions(run: Run, part: str) -> List[str]:
    """What each entry of a part gives to an epoch or an evaluation, a line each."""
    sources = run.datasets[part].sources
    draws = run.order.draws if part == "train" and run.order is not None else ()
    counts = [draw.count for draw in draws] or [source.samples for source in sources]
    lines = []
    for source, count in zip(sources, counts):
        files = some(source.entry.data_files, _NAMED_FILES)
        line = f"{count:,} samples ({count / sum(counts):.1%}) from the {source.records:,} records of {files}"
        mixing = source.entry.mixing
        if "prompt" in mixing:
            mixing["prompt"] = len(mixing["prompt"])
        shown = {name: f"{value:,}" for name, value in mixing.items()}
        used = min(source.records, mixing.get("limit", source.records))
        if "limit" in mixing and count > used:
            shown["limit"] += f" ({count / used:.1f} × {used:,})"
        lines.append(line + "".join(f"; {name} {value}" for name, value in shown.items()))
    return lines


def _is_model(folder: Optional[str]) -> bool:
    """Whether a key names a model's folder; the rules report anything else."""
    return folder is not None and os.path.isfile(os.path.join(folder, "config.json"))


def _open_base(run: Run, folder: str) -> None:
    """Check the headers of the base model's weights against its configuration."""
    with open_weights(folder) as reader:
        dtypes = Counter(reader.info(name).dtype for name in reader.keys())
        run.weights = StoredWeights(len(reader), len(reader.files), reader.total_bytes, dtypes)
        run.guard = LanguageGuard(folder, run.config, reader)
        check_weights(reader, run.shapes, folder)


def _check_lora_path(run: Run, folder: str) -> None:
    model = run.arguments.model
    with open_lora_weights(folder, run.saved):
        pass
    if run.guard is not None:
        # Continuing on another base may be intended.
        base, text = model.model_name_or_path, model.text_model_name_or_path
        Origin.read(folder).check(folder, base, text, force=True, warn=run.warnings.append)


def _decide_output(run: Run) -> None:
    """Check the output folder; decide what to resume from and what to delete."""
    training = run.arguments.training
    if training.output_dir is None:
        return
    found = nearest_folder(training.output_dir)
    if not os.path.isdir(found):
        run.problem(f"output_dir: {found} is a file")
    elif not os.access(found, os.W_OK | os.X_OK):
        run.problem(f"output_dir: {found} is not writable")
    elif training.do_train and training.benchmark:
        run.notes.append("benchmark: this run only measures speed; it saves nothing and leaves output_dir unchanged")
    elif training.do_train and (not training.resume_from_checkpoint or os.path.isdir(training.resume_from_checkpoint)):
        decided = run.attempt(
            run_checkpoints.check_output,
            training.output_dir,
            overwrite=training.overwrite_output_dir,
            resume=training.resume,
            resume_from=training.resume_from_checkpoint,
        )
        run.resume_from, run.old_files = decided or (None, [])
        if training.resume and decided == (None, []):
            run.warnings.append(f"nothing to resume in {training.output_dir}: starting from step 0")
    if run.resume_from is not None:
        run.notes.append(f"resumes from {run.resume_from}")
    # A run that goes on in its own folder deletes only the note that it was finished.
    if run.old_files and (run.resume_from is None or len(run.old_files) > 1):
        names = [os.path.basename(path) for path in run.old_files]
        more = " …" if len(names) > 6 else ""
        run.notes.append(f"overwrite_output_dir: deletes from {training.output_dir} {', '.join(names[:6])}{more}")


def _decide_data(run: Run) -> None:
    """Tokenizer and datasets."""
    if run.config is None:
        return
    data = run.arguments.data
    run.tokenizer = run.attempt(AutoTokenizerMIX.from_pretrained, run.arguments.model.model_name_or_path)
    if run.tokenizer is None:
        return
    run.attempt(check_vocabulary, run.tokenizer, run.config)
    template = data.chat_template
    run.entries, _ = read_entries(data.dataset, template if template and os.path.isfile(template) else None)
    image_processor = MGenVLImageProcessor.from_config(run.config)
    for part, entries in run.entries.items():
        seed = run.arguments.training.seed
        dataset = run.attempt(build_dataset, entries, run.tokenizer, image_processor, data, seed)
        if dataset is not None:
            run.datasets[part] = dataset


def _decide_order(run: Run) -> None:
    training, data, dataset = run.arguments.training, run.arguments.data, run.datasets["train"]
    packs = None
    if data.mixtoken or training.group_by_modality_length:
        run.lengths = dataset.lengths()
        if data.mixtoken:
            packs = plan_packs(run.lengths.tokens, data.max_length, training.seed)
    entries = [source.entry for source in dataset.sources]
    draws: Tuple[Draw, ...] = ()
    if all(entry.weight is not None for entry in entries):
        draws = plan_draws([source.samples for source in dataset.sources], [entry.weight for entry in entries])
    run.order = order = Order(
        samples=len(dataset),
        batch=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        cards=run.data_parallel,
        drop_last=training.dataloader_drop_last,
        packs=packs,
        lengths=None if data.mixtoken else run.lengths,
        draws=draws,
        mixing=tuple(entry.mixing for entry in entries),
        seed=training.seed,
        epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    for problem in order.problems():
        run.problem(problem)
    warmup = training.warmup_steps or math.ceil(order.steps * training.warmup_ratio)
    if training.lr_scheduler_type == "polynomial" and warmup >= order.steps > 0:
        # PaddleNLP would divide by their difference.
        text = f"lr_scheduler_type=polynomial needs fewer warmup steps ({warmup:,}) than steps ({order.steps:,})"
        run.problem(Problem(text, "warmup_steps", "warmup_ratio"))
    run.warnings += order.warnings()
    if order.left_over:
        run.notes.append(
            f"{order.count:,} {order.unit} are not a multiple of the {order.per_step} per optimizer step: each epoch "
            f"leaves out {order.left_over}, different ones each time"
        )


def _check_resume(run: Run) -> None:
    """Check that the checkpoint to resume from belongs to this run: order of samples, state, weights."""
    folder = run.resume_from
    if folder is None:
        return
    position = run.attempt(resume.read_position, folder)
    if position is not None:
        run.done = position.step
        if run.done >= run.order.steps:
            run.warnings.append(
                f"nothing is left to train: the checkpoint is after step {run.done}, and the run has {run.order.steps} "
                "steps"
            )
        run.attempt(run_checkpoints.check_order, folder, position.order, run.order.settings())
        run.attempt(resume.read_trainer_state, folder, position.step)
    if run.guard is not None and run.trained:
        run.attempt(_check_resumed_weights, run, folder)


def _check_resumed_weights(run: Run, folder: str) -> None:
    with open_tuned(folder, run.saved, run.kind, run.origin):
        pass
