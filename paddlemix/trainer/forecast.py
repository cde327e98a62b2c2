"""What a finetuning run would do and need: its Run and, beyond that, estimates.

Statistics of data samples (lengths from texts, image sizes from headers), packing, evaluations, memory (memory.py),
disk space, and the work of a sample (work.py).
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from paddlemix.checkpoint.model_folder import VOCABULARIES
from paddlemix.trainer import memory, work
from paddlemix.trainer.command_line import read
from paddlemix.trainer.data_statistics import DataStatistics, data_statistics, padded
from paddlemix.trainer.eval_captions import caption_count
from paddlemix.trainer.machine import card
from paddlemix.trainer.run import Run, resolve
from paddlemix.utils.compat import PADDLE_3
from paddlemix.utils.outputs import nearest_folder

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
    """How many times something due every `every` steps is still to come. last: it is also due after the last step."""
    steps = run.order.steps
    return max((math.ceil(steps / every) if last else steps // every) - run.done // every, 0)


def evaluations(run: Run) -> Optional[Evaluations]:
    """The evaluations of a training run; None if it has none."""
    training, data, order = run.arguments.training, run.arguments.data, run.order
    if not training.evaluates or "eval" not in run.datasets or order is None:
        return None
    batch = training.per_device_eval_batch_size * run.data_parallel
    rows = len(run.datasets["eval"])
    batches = math.ceil(rows / batch)
    if training.max_evaluate_steps > 0:
        batches = min(batches, training.max_evaluate_steps)
    samples = min(rows, batches * batch)
    every = {
        "steps": training.eval_steps or training.logging_steps, "epoch": order.steps_per_epoch,
    }.get(training.evaluation_strategy, order.steps)  # fmt: skip
    times = _times(run, every, training.evaluation_strategy == "epoch")
    trained = sum(count.trainable for count in run.counts().values())
    # A step's passes over the weights: forward, gradients of activations, of what trains, and the forward once more.
    passes = 2 + trained / sum(sum(count) for count in run.counts().values()) + training.recompute
    per_step = order.per_step * order.samples / order.count
    return Evaluations(
        times=times,
        batches=batches,
        samples=samples,
        every=every,
        # The decoder sees each batch a second time, with blank images.
        steps=samples * (1 + data.eval_image_gain) / passes / per_step,
        captions=caption_count(run.arguments, rows),
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
            advice.append(f"recompute needs {size_text(lower)}")
        advice.append("lower per_device_train_batch_size or max_length, or split the model over several cards")
        found.problems.append(
            f"a step needs about {size_text(needed)} per card, but {machine.name} has {size_text(machine.memory)}: "
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
            f"output_dir: {kept} checkpoints and the result take {size_text(found.disk_needed)}, but the disk "
            f"has {size_text(found.disk_free)} free: set save_total_limit, or use another disk"
        )


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


def size_text(count: float) -> str:
    """A number of bytes in GiB or MiB."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.2f} GiB"
    return f"{count / (1 << 20):,.1f} MiB"
