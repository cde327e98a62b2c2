"""Rows of a TSV, a CSV or JSON records, with base64, paths or references.

python -m pytest tests/datasets/test_rows.py
"""

import base64
import json
import os

import pytest

from paddlemix.datasets import rows
from paddlemix.datasets.blocks import FileState
from paddlemix.datasets.caption_files import read_references
from paddlemix.datasets.labels import Options, convert
from paddlemix.datasets.thumbnails import read_thumbnails
from paddlemix.datasets.tsv import (
    CAPTION_NOT_UTF8,
    EMPTY_IMAGE,
    MISSING_COLUMN,
    NO_CAPTION,
    NO_IMAGE,
    PATH_LEADS_OUT,
    row_id,
)
from paddlemix.utils.errors import ImageError, JobFailed, UserError
from tests.helpers import image_base64, image_bytes, refused


@pytest.fixture
def folder(tmp_path):
    """A folder with three images."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image_bytes(number))
    return tmp_path


def read(path, content, want_caption=True):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(rows.read_rows(str(path), want_caption))


def bytes_of(row):
    return base64.b64decode(bytes(rows.image_text(row)))


TABLES = {
    "tsv": "a\timages/0.jpg\t红杯\nb\timages/1.jpg\t蓝杯,\"新\"\n",
    "csv": 'id,image,caption\na,images/0.jpg,红杯\nb,images/1.jpg,"蓝杯,""新"""\n',
    "csv of another order, with blanks and CRLF": (
        'Caption, ID ,file_name\r\n红杯,a,images/0.jpg\r\n\r\n"蓝杯,""新""",b,images/1.jpg\r\n'
    ),
    "csv of Excel": '\ufeffid,image,caption\r\na,images/0.jpg,红杯\r\nb,images/1.jpg,"蓝杯,""新"""\r\n',
    "csv with base64": f'id,image,caption\na,{image_base64(0)},红杯\nb,{image_base64(1)},"蓝杯,""新"""\n',
    "tsv with paths written in other ways": "a\t./images/0.jpg\t红杯\nb\timages//1.jpg\t蓝杯,\"新\"\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(folder, kind):
    found = read(folder / "table", TABLES[kind])
    assert [(row.id, row.caption, row.error) for row in found] == [("a", "红杯", None), ("b", '蓝杯,"新"', None)]
    assert [bytes_of(row) for row in found] == [image_bytes(0), image_bytes(1)]
    assert [row.id for row in read(folder / "table", TABLES[kind], want_caption=False)] == ["a", "b"]
    assert found[-1].next_offset == os.path.getsize(folder / "table")


def test_a_csv_without_ids_has_its_paths_for_ids(folder):
    found = read(folder / "table.csv", "image,caption\nimages/0.jpg,one\nimages/2.jpg,two\n")
    assert [row.id for row in found] == ["images/0.jpg", "images/2.jpg"]


def test_broken_csv_rows_cost_themselves_alone(folder):
    lines = [
        b"id,image,caption", b"a", b"b,,x", b"c,None,x", b"d,images/0.jpg", b"e,images/0.jpg,\xff", b"f,../0.jpg,x",
        b'g,images/0.jpg,"two', b'lines"', b"h,images/1.jpg,x", b"i,images/0.jpg,on\re\r",
    ]  # fmt: skip
    found = read(folder / "t.csv", b"\n".join(lines))
    assert [(row.line_no, row.id, row.error) for row in found] == [
        (2, "a", MISSING_COLUMN), (3, "b", EMPTY_IMAGE), (4, "c", NO_IMAGE), (5, "d", NO_CAPTION),
        (6, "e", CAPTION_NOT_UTF8), (7, "f", PATH_LEADS_OUT), (9, "g", None), (10, "h", None),
        (11, "i", None),
    ]  # fmt: skip
    assert (found[-3].caption, found[-1].caption) == ("two lines", "one")


