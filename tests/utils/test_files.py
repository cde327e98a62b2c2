"""Files that appear complete or not at all, and locks."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from paddlemix.utils import files, outputs
from paddlemix.utils.errors import UserError
from tests.helpers import refused


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.atomic_write(str(path)) as file:
        file.write("字\n")
        assert not path.exists()
    assert path.read_bytes() == "字\n".encode()
    umask = os.umask(0o027)
    try:
        with files.atomic_write(str(path)), files.atomic_folder(str(tmp_path / "b")):
            pass
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750
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
    with refused(UserError, "busy", match="out"):
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


# ---- what is there already, and file systems that cannot do everything


def write_both(folder):
    """A file and a folder, each new and in the place of an older one; what stands there then."""
    for text in ("one", "two"):
        with files.atomic_write(str(folder / "a.txt")) as file:
            file.write(text)
        with files.atomic_folder(str(folder / "b")) as inner:
            with open(os.path.join(inner, text), "w"):
                pass
    assert sorted(os.listdir(folder)) == ["a.txt", "b"]
    return (folder / "a.txt").read_text(), os.listdir(folder / "b")


def refuse(number, only=lambda *arguments: True, call=None):
    def refused(*arguments, **named):
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments, **named)

    return refused


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folder(tmp_path, monkeypatch, number):
    """CIFS, VirtualBox' shares, some FUSE."""
    folders_only = refuse(number, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode), os.fsync)
    monkeypatch.setattr(os, "fsync", folders_only)
    assert write_both(tmp_path) == ("two", ["two"])


def test_a_file_system_that_changes_no_rights(tmp_path, monkeypatch):
    """gcsfuse, s3fs, CIFS."""
    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse(errno.EPERM))
    assert write_both(tmp_path) == ("two", ["two"])
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    assert not files.link_or_copy(str(tmp_path / "a.txt"), str(tmp_path / "c.txt"))
    assert (tmp_path / "c.txt").read_text() == "two"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.ENOSYS])
def test_a_file_system_that_renames_no_folder(tmp_path, monkeypatch, number):
    """Object stores; overlayfs, for folders of the image."""
    monkeypatch.setattr(files, "_exchange", lambda *folders: False)
    monkeypatch.setattr(os, "rename", refuse(number, lambda source, target: os.path.isdir(source), os.rename))
    assert write_both(tmp_path) == ("two", ["two"])
    moved = []
    (tmp_path / "b" / "checkpoint.json").write_text("{}")
    (tmp_path / "b" / "weights").write_text("")
    move = shutil.move
    monkeypatch.setattr(shutil, "move", lambda source, target: moved.append(source) or move(source, target))
    files.rename_folder(str(tmp_path / "b"), str(tmp_path / "checkpoint-1"))
    assert sorted(os.listdir(tmp_path / "checkpoint-1")) == ["checkpoint.json", "two", "weights"]
    assert moved[-1].endswith("checkpoint.json") and not (tmp_path / "b").exists()


