"""User content: texts with images, and the forms of input it comes in.

Tags in a text are plain characters. Only an Image makes a span; it stands for an image given with a text, or for a
complete `<img>path or base64</img>` in a record's prompt or in a query of the notebook's list form.
"""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Sequence, Union

from paddlemix.utils.errors import UserError

# An image named in a text: a path, or base64 of any length.
NAMED_IMAGE = re.compile(r"<img>([^<]*)</img>")


class Image(NamedTuple):
    """An image in a prompt. name: the text that the ids of its span encode, at most n_queries bytes; the model replaces
    them by the image's features."""

    name: str = ""


# A text, or texts and images in order.
Content = Union[str, Sequence[Union[str, Image]]]


def split_images(text: str, n_queries: int) -> List[Union[str, Image]]:
    """The parts of a text that names images as `<img>path or base64</img>`.

    Names of more than n_queries bytes are dropped, so that base64 never reaches the tokenizer. Unpaired tags are text.
    """
    parts = NAMED_IMAGE.split(text)
    return [_image(part, n_queries) if number % 2 else part for number, part in enumerate(parts)]


def named_images(given: Content, n_queries: int) -> Content:
    """Content, with images named in a text resolved."""
    return split_images(given, n_queries) if isinstance(given, str) else given


def _image(name: str, n_queries: int) -> Image:
    return Image(name if len(name.encode("utf-8", "replace")) <= n_queries else "")


def parts_of(content: Content) -> List[Union[str, Image]]:
    """Texts and images in order, neighbouring texts joined."""
    parts: List[Union[str, Image]] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def as_text(content: Content) -> str:
    """Content with its images as `<img>name</img>`."""
    return "".join(part if isinstance(part, str) else f"<img>{part.name}</img>" for part in parts_of(content))


def count_images(content: Content) -> int:
    return sum(isinstance(part, Image) for part in parts_of(content))


def picture(number: int, name: str = "") -> List[Union[str, Image]]:
    """Image number `number` in a prompt."""
    return [f"Picture {number}: ", Image(name), "\n"]


def with_images(prompt: Content, n_images: int, first: int = 1) -> List[Union[str, Image]]:
    """A prompt preceded by n_images images, numbered from `first`."""
    shown = [part for number in range(first, first + n_images) for part in picture(number)]
    return shown + parts_of(prompt)


def list_parts(query: Sequence[Dict], n_queries: int) -> List[Union[str, Image]]:
    """The content of a query in the notebook's list form: {"image": …}, {"text": …}, {"ref": …, "box": (x1, y1, x2, y2)
    or several}.

    Raises:
        UserError: an unknown part.
    """
    parts: List[Union[str, Image]] = []
    images = 0
    for part in query:
        if "image" in part:
            images += 1
            source = part["image"] if isinstance(part["image"], str) else ""
            parts += picture(images, _image(source, n_queries).name)
        elif "text" in part:
            parts.append(part["text"])
        elif "box" in part or "ref" in part:
            if "ref" in part:
                parts.append(f"<ref>{part['ref']}</ref>")
            boxes = part.get("box", [])
            for box in boxes if boxes and isinstance(boxes[0], (list, tuple)) else [boxes] if boxes else []:
                parts.append("<box>({:d},{:d}),({:d},{:d})</box>".format(*box))
        else:
            raise UserError(f"a part of a query is an image, a text or a box, not {sorted(part)}", "query")
    return parts
