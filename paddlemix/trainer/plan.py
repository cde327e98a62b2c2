"""The dry run: what a finetuning run would do and need, and everything that stands in its way, found at once.

Nothing is trained and no weights are read beyond their headers: names, shapes and sizes come from config.json
(parameters.py), lengths from texts, image sizes from image headers, memory from counted bytes (memory.py).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.datasets.collator import PAD_TO
from paddlemix.datasets.entries import read_entries
from paddlemix.datasets.packing import plan_packs
from paddlemix.models.lora import adapter_shapes, check_claims, open_lora_weights
from paddlemix.models.mgen_vl.parameters import CONSTANTS, check_weights, cut_problems, parameter_shapes
from paddlemix.trainer import checkpoints, freeze, memory, parallel
from paddlemix.trainer.command_line import read
from paddlemix.trainer.keys import Arguments
from paddlemix.trainer.order import TOO_FEW_EPOCHS
from paddlemix.trainer.rules import find_problems
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.runtime import decide_dtype, decide_flash, resolve_device, world_size

# Records looked at; a percentile of 400 is good to a few hundredths of the range, and they take about a second.
SAMPLE = 400
# Lengths of so many records are counted exactly for packing; that takes two seconds.
EXACT_UP_TO = 20_000
# Files beside the weights in a checkpoint: mostly the vocabulary.
_SIDE_FILES = 4 << 20

# Memory in GiB and compute capability, for --plan_for. The memory is what CUDA reports, not the name's: error
# correction takes a sixteenth of a T4, A10 or L40S, and the driver keeps some of each.
CARDS: Dict[str, Tuple[float, Tuple[int, int]]] = {
    "V100-16GB": (15.78, (7, 0)),
    "V100-32GB": (31.74, (7, 0)),
    "T4-16GB": (14.58, (7, 5)),
    "A10-24GB": (22.06, (8, 6)),
    "RTX3090-24GB": (23.67, (8, 6)),
    "RTX4090-24GB": (23.65, (8, 9)),
    "L40S-48GB": (44.4, (8, 9)),
    "A100-40GB": (39.5, (8, 0)),
    "A100-80GB": (79.15, (8, 0)),
    "H100-80GB": (79.1, (9, 0)),
}
# The first with bfloat16 (A100).
_BF16_FROM = (8, 0)


class Machine(NamedTuple):
    """What a run would find: "cpu" or "gpu", its name, bytes of memory and compute capability of a card, cards."""

    device: str
    name: str
    memory: int
    capability: Tuple[int, int]
    bf16: bool
    cards: int


def card(text: str) -> Machine:
    """The machine that `--plan_for` names, as "8xA100-80GB" or "V100-32GB".

    Raises:
        ConfigError: it is no number and known card.
    """
    found = re.fullmatch(r"(?:(\d{1,4})\s*[x×*]\s*)?(\S+)", text.strip(), re.IGNORECASE)
    names = {name.lower(): name for name in CARDS}
    if found is None or found.group(2).lower() not in names or int(found.group(1) or 1) < 1:
        raise ConfigError(f"--plan_for: {text!r} is not [N x] one of {', '.join(CARDS)}")
    name = names[found.group(2).lower()]
    gibibytes, capability = CARDS[name]
    return Machine("gpu", name, int(gibibytes * 2**30), capability, capability >= _BF16_FROM, int(found.group(1) or 1))


def this_machine(requested: Optional[str]) -> Tuple[Machine, Optional[str]]:
    """This machine as a run with this `device` key would see it, and why it is not the device asked for."""
    import paddle

    choice = resolve_device(requested)
    if choice.value.startswith("gpu"):
        properties = paddle.device.cuda.get_device_properties(choice.value)
        capability = tuple(paddle.device.cuda.get_device_capability(choice.value))
        bf16 = paddle.amp.is_bfloat16_supported()
        return Machine("gpu", properties.name, properties.total_memory, capability, bf16, world_size()), choice.reason
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine("cpu", "CPU", total // world_size(), (0, 0), False, world_size()), choice.reason


class Packing(NamedTuple):
    """How samples share sequences (mixtoken).

    count: sequences, estimated from the sample when not exact. filled: part of their room that holds tokens. longest:
    tokens in the fullest; most: samples in one; squares: the largest sum of squared lengths in one.
    """

    count: int
    exact: bool
    max_length: int
    filled: float
    longest: int
    most: int
    squares: int


def packing(tokens: np.ndarray, records: int, max_length: int, seed: int) -> Packing:
    """The packing of `records` samples of which these lengths are known, all or a sample of them."""
    exact = len(tokens) == records
    if not exact:
        # A window of the planner holds a few hundred samples; a few dozen windows show what all would.
        tokens = np.random.default_rng(seed).choice(tokens, min(records, EXACT_UP_TO))
    packs = plan_packs(tokens, max_length, seed)
    begins = packs.starts[:-1]
    held = tokens[packs.members]
    longest, squares = (int(np.add.reduceat(values, begins).max()) for values in (held, held**2))
    filled = float(tokens.sum() / (packs.count * max_length))
    count = math.ceil(packs.count * records / len(tokens))
    return Packing(count, exact, max_length, filled, longest, int(np.diff(packs.starts).max()), squares)


class DataStatistics(NamedTuple):
    """What the records looked at are like.

    records: in the whole part; looked_at, failed: of the sample. lengths, labels, images: per good record. sizes:
    (width, height) per image. formats: images by format. padding: part of a padded batch that is padding, on average.
    """

    records: int
    looked_at: int
    failed: int
    lengths: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    sizes: np.ndarray
    formats: Counter
    padding: float


def data_statistics(dataset: Any, batch_size: int, grouped: bool = False) -> Tuple[DataStatistics, List[str]]:
    """Statistics of records spread evenly over a ChatmlDataset, and what is wrong with them.

    grouped: batches hold samples of like length. Images are opened as far as their headers say their size; no pixel is
    decoded.
    """
    from paddlemix.processors.images import read_header

    count = len(dataset)
    indices = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64))
    rows: List[Tuple[int, int, int]] = []
    sizes: List[Tuple[int, int]] = []
    formats: Counter = Counter()
    failures: List[str] = []
    spans_lost = 0
    for index in indices.tolist():
        try:
            encoded, sources = dataset.encoded(index)
            headers = [read_header(source) for source in sources]
        except UserError as error:
            failures.append(f"record {index}: {error}")
            continue
        formats.update(name for name, _ in headers)
        sizes += [size for _, size in headers]
        spans = int((encoded["input_ids"] == dataset.tokenizer.img_start_id).sum())
        spans_lost += spans != len(sources)
        rows.append((len(encoded["input_ids"]), int((encoded["labels"][1:] >= 0).sum()), len(sources)))
    lengths, labels, images = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    padding = 0.0
    if len(rows):
        rng = np.random.default_rng(0)
        order = rng.permutation(np.resize(np.arange(len(rows)), max(len(rows), batch_size * 64)))
        order = order[np.argsort(lengths[order], kind="stable")] if grouped else order
        batches = lengths[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size)
        padded = -(-batches.max(axis=1) // PAD_TO) * PAD_TO
        padding = 1 - batches.sum() / (padded.sum() * batch_size)
    problems = []
    if failures and not rows:
        problems.append(f"none of the {len(indices)} records looked at can be used; {failures[0]}")
    if spans_lost:
        problems.append(
            f"the images of {spans_lost} of {len(rows)} records leave no <img> span in the tokens: training would not "
            "see them; check chat_template"
        )
    if rows and not images.any():
        problems.append(f"no image in any of the {len(rows)} records looked at: the model would learn from texts alone")
    statistics = DataStatistics(
        count, len(indices), len(failures), lengths, labels, images, np.array(sizes).reshape(-1, 2), formats, padding
    )
    return statistics, problems


@dataclass
class Plan:
    """What was found out; parts that could not be are None. problems end in status 2, notes do not."""

    problems: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    machine: Optional[Machine] = None
    dtype: str = "float32"
    setting: Optional[memory.Setting] = None
    config: Optional[Any] = None
    trained: Optional[memory.Trained] = None
    counts: Optional[Dict[str, freeze.GroupCount]] = None
    weights: str = ""
    data: Dict[str, DataStatistics] = field(default_factory=dict)
    packs: Optional[Packing] = None
    batch: Optional[memory.Batch] = None
    per_step: int = 0
    steps_per_epoch: int = 0
    steps: int = 0
    left_over: int = 0
    data_parallel: int = 1
    resume_from: Optional[str] = None
    saves: int = 0
    checkpoint: int = 0
    disk_needed: int = 0
    disk_free: int = 0

    def attempt(self, call, *arguments, **options):
        """The call's result, or None when it raises a UserError, which becomes a problem."""
        try:
            return call(*arguments, **options)
        except UserError as error:
            self.problem(str(error))
        return None

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


