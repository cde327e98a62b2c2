"""Near duplicates among hashes: every pair that a comparison of all with all finds, groups, and bounds."""

import base64
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from paddlemix.curation import near_duplicates
from paddlemix.curation.image_facts import image_facts, perceptual_hash
from paddlemix.curation.near_duplicates import MAX_DISTANCE, bits_apart, near_groups, nearest_in
from paddlemix.utils.errors import UserError
from tests.helpers import encoded
from tools import make_demo_data


def random_hashes(n, seed):
    return np.random.default_rng(seed).integers(0, 1 << 64, n, dtype=np.uint64)


def flipped(hashes, bits, seed):
    """Each hash with `bits` different bits changed."""
    rng = np.random.default_rng(seed)
    change = np.zeros(len(hashes), np.uint64)
    for row in range(len(hashes)):
        for bit in rng.choice(64, bits[row], replace=False):
            change[row] |= np.uint64(1) << np.uint64(bit)
    return hashes ^ change


@pytest.fixture(scope="module")
def crowd():
    """20,000 hashes: 12,000 by themselves, 8,000 near one of them, 0 to 14 bits away, mixed."""
    alone = random_hashes(12_000, 1)
    rng = np.random.default_rng(2)
    near = flipped(alone[rng.integers(0, len(alone), 8_000)], rng.integers(0, 15, 8_000), 3)
    return rng.permutation(np.concatenate([alone, near]))


@pytest.fixture(scope="module")
def all_pairs(crowd):
    """(i, j, bits apart) of all pairs up to 14 bits apart, by comparing all with all; j > i."""
    found = []
    for i in range(len(crowd) - 1):
        apart = bits_apart(np.full(len(crowd) - i - 1, crowd[i]), crowd[i + 1 :])
        near = np.flatnonzero(apart <= 14)
        found.append(np.stack([np.full(len(near), i), near + i + 1, apart[near].astype(np.int64)]))
    return np.concatenate(found, axis=1)


def groups_by_hand(n, pairs):
    """Union-find, pair by pair."""
    group = list(range(n))

    def root(x):
        while group[x] != x:
            x = group[x]
        return x

    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        group[high] = low
    return [root(x) for x in range(n)]


def test_bits_apart():
    assert bits_apart(np.array([0, 5, 2**64 - 1], np.uint64), np.array([0, 6, 0], np.uint64)).tolist() == [0, 2, 64]


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 8, MAX_DISTANCE])
def test_every_pair_is_found_that_a_comparison_of_all_with_all_finds(crowd, all_pairs, distance):
    i, j, apart = all_pairs
    expected = groups_by_hand(len(crowd), zip(*(side[apart <= distance].tolist() for side in (i, j))))
    assert near_groups(crowd, distance).tolist() == expected
    assert len(set(expected)) < len(crowd)
    distinct = np.unique(crowd)
    found = {tuple(sorted(pair)) for a, b, _ in near_duplicates._near_pairs(distinct, distance) for pair in zip(a, b)}
    place = np.searchsorted(distinct, crowd)
    near = (apart <= distance) & (apart > 0)
    assert found == {tuple(sorted(pair)) for pair in zip(place[i[near]], place[j[near]])}


@pytest.mark.parametrize("distance", [0, 6])
def test_the_nearest_of_another_set(crowd, distance):
    own, others = crowd[:3_000], crowd[3_000:]
    place, apart = nearest_in(own, others, distance)
    for row, value in enumerate(own):
        bits = bits_apart(np.full(len(others), value), others)
        best = int(bits.argmin())
        expected = (best, int(bits[best])) if bits[best] <= distance else (-1, -1)
        assert (place[row], apart[row]) == expected
    assert (place >= 0).any() and (place < 0).any()


def test_a_set_with_nothing_or_one_or_the_same_many_times():
    assert near_groups(np.zeros(0, np.uint64), 6).tolist() == []
    assert near_groups(np.array([7], np.uint64), 6).tolist() == [0]
    # One bucket holds them all: nothing is compared with itself.
    many = np.full(300_000, 12345, np.uint64)
    many[7] = ~many[0]
    groups = near_groups(many, 6)
    assert groups[7] == 7 and set(np.delete(groups, 7).tolist()) == {0}
    assert [part.tolist() for part in nearest_in(np.zeros(2, np.uint64), np.zeros(0, np.uint64), 6)] == [[-1] * 2] * 2


def test_rows_that_are_not_usable_stay_by_themselves():
    hashes = np.array([3, 0, 1, 0, 3], np.uint64)
    assert near_groups(hashes, 2, np.array([True, False, True, False, True])).tolist() == [0, 1, 0, 3, 0]


