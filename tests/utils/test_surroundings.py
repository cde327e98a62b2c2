"""Processes that lack something: closed streams, no home, an unusual locale."""

import io
import json
import os
import subprocess
import sys

import pytest

from paddlemix.utils import cli, surroundings
from paddlemix.utils.errors import UserError
from tests.helpers import refused

# Says what it was given, prints, and writes a file whose number must not be one of the standard streams'.
SCRIPT = """
import json, os, sys
from paddlemix.utils import cli
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress

def main():
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        print("标题")
        logger.warning("a warning")
        with Progress(2) as bar:
            bar.update(2)
        os.write(1, b"printed by a library")
        said = {"words": sys.argv[2:], "number": file.fileno(), "optimize": sys.flags.optimize}
        said.update(read=sys.stdin.read(), encoding=sys.stdout.encoding)
        json.dump(said, file, ensure_ascii=False)
    return 0

if __name__ == "__main__":
    sys.exit(cli.run(main))
"""


@pytest.fixture
def script(tmp_path, root):
    """Runs SCRIPT by a shell, with what stands behind the words there; gives what it said and what it printed."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")

    def run(behind="", words=(), python=(), **environment):
        quoted = " ".join(f"'{word}'" for word in [sys.executable, *python, path, tmp_path / "图.json", *words])
        env = dict(os.environ, PYTHONPATH=str(root), **environment)
        done = subprocess.run(f"{quoted} {behind}".encode(), shell=True, env=env, input=b"", capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads((tmp_path / "图.json").read_text(encoding="utf-8")), done.stdout

    return run


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(script, closed):
    said, printed = script(closed)
    assert said["number"] > 2 and said["read"] == ""
    assert ("标题".encode() in printed) == (">&-" not in closed.split())


def test_a_locale_of_another_encoding(script):
    """Such a locale need not be installed: C is ASCII, once Python is not let to take it for UTF-8."""
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said, printed = script(words=["一张图片"], **ascii)
    assert said["words"] == ["一张图片"] and printed.startswith("标题".encode())
    said, printed = script(words=["一张图片"], PYTHONIOENCODING="gbk")
    assert said["encoding"] == "utf-8" and printed.startswith("标题".encode())


@pytest.mark.parametrize("python, environment", [(["-O"], {}), (["-OO", "-u"], {}), ([], {"PYTHONOPTIMIZE": "2"})])
def test_optimized_python_is_started_again_without(script, python, environment):
    assert script(python=python, words=["--a", "b c"], **environment)[0] == {
        "words": ["--a", "b c"], "number": 3, "optimize": 0, "read": "", "encoding": "utf-8",
    }  # fmt: skip


def test_another_process_is_not_started_again(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")
    monkeypatch.setattr(os, "execve", lambda *words: pytest.fail("that would be the end of the tests"))
    assert cli.run(lambda: 3) == 3


def test_a_notebooks_streams(monkeypatch):
    class Stream(io.StringIO):
        reconfigure = property(lambda self: self.no_such_thing)

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, Stream())
    assert cli.run(lambda: print("标题")) == 0 and sys.stdout.getvalue() == "标题\n"
    sys.stderr.close()
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(lambda: print("标题") or print("标题", file=sys.stderr)) == 0


def test_a_leading_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/tmp/mine")
    assert [cli.path(text) for text in ("~/a", "~", "a~/b", "./~/c")] == [
        "/tmp/mine/a", "/tmp/mine", "a~/b", "./~/c",
    ]  # fmt: skip


# ---- libraries


def fresh(code, root, **environment):
    env = {name: value for name, value in os.environ.items() if name not in ("PPNLP_HOME", "MPLCONFIGDIR")}
    env.update(environment, PYTHONPATH=str(root))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("home", ["", "file/below", "file", "missing", None])
def test_paddlenlp_is_imported_without_a_home(tmp_path, root, home):
    """A home that takes nothing to anyone, root included, lies below a file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "t").mkdir()
    code = (
        "import paddlemix, paddlenlp, os; home = os.environ.get('HOME')\n"
        "try:\n    import visualdl\nexcept ImportError:\n    pass\n"
        "assert os.environ.get('HOME') == home\n"
        "print(os.environ.get('PPNLP_HOME'), os.environ.get('MPLCONFIGDIR'))"
    )
    environment = {"TMPDIR": str(tmp_path / "t"), "HOME": str(tmp_path / home) if home is not None else "not/absolute"}
    done = fresh(code, root, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == ""
    writable = home in ("", "missing")
    elsewhere = "t/mgen-vl-" if not writable else "None None"
    assert elsewhere in done.stdout.splitlines()[-1]
    assert (tmp_path / (home or "") / ".paddlenlp").exists() == writable


@pytest.mark.slow
def test_paddle_is_imported_where_the_cache_takes_nothing(tmp_path, root):
    """As that of another user, which a program run by sudo made."""
    (tmp_path / ".cache").write_text("")
    done = fresh("import paddlemix, paddle.dataset.common as it; print(it.DATA_HOME)", root, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not done.stdout.startswith(str(tmp_path))


def test_a_users_own_places_stay(tmp_path, root):
    code = "import paddlemix, os; print(os.environ['PPNLP_HOME'])"
    assert fresh(code, root, HOME="/dev/null", PPNLP_HOME=str(tmp_path)).stdout == f"{tmp_path}\n"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [None, "2"])
def test_paddle_says_nothing_about_threads(root, threads):
    code = (
        "import os, sys, paddlemix\n"
        "if os.environ['OMP_NUM_THREADS'] == '1': os.environ['OMP_NUM_THREADS'] = '2'\n"
        "before = os.environ['OMP_NUM_THREADS']\n"
        "import paddle\n"
        "assert os.environ['OMP_NUM_THREADS'] == before\n"
        "paddle.matmul(paddle.rand([8, 8]), paddle.rand([8, 8]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment.update({} if threads is None else {"OMP_NUM_THREADS": threads}, PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OMP_NUM_THREADS" not in done.stderr


def test_no_room_for_locks(monkeypatch):
    import multiprocessing

    surroundings.check_shared_memory(2, "--workers 0")
    monkeypatch.setattr(multiprocessing, "Lock", lambda: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with refused(UserError, "shared-memory", match="No space left on device.*--workers 0"):
        surroundings.check_shared_memory(2, "--workers 0")


def test_many_open_files(monkeypatch):
    import resource

    limits = [(256, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    surroundings.allow_open_files(100, "")
    assert len(limits) == 1
    surroundings.allow_open_files(500, "")
    assert limits[-1] == (564, 1000)
    with refused(UserError, "open-files", match="2000 .* 1000: do less"):
        surroundings.allow_open_files(2000, "do less")
