"""Image formats, the pixels that come out, and the limits on what goes in."""

import base64
import io
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from paddlemix.processors import images
from paddlemix.processors.images import (
    MEAN,
    STD,
    MGenVLImageProcessor,
    decode_base64,
    open_image,
    read_header,
)
from paddlemix.utils.errors import ImageError
from tests.helpers import image_bytes


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reason(call, *args, **kwargs):
    with pytest.raises(ImageError) as error:
        call(*args, **kwargs)
    return error.value.reason


# ---- base64


def test_accepted_base64():
    data = bytes(range(256)) + b"\xff\xfe\xfb"
    plain = base64.b64encode(data).decode()
    wrapped = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76)) + "\n"
    url_safe = base64.urlsafe_b64encode(data).decode()
    assert "-" in url_safe or "_" in url_safe
    uris = ["data:image/jpeg;base64," + plain, "data:image/svg+xml;charset=utf-8;base64," + plain]
    bare = [wrapped.replace("\r\n", " "), wrapped.replace("\r\n", "\n  ")]
    bare += [plain, wrapped, url_safe, plain.rstrip("="), " " + plain, plain.encode(), memoryview(plain.encode())]
    for text in uris + bare:
        assert decode_base64(text) == data


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "empty image"),
        (" \n", "empty image"),
        ("====", "empty image"),
        ("data:image/png;base64,", "empty image"),
        ("data:image/png,abcd", "bad base64"),
        ("ab!d", "bad base64"),
        ("a", "bad base64"),
        ("图片", "bad base64"),
        ("ab=cd", "bad base64"),
        # Each space was a "+".
        ("abcd efg", "bad base64"),
        ("abc efgh jk mno q st", "bad base64"),
    ],
)
def test_refused_base64(text, expected):
    assert reason(decode_base64, text) == expected


def test_huge_base64_is_not_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    assert reason(decode_base64, "A" * 4000) == "image too large"
    assert reason(open_image, bytes(2000)) == "image too large"
    # A JPEG's header is read without opening it.
    assert reason(read_header, image_bytes(size=(64, 48)) + bytes(2000)) == "image too large"


# ---- pictures


def test_plain_rgb_and_header():
    data = image_bytes(size=(64, 48))
    assert read_header(data) == ("JPEG", (64, 48))
    image = open_image(data)
    assert image.mode == "RGB" and image.size == (64, 48) and image.info["truncated"] is False


def test_cmyk_and_grey():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    cmyk = open_image(encoded(red.convert("CMYK"), "JPEG", quality=100))
    assert np.asarray(cmyk)[4, 4, 0] > 200 and np.asarray(cmyk)[4, 4, 1] < 60
    grey = open_image(encoded(Image.new("L", (8, 8), 77)))
    assert np.asarray(grey)[0, 0].tolist() == [77, 77, 77]
    black = open_image(encoded(Image.new("1", (8, 8), 1)))
    assert np.asarray(black)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_their_shades():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    image = np.asarray(open_image(encoded(ramp)))
    assert image[0, 0, 0] == 0 and image[-1, -1, 0] == 255
    assert abs(int(image[8, 0, 0]) - 128) <= 1
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    assert np.asarray(open_image(encoded(dark))).max() == 0