def make_plan(argv: Sequence[str], plan_for: Optional[str] = None) -> Plan:
    """Everything about the run that `argv` describes.

    Raises:
        ConfigError: the config file cannot be read at all, or plan_for is no card.
    """
    machine = card(plan_for) if plan_for is not None else None
    arguments, problems = read(argv, machine.cards if machine else None)
    plan = Plan(problems=problems)
    for problem in find_problems(arguments):
        plan.problem(problem)
    _plan_machine(plan, arguments, machine)
    _plan_model(plan, arguments)
    _plan_output(plan, arguments)
    _plan_data(plan, arguments)
    if arguments.training.do_train:
        _plan_steps(plan, arguments)
        _plan_resume(plan, arguments)
        _plan_memory(plan, arguments)
        _plan_disk(plan, arguments)
    return plan


def _plan_machine(plan: Plan, arguments: Arguments, machine: Optional[Machine]) -> None:
    from paddlemix.utils.compat import PADDLE_3

    training = arguments.training
    requested = "cpu" if training.no_cuda else training.device
    reason = None
    if machine is None:
        found = plan.attempt(this_machine, requested) or this_machine("cpu")
        machine, reason = found
    elif requested == "cpu":
        plan.problem("--plan_for names a GPU, but the config asks for the CPU (device or no_cuda)")
    if reason:
        plan.problem(f"device={requested}: {reason}")
    asked = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
    dtype = decide_dtype(asked, machine.device, machine.bf16)
    if dtype.reason:
        plan.problem(f"{'fp16' if training.fp16 else 'bf16'} on this device ({machine.name}): {dtype.reason}")
    flash, reason = arguments.model.use_flash_attention, None
    if machine.device == "gpu":
        flash, reason = decide_flash(flash, dtype.value, machine.device, machine.capability, True)
    if reason:
        plan.problem(reason)
    plan.machine, plan.dtype = machine, dtype.value
    plan.attempt(parallel.check_device, training, machine.device)
    tensor = max(training.tensor_parallel_degree, 1)
    sharding = max(training.sharding_parallel_degree, 1)
    if training.sharding and sharding == 1:
        sharding = max(machine.cards // tensor, 1)
    plan.data_parallel = max(machine.cards // tensor, 1)
    plan.setting = memory.Setting(
        precision="float32" if dtype.value == "float32" else training.fp16_opt_level,
        gpu=machine.device == "gpu",
        paddle_3=PADDLE_3,
        recompute=training.recompute,
        # On the CPU the call is answered with plain matmuls.
        flash=flash and machine.device == "gpu",
        lora_dropout=arguments.model.lora_dropout if arguments.model.lora else 0.0,
        clip=training.max_grad_norm > 0,
        master_grad=training.amp_master_grad,
        tensor=tensor,
        sharding=sharding,
        stage=2 if "stage2" in training.sharding else 1,
    )


def _is_model(folder: Optional[str]) -> bool:
    """Whether a key names a model's folder; find_problems has said it when it names something else."""
    return folder is not None and os.path.isfile(os.path.join(folder, "config.json"))


def _plan_model(plan: Plan, arguments: Arguments) -> None:
    """Configuration, shapes, what trains, and whether the weights' headers fit."""
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.trainer.guard import check_text_model

    model = arguments.model
    folder = model.model_name_or_path
    if not _is_model(folder):
        return
    plan.config = plan.attempt(MGenConfig.from_pretrained, folder)
    if plan.config is None:
        return
    shapes = parameter_shapes(plan.config)
    plan.weights = _weights_line(plan, folder, shapes) or ""
    if _is_model(model.text_model_name_or_path):
        plan.attempt(check_text_model, plan.config, model.text_model_name_or_path)
    for problem in cut_problems(plan.config, plan.setting.tensor):
        plan.problem(problem)

    names, trainable = list(shapes), None
    try:
        trainable = freeze.plan_freeze(names, model.freeze_include, model.freeze_exclude, model.lora).trainable
    except ConfigError as error:
        plan.problem(str(error))
    adapters: Dict[str, Tuple[int, ...]] = {}
    if model.lora and model.lora_target_modules:
        adapters = plan.attempt(adapter_shapes, shapes, model.lora_target_modules, model.lora_rank) or {}
        plan.attempt(check_claims, adapters, trainable or ())
        if model.lora_path is not None and os.path.isfile(os.path.join(model.lora_path, "lora_config.json")):
            plan.attempt(freeze.check_lora_path, model, shapes)
            if trainable is not None and adapters:
                beside = {name: shapes[name] for name in trainable}
                plan.attempt(_check_lora_weights, model.lora_path, {**adapters, **beside})
    if trainable is None:
        trainable = []
    trained = set(trainable) | set(adapters)
    plan.trained = memory.Trained({**shapes, **adapters}, trainable + list(adapters))
    plan.counts = freeze.count_groups((name, shape, name in trained) for name, shape in plan.trained.shapes.items())


def _check_lora_weights(folder: str, trained: memory.Shapes) -> None:
    with open_lora_weights(folder, trained):
        pass


def _weights_line(plan: Plan, folder: str, shapes: memory.Shapes) -> Optional[str]:
    """Check the headers of a folder's weights against shapes; a line that describes them."""
    from paddlemix.checkpoint import open_weights

    try:
        with open_weights(folder) as reader:
            plan.attempt(check_weights, reader, shapes, folder)
            dtypes = Counter(reader.info(name).dtype for name in reader.keys())
            stored = ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common())
            return f"{len(reader)} tensors in {len(reader.files)} files, {_size(reader.total_bytes)}, {stored}"
    except UserError as error:
        plan.problem(str(error))
    return None


def _nearest(path: str) -> str:
    """The path, or the folder nearest above it that there is."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _plan_output(plan: Plan, arguments: Arguments) -> None:
    training = arguments.training
    if training.output_dir is not None:
        found = _nearest(training.output_dir)
        if not os.path.isdir(found):
            plan.problem(f"output_dir: {found} is a file")
        elif not os.access(found, os.W_OK | os.X_OK):
            plan.problem(f"output_dir: {found} cannot be written to")
    if not training.do_train or training.output_dir is None or not os.path.isdir(training.output_dir):
        return
    found = plan.attempt(
        checkpoints.check_output,
        training.output_dir,
        overwrite=training.overwrite_output_dir,
        resume=training.resume,
        resume_from=training.resume_from_checkpoint,
    )
    if found is None:
        return
    resume_from, old = found
    plan.resume_from = resume_from
    if resume_from is not None:
        plan.notes.append(f"goes on from {resume_from}")
    elif old:
        names = ", ".join(os.path.basename(path) for path in old[:6]) + (" …" if len(old) > 6 else "")
        plan.notes.append(f"overwrite_output_dir: deletes from {training.output_dir} {names}")


def _plan_data(plan: Plan, arguments: Arguments) -> None:
    from paddlemix.datasets.chatml import build_dataset
    from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer
    from paddlemix.trainer.guard import check_vocabulary

    folder = arguments.model.model_name_or_path
    if plan.config is None:
        return
    tokenizer = plan.attempt(MGenVLTokenizer.from_pretrained, folder)
    if tokenizer is None:
        return
    plan.attempt(check_vocabulary, tokenizer, plan.config)
    if tokenizer.n_queries != plan.config.n_queries:
        plan.problem(
            f"an image span has {tokenizer.n_queries} ids in the tokenizer and {plan.config.n_queries} in config.json "
            "(visual.n_queries): use the tokenizer that belongs to the model"
        )
    training, template = arguments.training, arguments.data.chat_template
    entries, _ = read_entries(arguments.data.dataset, template if template and os.path.isfile(template) else None)
    for part, size in (
        ("train", training.per_device_train_batch_size),
        ("eval", training.per_device_eval_batch_size),
    ):
        if part not in entries:
            continue
        dataset = plan.attempt(build_dataset, entries[part], tokenizer, None, arguments.data)
        if dataset is None:
            continue
        grouped = part == "train" and training.group_by_modality_length
        plan.data[part], problems = data_statistics(dataset, size, grouped)
        for problem in problems:
            plan.problem(f"dataset.{part}: {problem}")
        if plan.data[part].failed and len(plan.data[part].lengths):
            plan.notes.append(
                f"dataset.{part}: {plan.data[part].failed} of {plan.data[part].looked_at} records looked at cannot be "
                "used; the next good one takes the place of each"
            )
        if part == "train" and arguments.data.mixtoken and len(plan.data[part].lengths):
            known = dataset.lengths().tokens if len(dataset) <= EXACT_UP_TO else plan.data[part].lengths
            plan.packs = packing(known, len(dataset), arguments.data.max_length, training.seed)


def _plan_steps(plan: Plan, arguments: Arguments) -> None:
    training = arguments.training
    accumulation, size = training.gradient_accumulation_steps, training.per_device_train_batch_size
    plan.per_step = size * accumulation * plan.data_parallel
    if "train" not in plan.data:
        plan.steps = max(training.max_steps, 0)
        return
    unit, count = "samples", plan.data["train"].records
    if plan.packs is not None:
        unit, count = "packed sequences", plan.packs.count
    per_batch = size * plan.data_parallel
    batches = count // per_batch if training.dataloader_drop_last else math.ceil(count / per_batch)
    if batches == 0:
        plan.problem(f"{count} {unit} do not fill one batch of {size} on each of {plan.data_parallel} cards")
    elif batches < accumulation:
        plan.problem(
            f"an epoch has {batches} batches ({count} {unit}, {size} × {plan.data_parallel} at a time), fewer than "
            f"gradient_accumulation_steps={accumulation}: lower that to {batches}"
        )
    plan.steps_per_epoch = max(batches // accumulation, 1)
    plan.left_over = max(count - plan.steps_per_epoch * plan.per_step, 0)
    plan.steps = training.max_steps if training.max_steps > 0 else int(plan.steps_per_epoch * training.num_train_epochs)
    if plan.steps == 0:
        plan.problem(TOO_FEW_EPOCHS.format(training.num_train_epochs))
    if plan.left_over:
        plan.notes.append(
            f"{count:,} {unit} are not a multiple of the {plan.per_step} of an optimizer step: each epoch leaves out "
            f"{plan.left_over}, others each time"
        )


def _plan_resume(plan: Plan, arguments: Arguments) -> None:
    """Whether the run would see the samples in the order of the checkpoint it goes on from."""
    state = None if plan.resume_from is None else checkpoints.read_seal(plan.resume_from)
    if state is None or "train" not in plan.data:
        return
    data, training = arguments.data, arguments.training
    stored = state.get("order") if isinstance(state, dict) else None
    if not isinstance(stored, dict):
        plan.problem(f"{plan.resume_from} does not say where the run stood")
        return
    ours = {
        "samples": plan.data["train"].records,
        "batch": training.per_device_train_batch_size * plan.data_parallel,
        "accumulation": training.gradient_accumulation_steps,
        "seed": training.seed,
    }
    # What these depend on besides, the lengths of all samples, the run itself compares.
    if data.mixtoken:
        ours.update({name: stored.get(name, "on") for name in ("mixtoken", "sequences")}, max_length=data.max_length)
    elif training.group_by_modality_length:
        ours["group_by_modality_length"] = stored.get("group_by_modality_length", "on")
    plan.attempt(checkpoints.check_order, plan.resume_from, stored, ours)


def _plan_memory(plan: Plan, arguments: Arguments) -> None:
    if plan.trained is None:
        return
    training = arguments.training
    rows = training.per_device_train_batch_size
    statistics = plan.data.get("train")
    if statistics is not None and len(statistics.lengths):
        longest = -(-int(statistics.lengths.max()) // PAD_TO) * PAD_TO
        images, labels = int(statistics.images.max()), int(statistics.labels.max())
    else:
        longest, images, labels = arguments.data.max_length, 1, arguments.data.max_length
    plan.batch = memory.Batch(rows, longest, rows * images, rows * labels)
    if plan.packs is not None:
        packs = plan.packs
        longest = min(-(-packs.longest // PAD_TO) * PAD_TO, -(-packs.max_length // PAD_TO) * PAD_TO)
        held = rows * packs.most
        mean = math.ceil(statistics.labels.mean())
        squares = (rows * packs.squares, int(statistics.lengths.max()))
        plan.batch = memory.Batch(rows, longest, held * images, held * mean, squares)
    needed = estimate(plan).peak
    if needed > plan.machine.memory:
        lower = estimate(plan, recompute=True).peak
        advice = []
        if not plan.setting.recompute and lower < plan.machine.memory:
            advice.append(f"recompute needs {_size(lower)}")
        advice.append("lower per_device_train_batch_size or max_length, or share the model among cards")
        plan.problem(
            f"a step needs about {_size(needed)} on each card, {plan.machine.name} has {_size(plan.machine.memory)}: "
            + "; ".join(advice)
        )


def estimate(plan: Plan, **changes: Any) -> memory.Estimate:
    """The memory of the planned step, with some fields of its Setting changed."""
    config = memory.plain(plan.config)
    return memory.estimate(config, plan.trained, plan.batch, plan.setting._replace(**changes))


def _plan_disk(plan: Plan, arguments: Arguments) -> None:
    training = arguments.training
    if plan.trained is None or training.output_dir is None:
        return
    # What changed alone, unless that is everything (tuned_model.save_tuned).
    shapes, saved = plan.trained.shapes, plan.trained.trainable
    if not arguments.model.lora and len(saved) == len(shapes) - len(CONSTANTS):
        saved = list(shapes)
    weights, states = memory.checkpoint_bytes(plan.trained, plan.setting, saved)
    plan.checkpoint = weights + states + _SIDE_FILES
    if training.save_strategy == "steps":
        plan.saves = plan.steps // training.save_steps
    elif training.save_strategy == "epoch":
        plan.saves = math.ceil(plan.steps / plan.steps_per_epoch) if plan.steps_per_epoch else 0
    final = weights + _SIDE_FILES
    if training.benchmark:
        plan.saves, final = 0, 0
    kept = plan.saves
    if training.save_total_limit:
        # Old ones go when the new one is whole; the best one is kept besides.
        kept = min(plan.saves, training.save_total_limit + 1 + training.load_best_model_at_end)
    plan.disk_needed = kept * plan.checkpoint + final
    plan.disk_free = shutil.disk_usage(_nearest(training.output_dir)).free
    if plan.disk_needed > plan.disk_free:
        plan.problem(
            f"output_dir: {kept} checkpoints and the result take {_size(plan.disk_needed)}, the disk has "
            f"{_size(plan.disk_free)} left: set save_total_limit, or choose another disk"
        )


# ---- what is printed


def _size(count: float) -> str:
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.2f} GiB"
    return f"{count / (1 << 20):,.1f} MiB"


def _percentiles(values: np.ndarray) -> str:
    points = np.percentile(values, (0, 5, 25, 50, 75, 95, 100), method="nearest").astype(int)
    names = ("min", "5%", "25%", "50%", "75%", "95%", "max")
    return "  ".join(f"{name} {value:,}" for name, value in zip(names, points))


def memory_lines(plan: Plan) -> List[str]:
    """The memory table: a column without recompute and one with it, the run's own marked."""
    columns = [estimate(plan, recompute=recompute) for recompute in (False, True)]
    mark = ["", ""]
    mark[plan.setting.recompute] = " *"
    heads = [f"recompute {'on' if i else 'off'}{mark[i]}" for i in (0, 1)]
    lines = [f"{'':<34}{heads[0]:>18}{heads[1]:>18}"]

    def row(name: str, values: Sequence[int]) -> None:
        lines.append(f"{name:<34}" + "".join(f"{_size(value):>18}" for value in values))

    for part in columns[0].held:
        row(part, [column.held[part] for column in columns])
    for part in columns[0].stored:
        row(part, [column.stored[part] for column in columns])
    row("working memory of the backward", [column.working for column in columns])
    if any(column.clipped for column in columns):
        row("(gradients while clipped, after it)", [column.clipped for column in columns])
    if columns[0].allowance:
        row("driver and libraries (allowance)", [column.allowance for column in columns])
    row("peak", [column.peak for column in columns])
    lines.append(f"{'memory of the device':<34}{_size(plan.machine.memory):>18}")
    return lines


def render(plan: Plan) -> List[str]:
    """The plan as lines."""
    machine, setting = plan.machine, plan.setting
    lines = ["==== device"]
    lines.append(f"{machine.cards} × {machine.name}, {_size(machine.memory)} each; computes in {plan.dtype}"
                 + (f", {setting.precision}" if setting.precision != "float32" else ""))  # fmt: skip
    degrees = [f"data parallel {plan.data_parallel}"]
    if setting.sharding > 1:
        degrees.append(f"sharding stage {setting.stage} over {setting.sharding}")
    if setting.tensor > 1:
        degrees.append(f"tensor parallel {setting.tensor}")
    lines.append(", ".join(degrees))
    if plan.counts is not None:
        lines += ["", "==== model", *freeze.table_lines(plan.counts)]
        lines.append(freeze.summary_line(plan.counts))
        base = sum(sum(count) for group, count in plan.counts.items() if group != "lora")
        trains = sum(count.trainable for count in plan.counts.values())
        lines.append(f"{base:,} in the model, {trains:,} trainable")
        lines.append(f"weights: {plan.weights or 'none that can be used'}")
    for part, data in plan.data.items():
        lines += ["", f"==== data: {part}"]
        lines.append(f"{data.records:,} samples; {data.looked_at:,} looked at, {data.failed:,} cannot be used")
        if len(data.lengths):
            lines.append(f"tokens           {_percentiles(data.lengths)}")
            lines.append(f"labelled tokens  {_percentiles(data.labels)}")
            lines.append(f"images a sample  {_percentiles(data.images)}")
            lines.append(f"padding          {data.padding:.1%} of the positions of a padded batch")
        if len(data.sizes):
            formats = ", ".join(f"{name} {count}" for name, count in data.formats.most_common())
            lines.append(f"image width      {_percentiles(data.sizes[:, 0])}")
            lines.append(f"image height     {_percentiles(data.sizes[:, 1])}")
            lines.append(f"image formats    {formats}")
    unit, packs = "samples", plan.packs
    if packs is not None:
        unit = "packed sequences"
        lines += ["", "==== packing (mixtoken)"]
        lines.append(
            f"{'' if packs.exact else 'about '}{packs.count:,} sequences of at most {packs.max_length:,} tokens, "
            f"{packs.filled:.1%} filled; {plan.data['train'].records / packs.count:.2f} samples in each, at most "
            f"{packs.most}"
        )
    if plan.per_step:
        lines += ["", "==== steps", f"{plan.per_step:,} {unit} in an optimizer step"]
    if plan.steps_per_epoch:
        epochs = plan.steps / plan.steps_per_epoch
        lines.append(f"{plan.steps_per_epoch:,} steps in an epoch; {plan.left_over:,} {unit} left out of each epoch")
        lines.append(f"{plan.steps:,} steps, {plan.steps * plan.per_step:,} {unit}, {epochs:.2f} epochs")
    elif plan.steps:
        lines.append(f"{plan.steps:,} steps")
    if plan.batch is not None:
        lines += ["", "==== memory on each card, estimated"]
        seen = "the longest sample seen" if plan.data.get("train") else "max_length, without data to look at"
        seen = seen if packs is None else "the fullest sequence"
        lines.append(
            f"a batch of {plan.batch.rows} × {plan.batch.tokens:,} tokens ({seen}); images: {plan.batch.images}, "
            f"labelled positions: {plan.batch.labels:,}"
        )
        lines += memory_lines(plan)
    if plan.checkpoint:
        lines += ["", "==== disk", f"checkpoints written: {plan.saves:,} of {_size(plan.checkpoint)} each"]
        lines.append(f"at most {_size(plan.disk_needed)} at once, {_size(plan.disk_free)} free")
    if plan.notes:
        lines += ["", "==== notes", *(f"- {note}" for note in plan.notes)]
    lines += ["", f"==== problems: {len(plan.problems) or 'none'}"]
    lines += [f"- {problem}" for problem in plan.problems]
    return lines


def dry_run(argv: Sequence[str], plan_for: Optional[str] = None) -> int:
    """Print the plan; 0 when the run can start, 2 when there are problems."""
    plan = make_plan(argv, plan_for)
    print("\n".join(render(plan)))
    return 2 if plan.problems else 0
