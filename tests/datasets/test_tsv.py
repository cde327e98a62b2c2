"""Rows of a TSV, whatever bytes it holds."""

import base64
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix.datasets import blocks, tsv
from paddlemix.utils.errors import UserError
from tests.helpers import refused

JPEG = b"/9j/" + base64.b64encode(bytes(range(96)))
PNG = b"iVBORw0KGgo" + base64.b64encode(bytes(90))
UNKNOWN = base64.b64encode(bytes(range(256)))


def rows_of(tmp_path, content, want_caption=True, **kwargs):
    path = tmp_path / "in.tsv"
    path.write_bytes(content)
    rows = list(tsv.read_rows(str(path), want_caption, **kwargs))
    for row in rows:
        # What the row says of its place must hold in the file.
        assert content[row.image_offset : row.image_offset + row.image_length] == bytes(row.image)
    assert not rows or rows[-1].next_offset <= len(content)
    return rows


def test_training_rows(tmp_path):
    caption = "红色的\t杯子"
    content = b"a1\t%s\t%s\nb2\t%s\tx" % (JPEG, caption.encode(), PNG)
    first, second = rows_of(tmp_path, content)
    assert first == (1, "a1", JPEG, 3, len(JPEG), caption, None, content.index(b"b2"), None, "", ())
    assert second == (2, "b2", PNG, content.index(PNG), len(PNG), "x", None, len(content), None, "", ())


def test_rows_without_an_id(tmp_path):
    content = b"".join(image + b"\tcap\ttion\n" for image in (JPEG, PNG, b"data:image/jpeg;base64," + JPEG))
    assert [(row.id, row.caption, row.error) for row in rows_of(tmp_path, content)] == [("", "cap\ttion", None)] * 3
    (row,) = rows_of(tmp_path, UNKNOWN + b"\tcaption\n")
    assert (row.id, bytes(row.image), row.caption) == ("", UNKNOWN, "caption")


@pytest.mark.parametrize(
    "line, error, row_id",
    [
        (b"only an id", tsv.MISSING_COLUMN, "only an id"),
        (JPEG, tsv.MISSING_COLUMN, ""),
        (b"x" * 500, tsv.MISSING_COLUMN, ""),
        ("字".encode() * 150, tsv.MISSING_COLUMN, "字" * 66 + "\ufffd"),
        (b"a\t" + JPEG, tsv.NO_CAPTION, "a"),
        (b"d41d8cd98f00b204e9800998ecf8427e\t" + JPEG, tsv.NO_CAPTION, "d41d8cd98f00b204e9800998ecf8427e"),
        (b"a\t" + UNKNOWN, tsv.NO_CAPTION, "a"),
        (b"a\tsome caption", tsv.NO_IMAGE, "a"),
        (b"a\t\tcaption", tsv.EMPTY_IMAGE, "a"),
        (b"\t\tx", tsv.EMPTY_IMAGE, ""),
        (b"id\timage_base64\tcaption", tsv.NO_IMAGE, "id"),
        (b"a\tNone\tcaption", tsv.NO_IMAGE, "a"),
        (b"a\tnan\tcaption", tsv.NO_IMAGE, "a"),
        (b"a\thttps://host/a.jpg\tcaption", tsv.IMAGE_IS_URL, "a"),
        (b"a\t../a.jpg\tcaption", tsv.PATH_LEADS_OUT, "a"),
        (b"a\timages/../../a.jpg\tcaption", tsv.PATH_LEADS_OUT, "a"),
        (b"a\t/elsewhere/a.jpg\tcaption", tsv.PATH_LEADS_OUT, "a"),
        (b"a\timages/a.jpg", tsv.NO_CAPTION, "a"),
        (b"a\t%s\t" % JPEG, tsv.EMPTY_CAPTION, "a"),
        (b"a\t%s\t \t " % JPEG, tsv.EMPTY_CAPTION, "a"),
        (b"a\t%s\t\xff\xfe" % JPEG, tsv.CAPTION_NOT_UTF8, "a"),
    ],
)
def test_bad_rows_cost_themselves_alone(tmp_path, line, error, row_id):
    good = b"g\t%s\tcaption\n" % JPEG
    before, bad, after = rows_of(tmp_path, good + line + b"\n" + good)
    assert (bad.error, bad.id, bad.line_no, bad.place) == (error, row_id, 2, None)
    read = error in (tsv.NO_IMAGE, tsv.IMAGE_IS_URL, tsv.PATH_LEADS_OUT) and line.count(b"\t") == 2
    assert bad.caption == ("caption" if read else None)
    assert before.error is after.error is None
    assert after.line_no == 3


