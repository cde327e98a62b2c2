"""Limits on image metadata, checked before Pillow parses it.

Pillow joins comments and EXIF blocks in quadratic time and visits each chunk of a PNG; a progressive JPEG may have any
number of scans. So a file of some hundred KB could keep a program busy for minutes. Here such a file loses whatever its
picture does not need; a PNG with too many chunks is refused. Opening a WebP takes the memory of its picture, so its
size is read first. Ordinary files pass unchanged; only their block headers are read.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Iterator, List, Tuple

from paddlemix.utils.errors import ImageError

# The largest EXIF block by the standard. Larger ones are not read.
MAX_EXIF = 65_536 + 6
# Before the picture: markers of a JPEG, bytes of a GIF's extensions. Phones and Photoshop stay well below.
MAX_MARKERS = 1000
MAX_EXTENSIONS = 1 << 20
# Scans of a progressive JPEG; encoders make ten, 18 with four colours. One takes up to 0.5 s at 100 megapixels.
MAX_SCANS = 24
# Chunks of a PNG. libpng writes 8 KB chunks.
MAX_CHUNKS = 50_000

_SCAN = b"\xff\xda"


def bounded(data: bytes) -> bytes:
    """The image file without metadata that would take disproportionate time or memory.

    Raises:
        ImageError: a PNG of more than MAX_CHUNKS chunks.
    """
    if data.startswith(b"\xff\xd8"):
        return _bounded_jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _bounded_gif(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_chunks(data)
    return data


def webp_size(data: bytes) -> Tuple[int, int]:
    """(width, height) from the header of a WebP; (0, 0) for anything else."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    kind = data[12:16]
    if kind == b"VP8X":
        return tuple(1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<L", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return tuple(n & 0x3FFF for n in struct.unpack_from("<HH", data, 26))
    return 0, 0


# ---- JPEG


def _markers(data: bytes) -> Iterator[Tuple[int, int, int]]:
    """(marker, begin, end) of each block up to the first scan, which comes last and extends to the end of the data."""
    at = 2
    while True:
        begin = data.find(b"\xff", at)
        at = begin + 1
        while data[at : at + 1] == b"\xff":
            at += 1
        if begin < 0 or at >= len(data):
            return
        marker = data[at]
        at += 1
        if marker == 0xDA:
            yield marker, begin, len(data)
            return
        if marker not in (0x00, 0x01) and not 0xD0 <= marker <= 0xD9:
            at = begin if at + 2 > len(data) else at + max(2, struct.unpack_from(">H", data, at)[0])
            if at == begin:
                return
            yield marker, begin, min(at, len(data))


def jpeg_size(data: bytes) -> Tuple[int, int]:
    """(width, height) of a JPEG that Pillow would open, from its frame header; (0, 0) for anything else."""
    if data[:3] != b"\xff\xd8\xff":
        return 0, 0
    for marker, begin, end in islice(_markers(data), MAX_MARKERS):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            at = data.index(marker, begin) + 3
            if at + 6 <= end:
                bits, height, width, components = struct.unpack_from(">BHHB", data, at)
                if bits == 8 and components in (1, 3, 4):
                    return width, height
            break
    return 0, 0


def _is_metadata(marker: int) -> bool:
    # APP0 and APP14 define the colour encoding.
    return marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE)


def _bounded_jpeg(data: bytes) -> bytes:
    n = exif = scan = 0
    for marker, begin, end in _markers(data):
        n += 1
        if n > MAX_MARKERS:
            break
        if marker == 0xE1 and data[begin:end].find(b"Exif\0\0", 0, 16) >= 0:
            exif += end - begin
        scan = begin if marker == 0xDA else 0
    if n > MAX_MARKERS or exif > MAX_EXIF + 16:
        kept: List[bytes] = [data[:2]]
        length = 2
        for marker, begin, end in _markers(data):
            if not _is_metadata(marker):
                scan = length if marker == 0xDA else 0
                kept.append(data[begin:end])
                length += end - begin
            if len(kept) > MAX_MARKERS:
                break
        data = b"".join(kept)
    if scan and data.count(_SCAN, scan) > MAX_SCANS:
        at = scan
        for _ in range(MAX_SCANS):
            at = data.index(_SCAN, at) + 2
        data = data[: data.index(_SCAN, at)]
    return data


# ---- GIF


def _bounded_gif(data: bytes) -> bytes:
    """Without the extensions before the first picture, if they are long; the transparency setting stays."""
    if len(data) < 13:
        return data
    start = at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    control = b""
    while at < len(data) and data[at] not in b",;":
        begin = at
        at += 1
        if data[begin] != 0x21:
            continue
        at += 1
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
        if data[begin + 1 : begin + 2] == b"\xf9":
            control = data[begin:at]
    if at - start <= MAX_EXTENSIONS:
        return data
    return data[:start] + control[:256] + data[at:]


# ---- PNG


def _check_chunks(data: bytes) -> None:
    at = 8
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise ImageError("broken image", f"a PNG of more than {MAX_CHUNKS:,} chunks")