def test_a_caption_with_commas_and_without_quotes_is_not_cut(folder):
    content = 'id,image,caption\na,images/0.jpg,red, blue\nb,images/1.jpg,"red, blue"\nc,images/2.jpg,red,,\n'
    found = read(folder / "t.csv", content)
    assert [(row.caption, row.error) for row in found] == [
        (None, rows.TOO_MANY_COLUMNS), ("red, blue", None), ("red", None),
    ]  # fmt: skip
    assert [row.error for row in read(folder / "t.csv", content, want_caption=False)] == [None] * 3


def test_a_csv_with_cr_alone_is_named(folder):
    with refused(UserError, "line-ends"):
        read(folder / "t.csv", "image,caption\rimages/0.jpg,x\rimages/1.jpg,y\r")
    assert len(read(folder / "t.csv", "image,caption\r\r\nimages/0.jpg,x\r\r\n")) == 1


def test_a_csv_without_captions_is_for_prediction_alone(folder):
    content = "image,price\nimages/0.jpg,3\n"
    assert [row.error for row in read(folder / "t.csv", content, want_caption=False)] == [None]
    with refused(UserError, "no-caption-column"):
        read(folder / "t.csv", content)


@pytest.mark.parametrize("images", ["inline", "reference"])
def test_the_records_of_a_conversion(folder, images):
    (folder / "in.tsv").write_text(
        "".join(f"ad{n}\t{image_base64(n)}\tcaption {n}\n" for n in range(3)) + "ad3\timages/1.jpg\tcaption 3\n"
    )
    convert(str(folder / "in.tsv"), str(folder / "out"), Options(val_every=2, images=images), disable_progress=True)
    val = list(rows.read_rows(str(folder / "out" / "val.json"), False))
    train = list(rows.read_rows(str(folder / "out" / "train.json"), False))
    assert [row.id for row in val + train] == ["identity_0", "identity_2", "identity_1", "identity_3"]
    assert [bytes_of(row) for row in val + train] == [image_bytes(n) for n in (0, 2, 1, 1)]
    assert rows.first_prompt(str(folder / "out" / "val.json")) == "请描述图片内容"
    assert rows.first_prompt(str(folder / "in.tsv")) is None


@pytest.mark.parametrize("kind", ["tsv", "csv", "json", "json on one line"])
def test_reading_goes_on_behind_a_row(folder, kind):
    turns = [["?", "x"]]
    records = [{"id": f"r{n}", "conversations": turns, "image": {"file": f"images/{n}.jpg"}} for n in range(3)]
    contents = {
        "tsv": "".join(f"r{n}\timages/{n}.jpg\tx\n" for n in range(3)),
        "csv": "image,caption,id\n" + "".join(f'images/{n}.jpg,"one\n\ntwo",r{n}\n' for n in range(3)),
        "json": "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
        "json on one line": json.dumps(records),
    }
    whole = read(folder / "in", contents[kind], want_caption=False)
    assert [row.id for row in whole] == ["r0", "r1", "r2"]
    assert 3 <= rows.most_rows(str(folder / "in"), contents[kind].count("\n")) <= 9
    state = FileState.of(str(folder / "in"))
    for done, row in enumerate(whole, 1):
        rest = rows.read_rows(str(folder / "in"), False, row.next_offset, row.line_no + 1, state)
        assert list(rest) == whole[done:]
    os.utime(folder / "in", ns=(0, 0))
    with refused(JobFailed, "changed"):
        list(rows.read_rows(str(folder / "in"), False, state=state))


def test_records_that_cannot_be_captioned(folder):
    turns = [["?", "x"]]
    records = [
        {"id": "none", "conversations": turns}, {"id": "two", "conversations": turns, "image": ["QQ==", "QQ=="]},
        {"id": "bad", "conversations": 3}, {"id": "good", "conversations": turns, "image": {"file": "images/2.jpg"}},
    ]  # fmt: skip
    found = read(folder / "val.json", json.dumps(records))
    assert [row.error for row in found] == [NO_IMAGE, rows.SEVERAL_IMAGES, rows.BAD_RECORD, None]
    assert (found[-1].id, bytes_of(found[-1])) == ("good", image_bytes(2))


