"""The dry run: what a finetuning run would do and need (forecast.py), and every problem that would stop it, as text."""

from __future__ import annotations

from typing import List, Optional, Sequence

import numpy as np

from paddlemix.datasets.collator import PAD_TO
from paddlemix.trainer import freeze, work
from paddlemix.trainer.data_statistics import DataStatistics
from paddlemix.trainer.forecast import Forecast, evaluations, foresee, sample_work, size_text
from paddlemix.trainer.run import Run, contributions
from paddlemix.utils.language import tr_row
from paddlemix.utils.texts import counted


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
            lines.append(f"{name:<34}{size_text(off):>18}{size_text(on):>18}")
    lines.append(f"{'memory of the device':<34}{size_text(found.run.machine.memory):>18}")
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
        lines += ["", "==== disk", f"checkpoints written: {found.saves:,}, {size_text(found.checkpoint)} each"]
        lines.append(f"at most {size_text(found.disk_needed)} at once, {size_text(found.disk_free)} free")
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
        f"{machine.cards} × {machine.name} with {size_text(machine.memory)}; "
        f"computes in {run.precision.compute}{level}",
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
        stored = f"{tensors} tensors in {counted(files, 'file')}, {size_text(size)}, {dtypes}"
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
