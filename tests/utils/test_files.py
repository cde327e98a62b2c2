"""Files that appear complete or not at all, and locks."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from paddlemix.utils import files
from paddlemix.utils.errors import UserError


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


# ---- killed processes

WRITE_FOLDER = """
import os, signal, sys, time
from paddlemix.utils import files
from paddlemix.utils.errors import UserError
path, how = sys.argv[1:]
# What started the tests may ignore them: nohup, a shell's background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with files.atomic_folder(path) as folder:
    with open(os.path.join(folder, "model"), "w") as file:
        file.write("new")
    print(os.path.basename(folder), flush=True)
    if how == "wait":
        time.sleep(60)
    if how != "KILL":
        files._exchange = lambda *folders: False
        rename = os.rename
        def renamed(source, target):
            rename(source, target)
            if target.endswith("/old"):
                os.kill(os.getpid(), signal.SIGKILL)
        os.rename = renamed
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def writing(root, path, how):
    command = [sys.executable, "-c", WRITE_FOLDER, str(path), how]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, root):
    target = tmp_path / "out"
    for _ in range(2):
        process = writing(root, target, "KILL")
        left = process.communicate()[0].strip()
        assert process.returncode == -signal.SIGKILL
        assert os.listdir(tmp_path) == [left], "and the one before is gone"
    (tmp_path / ".out.notes.partial").write_text("not of this form")
    (tmp_path / ".other.abcdefgh.partial").write_text("of another name")
    (tmp_path / ".out.abcdefgh.partial").symlink_to(tmp_path / "elsewhere")
    kept = {".out.notes.partial", ".other.abcdefgh.partial", ".out.abcdefgh.partial"}
    with files.atomic_folder(str(target)):
        pass
    assert set(os.listdir(tmp_path)) == {"out", *kept}


def test_a_file_that_a_killed_process_left_is_removed_by_the_next(tmp_path, root):
    code = "import os, sys\nfrom paddlemix.utils import files\nwith files.atomic_write(sys.argv[1]):\n    os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=root, check=True)
    assert len(os.listdir(tmp_path)) == 1
    with files.atomic_write(str(tmp_path / "a.txt")):
        with files.atomic_write(str(tmp_path / "a.txt")) as file:
            file.write("the inner one")
        assert len(os.listdir(tmp_path)) == 2, "what a process that lives is writing stays"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_and_ends_the_process(tmp_path, root, number):
    target = tmp_path / "out"
    process = writing(root, target, "wait")
    left = process.stdout.readline().strip()
    assert os.listdir(tmp_path) == [left]
    with pytest.raises(UserError, match="another process is writing .*out"):
        with files.atomic_folder(str(target)):
            pass
    assert os.listdir(tmp_path) == [left], "it lives, so it is left alone"
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -number and os.listdir(tmp_path) == []


def test_a_folder_is_never_lost_while_it_is_replaced(tmp_path, root):
    target = tmp_path / "out"
    target.mkdir()
    (target / "model").write_text("old")
    process = writing(root, target, "between the renames")
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not target.exists()
    files.remove_leftovers(str(target))
    assert (target / "model").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("at_once", [True, False])
def test_replacing_in_one_step_and_in_two(tmp_path, monkeypatch, at_once):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    (tmp_path / "link").symlink_to(target)
    steps = []
    exchange, rename = files._exchange, os.rename
    monkeypatch.setattr(files, "_exchange", lambda *folders: at_once and exchange(*folders))
    monkeypatch.setattr(os, "rename", lambda *names: steps.append(names) or rename(*names))
    with files.atomic_folder(str(tmp_path / "link")) as folder:
        with open(os.path.join(folder, "new"), "w"):
            pass
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"] and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]
    # Not every file system can exchange two folders.
    assert len(steps) == 2 or (at_once and not steps)


def test_every_file_of_a_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def noted(handle):
        synced.append((os.fstat(handle).st_ino, (tmp_path / "out").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with files.atomic_folder(str(tmp_path / "out")) as folder:
        os.mkdir(os.path.join(folder, "inner"))
        for name in ("config.json", "inner/vocabulary"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("x")
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert (path.stat().st_ino, False) in synced, path
    assert (tmp_path.stat().st_ino, True) in synced
