"""What a run leaves to look at: scalars, captions and thumbnails for VisualDL and TensorBoard; the loss as a picture.

    visualdl --logdir OUTPUT_DIR/runs        tensorboard --logdir OUTPUT_DIR/runs
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from paddlenlp.trainer import TrainerCallback

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger

# report_to → the package that writes its files.
_PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX"}
CURVE_NAME = "loss_curve.png"
# Bytes a disk must have left for an entry to be written: more than any entry takes.
_ROOM = 1 << 20


def choose_reports(asked: Optional[Sequence[str]]) -> List[str]:
    """Where to report: what was asked for, or by default all that is installed.

    Raises:
        ConfigError: a package that was asked for is missing.
    """
    there = [kind for kind, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None]
    for kind in asked or ():
        if kind != "none" and kind not in there:
            raise ConfigError(
                f"report_to {kind} needs the package {_PACKAGES[kind]}; install it or leave it out", "report_to"
            )
    return list(asked) if asked else there or ["none"]


class EventFiles(TrainerCallback):
    """Event files of one run, opened with the first entry. Only the first process should have one.

    A disk without room ends them, not the run. Their packages write in threads of their own, which a failed write ends
    or blocks: so room is asked for beforehand.

    folder: where they go. kinds: "visualdl", "tensorboard".
    """

    def __init__(self, folder: str, kinds: Sequence[str]):
        self.folder = folder
        self.kinds = [kind for kind in kinds if kind in _PACKAGES]
        self._writers: Dict[str, Any] = {}

    def _open(self) -> Dict[str, Any]:
        if not self._writers:
            if "visualdl" in self.kinds:
                from visualdl import LogWriter

                self._writers["visualdl"] = LogWriter(logdir=self.folder)
            if "tensorboard" in self.kinds:
                from tensorboardX import SummaryWriter

                self._writers["tensorboard"] = SummaryWriter(log_dir=self.folder)
        return self._writers

    def on_train_begin(self, args, state, control, **kwargs):
        self.text("arguments", args.to_json_string(), 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Each number under train/ or, for eval_…, under eval/."""

        def write(writer):
            for name, value in logs.items():
                if isinstance(value, (int, float)):
                    tag = f"eval/{name[len('eval_'):]}" if name.startswith("eval_") else f"train/{name}"
                    writer.add_scalar(tag, value, state.global_step)

        self._enter(write)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""
        self._enter(lambda writer: writer.add_text(tag, text, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [H, W, 3]."""
        self._enter(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def _enter(self, write: Callable[[Any], None]) -> None:
        """Let `write` make an entry with each writer, and flush them."""
        if not self.kinds:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            if shutil.disk_usage(self.folder).free < _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for kind, writer in self._open().items():
                write(writer)
                (writer if kind == "visualdl" else writer.file_writer).flush()
        except OSError as error:
            logger.warning(f"event files in {self.folder} end here: {error.strerror or error}")
            self.kinds = []
            self._cut_off()
            self.close()

    def _cut_off(self) -> None:
        """Let what the writers still hold, and would fail to write until the program exits, go into memory."""
        nowhere = os.memfd_create("event files that found no room")
        inside = os.path.join(os.path.realpath(self.folder), "")
        for handle in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{handle}").startswith(inside):
                    os.dup2(nowhere, int(handle), inheritable=False)
        os.close(nowhere)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def caption_table(rows: Sequence[Tuple[str, str, str]]) -> str:
    """(id, caption, reference) rows as a Markdown table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    lines = ["| id | caption | reference |", "|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def curves(history: Sequence[Dict[str, float]]) -> Dict[str, Tuple[List[int], List[float]]]:
    """Steps and values of "loss", "eval_loss" and "learning_rate" in a log history, where they are finite."""
    found = {}
    for name in ("loss", "eval_loss", "learning_rate"):
        points = [(line["global_step"], line[name]) for line in history if name in line and "global_step" in line]
        points = [(step, value) for step, value in points if np.isfinite(value)]
        found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def draw_loss(history: Sequence[Dict[str, float]], path: str) -> bool:
    """Draw the losses and the learning rate over the steps as a PNG at `path`. False if there is no loss to draw.

    Raises:
        OSError: the picture cannot be written.
    """
    found = curves(history)
    steps, losses = found["loss"]
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    alone = "o-" if len(steps) == 1 else "-"
    above.plot(steps, losses, alone, color="tab:blue", linewidth=1, label="training")
    if found["eval_loss"][0]:
        above.plot(*found["eval_loss"], "o-", color="tab:orange", markersize=4, label="validation")
    above.set_ylabel("loss")
    above.legend()
    below.plot(*found["learning_rate"], alone, color="tab:gray", linewidth=1)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    return True
