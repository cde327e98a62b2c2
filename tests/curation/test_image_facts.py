"""Facts of images, and the file of them beside the data: made once, resumed, and believed only while it is true."""

import base64
import errno
import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFilter

from paddlemix.curation import image_facts as module
from paddlemix.curation.image_facts import (
    FACTS,
    ONE_COLOUR,
    PROBLEMS,
    all_image_facts,
    facts_path,
    image_facts,
    usable,
)
from paddlemix.curation.near_duplicates import bits_apart
from paddlemix.utils import parallel
from paddlemix.utils.errors import ImageError, JobFailed
from tests.helpers import encoded, refused, scene


def apart(a, b):
    return int(bits_apart(np.array([a.perceptual], np.uint64), np.array([b.perceptual], np.uint64))[0])


def dct_by_hand(values):
    """(u + v, u, frequency) of the DCT-II of a square, term by term, the lowest first, without the mean."""
    n = len(values)
    basis = [[np.cos(np.pi * (2 * x + 1) * u / (2 * n)) for x in range(n)] for u in range(n)]
    places = sorted((u + v, u, v) for u in range(9) for v in range(9) if u + v)[:40]
    return np.array([
        sum(basis[u][y] * basis[v][x] * values[y][x] for y in range(n) for x in range(n)) for _, u, v in places
    ])  # fmt: skip


def test_the_hash_is_that_of_the_lowest_frequencies():
    # So small that nothing is averaged before.
    image = scene(0, (96, 64))
    channels = image.resize((32, 32), Image.LANCZOS).convert("YCbCr").split()
    brightness, *colours = (dct_by_hand(np.asarray(channel, float).tolist()) for channel in channels)
    expected = [*(brightness > np.median(brightness))]
    for colour in colours:
        expected += [*(colour[:12] / 32**2 > 1)]
    bits = "".join("01"[int(bit)] for bit in expected)
    assert len(bits) == 64 and module.perceptual_hash(image) == int(bits, 2)


def test_a_grey_picture_sets_no_bit_of_colour_and_a_coloured_one_does():
    grey = image_facts(encoded(scene(0).convert("L").convert("RGB"), quality=40))
    assert grey.perceptual % (1 << 24) == 0 != image_facts(encoded(scene(0))).perceptual % (1 << 24)


def test_facts_of_a_jpeg_and_of_what_it_is_reduced_from():
    large_scene = scene(1, (2048, 1360))
    data = encoded(large_scene.resize((512, 340), Image.BICUBIC), quality=90)
    found = image_facts(data)
    assert (found.format, found.width, found.height, found.bytes) == ("JPEG", 512, 340, len(data))
    assert found.content == module.hash64(data) != module.hash64(data + b" ")
    large = image_facts(encoded(large_scene, quality=95))
    assert (large.width, large.height) == (2048, 1360)
    assert apart(found, large) <= 2
    assert large.sharpness == pytest.approx(found.sharpness, rel=0.5)


def test_a_large_jpeg_is_reduced_while_it_is_decoded(monkeypatch):
    sizes = []
    plain = module.open_image
    monkeypatch.setattr(module, "open_image", lambda *given, **named: sizes.append(plain(*given, **named)) or sizes[-1])
    image_facts(encoded(scene(1, (4000, 3000))))
    assert sizes[0].size == (500, 375)


def test_sharpness_falls_with_blur_and_can_be_worked_out_by_hand():
    sharp, soft = (image_facts(encoded(image)) for image in (scene(2), scene(2).filter(ImageFilter.GaussianBlur(4))))
    assert soft.sharpness < sharp.sharpness / 10
    # One white pixel in black: 8 × 8 Laplacians, -4 × 255 in its place, 255 in four around it.
    dot = Image.new("L", (10, 10))
    dot.putpixel((5, 5), 255)
    values = [-4 * 255, *[255] * 4, *[0] * 59]
    assert image_facts(encoded(dot, "PNG")).sharpness == pytest.approx(np.var(values), rel=1e-5)
    assert image_facts(encoded(Image.new("L", (2, 1)), "PNG")).sharpness == 0


def test_one_colour_pictures_are_known():
    for colour in ("white", (200, 30, 30)):
        assert image_facts(encoded(Image.new("RGB", (300, 200), colour), quality=40)).spread < ONE_COLOUR
    # Red and green of the same brightness differ in colour alone.
    two = Image.new("RGB", (200, 200), (255, 0, 0))
    two.paste((0, 130, 0), (0, 0, 100, 200))
    assert image_facts(encoded(two, "PNG")).spread > ONE_COLOUR


def test_an_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = image_facts(encoded(scene(3), exif=exif))
    assert (found.width, found.height) == (340, 512)


@pytest.mark.parametrize("data, reason", [(b"", "empty image"), (b"no image at all", "not an image")])
def test_what_cannot_be_used(data, reason):
    with pytest.raises(ImageError) as caught:
        image_facts(data)
    assert caught.value.reason == reason and reason in PROBLEMS


