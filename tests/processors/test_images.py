"""Images of every kind, and the limits. Run: pytest tests/processors/test_images.py"""

import base64
import contextlib
import gzip
import http.server
import io
import os
import threading
import time
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
    load_image_source,
    open_image,
    read_header,
)
from paddlemix.utils.errors import ImageError
from tests.helpers import image_base64, image_bytes


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
    bare = [plain, wrapped, url_safe, plain.rstrip("="), " " + plain, plain.encode(), memoryview(plain.encode())]
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


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 255, 51]], np.int32), [0, 255, 51]),
        (np.array([[0, 65535, 13107]], np.int32), [0, 255, 51]),
        (np.array([[-5, 2**31 - 1, 70000]], np.int32), [0, 255, 255]),
        (np.array([[0.0, 1.0, 0.2]], np.float32), [0, 255, 51]),
        (np.array([[np.nan, np.inf, 255.0]], np.float32), [0, 255, 255]),
    ],
)
def test_grey_of_32_bits(values, expected):
    image = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 1].tolist() == expected


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


def test_what_is_done_by_bands_has_no_seams(monkeypatch):
    rng = np.random.default_rng(0)
    kinds = {
        "RGBA": (rng.integers(0, 256, (37, 10, 4), dtype=np.uint8), "PNG"),
        "LA": (rng.integers(0, 256, (37, 10, 2), dtype=np.uint8), "PNG"),
        "F": (rng.uniform(0, 900, (37, 10)).astype(np.float32), "TIFF"),
    }
    for values, format in kinds.values():
        data = encoded(Image.fromarray(values), format)
        whole = np.asarray(open_image(data))
        # The largest value of all bands says what white is.
        for pixels in (1, 40, 100):
            with monkeypatch.context() as small:
                small.setattr(images, "_BAND", pixels)
                assert np.array_equal(np.asarray(open_image(data)), whole)


@pytest.mark.parametrize("mode, format", [("RGBA", "PNG"), ("LA", "PNG"), ("F", "TIFF")])
def test_no_copy_of_the_whole_is_made_on_the_way_to_rgb(mode, format, monkeypatch):
    seen = []
    for name in ("alpha_composite", "fromarray"):
        made = getattr(Image, name)
        monkeypatch.setattr(Image, name, lambda *args, made=made: seen.append(made(*args)) or seen[-1])
    monkeypatch.setattr(images, "_BAND", 100)
    open_image(encoded(Image.new(mode, (50, 40)), format))
    assert len(seen) == 20 and all(part.size == (50, 2) for part in seen)


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


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(orientation, format):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8))
    image = image.resize((50, 30), Image.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif)
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


