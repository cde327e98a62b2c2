"""What a run leaves to look at: scalars, captions and thumbnails for VisualDL and TensorBoard; the loss as a picture.

    visualdl --logdir OUTPUT_DIR/runs        tensorboard --logdir OUTPUT_DIR/runs
"""

from __future__ import annotations

import importlib.util
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from paddlenlp.trainer import TrainerCallback

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.files import atomic_write

# report_to → the package that writes its files.
_PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX"}
CURVE_NAME = "loss_curve.png"


def choose_reports(asked: Optional[Sequence[str]]) -> List[str]:
    """Where to report: what was asked for, or by default all that is installed.

    Raises:
        ConfigError: a package that was asked for is missing.
    """
    there = [kind for kind, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None]
    for kind in asked or ():
        if kind != "none" and kind not in there:
            raise ConfigError(f"report_to {kind} needs the package {_PACKAGES[kind]}; install it or leave it out")
    return list(asked) if asked else there or ["none"]


class EventFiles(TrainerCallback):
    """Event files of one run, opened with the first entry. Only the first process should have one.

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
        for writer in self._open().values():
            for name, value in logs.items():
                if isinstance(value, (int, float)):
                    tag = f"eval/{name[len('eval_'):]}" if name.startswith("eval_") else f"train/{name}"
                    writer.add_scalar(tag, value, state.global_step)
        self._flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""
        for writer in self._open().values():
            writer.add_text(tag, text, step)
        self._flush()

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [H, W, 3]."""
        for writer in self._open().values():
            writer.add_image(tag, pixels, step, dataformats="HWC")
        self._flush()

    def _flush(self) -> None:
        for kind, writer in self._writers.items():
            (writer if kind == "visualdl" else writer.file_writer).flush()

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