def test_a_truncated_image_is_used_as_far_as_it_goes():
    data = encoded(scene(4))
    whole, cut = image_facts(data), image_facts(data[: len(data) // 2])
    assert (whole.truncated, cut.truncated) == (False, True)
    assert (cut.width, cut.height) == (whole.width, whole.height) and cut.perceptual and cut.sharpness > 0


# ---- the file


@pytest.fixture
def table(tmp_path):
    """A TSV of eight pictures, and four rows without: 2 and 5 are copies of 0 and 1, 3 is white."""
    pictures = [encoded(scene(seed), quality=85) for seed in range(8)]
    pictures[2], pictures[3] = pictures[0], encoded(Image.new("RGB", (64, 64), "white"))
    pictures[5] = encoded(scene(1).resize((256, 170), Image.BICUBIC), quality=60)
    (tmp_path / "named.jpg").write_bytes(pictures[0])
    lines = [f"id{row}\t{base64.b64encode(data).decode()}\t说明{row}" for row, data in enumerate(pictures)]
    lines += ["bad\t" + "x" * 41 + "\t说明", "", "named\tnamed.jpg\t说明", "none", "gone\tgone.jpg\t说明"]
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_facts_of_all_rows(table, workers):
    found = all_image_facts(table, workers, quiet=True)
    assert found.dtype == FACTS and len(found) == 12
    assert [PROBLEMS[code] for code in found["problem"][8:]] == ["bad base64", "", "missing column", "no such file"]
    assert found["line"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13]
    assert found["next"][-1] == os.path.getsize(table)
    assert not found["problem"][:8].any()
    assert usable(found).tolist() == [True] * 3 + [False] + [True] * 4 + [False, True, False, False]
    assert found["content"][0] == found["content"][2] == found["content"][9] != found["content"][1]
    assert bits_apart(found["perceptual"][1:2], found["perceptual"][5:6])[0] <= 6
    expected = image_facts(base64.b64decode(open(table).read().split("\t")[1]))
    assert [found[0][name] for name in ("width", "height", "bytes")] == [512, 340, expected.bytes]
    assert found["perceptual"][0] == expected.perceptual


def test_the_file_is_made_once_and_again_when_the_data_change(table, monkeypatch):
    first = all_image_facts(table, quiet=True)
    assert os.path.exists(facts_path(table)) and not os.path.exists(facts_path(table) + ".partial")
    with monkeypatch.context() as patch:
        patch.setattr(module, "image_facts", lambda data: 1 / 0)
        assert all_image_facts(table, quiet=True).tobytes() == first.tobytes()
    with open(table, "a") as file:
        file.write("more\tnamed.jpg\t说明\n")
    assert len(all_image_facts(table, quiet=True)) == len(first) + 1


def test_what_was_computed_is_kept_when_the_process_ends(table, monkeypatch):
    whole = all_image_facts(table, quiet=True)
    os.unlink(facts_path(table))
    monkeypatch.setattr(parallel, "CHUNK_ITEMS", 2)
    seen = []

    def fails(found):
        seen.append(found)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return plain(found)

    plain = module.facts_record
    monkeypatch.setattr(module, "facts_record", fails)
    with pytest.raises(KeyboardInterrupt):
        all_image_facts(table, quiet=True)
    assert not os.path.exists(facts_path(table))
    # Half a record, as a crash may leave it.
    with open(facts_path(table) + ".partial", "ab") as file:
        file.write(b"half")
    again = []
    monkeypatch.setattr(module, "facts_record", lambda found: again.append(found) or plain(found))
    assert all_image_facts(table, quiet=True).tobytes() == whole.tobytes()
    assert len(again) == len(whole) - 4


def test_waiting_for_another_process_is_said(table, monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "info", said.append)
    with open(facts_path(table) + ".partial", "wb") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = pool.submit(all_image_facts, table, quiet=True)
        while not said:
            time.sleep(0.01)
        assert table in said[0] and not found.done()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert len(found.result(timeout=120))


def test_a_folder_that_takes_no_file_is_enough(table, monkeypatch):
    expected = all_image_facts(table, quiet=True)
    os.unlink(facts_path(table))

    def refuses(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(module, "_open_partial", refuses)
    assert all_image_facts(table, quiet=True).tobytes() == expected.tobytes()
    assert not os.path.exists(facts_path(table))


def test_data_that_change_meanwhile_end_it(table, monkeypatch):
    plain = module.facts_record

    def writes(found):
        with open(table, "a") as file:
            file.write("x")
        return plain(found)

    monkeypatch.setattr(module, "facts_record", writes)
    monkeypatch.setattr(parallel, "CHUNK_ITEMS", 2)
    monkeypatch.setattr("paddlemix.datasets.blocks.BUFFER_BYTES", 1 << 12)
    with refused(JobFailed, "changed"):
        all_image_facts(table, quiet=True)


def test_a_strangers_folder_leads_to_no_other_file_and_cannot_stop_it(table, tmp_path):
    expected = all_image_facts(table, quiet=True)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    partial = facts_path(table) + ".partial"
    os.unlink(facts_path(table))
    os.symlink(precious, partial)
    assert all_image_facts(table, quiet=True).tobytes() == expected.tobytes()
    assert precious.read_text() == "mine" and not os.path.exists(facts_path(table))
    os.unlink(partial)
    for path in (partial, facts_path(table)):
        os.mkfifo(path)
        assert all_image_facts(table, quiet=True).tobytes() == expected.tobytes()
        if os.path.exists(path):
            os.unlink(path)


def test_records_that_cannot_be_are_made_anew(table):
    expected = all_image_facts(table, quiet=True)
    for field, value in (("format", 200), ("problem", 200), ("next", 1)):
        wrong = expected.copy()
        wrong[3][field] = value
        with open(facts_path(table), "r+b") as file:
            file.seek(module._HEADER.size)
            file.write(wrong.tobytes())
        assert all_image_facts(table, quiet=True).tobytes() == expected.tobytes()


@pytest.mark.parametrize("header", [True, False])
def test_a_full_disk_is_one_line(table, monkeypatch, header):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if not header:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # What the disk still takes of it.
            return self.file.write(data[: module._HEADER.size])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    plain = module._open_partial
    monkeypatch.setattr(module, "_open_partial", lambda path: Full(plain(path)))
    with pytest.raises(JobFailed, match="cannot write .*partial: No space left on device"):
        all_image_facts(table, quiet=True)
