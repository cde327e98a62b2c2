"""The demo's ads: what captions say is what is drawn, the same seed gives the same bytes."""

import base64
import io
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from paddlemix.utils.errors import UserError
from tools import make_demo_data, make_tiny_model


@pytest.fixture(scope="module")
def font():
    try:
        return make_demo_data.find_font()
    except UserError as error:
        pytest.skip(str(error))


def test_both_styles_parse_back_exactly():
    for ad in make_demo_data.sample_ads(2000, seed=3):
        for style in make_demo_data.STYLES:
            assert make_demo_data.parse_caption(make_demo_data.write_caption(ad, style)) == ad._asdict()


def test_a_caption_counts_for_what_it_says():
    ad = make_demo_data.sample_ads(1, seed=1)[0]
    caption = make_demo_data.write_caption(ad, "plain")
    cut = make_demo_data.parse_caption(caption[: caption.index("，")])
    assert (cut["product"], cut["color"], cut["side"]) == (ad.product, ad.color, ad.side)
    assert cut["price"] is None and cut["slogan"] is None
    assert set(make_demo_data.parse_caption("一只猫在睡觉。").values()) == {None}
    # A value that does not exist, or the fixed words of no style, say nothing.
    assert make_demo_data.parse_caption("价格12元。")["price"] is None
    assert make_demo_data.parse_caption("红色")["color"] is None


def test_where_a_caption_says_it():
    ad = make_demo_data.Ad("手机", "红色", "左侧", "浅蓝色", "纯色", "72", "新品上市", "上方")
    for style in make_demo_data.STYLES:
        caption = make_demo_data.write_caption(ad, style)
        found = make_demo_data.find_attributes(caption)
        assert {field: caption[slice(*span)] for field, span in found.items()} == ad._asdict()
    assert make_demo_data.find_attributes("价格72元。") == {"price": (2, 4)}


def test_ads_differ_and_depend_on_the_seed():
    ads = make_demo_data.sample_ads(3000, seed=5)
    assert len(set(ads)) == 3000
    assert ads == make_demo_data.sample_ads(3000, seed=5) != make_demo_data.sample_ads(3000, seed=6)
    for field, values in make_demo_data._words().items():
        assert {getattr(ad, field) for ad in ads} == set(values), field
    with pytest.raises(UserError, match="different ads"):
        make_demo_data.sample_ads(10**9, seed=1)


def test_the_picture_shows_what_the_ad_says(font):
    ad = make_demo_data.Ad("手机", "红色", "左侧", "浅蓝色", "纯色", "72", "新品上市", "上方")
    draw = lambda ad: np.asarray(make_demo_data.draw_ad(ad, random.Random(1), 160, font)).astype(int)  # noqa: E731
    picture = draw(ad)
    assert picture.shape == (160, 160, 3)

    def red(pixels):
        return (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)

    # Between the bands of slogan and price: the product stands at the left.
    columns = np.nonzero(red(picture[40:110]))[1]
    assert len(columns) > 200 and 25 < columns.mean() < 70
    right = draw(ad._replace(side="右侧"))
    assert 90 < np.nonzero(red(right[40:110]))[1].mean() < 135
    # The background's colour is what most pixels there have.
    wanted = np.array(make_demo_data.BACKGROUND_COLORS["浅蓝色"])
    assert np.abs(np.median(picture[40:110].reshape(-1, 3), axis=0) - wanted).max() < 12
    # Each attribute changes the picture.
    for field, values in make_demo_data._words().items():
        other = next(value for value in values if value != getattr(ad, field))
        assert np.abs(draw(ad._replace(**{field: other})) - picture).max() > 60, field


def test_a_character_of_the_slogan_fills_a_patch_of_the_tiny_model(font):
    """Cut by two patches each, they were learned with some seeds only."""
    sizes, _ = make_tiny_model.parse_arguments(["out", "--captions", "a.tsv"])
    patches, size = sizes.image_size // sizes.patch_size, 160
    for slogan in make_demo_data.SLOGANS:
        ad = make_demo_data.Ad("手机", "红色", "左侧", "浅蓝色", "纯色", "72", slogan, "上方")
        picture = np.asarray(make_demo_data.draw_ad(ad, random.Random(1), size, font)).astype(int)
        ink = picture[: size // patches].min(axis=2) > 200
        # One white character to a patch: from margin to margin of the band, and none in the row of patches below it.
        columns = np.nonzero(ink.any(axis=0))[0]
        assert len(slogan) == patches and columns.max() - columns.min() > 0.85 * size
        paper = picture[size // patches - 2, 1], picture[size // patches + 1, 1]
        assert np.abs(paper[0] - picture[1, 1]).max() < 12 < np.abs(paper[1] - picture[1, 1]).max()


def test_characters_are_drawn_not_boxes(font):
    loaded = make_demo_data._load_font(font, 32)
    missing = bytes(loaded.getmask("\U0010fffd"))
    for slogan in make_demo_data.SLOGANS:
        for character in slogan:
            mask = loaded.getmask(character)
            assert sum(bytes(mask)) > 0 and bytes(mask) != missing, character


def test_files_and_their_order(font, root, tmp_path):
    def make(out, workers):
        command = [sys.executable, str(root / "tools" / "make_demo_data.py"), str(out), "--size", "48"]
        command += ["--pretrain", "5", "--tune", "3", "--held_out", "4", "--workers", str(workers)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in out.iterdir()}

    files = make(tmp_path / "a", 0)
    assert files == make(tmp_path / "b", 2)
    pictures = {name: files.pop(name) for name in sorted(files) if name.endswith(".jpg")}
    assert list(pictures) == ["ad0.jpg", "ad1.jpg", "ad2.jpg", "ad3.jpg"]
    counts = {"pretrain.tsv": 5, "tune.tsv": 3, "held_out.tsv": 4, "held_out_blank.tsv": 4, "held_out_captions.tsv": 4}
    assert {name: data.count(b"\n") for name, data in files.items()} == counts

    def rows(name):
        return [line.split("\t") for line in files[name].decode().splitlines()]

    captions = [columns[-1] for name in ("pretrain.tsv", "tune.tsv", "held_out_captions.tsv") for columns in rows(name)]
    assert len({tuple(make_demo_data.parse_caption(caption).items()) for caption in captions}) == 12
    assert all(caption.startswith("一个") for caption in captions[:5])
    assert all("广告图" in caption for caption in captions[5:])
    ids = [columns[0] for columns in rows("held_out.tsv")]
    assert ids == [columns[0] for columns in rows("held_out_blank.tsv")]
    assert ids == [columns[0] for columns in rows("held_out_captions.tsv")]
    assert [base64.b64decode(columns[1]) for columns in rows("held_out.tsv")] == list(pictures.values())
    blanks = {columns[1] for columns in rows("held_out_blank.tsv")}
    assert len(blanks) == 1
    for encoded, flat in ((rows("held_out.tsv")[0][1], False), (blanks.pop(), True)):
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert image.format == "JPEG" and image.size == (48, 48)
        assert (np.asarray(image).std() < 1) == flat


def test_bad_arguments_end_with_one_line(root, tmp_path):
    for words in (["--size", "8"], ["--tune", "-1"], ["--font", "no-such-font.ttf"], ["--font", __file__],
                  ["--seed", "-1"]):  # fmt: skip
        command = [sys.executable, str(root / "tools" / "make_demo_data.py"), str(tmp_path / "out"), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
