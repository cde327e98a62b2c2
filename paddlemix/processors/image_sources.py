"""Image files by path, http(s) URL, data URI or base64 text."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import List, Union

from paddlemix.processors import images
from paddlemix.processors.images import decode_base64, read_header
from paddlemix.utils.errors import ImageError

# For the entire download, redirects included.
URL_TIMEOUT_SECONDS = 20
MAX_REDIRECTS = 5
_CHUNK = 1 << 16


def load_image_source(source: Union[str, bytes]) -> bytes:
    """Bytes of an image given as bytes, path, http(s) URL, data URI or base64 text.

    Raises:
        ImageError: "no such file", "cannot fetch", "not an image", or a reason of decode_base64.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, str):
        raise ImageError("not an image", f"an image is given as bytes or text, not {type(source).__name__}")
    if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        return fetch(source)
    if len(source) < 4096 and os.path.isfile(source):
        try:
            if os.path.getsize(source) > images.MAX_BYTES:
                raise ImageError("image too large", f"{source} is larger than {images.MAX_BYTES >> 20} MB")
            with open(source, "rb") as file:
                return file.read()
        except OSError as error:
            raise ImageError("no such file", f"cannot read {source}: {error.strerror}") from None
    try:
        data = decode_base64(source)
        read_header(data)
        return data
    except ImageError as error:
        if len(source) > 1024:
            raise
        raise ImageError("no such file", f"{source} is not a file, and as base64 not an image ({error})") from None


def fetch(url: str) -> bytes:
    """GET an http(s) URL, with limits on size, time and redirects; proxies come from the environment.

    Raises:
        ImageError: "cannot fetch" or "image too large".
    """
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ImageError("cannot fetch", f"only http and https URLs are fetched, not {url}")
    deadline = time.monotonic() + URL_TIMEOUT_SECONDS
    result: List[Union[bytes, ImageError]] = []

    def download() -> None:
        try:
            result.append(_download(url, deadline))
        except ImageError as error:
            result.append(error)

    # The timeout of requests applies to each read; a thread can be abandoned.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(URL_TIMEOUT_SECONDS)
    found = result[0] if result else _too_slow(url)
    if isinstance(found, ImageError):
        raise found
    return found


def _too_slow(url: str) -> ImageError:
    return ImageError("cannot fetch", f"{url} took longer than {URL_TIMEOUT_SECONDS} seconds")


def _download(url: str, deadline: float) -> bytes:
    try:
        import requests
    except ImportError:  # not among a submission's requirements
        raise ImageError("cannot fetch", f"cannot fetch {url}: pip install requests") from None
    data = bytearray()
    try:
        with requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            session.headers.update({"User-Agent": "mgen-vl", "Accept": "image/*"})
            with session.get(url, stream=True, timeout=URL_TIMEOUT_SECONDS) as answer:
                if answer.status_code != 200:
                    raise ImageError("cannot fetch", f"{url} answered {answer.status_code} {answer.reason}")
                for chunk in answer.iter_content(_CHUNK):
                    data += chunk
                    if len(data) > images.MAX_BYTES:
                        raise ImageError("image too large", f"{url} is larger than {images.MAX_BYTES >> 20} MB")
                    if time.monotonic() > deadline:
                        raise _too_slow(url)
    except (requests.RequestException, OSError, ValueError) as error:
        # Without the details of the request that urllib3 adds.
        reason = getattr(error.args[0], "reason", None) if error.args else None
        raise ImageError("cannot fetch", f"cannot fetch {url}: {reason or error}") from None
    return bytes(data)