def test_a_set_that_is_all_alike_is_bounded_and_says_so(monkeypatch):
    """100,000 hashes within a few bits of one: all pairs would be five thousand million."""
    centre = np.zeros(100_000, np.uint64)
    hashes = np.unique(flipped(centre, np.full(len(centre), 4), 5))
    said = []
    monkeypatch.setattr(near_duplicates.logger, "warning", lambda text, *_: said.append(text))
    monkeypatch.setattr(near_duplicates, "MOST_COMPARISONS", 20_000_000)
    compared = []
    plain = near_duplicates.bits_apart
    monkeypatch.setattr(near_duplicates, "bits_apart", lambda a, b: compared.append(len(a)) or plain(a, b))
    groups = near_groups(hashes, 6)
    assert sum(compared) < 20_000_000 + 28 * len(hashes)
    assert "pairs were not compared" in said[0]
    # Most of them are joined all the same.
    assert np.bincount(groups).max() > len(hashes) // 2


def test_a_distance_beyond_the_search_is_refused():
    with pytest.raises(ValueError, match="0 to 10"):
        near_groups(np.zeros(2, np.uint64), 11)


# ---- which changes to a picture are found


def crop(left, top, right, bottom):
    """Take that share of the width or height off each side."""
    return lambda image: image.crop((
        round(image.width * left), round(image.height * top),
        round(image.width * (1 - right)), round(image.height * (1 - bottom)),
    ))  # fmt: skip


def tinted(image):
    red, green, blue = image.split()
    return Image.merge("RGB", (red.point(lambda v: min(255, 1.1 * v)), green, blue.point(lambda v: 0.85 * v)))


CHANGES = {
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2), Image.BICUBIC),
    "10 % narrower": lambda image: image.resize((image.width * 9 // 10, image.height), Image.BICUBIC),
    "JPEG of quality 30": lambda image: Image.open(io.BytesIO(encoded(image, quality=30))),
    "cropped, 1 % a side": crop(0.01, 0.01, 0.01, 0.01),
    "cropped, 2 % a side": crop(0.02, 0.02, 0.02, 0.02),
    "cropped, 3 % of one corner": crop(0, 0, 0.03, 0.03),
    "tinted (red × 1.1, blue × 0.85)": tinted,
    "20 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "20 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "20 % less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
}


def drawn_ads():
    try:
        font = make_demo_data.find_font()
    except UserError as error:
        pytest.skip(str(error))
    ads = make_demo_data.sample_ads(200, seed=11)
    return [make_demo_data.draw_ad(ad, random.Random(number), 160, font) for number, ad in enumerate(ads)]


def real_ads(shared):
    path = shared / "real_samples" / "test_samples.txt"
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [Image.open(io.BytesIO(base64.b64decode(row[1]))) for row in rows]


@pytest.mark.parametrize("kind", ["drawn", "real"])
def test_changed_copies_are_found_and_other_pictures_are_not(kind, request):
    """The table of docs/data.md: `python -m pytest -s tests/curation/test_near_duplicates.py -k changed`."""
    pictures = drawn_ads() if kind == "drawn" else real_ads(request.getfixturevalue("shared"))
    hashes = np.array([perceptual_hash(image.convert("RGB")) for image in pictures], np.uint64)
    recall = {}
    for name, change in CHANGES.items():
        changed = [image_facts(encoded(change(image.convert("RGB")), quality=85)).perceptual for image in pictures]
        apart = bits_apart(hashes, np.array(changed, np.uint64))
        recall[name] = [(apart <= distance).mean() for distance in (2, 4, 6, 8, 10)]
    i, j = np.triu_indices(len(hashes), 1)
    others = bits_apart(hashes[i], hashes[j])
    alarms = [(others <= distance).mean() for distance in (2, 4, 6, 8, 10)]
    print(f"\n{len(pictures)} {kind} ads, bits apart at most: 2, 4, 6, 8, 10")
    for name, shares in recall.items():
        print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    print(f"| others, of {len(others)} pairs | " + " | ".join(f"{100 * share:.3f} %" for share in alarms) + " |")
    for name, (*_, at_6, _, at_10) in recall.items():
        # The more is cut off, the more of the banners' edges move.
        least = {"cropped, 1 % a side": 0.9, "cropped, 2 % a side": 0.8, "cropped, 3 % of one corner": 0.65}.get(name)
        assert at_6 >= (least or 0.98) and at_10 >= (0.9 if least else 1), name
    # Drawn ads of the same layout and nearly the same colours come near each other.
    assert alarms[2] <= 0.002 and alarms[0] == 0