def test_transparency_lies_over_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    image = np.asarray(open_image(encoded(clear)))
    assert image[0, 0].tolist() == [10, 20, 30] and image[4, 4].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9] + [0] * 762)
    image = np.asarray(open_image(encoded(palette, transparency=1)))
    assert image[4, 4].tolist() == [255, 255, 255]
    grey = np.asarray(open_image(encoded(Image.new("LA", (4, 4), (0, 0)))))
    assert grey[0, 0].tolist() == [255, 255, 255]
    key = np.asarray(open_image(encoded(Image.new("RGB", (4, 4), (7, 8, 9)), transparency=(7, 8, 9))))
    assert key[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("shape, dtype", [((37, 10, 4), np.uint8), ((37, 10, 2), np.uint8), ((37, 10), np.uint16)])
def test_what_is_done_by_bands_has_no_seams(shape, dtype, monkeypatch):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    data = encoded(Image.fromarray(values))
    whole = np.asarray(open_image(data))
    for pixels in (1, 40, 100):
        with monkeypatch.context() as small:
            small.setattr(images, "_BAND", pixels)
            assert np.array_equal(np.asarray(open_image(data)), whole)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_no_copy_of_the_whole_is_made_on_the_way_to_rgb(mode, monkeypatch):
    seen = []
    for name in ("alpha_composite", "fromarray"):
        made = getattr(Image, name)
        monkeypatch.setattr(Image, name, lambda *args, made=made: seen.append(made(*args)) or seen[-1])
    monkeypatch.setattr(images, "_BAND", 100)
    open_image(encoded(Image.new(mode, (50, 40))))
    assert len(seen) == 20 and all(part.size == (50, 2) for part in seen)


def test_grey_of_16_bits_that_an_older_pillow_holds_in_32():
    image = Image.fromarray(np.array([[0, 65535, 300]], np.int32))
    assert image.mode == "I"
    assert np.asarray(images._upright_rgb(image))[0, :, 1].tolist() == [0, 255, 1]


def test_first_frame_of_a_gif():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(data))[0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right by 90°
    turned = open_image(encoded(image, "JPEG", quality=100, exif=exif))
    assert turned.size == (10, 20)
    assert np.asarray(turned)[2, 5, 0] < 60 and np.asarray(turned)[17, 5, 0] > 200


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation, format):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8))
    image = image.resize((50, 30), Image.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((30, 50) if orientation >= 5 else (50, 30))
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_a_broken_exif_block_costs_the_rotation_only():
    data = encoded(Image.new("RGB", (20, 10), (9, 9, 9)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(data).size == (20, 10)


def test_two_pictures_in_one_jpeg():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(data))[8, 8, 0] > 200 and read_header(data)[1] == (16, 16)


@pytest.mark.parametrize("size", [(1, 1), (10000, 1), (1, 10000)])
def test_odd_shapes(size):
    pixels = MGenVLImageProcessor(56)(open_image(encoded(Image.new("RGB", size, (1, 2, 3)))))
    assert pixels.shape == (3, 56, 56) and np.isfinite(pixels).all()


def test_a_cut_jpeg_is_decoded_as_far_as_it_goes():
    whole = image_bytes(size=(256, 256))
    image = open_image(whole[: len(whole) * 2 // 3])
    assert image.size == (256, 256) and image.info["truncated"] is True
    top = np.abs(np.asarray(image)[:32].astype(int) - np.asarray(open_image(whole))[:32])
    assert top.max() == 0
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # a global switch of Pillow: left as it was


def test_a_cut_png_is_decoded_as_far_as_it_goes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise)
    image = open_image(data[: len(data) // 2])
    assert image.info["truncated"] is True
    np.testing.assert_array_equal(np.asarray(image)[:16], np.asarray(noise)[:16])


def test_whole_and_cut_pictures_are_told_apart_in_threads():
    whole = image_bytes(size=(200, 200))
    files = [whole, whole[: len(whole) // 2]] * 60
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: open_image(data).info["truncated"], files))
    assert found == [False, True] * 60 and ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_switch_thrown_meanwhile_is_noticed(monkeypatch):
    """A cut file that Pillow takes for whole, as another thread has its global switch on, is decoded anew."""
    whole = image_bytes(size=(256, 256))
    cut = whole[: len(whole) * 2 // 3]
    image = images._open(cut)
    load = type(image).load

    def load_while_another_thread_decodes(self):
        monkeypatch.setattr(type(image), "load", load)
        with images._SWITCH:
            return load(self)

    monkeypatch.setattr(type(image), "load", load_while_another_thread_decodes)
    assert images._load(image, cut)[1] is True


def test_a_fork_waits_for_the_switch():
    """A child must start with Pillow's switch off and the lock free, whatever a thread is doing."""
    started, done = threading.Event(), threading.Event()

    def decode():
        with images._SWITCH:
            started.set()
            done.wait(0.3)

    thread = threading.Thread(target=decode)
    thread.start()
    started.wait()
    child = os.fork()
    if child == 0:
        try:
            free = images._PILLOW_LOCK.acquire(blocking=False)
            os._exit(0 if free and not ImageFile.LOAD_TRUNCATED_IMAGES else 1)
        finally:
            os._exit(2)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_damaged_files_raise_nothing_else(monkeypatch):
    """A thousand files with bytes changed: a picture, or an ImageError."""
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    random = np.random.default_rng(7)
    kinds = (("JPEG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"))
    seeds = [encoded(Image.open(io.BytesIO(image_bytes())).convert(mode), format) for format, mode in kinds]
    opened = 0
    for turn in range(1200):
        data = bytearray(seeds[turn % len(seeds)])
        for position in random.integers(0, len(data), 1 + turn % 5):
            data[position] = random.integers(0, 256)
        if turn % 3 == 0:
            del data[random.integers(0, len(data)) :]
        try:
            assert open_image(bytes(data)).mode == "RGB"
            opened += 1
        except ImageError as error:
            assert error.reason in images.__doc__
    assert 100 < opened < 1200


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "empty image"),
        (b"hello, this is text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (image_bytes()[:20], "not an image"),
        (image_bytes(format="TIFF"), "not an image"),
        (image_bytes(format="ICO"), "not an image"),
        (image_bytes(format="PNG")[:30] + bytes(40), "not an image"),
    ],
)
def test_what_is_no_picture(data, expected):
    assert reason(open_image, data) == expected


def test_a_picture_with_broken_data():
    whole = bytearray(image_bytes(format="BMP"))
    whole[28:30] = (7).to_bytes(2, "little")  # 7 bits per pixel
    assert reason(open_image, bytes(whole)) == "broken image"


def test_pixel_cap_comes_before_decoding(monkeypatch):
    data = encoded(Image.new("1", (400, 300)))
    monkeypatch.setattr(images, "MAX_PIXELS", 400 * 300 - 1)
    assert reason(open_image, data) == reason(read_header, data) == "too many pixels"
    monkeypatch.setattr(images, "MAX_PIXELS", 400 * 300)
    assert open_image(data).size == (400, 300)
    # A header that promises 60000 × 60000 pixels, and Pillow's own limits do not show through.
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert reason(open_image, bytes(bomb)) == "too many pixels"


def bmp(width, height, body, compression=1):
    """A BMP of 8 bits per pixel: 1 is run-length encoded, 0 is not."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(range(256)) * 4 + body


# A run of one pixel, then the end of the line; a jump by 255 columns and rows; the end of the picture.
RUN, JUMP, END = b"\1\1\0\0", b"\0\2\xff\xff", b"\0\1"


@pytest.mark.parametrize(
    "width, height, body",
    [(16_000_000, 1, JUMP), (2001, 2000, RUN), (65_535, 1525, JUMP), (8, 8, RUN * 2000), (1, 1, b"\0\2\0\0" * 2000)],
)
def test_run_lengths_that_decode_slowly_are_refused_unopened(width, height, body, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for call in (open_image, read_header):
        assert reason(call, bmp(width, height, body + END)) == "too many pixels"


def test_run_lengths_of_an_ordinary_size(monkeypatch):
    image = open_image(bmp(300, 200, RUN * 200 + END))
    assert image.size == (300, 200) and image.info["truncated"] is False
    monkeypatch.setattr(images, "MAX_PIXELS", 59_999)
    assert reason(open_image, bmp(300, 200, RUN * 200 + END)) == "too many pixels"


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_a_side_has_its_own_cap(size, monkeypatch):
    """Far below the pixel cap: resizing takes memory by the side."""
    for data in (encoded(Image.new("1", size)), bmp(*size, b"", compression=0)):
        assert reason(open_image, data) == "too many pixels" == reason(read_header, data)
    longest = tuple(min(side, 65_535) for side in size)
    assert open_image(encoded(Image.new("1", longest))).size == longest


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_only_the_first_of_many_frames_is_decoded(format, monkeypatch):
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 255)) for i in range(5)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **lossless)
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 5
    sought = []
    monkeypatch.setattr(type(opened), "seek", lambda self, frame: sought.append(frame))
    assert np.asarray(open_image(data))[5, 5].tolist() == [0, 0, 255] and not sought


def test_a_frame_larger_than_its_gif_counts_before_decoding(monkeypatch):
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert reason(open_image, bytes(data)) == "too many pixels"


# ---- pixel values


def test_pixel_values_are_the_formula():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((56, 56), Image.BICUBIC)).astype("float64") / 255
    expected = ((resized - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)
    for given in (image, np.asarray(image)):
        pixels = MGenVLImageProcessor(56)(given)
        assert pixels.dtype == np.float32 and pixels.flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(pixels, expected, atol=2e-6)
    assert MGenVLImageProcessor(56)(image.convert("L")).shape == (3, 56, 56)


def test_reference_pixel_values(shared):
    golden = np.load(shared / "goldens" / "tiny_model" / "visual.npz")["pixel_values"]
    processor = MGenVLImageProcessor(112)
    first, second = (open_image((shared / "goldens" / "tiny_model" / f"img{k}.png").read_bytes()) for k in range(2))
    np.testing.assert_allclose(processor(first), golden[0], atol=2e-6)
    # The reference resized image 1 in height first. Pillow (10.3 to 12.3) begins with the width and rounds in between:
    # up to 6 of 255 levels on this noise. In the reference's order the numbers are equal.
    tall_first = second.resize((second.width, 112), Image.BICUBIC)
    np.testing.assert_allclose(processor(tall_first), golden[1], atol=2e-6)
    assert np.abs(processor(second) - golden[1]).max() < 6.5 / 255 / min(STD)


def test_pixel_values_turn_back_into_the_picture():
    processor = MGenVLImageProcessor(28)
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    np.testing.assert_array_equal(processor.picture(processor(picture)), picture)
