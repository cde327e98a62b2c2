"""Record bounds in every layout, and when the index beside a file is believed."""

import json
import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddlemix.datasets import json_index
from paddlemix.utils.errors import UserError
from tests.helpers import refused

RECORDS = [
    {"id": f"identity_{i}", "conversations": [["问", 'a "quoted" {brace] \\ and \n newline \\']], "image": "A" * i}
    for i in range(30)
]


def as_lines(records):
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


LAYOUTS = {
    "lines": as_lines,
    "lines, crlf": lambda records: as_lines(records).replace("\n", "\r\n"),
    "lines, no final newline": lambda records: as_lines(records).rstrip("\n"),
    "lines, tight": lambda records: "[" + ",\n".join(map(json.dumps, records)) + "]",
    "lines, comma first": lambda records: "[\n " + "\n,".join(map(json.dumps, records)) + "\n]",
    "json lines": lambda records: "".join(json.dumps(record) + "\n" for record in records),
    "json lines with a bom": lambda records: "\ufeff" + "\n\n".join(map(json.dumps, records)),
    "indent 4": lambda records: json.dumps(records, indent=4, ensure_ascii=False),
    "indent 1, crlf": lambda records: json.dumps(records, indent=1).replace("\n", "\r\n"),
    "indent 2 with a bom": lambda records: "\ufeff" + json.dumps(records, indent=2),
    "indent 0": lambda records: json.dumps(records, indent=0),
    "one line": lambda records: json.dumps(records),
    "one line, no blanks": lambda records: json.dumps(records, separators=(",", ":")) + "\n",
    "two on a line": lambda records: "[" + ",\n".join(
        ", ".join(map(json.dumps, records[i : i + 2])) for i in range(0, len(records), 2)
    ) + "]",
}  # fmt: skip


def texts(path):
    content = path.read_bytes()
    return [content[start:end].strip(b"\xef\xbb\xbf \t\r\n,[]") for start, end in json_index.record_bounds(str(path))]


