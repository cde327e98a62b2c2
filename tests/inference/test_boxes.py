"""Boxes in answers: parsed, drawn, saved."""

import os

import pytest
from PIL import Image, ImageFont

from paddlemix.inference import boxes as module
from paddlemix.inference.boxes import Box, check_boxes_path, draw_boxes, parse_boxes, save_boxes
from paddlemix.processors import fonts as fonts_module
from paddlemix.processors.fonts import find_font
from paddlemix.utils.errors import UserError
from tests.helpers import refused


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cup", []),
        ("<ref>杯子</ref><box>(10,20),(300,400)</box>", [Box("杯子", (10, 20, 300, 400))]),
        (
            "<ref>two\n cups</ref><box>(1,2),(3,4)</box> <box>(5,6),(7,8)</box> and <box>(1,1),(2,2)</box>",
            [Box("two cups", (1, 2, 3, 4)), Box("two cups", (5, 6, 7, 8)), Box("", (1, 1, 2, 2))],
        ),
        # The wrong way round, outside, with blanks.
        ("<box>( 900,800 ), (100,1200)</box>", [Box("", (100, 800, 900, 1000))]),
        ("<box>(1,2)</box><box>(1,2),(3,4)<box>(a,b),(c,d)</box><box>(-1,2),(3,4)</box>", []),
        ("<ref>never closed<box>(1,2),(3,4)</box>", [Box("", (1, 2, 3, 4))]),
        ("<box>(1,2),(3," + "9" * 5000 + ")</box>", []),
    ],
)
def test_parse_boxes(text, expected):
    assert parse_boxes(text) == expected


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw_boxes(image, [Box("", (250, 500, 750, 1000))])
    assert image.getpixel((100, 100)) == (255, 255, 255)
    red = tuple(bytes.fromhex(module._COLOURS[0][1:]))
    for x, y in ((100, 100), (299, 150), (200, 199), (200, 100)):
        assert drawn.getpixel((x, y)) == red
    assert drawn.getpixel((200, 150)) == drawn.getpixel((50, 150)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (10000, 1), (1, 3000), (64, 64)])
@pytest.mark.parametrize("font", [True, False])
def test_any_image_and_label(size, font, tmp_path):
    """With a font or without: a label at the top, outside, empty, Chinese, very long, of odd characters."""
    used = find_font(str(tmp_path), 12) if font else None
    labels = ["", "cup", "杯子", "x" * 5000, "\U0001f642\u202e\x01"]
    places = [(0, 0, 0, 0), (0, 0, 1000, 1000), (1000, 1000, 1000, 1000)]
    found = [Box(label, place) for label in labels for place in places]
    assert draw_boxes(Image.new("RGB", size), found, used).size == size


def test_the_model_folders_font_goes_first(tmp_path, monkeypatch):
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    monkeypatch.setattr(fonts_module, "_FONTS", str(fonts) + "/")
    folder = tmp_path / "model [7B]"
    folder.mkdir()
    assert find_font(str(folder), 12) is None
    opened = []
    monkeypatch.setattr(ImageFont, "truetype", lambda path, size: opened.append(os.path.basename(path)) or "font")
    (fonts / "truetype" / "wqy").mkdir(parents=True)
    (fonts / "truetype" / "wqy" / "wqy-zenhei.ttc").write_bytes(b"")
    assert find_font(str(folder), 12) == "font"
    for name in ("a.otf", "SimSun.ttf"):
        (folder / name).write_bytes(b"")
    find_font(str(folder), 12)
    assert opened == ["wqy-zenhei.ttc", "SimSun.ttf"]


def test_a_broken_font_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts_module, "_FONTS", str(tmp_path / "none") + "/")
    (tmp_path / "SimSun.ttf").write_bytes(b"no font at all")
    # A pipe would be waited for.
    os.mkfifo(tmp_path / "pipe.ttf")
    assert find_font(str(tmp_path), 12) is None


def test_save_boxes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fonts_module, "_FONTS", str(tmp_path / "none") + "/")
    image = Image.new("RGB", (300, 200))
    answer = "<ref>杯子</ref><box>(10,200),(300,400)</box>"
    for name, format in (("a.png", "PNG"), ("new/b.JPG", "JPEG")):
        assert save_boxes(answer, image, str(tmp_path / name), str(tmp_path)) == 1
        with Image.open(tmp_path / name) as drawn:
            assert (drawn.size, drawn.format) == ((300, 200), format)
    assert "no font with Chinese characters" in capfd.readouterr().err
    # Nothing to draw, nothing to draw on, nowhere to write.
    assert save_boxes("a cup", image, str(tmp_path / "c.png"), str(tmp_path)) == 0
    assert save_boxes(answer, None, str(tmp_path / "c.png"), str(tmp_path)) == 0
    assert not (tmp_path / "c.png").exists()
    assert save_boxes(answer, image, str(tmp_path / "a.png" / "c.png"), str(tmp_path)) == 1
    assert "could not be written" in capfd.readouterr().err
    # WebP ends at 16383 pixels.
    assert save_boxes(answer, Image.new("RGB", (16400, 2)), str(tmp_path / "c.webp"), str(tmp_path)) == 1
    assert "could not be written" in capfd.readouterr().err
    assert save_boxes("<ref>\x1b[2J杯</ref><box>(1,2),(3,4)</box>", image, str(tmp_path / "d.png"), str(tmp_path)) == 1
    err = capfd.readouterr().err
    assert "1 is \\x1b[2J杯" in err and "\x1b" not in err
    assert sorted(os.listdir(tmp_path)) == ["a.png", "d.png", "new"]


def test_endings():
    assert check_boxes_path("a b/x.PNG") == "a b/x.PNG"
    for bad in ("boxes", "boxes.txt", "x.svg", ".png"):
        with refused(UserError, "boxes"):
            check_boxes_path(bad)
