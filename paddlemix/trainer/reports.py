"""Reports of a run: scalars, captions and thumbnails for VisualDL and TensorBoard; the loss curve as a picture.

visualdl --logdir OUTPUT_DIR/runs        tensorboard --logdir OUTPUT_DIR/runs
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from paddlenlp.trainer import TrainerCallback

from paddlemix.processors.fonts import find_font
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger

# report_to → the package that writes its files.
_PACKAGES = {"visualdl": "visualdl", "tensorboard": "tensorboardX"}
CURVE_NAME = "loss_curve.png"
# Free disk space that an entry needs, in bytes: more than any entry takes.
_ROOM = 1 << 20
# Layout of caption pictures in pixels; maximum characters drawn.
FONT_SIZE = 15
_TEXT_WIDTH, _LINE, _MARGIN, _MOST_LETTERS = 360, 20, 10, 1000
# Minimum number of losses for a smoothed line.
_SMOOTHED_FROM = 20


def choose_reports(asked: Optional[Sequence[str]]) -> List[str]:
    """Where to report: as requested, or by default to all that are installed.

    Raises:
        ConfigError: a requested package is missing.
    """
    there = [kind for kind, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None]
    for kind in asked or ():
        if kind != "none" and kind not in there:
            raise ConfigError(
                f"report_to {kind} needs the package {_PACKAGES[kind]}; install it or leave it out", "report_to"
            )
    return list(asked) if asked else there or ["none"]


Parameter = Union[str, int, float]
# Metrics shown with the hyperparameters.
METRICS = ("train/loss", "eval/loss", "eval/cider")


class EventFiles(TrainerCallback):
    """Event files of one run, opened with the first entry; of the first process only.

    A full disk ends them, not the run. The packages write in threads of their own, which a failed write kills or
    blocks, so free space is checked first.

    kinds: "visualdl", "tensorboard". parameters: the run's settings, shown with its results.
    """

    def __init__(self, folder: str, kinds: Sequence[str], parameters: Optional[Dict[str, Parameter]] = None):
        self.folder = folder
        self.parameters = parameters or {}
        self.kinds = [kind for kind in kinds if kind in _PACKAGES]
        # Whether captions, all of them, were drawn beside their images.
        self.pictures = False
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
        self.text("arguments", json.dumps(self.parameters, ensure_ascii=False, indent=1), 0)

        def write(writer):
            if writer is self._writers.get("visualdl"):
                writer.add_hparams(self.parameters, list(METRICS))
                return
            from tensorboardX.summary import hparams

            # The writer's own add_hparams creates a separate run in a subfolder.
            for summary in hparams(self.parameters, dict.fromkeys(METRICS, 0.0)):
                writer.file_writer.add_summary(summary)

        if self.parameters:
            self._enter(write)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Numbers go under train/ or, for eval_…, under eval/."""

        def write(writer):
            for name, value in logs.items():
                if isinstance(value, (int, float)):
                    tag = f"eval/{name[len('eval_') :]}" if name.startswith("eval_") else f"train/{name}"
                    writer.add_scalar(tag, value, state.global_step)

        self._enter(write)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text; TensorBoard takes it for Markdown, VisualDL shows it as one paragraph."""
        self._enter(lambda writer: writer.add_text(tag, text, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [H, W, 3]."""
        self._enter(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def _enter(self, write: Callable[[Any], None]) -> None:
        """Call `write` with each writer, and flush them."""
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
        """Redirect the writers' open files to memory: they would go on failing until the program exits."""
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


def caption_picture(thumbnail: np.ndarray, caption: str, reference: str, font) -> np.ndarray:
    """An image with its caption and reference to the right: uint8 [h, w, 3].

    thumbnail: uint8 [h, w, 3]. font: a Pillow font with the characters of both.
    """
    from PIL import Image, ImageDraw

    lines = []
    for name, text, colour in (("caption", caption, "black"), ("reference", reference, "#666666")):
        lines += [(name, "#1f77b4"), *((line, colour) for line in _wrapped(text, font, _TEXT_WIDTH)), ("", colour)]
    height, width = thumbnail.shape[:2]
    picture = Image.new("RGB", (width + _TEXT_WIDTH + 3 * _MARGIN, max(height, len(lines) * _LINE) + _MARGIN), "white")
    picture.paste(Image.fromarray(thumbnail), (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, (line, colour) in enumerate(lines):
        draw.text((width + _MARGIN, _MARGIN // 2 + number * _LINE), line, fill=colour, font=font)
    return np.asarray(picture)


def _wrapped(text: str, font, width: int) -> List[str]:
    """Lines of at most `width` pixels, broken between any two characters, as in Chinese."""
    lines, line = [], ""
    for letter in text[:_MOST_LETTERS]:
        if line and font.getlength(line + letter) > width:
            lines.append(line)
            line = ""
        line += letter
    return [*lines, line]


def curves(history: Sequence[Dict[str, float]]) -> Dict[str, Tuple[List[int], List[float]]]:
    """Steps and finite values of "loss", "eval_loss" and "learning_rate" in a log history."""
    found = {}
    for name in ("loss", "eval_loss", "learning_rate"):
        points = [(line["global_step"], line[name]) for line in history if name in line and "global_step" in line]
        points = [(step, value) for step, value in points if np.isfinite(value)]
        found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def smoothed(values: Sequence[float]) -> np.ndarray:
    """A centred running mean over a thirtieth of the values, at least 5. Near the ends the window is shorter, down
    to 2 values: a longer one would draw a steep beginning too low, and the end too high."""
    count = len(values)
    place = np.arange(count)
    half = np.clip(np.minimum(place, place[::-1]), 1, max(2, count // 60))
    first, end = np.maximum(place - half, 0), np.minimum(place + half + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


def loss_figure(history: Sequence[Dict[str, float]], title: str = ""):
    """A matplotlib figure of the losses, also smoothed, and the learning rate; None without losses. The scale of the
    losses is logarithmic if they span more than a factor of ten."""
    found = curves(history)
    steps, losses = found["loss"]
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    alone = "o-" if len(steps) == 1 else "-"
    shown = losses + found["eval_loss"][1]
    calm = smoothed(losses)
    logarithmic = min(shown) > 0 and max(calm) > 10 * min(calm)
    if logarithmic:
        calm = np.exp(smoothed(np.log(losses)))
    many = len(losses) >= _SMOOTHED_FROM
    above.plot(steps, losses, alone, color="tab:blue", linewidth=1, alpha=0.35 if many else 1.0, label="training")
    if many:
        above.plot(steps, calm, "-", color="tab:blue", linewidth=2, label="training, smoothed")
    if found["eval_loss"][0]:
        above.plot(*found["eval_loss"], "o-", color="tab:orange", markersize=4, label="validation")
    if logarithmic:
        above.set_yscale("log")
    above.set_ylabel("loss")
    above.set_title(title.encode("ascii", "replace").decode().replace("$", "\\$"))
    above.legend()
    below.plot(*found["learning_rate"], alone, color="tab:gray", linewidth=1)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def draw_loss(history: Sequence[Dict[str, float]], path: str) -> bool:
    """Write loss_figure as a PNG to `path`. Returns False without losses.

    Raises:
        OSError: the picture cannot be written.
    """
    figure = loss_figure(history, os.path.basename(os.path.dirname(os.path.abspath(path))))
    if figure is None:
        return False
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    return True


class CaptionReport:
    """Captions of an evaluation in the log and, with their images, in the event files.

    thumbnail: returns the image of a caption's id, or None. font_folder: searched for a font before the usual places.
    """

    def __init__(self, events: EventFiles, thumbnail: Callable[[str], Optional[np.ndarray]], font_folder: str):
        self.events, self.thumbnail, self.font_folder = events, thumbnail, font_folder
        self._thumbnails: Dict[str, Optional[np.ndarray]] = {}
        self._font: Any = None  # searched on demand; False: there is none

    def show(self, found: Sequence[Any], step: int) -> None:
        """found: objects with id, text and reference."""
        for one in found:
            line = f"{one.text} | reference: {one.reference}"
            logger.info(f"{one.id}: {line}")
            if not self.events.kinds:
                continue
            name = one.id.replace("#", "_")
            self.events.text(f"captions/{name}", line, step)
            if one.id not in self._thumbnails:
                self._thumbnails[one.id] = self.thumbnail(one.id)
            thumbnail = self._thumbnails[one.id]
            if thumbnail is not None:
                font = self._font_for(line)
                shown = thumbnail if font is None else caption_picture(thumbnail, one.text, one.reference, font)
                self.events.pictures = self._font is not False
                self.events.image(f"eval/{name}", shown, step)

    def _font_for(self, text: str) -> Any:
        """A font with the characters of a text, or None, with one warning."""
        from PIL import ImageFont

        if text.isascii():
            return ImageFont.load_default()
        if self._font is None:
            self._font = find_font(self.font_folder, FONT_SIZE) or False
            if not self._font:
                logger.warning(
                    "no font with Chinese characters (apt install fonts-noto-cjk): the event files show captions as "
                    "text (captions/…), not next to their images (eval/…)"
                )
        return self._font or None
