"""Thumbnails of the rows of a file, for pages that show many of them."""

from __future__ import annotations

import io
from typing import Collection, Dict, NamedTuple

from paddlemix.datasets.rows import image_text, read_rows
from paddlemix.datasets.tsv import check_input, row_id
from paddlemix.processors.images import decode_base64, open_image
from paddlemix.utils.errors import ImageError
from paddlemix.utils.progress import Progress

QUALITY = 60


class Thumbnail(NamedTuple):
    """webp: the encoded thumbnail, b"" if there is none; problem: why there is none, else ""."""

    webp: bytes
    problem: str


def shrink(data: bytes, side: int) -> bytes:
    """An image file as WebP of at most side × side pixels, with its aspect ratio.

    Raises:
        ImageError: as open_image.
    """
    from PIL import Image

    image = open_image(data)
    image.thumbnail((side, side), Image.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


def read_thumbnails(path: str, ids: Collection[str], side: int, quiet: bool = True) -> Dict[str, Thumbnail]:
    """The first picture of each of `ids` that has a row in the file; unusable ones have a reason.

    Raises:
        UserError: the file cannot be read.
    """
    wanted = set(ids)
    found: Dict[str, Thumbnail] = {}
    size = check_input(path)
    with Progress(size, "images", unit="B", disable=quiet) as bar:
        for row in read_rows(path, want_caption=False):
            name = row_id(row)
            if name in wanted and name not in found:
                try:
                    if row.error:
                        raise ImageError(row.error)
                    found[name] = Thumbnail(shrink(decode_base64(image_text(row)), side), "")
                except ImageError as error:
                    found[name] = Thumbnail(b"", error.reason)
                if len(found) == len(wanted):
                    break
            bar.reach(row.next_offset)
    return found
