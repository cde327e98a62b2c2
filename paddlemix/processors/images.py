"""Untrusted images to pixel values: decoding, and all limits except those on metadata (metadata.py).

Shapes: S image side in pixels; pixel values are float32 [3, S, S].

Reasons of an ImageError: "empty image", "bad base64", "not an image", "broken image", "too many pixels",
"image too large"; image_sources.py adds "cannot fetch" and "no such file".
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import threading
import warnings
from typing import Iterator, Tuple, Union

import numpy as np

from paddlemix.processors.metadata import MAX_EXIF, bounded, jpeg_size, webp_size
from paddlemix.utils.errors import ImageError

# CLIP's mean and standard deviation per channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Decoded pixels take up to 4 bytes each, and twice that during conversion and rotation: 100 megapixels are 400 MB in a
# worker, 900 at the peak; a WebP 1.4 GB, since its decoder keeps two copies. Cameras make up to 60 megapixels.
MAX_PIXELS = 100_000_000
# Pillow's resizing takes 32 bytes per pixel of a side, and its row table 8. No JPEG or GIF is larger.
MAX_SIDE = 65_535
# Pillow decodes run-length encoded BMPs in Python.
MAX_RLE_PIXELS = 4_000_000
# Pixels converted at a time, where the conversion copies them.
_BAND = 1 << 22
# Bytes of an encoded image; a JPEG at the pixel cap needs less.
MAX_BYTES = 64 << 20

# The formats of ad images (the JPEG plugin opens MPO too). Pillow's decoders of other formats are less tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Guards global state of Pillow and warnings: the switch for truncated files and the bomb warning. A fork waits for it,
# so that no child inherits the switch or the lock.
_PILLOW_LOCK = threading.RLock()
os.register_at_fork(
    before=_PILLOW_LOCK.acquire, after_in_parent=_PILLOW_LOCK.release, after_in_child=_PILLOW_LOCK.release
)
_DATA_URI = re.compile(rb"\s*data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: Union[str, bytes, memoryview]) -> bytes:
    """Bytes of base64 text; accepts line breaks, the URL-safe alphabet, missing padding and a data-URI prefix.

    Raises:
        ImageError: "empty image", "bad base64" or "image too large".
    """
    if isinstance(text, str):
        text = text.encode("utf-8", "replace")
    text = bytes(text)
    if len(text) > MAX_BYTES * 4 // 3 + 1024:
        raise ImageError("image too large", f"the base64 text is longer than {MAX_BYTES >> 20} MB of image")
    if text[:16].lstrip()[:5].lower() == b"data:":
        prefix = _DATA_URI.match(text)
        if not prefix:
            raise ImageError("bad base64", "a data URI without ;base64,")
        text = text[prefix.end() :]
    if b" " in text:
        lines = text.split()
        # In a web form's encoding a space may stand for +: dropping it would shift all bits behind it.
        if len({*map(len, lines[:-1])}) > 1 or (len(lines) > 1 and sum(map(len, lines)) % 4):
            raise ImageError("bad base64", "spaces in the base64 text that separate no lines of equal length")
    text = text.translate(_URL_SAFE, b" \t\r\n\x0b\x0c").rstrip(b"=")
    if not text:
        raise ImageError("empty image")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("bad base64", f"bad base64: {error}") from None


def _open(data: bytes, enough: int = 0):
    """A PIL image with only its header read; see open_image."""
    from PIL import Image, UnidentifiedImageError

    _check_bytes(data)
    _check_size(webp_size(data))
    plain = bounded(data)
    try:
        with _PILLOW_LOCK, warnings.catch_warnings():
            # Pillow warns at a size of its own; our limit is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(plain), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not an image", "not a JPEG, PNG, WebP, GIF or BMP image") from None
    except Image.DecompressionBombError:
        raise ImageError("too many pixels", f"the image has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's parsers raise almost any exception on a broken header.
        raise ImageError("broken image", f"the image header is broken: {error}") from None
    if min(image.size) < 1:
        raise ImageError("broken image", f"the image is {image.width} × {image.height} pixels")
    _check_size(image.size)
    if image.tile and image.tile[0][0] == "bmp_rle":
        pixels = image.width * image.height
        if pixels > min(MAX_PIXELS, MAX_RLE_PIXELS) or len(data) > 4 * pixels + 4096:
            size = f"{image.width} × {image.height} pixels in {len(data):,} bytes"
            raise ImageError("too many pixels", f"a run-length encoded BMP of {size}")
    if enough:
        image.draft(None, (enough, enough))
    return image


def read_header(data: bytes) -> Tuple[str, Tuple[int, int]]:
    """(format, (width, height)) from the header of an image; nothing is decoded.

    Ordinary JPEGs are parsed here: Pillow reads their tables too and takes five times as long.

    Raises:
        ImageError: not an image, or more than MAX_PIXELS.
    """
    _check_bytes(data)
    size = jpeg_size(data)
    if all(size):
        _check_size(size)
        return "JPEG", size
    image = _open(data)
    return image.format, image.size


def _check_bytes(data: bytes) -> None:
    if not data:
        raise ImageError("empty image")
    if len(data) > MAX_BYTES:
        raise ImageError("image too large", f"the image file is larger than {MAX_BYTES >> 20} MB")


def _check_size(size: Tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError("too many pixels", f"the image is {width} × {height}, more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError("too many pixels", f"the image is {width} × {height}, with a side over {MAX_SIDE:,} pixels")


def open_image(data: bytes, enough: int = 0):
    """Decode an image to RGB: rotated by its EXIF orientation, transparency over white, the first frame only.

    A truncated file is decoded as far as possible; `info["truncated"]` is then True. enough: a JPEG is decoded at 1/2,
    1/4 or 1/8 of its size as long as both sides keep that many pixels.

    Returns:
        a PIL image in mode RGB.

    Raises:
        ImageError: see the module's reasons. The pixel limit is checked on the header, before decoding.
    """
    image = _open(data, enough)
    try:
        image, truncated = _load(image, data, enough)
        image = _upright_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # as above: decoders raise almost any exception
        raise ImageError("broken image", f"the image cannot be decoded: {error}") from None
    image.info["truncated"] = truncated
    return image


class _TruncatedSwitch:
    """Pillow's global switch for decoding truncated files, on for one file at a time.

    uses: how often it was on; on: whether it is. By these another thread detects that it decoded while it was on.
    """

    def __init__(self):
        self.uses, self.on = 0, False

    def __enter__(self):
        from PIL import ImageFile

        _PILLOW_LOCK.acquire()
        self._before = ImageFile.LOAD_TRUNCATED_IMAGES
        self.uses, self.on = self.uses + 1, True
        ImageFile.LOAD_TRUNCATED_IMAGES = True

    def __exit__(self, *error):
        from PIL import ImageFile

        ImageFile.LOAD_TRUNCATED_IMAGES = self._before
        self.on = False
        _PILLOW_LOCK.release()


_SWITCH = _TruncatedSwitch()


def _load(image, data: bytes, enough: int = 0):
    """Decode an opened image, as far as possible. Returns (image, whether it is truncated)."""
    try:
        uses, on = _SWITCH.uses, _SWITCH.on
        image.load()
        if on or _SWITCH.uses != uses:
            # Another thread had the switch on, so a truncated file may have passed as complete.
            with _PILLOW_LOCK:
                image = _open(data, enough)
                image.load()
        return image, False
    except (OSError, SyntaxError, ValueError, struct.error):
        with _SWITCH:
            image = _open(data, enough)
            image.load()
        return image, True


def _exif_bytes(image) -> int:
    """Bytes of EXIF that Pillow would parse."""
    # ImageMagick writes it into a PNG as hexadecimal text.
    return max(len(image.info.get("exif", b"")), len(image.info.get("Raw profile type exif", "")) // 2)


def _upright_rgb(image):
    from PIL import Image

    # By EXIF orientation, from 2 on.
    turns = (
        Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE, Image.ROTATE_270,
        Image.TRANSVERSE, Image.ROTATE_90,
    )  # fmt: skip
    try:
        turn = dict(enumerate(turns, 2)).get(image.getexif().get(0x0112)) if _exif_bytes(image) <= MAX_EXIF else None
    except Exception:  # a broken EXIF block raises almost any exception, and the picture is still good
        turn = None
    see_through = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if image.mode.startswith("I"):
        image = _high_bytes(image)
    elif see_through:
        image = _over_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _bands(image) -> Iterator[Tuple[Tuple[int, int], object]]:
    """((left, top), part) of an image, in bands of rows."""
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        yield (0, top), image.crop((0, top, image.width, min(top + rows, image.height)))


def _over_white(image):
    """An image with transparency as RGB over white."""
    from PIL import Image

    result = Image.new("RGB", image.size)
    for place, part in _bands(image):
        ground = Image.new("RGBA", part.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(ground, part.convert("RGBA")).convert("RGB"), place)
    return result


def _high_bytes(image):
    """16-bit grey as 8-bit: Pillow's own conversion clips at 255. Older versions use 32 bits (mode I)."""
    from PIL import Image

    result = Image.new("L", image.size)
    for place, part in _bands(image):
        result.paste(Image.fromarray((np.asarray(part) >> 8).astype(np.uint8)), place)
    return result