@pytest.mark.parametrize("block", [7, 64, 4 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, block, monkeypatch):
    monkeypatch.setattr(json_index, "_BLOCK_BYTES", block)
    path = tmp_path / "train.json"
    path.write_bytes(LAYOUTS[layout](RECORDS).encode())
    assert [json.loads(text) for text in texts(path)] == RECORDS
    # And again, from the index.
    assert [json.loads(text) for text in texts(path)] == RECORDS


@pytest.mark.parametrize("layout", ["lines", "indent 4", "one line"])
def test_records_larger_than_what_is_looked_at_at_once(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(json_index, "_SNIFF_LINE_BYTES", 100)
    monkeypatch.setattr(json_index, "_BLOCK_BYTES", 64)
    records = [dict(record, image="A" * 300) for record in RECORDS]
    path = tmp_path / "train.json"
    path.write_text(LAYOUTS[layout](records), encoding="utf-8")
    assert [json.loads(text) for text in texts(path)] == records


@pytest.mark.parametrize("content", [b"", b"[]", b"[\n]\n", b"\n", b"[ ]"])
def test_files_without_records(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    assert json_index.record_bounds(str(path)).shape == (0, 2)


@pytest.mark.parametrize("layout", ["lines", "indent 4"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("}", ""),
        lambda text: text.replace('"id": "', '"id": ', 1),
        lambda text: text.replace("[", "[" * 5000),
    ],
)
def test_a_broken_record_costs_itself_alone(tmp_path, layout, spoil):
    records = [dict(record, conversations=[["q", "a"]]) for record in RECORDS[:25]]
    between = ",\n" if layout == "lines" else ",\n    {"
    pieces = LAYOUTS[layout](records).split(between)
    assert len(pieces) == 25
    pieces[9] = spoil(pieces[9])
    path = tmp_path / "train.json"
    path.write_text(between.join(pieces), encoding="utf-8")
    good = []
    for text in texts(path):
        try:
            good.append(json.loads(text)["id"])
        except (ValueError, RecursionError):
            pass
    assert good == [f"identity_{i}" for i in range(25) if i != 9]


def test_scan_ends_a_broken_string_at_the_line_break(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[{"id": "a",\n"x": "unterminated,\n"y": 1}, {"id": "b"}, "text", 3, {"id":\n"c"}]')
    assert [text[:9] for text in texts(path)] == [b'{"id": "a', b'{"id": "b', b'{"id":\n"c']


def test_the_index_is_believed_while_the_file_is_the_same(tmp_path, monkeypatch):
    path = tmp_path / "train.json"
    path.write_text(as_lines(RECORDS), encoding="utf-8")
    bounds = json_index.record_bounds(str(path))
    index = tmp_path / ".train.json.idx"
    assert index.is_file()

    def refuse(path):
        raise AssertionError("the file was read again")

    with monkeypatch.context() as patch:
        patch.setattr(json_index, "scan_records", refuse)
        assert np.array_equal(json_index.record_bounds(str(path)), bounds)
        for spoiled in (
            index.read_bytes()[:-8],
            index.read_bytes() + b"x",
            b"MGENIDX0" + index.read_bytes()[8:],
            b"",
            index.read_bytes()[:-8] + (1 << 40).to_bytes(8, "little"),
            index.read_bytes()[:32] + (-5).to_bytes(8, "little", signed=True) + index.read_bytes()[40:],
            # Overlapping: one record made to end in the next.
            index.read_bytes()[:40] + (500).to_bytes(8, "little") + index.read_bytes()[48:],
        ):
            good = index.read_bytes()
            index.write_bytes(spoiled)
            with pytest.raises(AssertionError, match="read again"):
                json_index.record_bounds(str(path))
            index.write_bytes(good)
        os.utime(path, ns=(1, 1))
        with pytest.raises(AssertionError, match="read again"):
            json_index.record_bounds(str(path))
    path.write_text(as_lines(RECORDS[:3]), encoding="utf-8")
    assert len(json_index.record_bounds(str(path))) == 3


def test_a_folder_that_takes_no_index(tmp_path, monkeypatch, capsys):
    def full(path, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_index, "atomic_write", full)
    path = tmp_path / "train.json"
    path.write_text(as_lines(RECORDS), encoding="utf-8")
    assert len(json_index.record_bounds(str(path))) == 30
    assert "kept in memory only" in capsys.readouterr().err
    assert [name.name for name in tmp_path.iterdir()] == ["train.json"]


def test_missing_and_changing_files(tmp_path, monkeypatch):
    with refused(UserError, "unreadable"):
        json_index.record_bounds(str(tmp_path / "missing.json"))
    with refused(UserError, "not-regular"):
        json_index.record_bounds(str(tmp_path))
    path = tmp_path / "train.json"
    path.write_text("[]")
    scan = json_index.scan_records

    def change(name):
        path.write_text("[ ]")
        return scan(name)

    monkeypatch.setattr(json_index, "scan_records", change)
    with refused(UserError, "changed"):
        json_index.record_bounds(str(path))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_array_that_does_not_end_is_said(layout, tmp_path, caplog):
    path = tmp_path / "train.json"
    path.write_text(LAYOUTS[layout](RECORDS))
    whole = json_index.record_bounds(str(path))
    assert not caplog.records
    if path.read_text().rstrip().endswith("]"):
        path.write_bytes(path.read_bytes().rstrip()[:-1])
        assert len(json_index.record_bounds(str(path))) == len(whole)
        assert "ends without the ] of its array" in caplog.text


value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(['"', "\\", "{", "]", '\\"']),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)
record = st.dictionaries(st.text(max_size=4), value, min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(record, min_size=1, max_size=5), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 40))
@example([{"a": [{}]}, {"b": [{"c": "\\"}]}], "one line", 1)
def test_any_records_in_any_layout(tmp_path_factory, records, layout, block):
    path = tmp_path_factory.mktemp("json") / "train.json"
    path.write_bytes(LAYOUTS[layout](records).encode())
    before = json_index._BLOCK_BYTES
    json_index._BLOCK_BYTES = block
    try:
        assert [json.loads(text) for text in texts(path)] == records
    finally:
        json_index._BLOCK_BYTES = before
