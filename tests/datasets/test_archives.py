"""Tables in .gz, .tar and .tar.gz files: the same records as of the plain file, and what hostile archives cost.

python -m pytest tests/datasets/test_archives.py
"""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import tarfile

import pytest

from paddlemix.datasets import archives
from paddlemix.datasets.labels import Options, convert
from paddlemix.datasets.rows import read_rows
from paddlemix.utils.errors import JobFailed, UserError
from tests.helpers import image_base64, refused

TABLE = "".join(f"ad{n}\t{image_base64(n % 3)}\t标题{n}\n" for n in range(45)).encode()
CSV = f"id,caption,image\na,\"红杯,\"\"新\"\"\",{image_base64(0)}\n".encode()


def tar_of(files, mode="w:gz", **header):
    """files: name → bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **header) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def rows(path, data):
    path.write_bytes(data)
    return list(read_rows(str(path), True, archives=True))


def converted(path, out, **options):
    result = convert(str(path), str(out), Options(**options), disable_progress=True)
    return result, [json.loads((out / name).read_bytes()) for name in ("train.json", "val.json")]


@pytest.mark.parametrize("table", [b"\xef\xbb\xbf" + TABLE, TABLE.replace(b"\n", b"\r\n")], ids=["bom", "crlf"])
@pytest.mark.parametrize("verify", ["none", "decode"])
def test_an_archive_gives_the_records_of_its_table(tmp_path, table, verify):
    (tmp_path / "plain.tsv").write_bytes(table)
    _, wanted = converted(tmp_path / "plain.tsv", tmp_path / "plain")
    packed = {
        "in.gz": gzip.compress(table), "two.gz": gzip.compress(table[:1000]) + gzip.compress(table[1000:]),
        "in.tar": tar_of({"train.txt": table}, "w"), "in.tar.gz": tar_of({"data/train.tsv": table}),
        "gnu.tar": tar_of({"n" * 300 + ".txt": table}, "w", format=tarfile.GNU_FORMAT),
        "pax.tar": tar_of({"标" * 300 + ".txt": table}, "w", format=tarfile.PAX_FORMAT),
        "no_extension.tar": tar_of({"train": table}, "w"),
    }  # fmt: skip
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        result, found = converted(tmp_path / name, tmp_path / "out", verify=verify, workers=1)
        assert (found, result.n_train, result.n_val) == (wanted, 42, 3), name


def test_all_tables_of_an_archive_are_read_and_named(tmp_path):
    data = tar_of({
        "images/0.jpg": bytes(2000), "README.txt": "没有列".encode(), "one.txt": b"bad\tx\n" + TABLE,
        "._one.txt": TABLE, "two.CSV": CSV, "sub/three.tsv": TABLE[:10] + b"\n", "model.gz": gzip.compress(TABLE),
        "empty.txt": b"",
    })  # fmt: skip
    found = rows(tmp_path / "in.tar.gz", data)
    assert [row.member for row in found] == ["one.txt"] * 46 + ["two.CSV", "sub/three.tsv"]
    assert (found[46].id, found[46].caption, found[46].line_no) == ("a", '红杯,"新"', 2)
    assert all(0 < one.next_offset <= other.next_offset <= len(data) for one, other in zip(found, found[1:]))
    result, _ = converted(tmp_path / "in.tar.gz", tmp_path / "out")
    assert (result.n_train, result.n_val) == (43, 3)
    rejected = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in rejected] == ["one.txt:1", "sub/three.tsv:1"]
    assert (tmp_path / "out" / "ids.tsv").read_text().splitlines()[-1] == "identity_45\ta\ttwo.CSV:2"


def test_what_is_refused(tmp_path):
    path = tmp_path / "in.tar.gz"
    whole = tar_of({"t.txt": TABLE})
    for data, says in [
        (whole[:-100], "damaged"), (whole[:20], "damaged"),
        (gzip.compress(TABLE)[:-4], "damaged"), (whole[:200] + b"x" + whole[201:], "damaged"),
        (gzip.compress(gzip.decompress(whole)[:1000]), "damaged"), (tar_of({"a.jpg": b"x"}), "holds no table"),
        (tar_of({}), "holds no table"), (bz2.compress(TABLE), "bzip2"), (lzma.compress(TABLE), "xz"),
        (gzip.compress(whole), "is a tar archive|compressed"), (gzip.compress(b'[{"id": 1}]'), "JSON"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=says):
            rows(path, data)
            # What was cut off may not be missed by a row.
            convert(str(path), str(tmp_path / "out"), Options(), disable_progress=True)
    path.write_bytes(whole)
    with refused(UserError, "images"):
        convert(str(path), str(tmp_path / "out"), Options(images="reference"), disable_progress=True)
    with pytest.raises(UserError, match="unpack it first"):
        read_rows(str(path), False)
    path.write_bytes(gzip.compress(b""))
    with refused(JobFailed, "empty"):
        convert(str(path), str(tmp_path / "out"), Options(), disable_progress=True)


def test_a_file_that_expands_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 20)
    zeros = bytes(64 << 20)
    for data in (gzip.compress(zeros), tar_of({"t.txt": zeros}), tar_of({"t.jpg": zeros})):
        with refused(UserError, "ratio", match="over 200 times"):
            rows(tmp_path / "in", data)


def test_headers_and_numbers_of_files_are_bounded(tmp_path, monkeypatch):
    big = tarfile.TarInfo("t.txt")
    big.pax_headers = {"comment": "x" * (2 << 20)}
    headers = big.tobuf(tarfile.PAX_FORMAT)
    links = b"".join(tarfile.TarInfo("n" * 200 + str(n)).tobuf(tarfile.GNU_FORMAT)[:1024] for n in range(2000))
    for data, says in ((headers, "attributes of a file in it take over 1"), (links, "take over 1|RecursionError")):
        with pytest.raises(UserError, match=says):
            rows(tmp_path / "in.tar", data + bytes(1024))
    negative = bytearray(tarfile.TarInfo("t.txt").tobuf())
    negative[124:136] = b"\xff" * 11 + b"\x00"
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:512]) + 8 * 32)
    with pytest.raises(UserError, match="damaged|holds no table"):
        rows(tmp_path / "in.tar", bytes(negative) + bytes(1024))
    monkeypatch.setattr(archives, "_MAX_FILES", 10)
    with refused(UserError, "files", match="more than 10 "):
        rows(tmp_path / "in.tar", tar_of({f"{n}.jpg": b"" for n in range(11)}))


def test_names_of_strangers_reach_no_terminal(tmp_path):
    (row,) = rows(tmp_path / "in.tar", tar_of({"a\x1b[2J\n.txt": TABLE[: TABLE.index(b"\n")]}, "w"))
    assert row.member == "a?[2J?.txt"


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("pack", [None, "gz", "tar.gz"])
def test_other_encodings_are_refused_with_the_command_to_convert_them(tmp_path, encoding, pack):
    data = TABLE.decode().encode(encoding)
    name = "in.tsv" if pack is None else f"in.{pack}"
    path = tmp_path / name
    path.write_bytes(data if pack is None else gzip.compress(data) if pack == "gz" else tar_of({"t.txt": data}))
    with pytest.raises(UserError) as caught:
        convert(str(path), str(tmp_path / "out"), Options(), disable_progress=True)
    said = str(caught.value)
    assert ("GBK" if encoding == "gb18030" else "UTF-16") in said and "\n" not in said
    command = said.split("is needed: ")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    out = os.path.join(tmp_path, command.split(" > ")[1])
    with open(out, "rb") as file:
        assert file.read().replace(b"\xef\xbb\xbf", b"") == TABLE


def test_a_few_captions_in_gbk_cost_themselves_alone(tmp_path):
    bad = f"x\t{image_base64(0)}\t标题\n".encode("gbk")
    found = rows(tmp_path / "in.tsv", TABLE + bad)
    assert [row.error for row in found] == [None] * 45 + ["caption is not UTF-8"]
    # In prediction nobody reads the third column.
    (tmp_path / "in.tsv").write_bytes(bad)
    assert [row.id for row in read_rows(str(tmp_path / "in.tsv"), False)] == ["x"]
