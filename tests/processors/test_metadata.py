"""Small files that would take hours or all memory.

Nothing here measures time: what is looked at is what reaches Pillow, and that the picture stays the same.
"""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from paddlemix.processors import images, metadata
from paddlemix.processors.images import open_image, read_header
from paddlemix.processors.metadata import MAX_EXTENSIONS, MAX_MARKERS, MAX_SCANS, bounded
from paddlemix.utils.errors import ImageError
from tests.helpers import image_bytes, refused


def same_picture(first, second):
    return np.array_equal(np.asarray(open_image(first)), np.asarray(open_image(second)))


def directory(n, size):
    """A directory of EXIF of n fields, each pointing at the same `size` bytes behind it; and those bytes."""
    fields = b"".join(struct.pack("<HHLL", 1000 + i, 7, size, 8) for i in range(n))
    return b"II*\0" + struct.pack("<LH", 8, n) + fields + bytes(4 + size)


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def turned(data, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def progressive():
    file = io.BytesIO()
    Image.open(io.BytesIO(image_bytes())).save(file, "JPEG", progressive=True)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_ordinary_files_are_handed_on_as_they_are(format):
    data = image_bytes(format=format)
    assert bounded(data) is data
    for length in range(min(len(data), 200)):
        assert bounded(data[:length]) == data[:length]


def test_ordinary_jpegs_keep_their_metadata():
    for data in (turned(image_bytes()), progressive()):
        assert bounded(data) is data
    extended = turned(image_bytes())
    block = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))
    extended = extended[:2] + block * 200 + extended[2:]
    assert bounded(extended) is extended


def test_a_jpeg_of_many_comments():
    data = turned(image_bytes())
    many = data[:2] + segment(0xFE, b"a") * MAX_MARKERS + data[2:]
    left = bounded(many)
    assert len(left) < len(data) and b"\xff\xfe" not in left
    # The rotation went with the comments.
    assert same_picture(many, left) and not same_picture(many, data)


def test_a_jpeg_of_much_exif():
    data = image_bytes()
    block = segment(0xE1, b"Exif\0\0" + directory(2000, 40_000)[:65_000])
    assert bounded(data[:2] + block + data[2:]) == data[:2] + block + data[2:]
    much = data[:2] + block * 2 + data[2:]
    assert bounded(much) == data and same_picture(much, data)


def test_a_jpeg_of_many_scans():
    data = progressive()
    last = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last:-2] * 1000 + data[-2:]
    assert bounded(many).count(b"\xff\xda") == MAX_SCANS
    picture = open_image(many)
    assert picture.info["truncated"] and picture.size == open_image(data).size
    # The mark of a scan in a block of metadata is none.
    mark = segment(0xE2, b"\xff\xda" * 1000)
    assert bounded(data[:2] + mark + data[2:]) == data[:2] + mark + data[2:]


@pytest.mark.parametrize("size", [255, 1])
def test_a_gif_of_long_comments(size):
    data = image_bytes(format="GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    control = b"\x21\xf9\x04\x00\x00\x00\x00\x00"
    comment = b"\x21\xfe" + bytes([size]) + b"a" * size + b"\0"
    many = data[:start] + control + comment * (MAX_EXTENSIONS // len(comment) + 1) + data[start:]
    assert bounded(many) == data[:start] + control + data[start:] and same_picture(many, data)
    # In one comment of many pieces, and without a picture behind it.
    pieces = data[:start] + b"\x21\xfe" + (bytes([size]) + b"a" * size) * (MAX_EXTENSIONS // (size + 1) + 10)
    assert len(bounded(pieces)) < 1000
    with pytest.raises(ImageError):
        open_image(pieces)


def test_a_png_of_many_chunks():
    data = image_bytes(format="PNG")
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    few, many = (data[:33] + empty * n + data[33:] for n in (metadata.MAX_CHUNKS - 10, metadata.MAX_CHUNKS))
    assert bounded(few) is few and same_picture(few, data)
    for call in (open_image, read_header):
        with refused(ImageError, "broken image"):
            call(many)
    # Frames of an animation are such chunks, too.
    frame = png((b"acTL", struct.pack(">LL", 1 << 20, 0)), *[(b"fcTL", bytes(26))] * metadata.MAX_CHUNKS)
    with refused(ImageError, "broken image"):
        open_image(frame)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"lossless": True, "exif": b"Exif\0\0"}])
def test_a_webp_is_measured_before_it_is_opened(options, monkeypatch):
    """Pillow's WebP takes the memory of the picture, twice, when it is opened; 16383 × 16383 from 360 bytes."""
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "WEBP", **options)
    data = file.getvalue()
    assert metadata.webp_size(data) == (300, 200) and open_image(data).size == (300, 200)
    assert metadata.webp_size(data[:29]) == (0, 0) == metadata.webp_size(image_bytes())
    assert metadata.webp_size(data.replace(b"VP8", b"VP9")) == (0, 0)
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 59_999)
    for call in (open_image, read_header):
        with refused(ImageError, "too many pixels"):
            call(data)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(900)}, {"quality": 100}])
def test_the_size_of_a_jpeg_is_pillows(mode, options):
    file = io.BytesIO()
    Image.effect_noise((133, 57), 80).convert(mode).save(file, "JPEG", **options)
    data = file.getvalue()
    assert metadata.jpeg_size(data) == (133, 57) == open_image(data).size
    # Bytes that fill up before a marker, and a block of any length in front.
    assert metadata.jpeg_size(data[:2] + b"\xff\xff" + segment(0xE5, bytes(60_000)) + data[2:]) == (133, 57)
    frame = next(begin for marker, begin, _ in metadata._markers(data) if marker in (0xC0, 0xC2))
    assert metadata.jpeg_size(data[: frame + 10]) == (133, 57)
    assert all(metadata.jpeg_size(data[:length]) == (0, 0) for length in range(frame + 10))


def test_what_pillow_would_not_open_has_no_size():
    data = image_bytes()
    frame = next(begin for marker, begin, _ in metadata._markers(data) if marker == 0xC0)
    for at, value in ((frame + 4, 12), (frame + 9, 2), (frame + 1, 0xC8)):  # bits, components, not a frame
        broken = bytearray(data)
        broken[at] = value
        assert metadata.jpeg_size(bytes(broken)) == (0, 0)
        with pytest.raises(ImageError):
            read_header(bytes(broken))
    assert metadata.jpeg_size(data[:2] + b"\xff\xe5\0\2" * MAX_MARKERS + data[2:]) == (0, 0)
    assert metadata.jpeg_size(image_bytes(format="PNG")) == (0, 0) == metadata.jpeg_size(b"")


def png(*chunks):
    data = image_bytes(format="PNG")
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:33] + added + data[33:]


def test_exif_in_other_formats_takes_no_memory():
    exif = directory(4000, 1_000_000)
    text = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode()
    file = io.BytesIO()
    Image.open(io.BytesIO(image_bytes())).save(file, "WEBP", exif=b"Exif\0\0" + exif)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (png((b"eXIf", exif)), png((b"tEXt", b"Raw profile type exif\0" + text)), file.getvalue()):
        assert open_image(data).size == (64, 48)
    # Read field by field it would be 4 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10