class MGenVLImageProcessor:
    """An image to pixel values: bicubic resize to S × S, / 255, - MEAN, / STD. image_size: S."""

    def __init__(self, image_size: int = 448):
        self.image_size = image_size
        mean, std = (np.array(values, np.float64).reshape(3, 1, 1) for values in (MEAN, STD))
        self._scale, self._shift = (1.0 / (255.0 * std)).astype(np.float32), (mean / std).astype(np.float32)

    @classmethod
    def from_config(cls, config) -> MGenVLImageProcessor:
        """For the image size of an MGenConfig."""
        return cls(config.visual["image_size"])

    def __call__(self, image) -> np.ndarray:
        """image: a PIL image, or uint8 [h, w, 3]. Returns float32 [3, S, S], contiguous."""
        from PIL import Image

        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        size = (self.image_size, self.image_size)
        if image.size != size:
            image = image.resize(size, Image.BICUBIC)
        # Split into channels by Pillow, which is faster than transposing the array.
        planes = b"".join(channel.tobytes() for channel in image.split())
        pixels = np.frombuffer(planes, np.uint8).reshape(3, *size).astype(np.float32)
        pixels *= self._scale
        pixels -= self._shift
        return pixels

    def blank(self) -> np.ndarray:
        """A grey picture as `__call__` gives it: float32 [3, S, S]."""
        return self(np.full((self.image_size, self.image_size, 3), 128, dtype=np.uint8))

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """The inverse: float32 [3, S, S] → uint8 [S, S, 3]."""
        values = (pixels + self._shift) / self._scale
        return values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