def test_only_plain_files_are_read(folder, monkeypatch):
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("images/1.jpg", folder / "link.jpg")
    os.mkdir(folder / "folder.jpg")
    found = read(folder / "t.tsv", "".join(f"{name}\t{name}.jpg\tx\n" for name in ("pipe", "folder", "gone", "link")))
    reasons = []
    for row in found[:3]:
        with pytest.raises(ImageError) as caught:
            rows.image_text(row)
        reasons.append(caught.value.reason)
    assert reasons == ["cannot read the file", "cannot read the file", "no such file"]
    assert bytes_of(found[3]) == image_bytes(1)
    monkeypatch.setattr("paddlemix.processors.images.MAX_BYTES", 100)
    with refused(ImageError, "image too large"):
        rows.image_text(found[3])


def test_a_reference_into_a_file_that_changed(folder):
    (folder / "in.tsv").write_text(f"a\t{image_base64(0)}\tx\n")
    convert(str(folder / "in.tsv"), str(folder), Options(val_every=0, images="reference"), disable_progress=True)
    (row,) = rows.read_rows(str(folder / "train.json"), False)
    (folder / "in.tsv").write_text(f"ab\t{image_base64(0)}\tx\n")
    with refused(ImageError, "changed file"):
        rows.image_text(row)
    # Another image of the same length, in its place.
    texts = [image_base64(n, format="BMP") for n in range(2)]
    assert len(texts[0]) == len(texts[1])
    (folder / "in.tsv").write_text(f"a\t{texts[0]}\tx\n")
    convert(str(folder / "in.tsv"), str(folder), Options(val_every=0, images="reference"), disable_progress=True)
    (row,) = rows.read_rows(str(folder / "train.json"), False)
    assert rows.image_text(row) == texts[0].encode()
    (folder / "in.tsv").write_text(f"a\t{texts[1]}\tx\n")
    with refused(ImageError, "changed file"):
        rows.image_text(row)


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_references_and_thumbnails_of_a_table(folder, kind):
    (folder / "t").write_text(TABLES[kind])
    found = read_references(str(folder / "t"))
    assert found == ({"a": ["红杯"], "b": ['蓝杯,"新"']}, True)
    assert all(one.webp for one in read_thumbnails(str(folder / "t"), ["a", "b"], 20).values())
    convert(str(folder / "t"), str(folder / "out"), Options(val_every=1), disable_progress=True)
    val = str(folder / "out" / "val.json")
    assert read_references(val).texts == {"identity_0": ["红杯"], "identity_1": ['蓝杯,"新"']}
    assert all(one.webp for one in read_thumbnails(val, ["identity_0", "identity_1"], 20).values())


@pytest.mark.parametrize("kind", ["tsv", "csv", "json"])
def test_references_and_thumbnails_of_rows_without_ids(folder, kind):
    """They have the ids that predict.py gives them."""
    table = "".join(f"{image_base64(n)}\t杯{n}\n" for n in range(2))
    if kind == "csv":
        table = "image,caption\n" + table.replace("\t", ",")
    records = [{"conversations": [["图", f"杯{n}"]], "image": image_base64(n)} for n in range(2)]
    path = folder / f"t.{kind}"
    path.write_text(json.dumps(records) if kind == "json" else table)
    names = [row_id(row) for row in rows.read_rows(str(path), False)]
    assert len(set(names)) == 2
    assert read_references(str(path)) == ({names[0]: ["杯0"], names[1]: ["杯1"]}, True)
    assert all(one.webp for one in read_thumbnails(str(path), names, 20).values())


def test_an_unclosed_quote_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    with refused(UserError, "csv", match=r"t.csv: line \d+: field larger than"):
        read(folder / "t.csv", 'image,caption\nimages/0.jpg,"' + "x\n" * 2000)
    with refused(UserError, "line-length", match="t.csv: line 2 "):
        read(folder / "t.csv", "image,caption\nimages/0.jpg," + "x" * 2000)
