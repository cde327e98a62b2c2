"""The dry run: what a finetuning run would do and need, and every problem that would stop it.

It resolves the same Run as `finetune`, and adds estimates: statistics of data samples (lengths from texts, image sizes
from headers), memory (memory.py) and disk space.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from paddlemix.checkpoint.model_folder import VOCABULARIES
from paddlemix.datasets.collator import PAD_TO
from paddlemix.trainer import freeze, memory, work
from paddlemix.trainer.command_line import read
from paddlemix.trainer.data_statistics import DataStatistics, data_statistics, padded
from paddlemix.trainer.machine import card
from paddlemix.trainer.run import Run, contributions, resolve
from paddlemix.utils.compat import PADDLE_3
from paddlemix.utils.language import tr_row
from paddlemix.utils.outputs import nearest_folder
from paddlemix.utils.texts import counted

# Other files in a checkpoint: mostly the vocabulary.
_SIDE_FILES = 4 << 20


class Packing(NamedTuple):
    """Statistics of packed sequences (mixtoken).

    filled: fraction of positions that hold tokens. longest: tokens of the longest sequence; most: samples in one;
    squares: largest sum of squared sample lengths in one.
    """

    filled: float
    longest: int
    most: int
    squares: int


def packing(run: Run) -> Packing:
    """Statistics of a run's packs."""
    packs, tokens = run.order.packs, run.lengths.tokens
    held, begins = tokens[packs.members], packs.starts[:-1]
    longest, squares = (int(np.add.reduceat(values, begins).max()) for values in (held, held**2))
    return Packing(tokens.sum() / (packs.count * packs.max_length), longest, int(np.diff(packs.starts).max()), squares)


class Evaluations(NamedTuple):
    """times: number of evaluations. batches, samples: of each. every: training steps between two. steps: training
    steps that take as long as one, without its captions. captions: generated in each, of at most `tokens` tokens."""

    times: int
    batches: int
    samples: int
    every: int
    steps: float
    captions: int
    tokens: int