def test_prediction_rows(tmp_path):
    content = b"a\t%s\nb\t%s\tcaption\nc\t\nd\n%s\tno id\n\xe9\t%s\n" % (JPEG, PNG, JPEG, PNG)
    rows = rows_of(tmp_path, content, want_caption=False)
    assert [(row.id, bytes(row.image), row.error) for row in rows] == [
        ("a", JPEG, None),
        ("b", PNG, None),
        ("c", b"", tsv.EMPTY_IMAGE),
        ("d", b"", tsv.MISSING_COLUMN),
        ("", JPEG, None),
        ("\ufffd", PNG, None),
    ]
    assert all(row.caption is None for row in rows)


def test_line_ends_bom_and_empty_lines(tmp_path):
    content = b"\xef\xbb\xbfa\t%s\tone\r\n\r\n   \n\nb\t%s\ttwo\r\r\nc\t%s\tth\rree" % (JPEG, JPEG, JPEG)
    rows = rows_of(tmp_path, content)
    assert [(row.line_no, row.id, row.caption) for row in rows] == [
        (1, "a", "one"),
        (5, "b", "two"),
        (6, "c", "th\rree"),
    ]


@pytest.mark.parametrize("blank", [b"\t", b" \t ", b"\t\t\r", b""])
def test_blank_lines_are_no_rows(tmp_path, blank):
    content = b"a\t%s\tone\n" % JPEG + blank + b"\nb\t%s\ttwo\n" % PNG + blank
    assert [row.line_no for row in rows_of(tmp_path, content)] == [1, 3]


def test_lines_that_end_with_cr_alone_are_named(tmp_path):
    content = b"".join(b"id%d\t%s\tcaption\r" % (number, JPEG) for number in range(6))
    for want_caption in (True, False):
        with refused(UserError, "line-ends", match=r": tr '\\r' '\\n' < "):
            rows_of(tmp_path, content, want_caption)
    # A CR inside a caption is a character like any other.
    (row,) = rows_of(tmp_path, b"a\t%s\tone\rtwo\tthree\n" % JPEG)
    assert row.caption == "one\rtwo\tthree"


def test_a_writer_that_quotes_every_field(tmp_path):
    content = b'"a"\t"%s"\t"one ""two"""\n"b"\t"%s"\t"three"\n' % (JPEG, PNG)
    rows = rows_of(tmp_path, content)
    assert [(row.id, bytes(row.image), row.caption) for row in rows] == [("a", JPEG, 'one "two"'), ("b", PNG, "three")]


@pytest.mark.parametrize(
    "text, meant",
    [
        ('"he said ""two for one"""', 'he said "two for one"'),
        ('"""now"" only"', '"now" only'),
        ('"with\ttab"', "with\ttab"),
        ('"a title"', '"a title"'),
        ('"now" only', '"now" only'),
        ('"5"" and "more"', '"5"" and "more"'),
        ('say ""x""', 'say ""x""'),
        ('"', '"'),
    ],
)
def test_only_what_a_csv_writer_quoted_is_unquoted(text, meant):
    assert tsv.unquoted(text) == meant


def test_paths_in_place_of_base64(tmp_path):
    content = "a\timages/1.JPG\tone\nb\t图 片.png\ttwo\nc.jpg\tthree\tfour\n1.webp\tfive\n".encode()
    rows = rows_of(tmp_path, content)
    found = [(row.id, row.place and row.place.file[len(str(tmp_path)) + 1 :], row.caption, row.error) for row in rows]
    assert found == [
        ("a", "images/1.JPG", "one", None),
        ("b", "图 片.png", "two", None),
        ("c.jpg", None, "four", tsv.NO_IMAGE),
        ("1.webp", "1.webp", "five", None),
    ]
    # An id may look like a path; the second column is the image then.
    (row,) = rows_of(tmp_path, b"1.jpg\tNone\n", want_caption=False)
    assert (row.id, bytes(row.image), row.place) == ("1.jpg", b"None", None)


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_files_without_rows(tmp_path, content):
    assert rows_of(tmp_path, content) == []


