"""Files that appear whole or not at all. Run: pytest tests/utils/test_files.py"""

import os
import stat

import pytest

from paddlemix.utils import files


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.atomic_write(str(path)) as file:
        file.write("字\n")
        assert not path.exists()
    assert path.read_bytes() == "字\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files._UMASK
    assert os.listdir(path.parent) == ["a.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"):
        with files.atomic_write(str(path), "wb") as file:
            file.write(b"half")
            raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("one", "two"):
        with files.atomic_folder(str(target)) as folder:
            with open(os.path.join(folder, text), "w"):
                pass
        assert os.listdir(target) == [text]
    with pytest.raises(RuntimeError):
        with files.atomic_folder(str(target)) as folder:
            raise RuntimeError
    assert os.listdir(target) == ["two"] and os.listdir(tmp_path) == ["out"]


def test_link_or_copy(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.write_text("x")
    files.link_or_copy(str(source), str(tmp_path / "b"))
    assert os.path.samefile(source, tmp_path / "b")
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("no links here")))
    files.link_or_copy(str(source), str(tmp_path / "c"))
    assert (tmp_path / "c").read_text() == "x" and not os.path.samefile(source, tmp_path / "c")
