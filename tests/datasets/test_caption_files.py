"""Captions and references read from files of each form."""

import base64
import json

import pytest

from paddlemix.datasets import tsv
from paddlemix.datasets.caption_files import common_ids, new_captions, read_captions, read_references
from paddlemix.datasets.score_files import read_scores
from paddlemix.datasets.thumbnails import read_thumbnails
from paddlemix.utils.errors import UserError
from tests.helpers import image_base64, image_bytes, refused

IMAGE = image_base64()


def write(tmp_path, text, name="file.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_captions_by_id(tmp_path):
    path = write(tmp_path, "\ufeffa\t红杯\r\n\nb\t\r\nc\t末行没有换行")
    assert read_captions(path) == {"a": "红杯", "b": "", "c": "末行没有换行"}


def test_lines_that_are_no_captions_are_listed(tmp_path):
    bad = b"".join(b"%d\tx\ty\n" % i for i in range(11))
    with pytest.raises(UserError, match=r"13 lines are not .* lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more$"):
        read_captions(write(tmp_path, b"a\tx\n" + bad + b"alone\n" + b"\xff\t\n"))
    with refused(UserError, "duplicate", match="2 ids come more than once: a, b"):
        read_captions(write(tmp_path, "a\tx\nb\tx\na\ty\nb\tx\na\tz\n"))
    with refused(UserError, "empty"):
        read_captions(write(tmp_path, "\n \n"))
    with refused(UserError, "argument-order", match="is JSON, not lines of id, tab, caption"):
        read_captions(write(tmp_path, '[{"id": "a"}]'))
    with refused(UserError, "unreadable"):
        read_captions(str(tmp_path / "none"))


def test_captions_in_gbk_get_the_command_that_converts_them(tmp_path):
    path = write(tmp_path, "".join(f"{i}\t红色的杯子\n" for i in range(3)).encode("gbk"))
    for read in (read_captions, lambda path: list(new_captions(path))):
        with refused(UserError, "encoding", match="iconv -f GB18030"):
            read(path)


SCORES = 'a\t0.51\t0.73\t0.22\t[["杯", 1.5]]\n'


@pytest.mark.parametrize("read", [read_captions, lambda path: list(new_captions(path))])
@pytest.mark.parametrize(
    "text, code",
    [(f"a\t红杯\nb\t{IMAGE}\n", "images"), (f"a\t{IMAGE}\t红杯\n", "images"), (f"{IMAGE}\t红杯\n", "images"),
     (SCORES, "scores"), ("a\t\t\t\tno image\n", "scores")],
)  # fmt: skip
def test_images_and_scores_are_not_captions(tmp_path, read, text, code):
    with refused(UserError, code):
        read(write(tmp_path, text))


def test_a_caption_that_repeats_a_character_is_not_an_image(tmp_path):
    assert read_captions(write(tmp_path, "a\t" + "1-" * 500)) == {"a": "1-" * 500}


def test_paths_of_images_are_not_captions_but_words_like_them_are(tmp_path):
    (tmp_path / "杯.jpg").write_bytes(image_bytes())
    for text in ("a\t杯.jpg\n", "a\t./杯.jpg\n"):
        for read in (read_captions, lambda path: list(new_captions(path))):
            with refused(UserError, "images"):
                read(write(tmp_path, text))
    captions = {"杯.jpg": "红杯", "b": "文件名是伞.jpg"}
    assert read_captions(write(tmp_path, "".join(f"{name}\t{text}\n" for name, text in captions.items()))) == captions


def test_new_captions_are_results_or_candidates(tmp_path):
    first = {"id": "a", "chosen": 1, "candidates": [{"text": "红"}, {"text": "蓝\t\ud800"}]}
    text = "".join(json.dumps(line) + "\n\n" for line in (first, {"id": "b", "chosen": None}))
    assert list(new_captions(write(tmp_path, "\ufeff" + text))) == [("a", "蓝 ?"), ("b", "")]
    assert list(new_captions(write(tmp_path, "\ufeffa\t红杯\r\n\r\nb\t\r\n"))) == [("a", "红杯"), ("b", "")]


@pytest.mark.parametrize(
    "line",
    [
        "a", "a\tb\tc", '{"id": "a"}', '{"id": 1, "chosen": null}',
        '{"id": "a", "chosen": 0, "candidates": [{"text": 5}]}',
        *(f'{{"id": "a", "chosen": {chosen}, "candidates": [{{"text": "x"}}]}}' for chosen in ("1", "-1", "[]", "{}")),
    ],
)  # fmt: skip
def test_lines_that_are_no_new_captions(tmp_path, line):
    with refused(UserError, "lines"):
        list(new_captions(write(tmp_path, line + "\n")))


def test_scores_are_not_references(tmp_path):
    with refused(UserError, "scores"):
        read_references(write(tmp_path, SCORES))


def test_references_as_lines_of_text(tmp_path):
    path = write(tmp_path, "\ufeffa\t红杯\nb\t蓝瓶\t一只瓶\t\na\t杯子\nc\t灯\t\n")
    found = read_references(path)
    assert found.texts == {"a": ["红杯", "杯子"], "b": ["蓝瓶", "一只瓶"], "c": ["灯"]}
    assert not found.has_images


def test_references_as_training_rows(tmp_path):
    path = write(tmp_path, f"a\t{IMAGE}\t红杯\tmore\nb\t{IMAGE}\t\"蓝\"\"瓶\"\na\t{IMAGE}\t杯子\n")
    found = read_references(path)
    assert found.texts == {"a": ["红杯\tmore", "杯子"], "b": ['蓝"瓶']} and found.has_images


@pytest.mark.parametrize("indent", [None, 2])
def test_references_as_records(tmp_path, indent):
    records = [
        {"id": f"identity_{i}", "conversations": [["问", f"答{i}"], ["再问", "再答"]], "image": IMAGE} for i in range(3)
    ]
    path = write(tmp_path, json.dumps(records, indent=indent, ensure_ascii=False), "val.json")
    found = read_references(path)
    assert found.texts == {f"identity_{i}": [f"答{i}"] for i in range(3)} and found.has_images


@pytest.mark.parametrize(
    "text, why",
    [
        ("a\t红杯\nalone\n", r"1 rows have no reference: 2 \(missing column\)"),
        ("a\t\n", r"1 \(empty caption\)"),
        (f"a\t{IMAGE}\n", r"1 \(no caption\)"),
        ("\t红杯\n", r"1 \(no id\)"),
        (b"a\t\xff\xfe\n", r"1 \(caption is not UTF-8\)"),
        ("[{]", r"1 rows have no reference: 1 \(bad record"),
        ("", "has no references"),
    ],
)
def test_references_that_are_none(tmp_path, text, why):
    with pytest.raises(UserError, match=why):
        read_references(write(tmp_path, text))


def test_ids_of_all_sides_in_the_order_of_the_first():
    assert common_ids({"c": 1, "a": 1, "b": 1}, {"a": 1, "c": 1}, {"c": 1, "a": 1, "d": 1}) == ["c", "a"]


def test_thumbnails(tmp_path):
    from io import BytesIO

    from PIL import Image

    wide = image_base64(size=(400, 100))
    cut = base64.b64encode(image_bytes(size=(64, 64))[:-40]).decode()
    text = f"a\t{wide}\nb\t!!!\nc\tZm9v\nunwanted\t{IMAGE}\na\t{IMAGE}\nalone\nd\t{cut}\n"
    found = read_thumbnails(write(tmp_path, text), ["a", "b", "c", "d", "alone", "absent"], side=50)
    with Image.open(BytesIO(found["a"].webp)) as image:
        assert (image.format, image.size) == ("WEBP", (50, 13))
    assert {key: one.problem for key, one in found.items()} == {
        "a": "", "b": "bad base64", "c": "not an image", "d": "", "alone": "missing column",
    }  # fmt: skip
    assert not found["b"].webp and found["d"].webp


@pytest.mark.parametrize("read", [read_captions, new_captions, read_scores])
def test_a_line_without_an_end_is_bounded(tmp_path, monkeypatch, read):
    """Zeros, for example, as a crash leaves them: no line of them is read at once."""
    monkeypatch.setattr(tsv, "MAX_ROW_BYTES", 1000)
    (tmp_path / "zeros").write_bytes(b"\0" * 5000)
    with refused(UserError, "line-length", match="longer than"):
        list(read(str(tmp_path / "zeros")))