def test_lines_over_the_limit_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 64)
    limit = len(JPEG) + 10
    exact = b"e\t%s\t%s\n" % (JPEG, b"c" * (limit - len(JPEG) - 4))
    content = exact + b"long\t" + JPEG * 9 + b"\tcaption\n" + exact + JPEG * 3 + b"\n" + b"last\t" + JPEG * 5
    assert len(exact) == limit
    monkeypatch.setattr(tsv, "MAX_ROW_BYTES", limit)
    rows = rows_of(tmp_path, content)
    assert [(row.line_no, row.id, row.error) for row in rows] == [
        (1, "e", None), (2, "long", tsv.LINE_TOO_LONG), (3, "e", None),
        (4, "", tsv.LINE_TOO_LONG), (5, "last", tsv.LINE_TOO_LONG),
    ]  # fmt: skip
    assert rows[1].next_offset == limit + len(b"long\t" + JPEG * 9 + b"\tcaption\n")
    assert rows[-1].next_offset == len(content)


def test_kept_rows_keep_their_own_bytes(tmp_path):
    content = b"".join(b"%d\t%s%d\tc\n" % (i, JPEG, i) for i in range(100))
    rows = rows_of(tmp_path, content)
    assert [bytes(row.image) for row in rows] == [JPEG + b"%d" % i for i in range(100)]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\x1f\x8b\x08rest", "gunzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"\xff\xfea\0", "UTF-16"),
        (b"name" + bytes(253) + b"ustar", "tar"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, content, says):
    path = tmp_path / "in"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        next(tsv.read_rows(str(path), True))


def test_missing_files_and_folders(tmp_path):
    with refused(UserError, "unreadable"):
        tsv.check_input(str(tmp_path / "missing.tsv"))
    with refused(UserError, "not-regular"):
        tsv.check_input(str(tmp_path))


field = st.text(st.characters(blacklist_characters="\t\n\r", blacklist_categories=("Cs",)), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(field, st.binary(min_size=20, max_size=80), field.filter(str.strip), st.booleans()), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_what_is_written_is_read(tmp_path_factory, written, line_end):
    tmp_path = tmp_path_factory.mktemp("tsv")
    lines = [
        f"{row_id}\t".encode()
        + b"/9j/"
        + base64.b64encode(image)
        + f"\t{caption}{chr(9) + caption if tab else ''}".encode()
        for row_id, image, caption, tab in written
    ]
    if lines and lines[0].startswith(b"\xef\xbb\xbf"):
        lines[0] = lines[0][3:]
    rows = rows_of(tmp_path, line_end.join(lines))
    assert [row.error for row in rows] == [None] * len(lines)
    assert [row.place for row in rows] == [None] * len(lines)
    assert [b"\t".join([row.id.encode(), bytes(row.image), row.caption.encode()]) for row in rows] == lines


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\t", b"\n", b"\r", b" ", b"a", b"\xff", b"\xef\xbb\xbf", JPEG, b"=", b"\0"]), max_size=40
    )
)
def test_any_bytes_give_a_row_per_line(tmp_path_factory, pieces):
    content = b"".join(pieces)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    text = content[3:] if content.startswith(b"\xef\xbb\xbf") else content
    wanted = sum(bool(line.strip()) for line in text.split(b"\n"))
    for want_caption in (True, False):
        try:
            rows = rows_of(tmp_path_factory.mktemp("tsv"), content, want_caption)
        except UserError as error:
            assert "CR alone" in str(error) and b"\r" in text.split(b"\n")[0]
            continue
        assert len(rows) == wanted
        assert all(row.caption is None or want_caption for row in rows)
        assert all(row.caption is not None or row.error is not None for row in rows if want_caption)


def test_rows_may_be_let_go_while_python_starts_or_stops_a_thread(tmp_path):
    """Garbage is collected at any moment, also in the middle of such a start; see read_blocks."""
    lock = getattr(threading, "_shutdown_locks_lock", None)
    if lock is None:
        pytest.skip("this Python's threads have no such lock")
    (tmp_path / "in.tsv").write_bytes(b"a\tQQ==\tx\n" * 10)
    held = [tsv.read_rows(str(tmp_path / "in.tsv"), True)]
    next(held[0])
    begin, let_go = threading.Event(), threading.Event()

    def collect():
        begin.wait()
        held.clear()
        let_go.set()

    threading.Thread(target=collect, daemon=True).start()
    with lock:
        begin.set()
        assert let_go.wait(60)


@pytest.mark.parametrize("kept", ["here", "os"])
def test_rows_that_python_holds_at_its_exit_do_not_keep_it(tmp_path, kept):
    (tmp_path / "in.tsv").write_bytes(b"a\tQQ==\tx\n" * 10)
    code = "import sys; from paddlemix.datasets import tsv; rows = tsv.read_rows(sys.argv[1], True); next(rows)"
    code += "; sys.modules['os'].rows = rows; del rows" * (kept == "os")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.tsv")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
