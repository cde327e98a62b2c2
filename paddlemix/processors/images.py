"""Images from strangers to pixel values. Every limit and every decision on decoding is here.

Shapes: S image side in pixels; pixel values are float32 [3, S, S].

Reasons of an ImageError: "empty image", "bad base64", "not an image", "broken image", "too many pixels",
"image too large", "cannot fetch", "no such file".
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
from typing import Tuple, Union

import numpy as np

from paddlemix.utils.errors import ImageError

# CLIP's mean and standard deviation per channel (SPEC §5).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Decoded pixels cost up to 4 bytes each: 100 megapixels are 400 MB in a worker. Cameras make up to 60.
MAX_PIXELS = 100_000_000
# Bytes of an encoded image; a JPEG at the pixel cap needs less.
MAX_BYTES = 64 << 20
URL_TIMEOUT_SECONDS = 20

# What ad images come in. Pillow knows many more, whose decoders are old and rarely tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_TRUNCATED_LOCK = threading.Lock()
_DATA_URI = re.compile(rb"\s*data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: Union[str, bytes, memoryview]) -> bytes:
    """Bytes of base64 text: wrapped lines, the url-safe alphabet, missing padding and a data-URI prefix are fine.

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
    text = text.translate(_URL_SAFE, b" \t\r\n\x0b\x0c").rstrip(b"=")
    if not text:
        raise ImageError("empty image")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("bad base64", f"bad base64: {error}") from None


def _open(data: bytes):
    """A PIL image of which only the header has been read."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("empty image")
    if len(data) > MAX_BYTES:
        raise ImageError("image too large", f"the image file is larger than {MAX_BYTES >> 20} MB")
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at a size of its choice; ours follows.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not an image", "the bytes are no JPEG, PNG, WebP, GIF, BMP or TIFF image") from None
    except Image.DecompressionBombError:
        raise ImageError("too many pixels", f"the image has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's parsers raise nearly anything on a broken header.
        raise ImageError("broken image", f"the image header is broken: {error}") from None


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Tuple[str, Tuple[int, int]]:
    """(format, (width, height)) from the first bytes of an image, nothing decoded.

    Raises:
        ImageError: no image, or one of more than max_pixels.
    """
    image = _open(data)
    _check_size(image, max_pixels)
    return image.format, image.size


def _check_size(image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("broken image", f"the image is {width} × {height} pixels")
    if width * height > max_pixels:
        raise ImageError("too many pixels", f"the image is {width} × {height}, more than {max_pixels:,} pixels")


def open_image(data: bytes, max_pixels: int = MAX_PIXELS):
    """Decode an image to RGB, upright as its EXIF says, transparency over white, the first frame of several.

    A file cut short is decoded as far as it goes; its `info["truncated"]` is then True.

    Returns:
        a PIL image in mode RGB.

    Raises:
        ImageError: see the module's reasons. The pixel cap is checked on the header, before anything is decoded.
    """
    image = _open(data)
    _check_size(image, max_pixels)
    truncated = False
    try:
        try:
            image.load()
        except (OSError, SyntaxError, struct.error):
            image, truncated = _load_truncated(data), True
        image = _upright_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # as above: decoders raise nearly anything
        raise ImageError("broken image", f"the image cannot be decoded: {error}") from None
    image.info["truncated"] = truncated
    return image


def _load_truncated(data: bytes):
    """Decode what there is. Pillow's switch for it is global, so it is thrown only for these few files."""
    from PIL import ImageFile

    with _TRUNCATED_LOCK:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            image = _open(data)
            image.load()
            return image
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright_rgb(image):
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # 16 bits per pixel: the high byte is the 8-bit picture. Pillow's own conversion cuts at 255.
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


class MGenVLImageProcessor:
    """A picture to pixel values: bicubic resize to S × S, /255, minus mean, over std (SPEC §5).

    image_size: S. mean, std: per channel, in 0 … 1.
    """

    def __init__(self, image_size: int = 448, mean=MEAN, std=STD):
        self.image_size = image_size
        scale = 1.0 / (255.0 * np.array(std, dtype=np.float64))
        self._scale = scale.astype(np.float32).reshape(3, 1, 1)
        self._shift = (np.array(mean, dtype=np.float64) / np.array(std)).astype(np.float32).reshape(3, 1, 1)

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
        # Channels first while they are bytes: a quarter of the traffic of doing it in float32.
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        pixels *= self._scale
        pixels -= self._shift
        return pixels


# ---- sources that a person types


def load_image_source(source: Union[str, bytes], allow_private_urls: bool = False) -> bytes:
    """Bytes of an image given as bytes, path, http(s) URL, data URI or base64 text.

    Raises:
        ImageError: not found, not fetched, or none of these.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, str):
        raise ImageError("not an image", f"an image is given as bytes or text, not {type(source).__name__}")
    if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        return _fetch(source, allow_private_urls)
    if len(source) < 4096 and "\0" not in source and os.path.isfile(source):
        if os.path.getsize(source) > MAX_BYTES:
            raise ImageError("image too large", f"{source} is larger than {MAX_BYTES >> 20} MB")
        with open(source, "rb") as file:
            return file.read()
    try:
        data = decode_base64(source)
        read_header(data)
        return data
    except ImageError as error:
        if len(source) > 1024:
            raise
        raise ImageError("no such file", f"{source} is no file, and as base64 it is no image ({error})") from None


def _check_address(host: str, port: int):
    """An address to connect to for `host`: all it resolves to must be public.

    The connection is then made to that very address, so a name cannot change its mind in between.
    """
    import ipaddress
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ImageError("cannot fetch", f"cannot resolve {host}: {error}") from None
    addresses = [entry[4][0] for entry in found]
    for address in addresses:
        if not ipaddress.ip_address(address.split("%")[0]).is_global:
            raise ImageError(
                "cannot fetch", f"{host} is the private address {address}; --allow_private_urls allows it"
            )
    return addresses[0]


def _fetch(url: str, allow_private_urls: bool) -> bytes:
    """GET an http(s) URL within limits of size and time; each redirect is checked like the first address."""
    import http.client
    import socket
    import ssl
    import time
    from urllib.parse import urljoin, urlsplit

    deadline = time.monotonic() + URL_TIMEOUT_SECONDS
    for _ in range(5):
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ImageError("cannot fetch", f"{url} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageError("cannot fetch", f"only http and https URLs are fetched, not {url}")
        address = parts.hostname if allow_private_urls else _check_address(parts.hostname, port)
        connection = http.client.HTTPConnection(parts.hostname, port)
        try:
            connection.sock = socket.create_connection((address, port), timeout=URL_TIMEOUT_SECONDS)
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            host = parts.hostname if parts.port is None else f"{parts.hostname}:{port}"
            connection.request("GET", path, headers={"Host": host, "User-Agent": "mgen-vl", "Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                url = urljoin(url, answer.getheader("Location") or "")
                continue
            if answer.status != 200:
                raise ImageError("cannot fetch", f"{url} answered {answer.status} {answer.reason}")
            data = bytearray()
            while True:
                chunk = answer.read1(1 << 16)
                if not chunk:
                    return bytes(data)
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ImageError("image too large", f"{url} is larger than {MAX_BYTES >> 20} MB")
                if time.monotonic() > deadline:
                    raise ImageError("cannot fetch", f"{url} took longer than {URL_TIMEOUT_SECONDS} seconds")
        except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
            raise ImageError("cannot fetch", f"cannot fetch {url}: {error}") from None
        finally:
            connection.close()
    raise ImageError("cannot fetch", f"{url} redirects too often")