def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "there").write_text("old")
    for name in ("there", "dangling"):
        with files.atomic_write(str(tmp_path / name)) as file:
            file.write("new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "far")) == ["dangling", "there"]


def test_names_that_are_not_utf8_go_into_json(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")
    with files.atomic_write(path) as file:
        json.dump({"path": path}, file, ensure_ascii=False)
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == {"path": path}


def test_what_a_dangling_link_leads_to_is_made(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "far" / "new")
    with files.only_writer(str(tmp_path / "out")):
        (tmp_path / "out" / "file").write_text("")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "far" / "new" / "file").is_file()


def test_a_pipe_is_written_into(tmp_path):
    """As devices are: renaming onto /dev/null would make a file of it, as root for everyone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with files.atomic_write(str(pipe), "wb") as file:
        file.write(b"said")
    assert os.read(reader, 99) == b"said" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]
    outputs.check_file(str(pipe))
    with refused(UserError, "not-regular"):
        outputs.check_file(str(pipe), plain=True)


IN_MOUNTS = """
import os, sys
from paddlemix.utils import files
for text in ("one", "two"):
    with files.atomic_write("bound") as file:
        file.write(text)
    with files.atomic_folder("disk") as folder:
        assert os.path.dirname(folder).endswith("/disk"), "or 19 GB go to another disk first"
        for name in ("config.json", text):
            with open(os.path.join(folder, name), "w"):
                pass
        assert text == "one" or "one" in os.listdir("disk")
with files.atomic_folder("bound folder") as folder:
    with open(os.path.join(folder, "two"), "w"):
        pass
print(os.getcwd(), open("bound").read(), sorted(os.listdir("disk")), sorted(os.listdir("bound folder")))
"""


def test_mounts_keep_their_place(tmp_path, root):
    """docker -v of a file, and of a folder; a folder of the same disk tells that it is a mount when it is renamed."""
    for name in ("disk", "far", "bound folder", "far folder"):
        (tmp_path / name).mkdir() if name != "far" else (tmp_path / name).write_text("old")
    (tmp_path / "bound").write_text("")
    mounts = "mount --bind far bound && mount -t tmpfs none disk && mkdir disk/lost+found && "
    mounts += "mount --bind 'far folder' 'bound folder'"
    command = ["unshare", "-m", "sh", "-c", f'{mounts} || exit 77; exec "$@"', "sh", sys.executable, "-c", IN_MOUNTS]
    env = dict(os.environ, PYTHONPATH=str(root))
    try:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode != 0 and "Traceback" not in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path} two ['config.json', 'lost+found', 'two'] ['two']\n"
    assert (tmp_path / "far").read_text() == "two" and os.listdir(tmp_path / "far folder") == ["two"]
    assert sorted(os.listdir(tmp_path)) == ["bound", "bound folder", "disk", "far", "far folder"]


def test_a_file_in_a_folder_that_takes_no_other(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for module in (files, outputs):
        monkeypatch.setattr(module, "takes_entries", lambda folder: folder != str(tmp_path))
    monkeypatch.setattr(os, "replace", refuse(errno.EXDEV))
    outputs.check_file(str(tmp_path / "a.txt"))
    with files.atomic_write(str(tmp_path / "a.txt")) as file:
        file.write("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["a.txt", "t"]
    with refused(UserError, "not-writable"):
        outputs.check_file(str(tmp_path / "b.txt"))


# ---- what is refused before any work


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file/a", "file/a/b"):
        for check in (outputs.check_file, outputs.check_folder):
            with refused(UserError, "not-writable"):
                check(str(tmp_path / path))
    with refused(UserError, "is-a-folder"):
        outputs.check_file(str(tmp_path))
    with refused(UserError, "is-a-file"):
        outputs.check_folder(str(tmp_path / "file"))
    with refused(UserError, "is-a-file"):
        with files.atomic_folder(str(tmp_path / "file")):
            pass
    for path in ("file", "new", "new/a/b"):
        outputs.check_file(str(tmp_path / path))
    assert os.listdir(tmp_path) == ["file"], "nothing is made"


def test_an_input_is_not_written_over(tmp_path):
    (tmp_path / "in").write_text("")
    (tmp_path / "link").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "hard")
    (tmp_path / "other").write_text("")
    given, missing = str(tmp_path / "in"), str(tmp_path / "missing")
    outputs.keep_apart([given, None, missing], [str(tmp_path / "other"), None, missing])
    for name in ("in", "link", "hard"):
        with refused(UserError, "overlap"):
            outputs.keep_apart([missing, given], [str(tmp_path / "other"), str(tmp_path / name)])


def test_two_outputs_are_two_files(tmp_path):
    (tmp_path / "link").symlink_to("new")
    outputs.keep_apart([], [os.devnull, os.devnull, str(tmp_path / "new")])
    for name in ("new", "link"):
        with refused(UserError, "overlap"):
            outputs.keep_apart([], [str(tmp_path / "new"), None, str(tmp_path / name)])


def test_one_process_writes_into_a_folder(tmp_path, root):
    folder = tmp_path / "out"
    code = "import sys\nfrom paddlemix.utils.files import *\nwith only_writer(sys.argv[1]): print(1, flush=1), input()"
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    with refused(UserError, "busy"):
        with files.only_writer(str(folder)):
            pass
    process.communicate("\n")
    assert process.returncode == 0 and not folder.exists(), "it was made for nothing"
    with files.only_writer(str(folder)):
        (folder / "a").write_text("")
        # A child that lives on, as a loader's worker may for a moment, keeps nobody out.
        (asked, ask), (ready, is_ready), pid = os.pipe(), os.pipe(), os.fork()
        if pid == 0:
            os.close(ask)
            os.write(is_ready, b"1")
            os.read(asked, 1)
            os._exit(0)
        os.read(ready, 1)
        # As a kill closes it.
        os.close(files._WRITING.pop())
    with files.only_writer(str(folder)):
        pass
    for end in (ask, asked, ready, is_ready):
        os.close(end)
    assert os.waitpid(pid, 0)[1] == 0 and os.listdir(folder) == ["a"]
