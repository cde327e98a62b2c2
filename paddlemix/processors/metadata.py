"""What stands beside an image's pixels, bounded before Pillow reads it.

Pillow puts comments and EXIF blocks together piece by piece, which takes time with the square of their size; it reads
every field of a TIFF directory into memory, though all may point at the same bytes; libtiff makes room for a whole
tile, whatever the picture's size; and a progressive JPEG may go over its whole picture as often as it likes. A file of
some hundred KB could so hold a program for hours or fill its memory.
Here such a file loses what is not needed for its picture; only a TIFF, whose directory is the picture's, is refused.
And a WebP takes the memory of its whole picture when it is opened, so its size is read beforehand. Ordinary files are
handed on as they are, unlooked at beyond their first few blocks.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Dict, Iterator, List, Optional, Tuple

# An EXIF block is at most this long by its standard. Larger ones are not read.
MAX_EXIF = 65_536 + 6
# In front of the picture: markers of a JPEG, bytes of a GIF's extensions. Phones and Photoshop stay well below.
MAX_MARKERS = 1000
MAX_EXTENSIONS = 1 << 20
# Passes over a progressive JPEG; encoders make ten or so.
MAX_SCANS = 100
# Values of a field of a TIFF that are turned into Python's numbers: a strip for every row, at most.
MAX_TIFF_VALUES = 1 << 20

# Pixels of a TIFF's tile, or as many as the picture has with its sides rounded up to tiles' 16. Tiles have 256² mostly.
MAX_TILE = 1 << 24

_SCAN = b"\xff\xda"
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_TIFF_BYTES = (1, 2, 7)
# Width and height of the picture, width and height of a tile; and the types that are written for them.
_TIFF_SIDES = (256, 257, 322, 323)
_TIFF_SIDE_TYPES = {3: "H", 4: "L", 16: "Q"}


def bounded(data: bytes) -> Optional[bytes]:
    """The image file without what could take time or memory out of proportion; None for a TIFF that would."""
    if data.startswith(b"\xff\xd8"):
        return _bounded_jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _bounded_gif(data)
    if data.startswith((b"II", b"MM")):
        return data if _is_plain_tiff(data) else None
    return data


def webp_size(data: bytes) -> Tuple[int, int]:
    """(width, height) that a WebP says of itself; (0, 0) of anything else."""
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
    """(marker, begin, end) of each block in front of the first scan, which comes last and has no end of its own."""
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
    """(width, height) of a JPEG that Pillow would open, from its frame header; (0, 0) of anything else."""
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
    # APP0 and APP14 say how colours are stored.
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
    """Without the extensions in front of the first picture, if they are long; what they say of transparency stays."""
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


# ---- TIFF


def _is_plain_tiff(data: bytes) -> bool:
    """Whether the first directory is plain. Pillow takes a BigTIFF of the other byte order for an ordinary TIFF."""
    forms = (True, False) if data[2:4] == b"\0+" else (data[2:3] == b"+",)
    return all(_is_plain_directory(data, "<" if data[:1] == b"I" else ">", big) for big in forms)


def _is_plain_directory(data: bytes, order: str, big: bool) -> bool:
    """Whether the fields of the first directory together promise no more bytes than the file has, and its tiles are not
    far larger than its picture."""
    head, count, entry = (order + kinds for kinds in (("Q", "Q", "HHQ") if big else ("L", "H", "HHL")))
    room = 8 if big else 4
    # Where a side is told twice, Pillow and libtiff may not take the same: the picture's smallest, the tile's largest.
    sides: Dict[int, List[int]] = {tag: [] for tag in _TIFF_SIDES}
    try:
        (at,) = struct.unpack_from(head, data, room)
        (n,) = struct.unpack_from(count, data, at)
        at += struct.calcsize(count)
        total = 0
        for _ in range(n):
            tag, kind, values = struct.unpack_from(entry, data, at)
            at += struct.calcsize(entry)
            if kind not in _TIFF_BYTES and values > MAX_TIFF_VALUES:
                return False
            total += values * _TIFF_UNITS.get(kind, 0)
            if total > len(data):
                return False
            if tag in sides:
                if _TIFF_UNITS.get(kind, 9) > room or kind not in _TIFF_SIDE_TYPES:
                    return False
                sides[tag] += struct.unpack_from(order + _TIFF_SIDE_TYPES[kind], data, at)
            at += room
    except (struct.error, OverflowError):
        # Cut short, or no TIFF: Pillow says so.
        return True
    width, height = (min(sides[tag], default=0) for tag in _TIFF_SIDES[:2])
    tile = [max(sides[tag], default=0) for tag in _TIFF_SIDES[2:]]
    return tile[0] * tile[1] <= max(MAX_TILE, (width + 15) * (height + 15))