def _times(run: Run, every: int, last: bool) -> int:
    """How often something is still done that is done every so many steps. last: and after the last step, too."""
    steps = run.order.steps
    return max((math.ceil(steps / every) if last else steps // every) - run.done // every, 0)


def evaluations(run: Run) -> Optional[Evaluations]:
    """The evaluations of a training run; None if it has none."""
    training, data, order = run.arguments.training, run.arguments.data, run.order
    if not training.evaluates or "eval" not in run.datasets or order is None:
        return None
    batch = training.per_device_eval_batch_size * run.data_parallel
    samples = len(run.datasets["eval"])
    batches = math.ceil(samples / batch)
    if training.max_evaluate_steps > 0:
        batches = min(batches, training.max_evaluate_steps)
    samples = min(samples, batches * batch)
    every = {
        "steps": training.eval_steps or training.logging_steps, "epoch": order.steps_per_epoch,
    }.get(training.evaluation_strategy, order.steps)  # fmt: skip
    times = _times(run, every, training.evaluation_strategy == "epoch")
    trained = sum(count.trainable for count in run.counts().values())
    # A step's passes over the weights: forward, gradients of activations, of what trains, and the forward once more.
    passes = 2 + trained / sum(sum(count) for count in run.counts().values()) + training.recompute
    per_step = order.per_step * order.samples / order.count
    generated = samples if data.eval_with_do_generation else min(data.shown_captions, samples)
    return Evaluations(
        times=times,
        batches=batches,
        samples=samples,
        every=every,
        # The decoder sees each batch a second time, with blank images.
        steps=samples * (1 + data.eval_image_gain) / passes / per_step,
        captions=generated,
        tokens=run.arguments.generation.max_new_tokens,
    )


@dataclass
class Forecast:
    """A Run and its estimates. problems, notes: of the run and of the estimates. saves: number of checkpoints;
    checkpoint: bytes of one; disk_needed, disk_free: bytes."""

    run: Run
    problems: List[str]
    notes: List[str]
    setting: memory.Setting
    data: Dict[str, DataStatistics] = field(default_factory=dict)
    packs: Optional[Packing] = None
    batch: Optional[memory.Batch] = None
    saves: int = 0
    checkpoint: int = 0
    disk_needed: int = 0
    disk_free: int = 0

    @property
    def trained(self) -> memory.Trained:
        return memory.Trained({**self.run.shapes, **self.run.adapters}, self.run.trained)

    def estimate(self, **changes: Any) -> memory.Estimate:
        """Memory of a training step, with some fields of the Setting replaced."""
        return memory.estimate(self.run.config, self.trained, self.batch, self.setting._replace(**changes))


def foresee(argv: Sequence[str], plan_for: Optional[str] = None) -> Forecast:
    """The forecast of the run that `argv` describes.

    Raises:
        ConfigError: the config file cannot be read, or plan_for is not a card.
    """
    machine = card(plan_for) if plan_for is not None else None
    arguments, problems = read(argv, machine.cards if machine else None)
    run = resolve(arguments, machine, problems)
    found = Forecast(run, list(run.problems), [*run.warnings, *run.notes], _setting(run))
    if not run.shapes:
        found.notes.append(
            "without the model's config.json its memory cannot be estimated; that file in the folder of "
            f"model_name_or_path is enough, and with {VOCABULARIES[0]} there, data, steps and hours are shown, too"
        )
    _look_at_data(found)
    if arguments.training.do_train and run.trained:
        if run.packs is not None:
            found.packs = packing(run)
        _foresee_memory(found)
        planned = evaluations(found.run)
        if planned is not None and planned.steps > planned.every:
            found.notes.append(
                f"an evaluation takes as long as {planned.steps:,.0f} training steps, but there are only "
                f"{planned.every:,} between two: raise eval_steps, or limit its batches with max_evaluate_steps"
            )
        if run.order is not None and arguments.training.output_dir is not None:
            _foresee_disk(found)
    return found


def _setting(run: Run) -> memory.Setting:
    model, training = run.arguments.model, run.arguments.training
    sharding = max(training.sharding_parallel_degree, 1)
    if training.sharding and sharding == 1:
        sharding = run.data_parallel
    return memory.Setting(
        precision="float32" if run.precision.compute == "float32" else training.fp16_opt_level,
        gpu=run.machine.gpu,
        paddle_3=PADDLE_3,
        recompute=training.recompute,
        # On the CPU Paddle falls back to plain matmuls.
        flash=run.flash and run.machine.gpu,
        lora_dropout=model.lora_dropout if model.lora else 0.0,
        clip=training.max_grad_norm > 0,
        master_grad=training.amp_master_grad,
        tensor=run.tensor,
        sharding=sharding,
        stage=2 if "stage2" in training.sharding else 1,
    )


def _look_at_data(found: Forecast) -> None:
    training = found.run.arguments.training
    sizes = {"train": training.per_device_train_batch_size, "eval": training.per_device_eval_batch_size}
    for part, dataset in found.run.datasets.items():
        grouped = part == "train" and training.group_by_modality_length
        data, problems = data_statistics(dataset, sizes[part], grouped)
        found.data[part] = data
        found.problems += [f"dataset.{part}: {problem}" for problem in problems]
        if data.failed and len(data.lengths):
            found.notes.append(
                f"dataset.{part}: {data.failed} of {data.looked_at} inspected records are unusable; each is "
                "replaced by the next usable one"
            )
        shortened = int((data.cut > 0).sum())
        if shortened:
            found.notes.append(
                f"dataset.{part}: max_length={dataset.max_length} truncates the text of {shortened} of {len(data.cut)} "
                f"inspected records, by up to {data.cut.max():,} tokens"
            )


def _foresee_memory(found: Forecast) -> None:
    arguments, machine = found.run.arguments, found.run.machine
    rows = arguments.training.per_device_train_batch_size
    data = found.data.get("train")
    if data is not None and len(data.lengths):
        longest, images, labels = int(data.lengths.max()), int(data.images.max()), int(data.labels.max())
    else:
        longest, images, labels = arguments.data.max_length, 1, arguments.data.max_length
    found.batch = memory.Batch(rows, padded(longest), rows * images, rows * labels)
    if found.packs is not None and data is not None and len(data.lengths):
        held = rows * found.packs.most
        squares = (rows * found.packs.squares, longest)
        tokens = padded(min(found.packs.longest, arguments.data.max_length))
        found.batch = memory.Batch(rows, tokens, held * images, held * math.ceil(data.labels.mean()), squares)
    needed = found.estimate().peak
    if needed > machine.memory:
        lower = found.estimate(recompute=True).peak
        advice = []
        if not found.setting.recompute and lower < machine.memory:
            advice.append(f"recompute needs {_size(lower)}")
        advice.append("lower per_device_train_batch_size or max_length, or split the model over several cards")
        found.problems.append(
            f"a step needs about {_size(needed)} per card, but {machine.name} has {_size(machine.memory)}: "
            + "; ".join(advice)
        )


def _foresee_disk(found: Forecast) -> None:
    run, training, order = found.run, found.run.arguments.training, found.run.order
    weights, states = memory.checkpoint_bytes(found.trained, found.setting, run.saved)
    found.checkpoint = weights + states + _SIDE_FILES
    if training.save_strategy != "no" and not training.benchmark:
        epochs = training.save_strategy == "epoch"
        found.saves = _times(run, order.steps_per_epoch if epochs else training.save_steps, epochs)
    kept, final = found.saves, 0 if training.benchmark else weights + _SIDE_FILES
    if training.save_total_limit:
        # Old ones are deleted once the new one is complete; the best one is kept as well.
        kept = min(kept, training.save_total_limit + 1 + training.load_best_model_at_end)
    found.disk_needed = kept * found.checkpoint + final
    found.disk_free = shutil.disk_usage(nearest_folder(training.output_dir)).free
    if found.disk_needed > found.disk_free:
        found.problems.append(
            f"output_dir: {kept} checkpoints and the result take {_size(found.disk_needed)}, but the disk "
            f"has {_size(found.disk_free)} free: set save_total_limit, or use another disk"
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


def memory_lines(found: Forecast) -> List[str]:
    """The memory table: a column without recompute and one with it; the run's own is marked."""
    columns = [found.estimate(recompute=recompute) for recompute in (False, True)]
    heads = [f"recompute {name}" + " *" * (found.setting.recompute == on) for on, name in enumerate(("off", "on"))]
    lines = [f"{'':<34}{heads[0]:>18}{heads[1]:>18}"]
    for (name, off), on in zip(columns[0].rows().items(), columns[1].rows().values()):
        if off or on:
            lines.append(f"{name:<34}{_size(off):>18}{_size(on):>18}")
    lines.append(f"{'memory of the device':<34}{_size(found.run.machine.memory):>18}")
    return lines


def render(found: Forecast) -> List[str]:
    """The forecast as lines, in the chosen language."""
    lines = _device_lines(found)
    if found.run.shapes:
        lines += _model_lines(found.run)
    for part, data in found.data.items():
        lines += ["", f"==== data: {part}", *contributions(found.run, part), *_data_lines(data)]
    if found.packs is not None:
        order, packs = found.run.order, found.packs
        lines += ["", "==== packing (mixtoken)"]
        lines.append(
            f"{order.count:,} sequences of at most {order.packs.max_length:,} tokens, {packs.filled:.1%} filled; "
            f"{order.samples / order.count:.2f} samples each, at most {packs.most}"
        )
    lines += _step_lines(found.run)
    lines += _time_lines(found)
    if found.batch is not None:
        lines += ["", "==== memory per card, estimated"]
        if found.packs is not None:
            seen = "the fullest sequence"
        elif "train" in found.data and len(found.data["train"].lengths):
            seen = f"the longest sample inspected, padded to a multiple of {PAD_TO}"
        else:
            lacks = "tokenizer" if found.run.tokenizer is None else "data"
            seen = f"max_length, as there is no {lacks}"
        lines.append(
            f"a batch of {found.batch.rows} × {found.batch.tokens:,} tokens ({seen}); images: {found.batch.images}, "
            f"labelled positions: {found.batch.labels:,}"
        )
        lines += memory_lines(found)
    if found.checkpoint:
        lines += ["", "==== disk", f"checkpoints written: {found.saves:,}, {_size(found.checkpoint)} each"]
        lines.append(f"at most {_size(found.disk_needed)} at once, {_size(found.disk_free)} free")
    if found.notes:
        lines += ["", "==== notes", *(f"- {note}" for note in found.notes)]
    lines += ["", f"==== problems: {len(found.problems) or 'none'}"]
    lines += [f"- {problem}" for problem in found.problems]
    return [tr_row(line) for line in lines]


def _device_lines(found: Forecast) -> List[str]:
    run, machine, setting = found.run, found.run.machine, found.setting
    level = f", {setting.precision}" if setting.precision != "float32" else ""
    degrees = [f"data parallel {run.data_parallel}"]
    if setting.sharding > 1:
        degrees.append(f"sharding stage {setting.stage} over {setting.sharding}")
    if setting.tensor > 1:
        degrees.append(f"tensor parallel {setting.tensor}")
    return [
        "==== device",
        f"{machine.cards} × {machine.name} with {_size(machine.memory)}; computes in {run.precision.compute}{level}",
        ", ".join(degrees),
    ]


def _model_lines(run: Run) -> List[str]:
    counts = run.counts()
    base = sum(sum(count) for group, count in counts.items() if group != "lora")
    trains = sum(count.trainable for count in counts.values())
    lines = ["", "==== model", *freeze.table_lines(counts), freeze.summary_line(counts)]
    lines.append(f"{base:,} in the model, {trains:,} trainable")
    stored = "none usable"
    if run.weights is not None:
        tensors, files, size, found = run.weights
        dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in found.most_common())
        stored = f"{tensors} tensors in {counted(files, 'file')}, {_size(size)}, {dtypes}"
    return [*lines, f"weights: {stored}"]


def _data_lines(data: DataStatistics) -> List[str]:
    lines = [f"{data.records:,} samples; {data.looked_at:,} inspected, {data.failed:,} unusable"]
    if len(data.lengths):
        lines.append(f"tokens           {_percentiles(data.lengths)}")
        lines.append(f"labelled tokens  {_percentiles(data.labels)}")
        lines.append(f"images per row   {_percentiles(data.images)}")
        lines.append(f"padding          {data.padding:.1%} of the positions of a padded batch")
    if len(data.sizes):
        formats = ", ".join(f"{name} {count}" for name, count in data.formats.most_common())
        lines.append(f"image width      {_percentiles(data.sizes[:, 0])}")
        lines.append(f"image height     {_percentiles(data.sizes[:, 1])}")
        lines.append(f"image formats    {formats}")
    return lines


def _step_lines(run: Run) -> List[str]:
    order = run.order
    if order is None:
        return []
    epochs = order.steps / order.steps_per_epoch
    lines = [
        "",
        "==== steps",
        f"{order.per_step:,} {order.unit} per optimizer step",
        f"{order.steps_per_epoch:,} steps per epoch; {order.left_over:,} {order.unit} left out of each epoch",
        f"{order.steps:,} steps, {order.steps * order.per_step:,} {order.unit}, {epochs:.2f} epochs",
    ]
    if run.done:
        lines.append(f"resumes after step {run.done:,}: {max(order.steps - run.done, 0):,} steps left")
    planned = evaluations(run)
    if planned is not None:
        lines.append(
            f"evaluations: {planned.times:,}, each with {planned.samples:,} samples in {planned.batches:,} batches, "
            f"taking about as long as {planned.steps:,.1f} steps"
            + f"; each generates {planned.captions:,} captions of at most {planned.tokens} tokens"
            * (planned.captions > 0)
        )
    return lines


def sample_work(found: Forecast) -> Optional[float]:
    """Average floating-point operations per training sample; None without data."""
    data = found.data.get("train")
    if data is None or not len(data.lengths) or not found.run.trained:
        return None
    tokens, labels, images = (float(values.mean()) for values in (data.lengths, data.labels, data.images))
    # Padding is computed too; packed sequences have almost none.
    tokens = tokens / (1 - data.padding) if found.packs is None else tokens
    recompute = found.setting.recompute
    return work.sample(found.run.config, found.trained, round(tokens), round(labels), recompute, images)


def _time_lines(found: Forecast) -> List[str]:
    """Estimated time of an epoch on the cards of --plan_for."""
    order, machine, sample = found.run.order, found.run.machine, sample_work(found)
    if machine.flops is None or order is None or sample is None:
        return []
    epoch = sample * order.samples / machine.flops / work.FLOPS_SHARE / machine.cards
    left = max(order.steps - found.run.done, 0) / order.steps_per_epoch
    return [
        f"about {_hours(epoch)} per epoch, {_hours(epoch * left)} in total, at "
        f"{work.FLOPS_SHARE:.0%} of the card's published peak: {sample / 1e12:,.3g} TFLOP per sample (an estimate, "
        "never measured; without evaluations and checkpoints)"
    ]


def _hours(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.2g} seconds"


def dry_run(argv: Sequence[str], plan_for: Optional[str] = None) -> int:
    """Print the forecast. Returns 0 if the run can start, 2 if there are problems."""
    found = foresee(argv, plan_for)
    print("\n".join(render(found)))
    return 2 if found.problems else 0
