"""Bounding boxes of grounding answers, `<ref>a cup</ref><box>(x1,y1),(x2,y2)</box>`: parsed and drawn.

Coordinates are thousandths of the image's width and height, as in Qwen-VL.
"""

from __future__ import annotations

import os
import re
from typing import List, NamedTuple, Optional, Tuple

from paddlemix.processors.fonts import find_font
from paddlemix.utils.cli import harmless
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger

# File extension → Pillow's name of the format.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
_CORNER = r"\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*"
_MARK = re.compile(rf"<ref>(?P<ref>.*?)</ref>|<box>{_CORNER},{_CORNER}</box>", re.DOTALL)
_MAX_LABEL = 40
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


class Box(NamedTuple):
    """label: the `<ref>` before it, or "". corners: (left, top, right, bottom) in 0 … 1000."""

    label: str
    corners: Tuple[int, int, int, int]


def parse_boxes(text: str) -> List[Box]:
    """The boxes of an answer, in order. Swapped corners are reordered, coordinates clipped; malformed boxes are
    ignored."""
    boxes, label, end = [], "", 0
    for found in _MARK.finditer(text):
        # A label applies to all boxes that follow it directly.
        if text[end : found.start()].strip():
            label = ""
        end = found.end()
        if found.group("ref") is not None:
            label = " ".join(found.group("ref").split())
            continue
        x1, y1, x2, y2 = (min(1000, int(number)) for number in found.groups()[1:])
        boxes.append(Box(label, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))))
    return boxes


def check_boxes_path(path: str) -> str:
    """`path`, if it has the extension of an image format.

    Raises:
        UserError: it has an extension that is not in FORMATS.
    """
    if os.path.splitext(path)[1].lower() not in FORMATS:
        raise UserError(f"boxes are drawn to a file ending in {', '.join(FORMATS)}, not {path}", "boxes")
    return path


def draw_boxes(image, boxes: List[Box], font=None):
    """A copy of a PIL image (mode RGB) with the boxes and their labels.

    font: see find_font. Without one, non-ASCII labels are replaced by the box's number.
    """
    from PIL import ImageDraw, ImageFont

    image = image.copy()
    draw = ImageDraw.Draw(image)
    line = max(2, min(image.size) // 200)
    for number, box in enumerate(boxes, 1):
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        left, top, right, bottom = (
            round(value / 1000 * (side - 1)) for value, side in zip(box.corners, image.size + image.size)
        )
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        label = box.label[:_MAX_LABEL] if font is not None or box.label.isascii() else str(number)
        if label:
            used = font or ImageFont.load_default()
            # Above the box if there is room, else inside it.
            x0, y0, x1, y1 = used.getbbox(label)
            top = top - (y1 - y0) - 2 * line if top >= (y1 - y0) + 2 * line else top
            draw.rectangle((left, top, left + x1 - x0 + 2 * line, top + y1 - y0 + 2 * line), fill=colour)
            draw.text((left + line - x0, top + line - y0), label, fill="white", font=used)
    return image


def save_boxes(answer: str, image, path: str, folder: str) -> Optional[int]:
    """Draw the boxes of an answer to the file `path`. Returns the number of boxes.

    image: the PIL image (RGB) that was asked about, or None. folder: the model's, for its font. Write errors are only
    logged.
    """
    boxes = parse_boxes(answer)
    if not boxes or image is None:
        return 0
    font = find_font(folder, max(12, min(image.size) // 30))
    if font is None:
        unnamed = [f"{i} is {box.label}" for i, box in enumerate(boxes, 1) if not box.label.isascii()]
        if unnamed:
            names = harmless(", ".join(unnamed))
            logger.warning("no font with Chinese characters (apt install fonts-noto-cjk): %s", names)
    try:
        with atomic_write(path, "wb") as file:
            draw_boxes(image, boxes, font).save(file, FORMATS[os.path.splitext(path)[1].lower()])
    except (OSError, ValueError) as error:  # ValueError: too large for the format
        logger.warning("the boxes could not be written to %s: %s", path, getattr(error, "strerror", None) or error)
    else:
        logger.info("boxes drawn in %s: %d", path, len(boxes))
    return len(boxes)