def test_damaged_files_raise_nothing_else():
    """A thousand files with bytes changed: a picture, or an ImageError."""
    random = np.random.default_rng(7)
    seeds = [encoded(Image.open(io.BytesIO(image_bytes())).convert(mode), format)
             for format, mode in (("JPEG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "RGB"),
                                  ("BMP", "RGB"))]  # fmt: skip
    opened = 0
    for turn in range(1200):
        data = bytearray(seeds[turn % len(seeds)])
        for position in random.integers(0, len(data), 1 + turn % 5):
            data[position] = random.integers(0, 256)
        if turn % 3 == 0:
            del data[random.integers(0, len(data)) :]
        try:
            assert open_image(bytes(data), max_pixels=10**6).mode == "RGB"
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
    assert reason(open_image, data, max_pixels=400 * 300 - 1) == "too many pixels"
    assert reason(read_header, data, max_pixels=1) == "too many pixels"
    assert open_image(data, max_pixels=400 * 300).size == (400, 300)
    # A header that promises 60000 × 60000 pixels, and Pillow's own limits do not show through.
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert reason(open_image, bytes(bomb)) == "too many pixels"


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


# ---- sources


@pytest.fixture(scope="module")
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
                return
            if self.path == "/headers":
                self.send_response(200)
                for number in range(1000):
                    self.send_header(f"X-{number}", "a" * 100)
                with contextlib.suppress(ConnectionError):
                    self.end_headers()
                return
            if self.path == "/endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        self.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
                return
            if self.path == "/packed":
                self.send_response(200)
                self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(gzip.compress(bytes(10 << 20)))
                return
            bodies = {"/a.jpg?x=1": image_bytes(), "/%E5%9B%BE%20a.jpg": image_bytes(), "/big": b"x" * 5000}
            body = bodies.get(self.path, b"")
            if self.path == "/slow":
                with contextlib.suppress(ConnectionError):
                    for _ in range(100):
                        self.wfile.write(b"H")
                        time.sleep(0.02)
                return
            self.send_response(200 if body or self.path == "/short" else 404)
            if self.path == "/short":
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_url(server, monkeypatch):
    assert load_image_source(server + "/a.jpg?x=1", allow_private_urls=True) == image_bytes()
    assert load_image_source(server + "/to//a.jpg?x=1", allow_private_urls=True) == image_bytes()
    assert reason(load_image_source, server + "/none", allow_private_urls=True) == "cannot fetch"
    assert reason(load_image_source, server + "/to/file:///etc/passwd", allow_private_urls=True) == "cannot fetch"
    assert reason(load_image_source, server + "/to//to//to//to//to//to/x", allow_private_urls=True) == "cannot fetch"
    assert load_image_source(server + "/图 a.jpg", allow_private_urls=True) == image_bytes()
    with pytest.raises(ImageError, match="100 bytes before its end"):
        load_image_source(server + "/short", allow_private_urls=True)
    monkeypatch.setattr(images, "MAX_BYTES", 4000)
    assert reason(load_image_source, server + "/big", allow_private_urls=True) == "image too large"


def test_answers_that_would_grow(server, monkeypatch):
    """A compressed body is not unpacked, so it is no image; headers and pieces without end are cut off."""
    packed = load_image_source(server + "/packed", allow_private_urls=True)
    assert len(packed) < 20_000 and reason(read_header, packed) == "not an image"
    assert reason(load_image_source, server + "/headers", allow_private_urls=True) == "cannot fetch"
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    assert reason(load_image_source, server + "/endless", allow_private_urls=True) == "image too large"


def test_a_server_that_dribbles_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(images, "URL_TIMEOUT_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(ImageError, match="took longer than 0.3 seconds"):
        load_image_source(server + "/slow", allow_private_urls=True)
    assert time.monotonic() - started < 1.5


def test_a_redirect_is_checked_like_the_first_address(server, monkeypatch):
    """The first host passes for a public one; the one it points to is looked at again."""
    checked = []

    def check(host, port):
        checked.append(host)
        return host if len(checked) == 1 else check_address(host, port)

    check_address = images._check_address
    monkeypatch.setattr(images, "_check_address", check)
    with pytest.raises(ImageError, match="private address"):
        load_image_source(server + "/to/http://127.0.0.1:9/a.jpg")
    assert len(checked) == 2


def test_a_name_cannot_change_its_mind(monkeypatch):
    """DNS rebinding: what was checked is what is connected to; and one private address of several is enough."""
    import socket

    answers = [["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "10.0.0.1"]]
    connected = []

    def resolve(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address, timeout):
        connected.append(address)
        raise OSError("not from a test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="not from a test"):
        load_image_source("http://rebinding.example/a.jpg")
    assert connected == [("93.184.216.34", 80)] and len(answers) == 2
    for address in ("127.0.0.1", "10.0.0.1"):
        with pytest.raises(ImageError, match=f"private address {address}"):
            load_image_source("http://rebinding.example/a.jpg")
    assert len(connected) == 1


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::808:808", False),
        ("::127.0.0.1", False),
        ("::1", False),
        ("fec0::1", False),
        ("240.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
    ],
)
def test_public_addresses(address, public):
    assert images._is_public(address) is public


def test_private_addresses_need_leave(server):
    with pytest.raises(ImageError, match="private address 127.0.0.1"):
        load_image_source(server + "/a.jpg?x=1")
    for url in ("http://localhost/", "http://[::1]/", "http://10.0.0.1/", "http://169.254.169.254/x", "http://0/"):
        assert reason(load_image_source, url) == "cannot fetch"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "http://", "gopher://x", "http://a:b/"])
def test_other_urls(url):
    assert reason(load_image_source, url) == "cannot fetch"


def test_sources(tmp_path):
    path = tmp_path / "a b.jpg"
    path.write_bytes(image_bytes())
    assert load_image_source(str(path)) == load_image_source(image_base64()) == load_image_source(image_bytes())
    assert load_image_source("data:image/jpeg;base64," + image_base64()) == image_bytes()
    assert reason(load_image_source, "missing.jpg") == "no such file"
    assert reason(load_image_source, "abcd") == "no such file"
    assert reason(load_image_source, "A" * 2000) == "not an image"
    assert reason(load_image_source, 3) == "not an image"
    assert reason(load_image_source, str(tmp_path)) == "no such file"
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert reason(load_image_source, str(tmp_path / "huge")) == "image too large"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(image_bytes())

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", refuse, raising=False)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image_source(str(path))


def test_pixel_values_turn_back_into_the_picture():
    processor = MGenVLImageProcessor(28)
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    np.testing.assert_array_equal(processor.picture(processor(picture)), picture)
