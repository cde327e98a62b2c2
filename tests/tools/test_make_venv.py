"""`make venv` decides rightly about Paddle. pip itself is replaced here: nothing is downloaded."""

import os
import re
import subprocess
import sys

import pytest

from paddlemix.utils.errors import JobFailed, UserError
from tools import make_venv

LOCKS = (make_venv.LOCK, "requirements/lock-paddle26.txt")


@pytest.fixture
def environment(tmp_path):
    """Makes bare environments (without pip) in a folder whose path has a blank; gives their interpreters."""

    def make(name: str) -> str:
        folder = tmp_path / f"an {name}"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        return str(folder / "bin" / "python")

    return make


def install_fake_paddle(python, name="paddlepaddle-gpu", version="3.3.1", body="") -> str:
    """A package `paddle` as pip would leave it; gives its folder."""
    site = make_venv.describe(python).site
    info = os.path.join(site, f"{name.replace('-', '_')}-{version}.dist-info")
    os.makedirs(info)
    with open(os.path.join(info, "METADATA"), "w") as file:
        file.write(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    folder = os.path.join(site, "paddle")
    os.makedirs(folder)
    with open(os.path.join(folder, "__init__.py"), "w") as file:
        file.write(body)
    return folder


def run_code(python, code) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


def as_base(monkeypatch, python: str) -> None:
    """Let make_venv believe that `python` runs it."""
    monkeypatch.setattr(make_venv.sys, "executable", python)


def test_cpu_wheel_where_there_is_no_paddle(environment, monkeypatch):
    python = environment("environment")
    as_base(monkeypatch, environment("base"))
    assert make_venv.choose_paddle(python, "auto", make_venv.LOCK) == ["paddlepaddle"]
    assert make_venv.choose_paddle(python, "none", make_venv.LOCK) == []
    assert make_venv.choose_paddle(python, "paddlepaddle-gpu==3.3.1", make_venv.LOCK) == ["paddlepaddle-gpu==3.3.1"]


@pytest.mark.parametrize(
    ("wanted", "lock", "version"),
    [("auto", LOCKS[1], "2.6.1"), ("none", LOCKS[0], "3.2.2"), ("paddlepaddle==3.3.1", LOCKS[0], "3.2.2")],
)
def test_paddle_in_the_environment_is_kept(environment, monkeypatch, capsys, wanted, lock, version):
    python = environment("environment")
    as_base(monkeypatch, environment("base"))
    folder = install_fake_paddle(python, version=version)
    assert make_venv.choose_paddle(python, wanted, lock) == []
    assert f"keeping paddlepaddle-gpu {version} in {folder}" in capsys.readouterr().out


def test_paddle_of_the_base_python_is_used_in_place(environment, monkeypatch, capsys):
    base, python = environment("base"), environment("environment")
    folder = install_fake_paddle(base, body="flavour = 'gpu'\n")
    before = sorted(os.listdir(os.path.dirname(folder)))
    as_base(monkeypatch, base)
    assert make_venv.choose_paddle(python, "auto", make_venv.LOCK) == []
    assert f"using paddlepaddle-gpu 3.3.1 in {folder}" in capsys.readouterr().out
    seen = run_code(python, "import paddle; print(paddle.flavour, paddle.__file__)")
    assert seen == f"gpu {folder}/__init__.py\n"
    assert sorted(os.listdir(os.path.dirname(folder))) == before


def test_own_packages_come_before_those_of_the_base_python(environment, monkeypatch):
    base, python = environment("base"), environment("environment")
    install_fake_paddle(base)
    for interpreter, text in ((base, "theirs"), (python, "ours")):
        with open(os.path.join(make_venv.describe(interpreter).site, "pinned.py"), "w") as file:
            file.write(f"whose = {text!r}\n")
    as_base(monkeypatch, base)
    make_venv.choose_paddle(python, "auto", make_venv.LOCK)
    assert run_code(python, "import pinned; print(pinned.whose)") == "ours\n"


@pytest.mark.parametrize(("lock", "version", "fits"), zip(LOCKS, ("2.6.2", "3.3.1"), ("3.3.1", "2.6.2")))
def test_the_other_paddle_is_refused_and_kept(environment, monkeypatch, lock, version, fits):
    base, python = environment("base"), environment("environment")
    folder = install_fake_paddle(base, version=version)
    as_base(monkeypatch, base)
    message = f"paddlepaddle-gpu {version} .* is kept, but {lock} is for Paddle {fits};.*PADDLE=paddlepaddle=={fits}"
    with pytest.raises(UserError, match=message):
        make_venv.choose_paddle(python, "auto", lock)
    assert os.path.isdir(folder)


def test_a_lock_without_paddle_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "lock.txt").write_text("numpy==1.26.4\npaddlepaddle>=3\n")
    for lock in (tmp_path / "lock.txt", tmp_path / "none.txt"):
        with pytest.raises(UserError, match="is no lock file with a line paddlepaddle=="):
            make_venv.main(["--venv", str(tmp_path / "environment"), "--lock", str(lock)])
    assert not (tmp_path / "environment").exists()


def test_whole_run_names_no_wheel_when_a_paddle_is_there(environment, monkeypatch, capsys):
    python = environment("environment")
    install_fake_paddle(python)
    calls = []
    monkeypatch.setattr(make_venv, "has_pip", lambda python: True)
    monkeypatch.setattr(make_venv, "run_pip", lambda python, lock, *arguments: calls.append((lock, arguments)))
    assert make_venv.main(["--venv", os.path.dirname(os.path.dirname(python))]) == 0
    asked = [argument for _, arguments in calls for argument in arguments]
    assert "requirements.txt" in asked and "paddlepaddle" not in asked
    assert {lock for lock, _ in calls} == {make_venv.LOCK}
    assert "ready: " in capsys.readouterr().out


def test_a_paddle_that_pip_brought_in_unasked_is_an_error(environment, monkeypatch):
    base, python = environment("base"), environment("environment")
    install_fake_paddle(base)
    as_base(monkeypatch, base)

    def pip_with_a_surprise(python, lock, *arguments):
        if "requirements.txt" in arguments:
            install_fake_paddle(python, name="paddlepaddle")

    monkeypatch.setattr(make_venv, "has_pip", lambda python: True)
    monkeypatch.setattr(make_venv, "run_pip", pip_with_a_surprise)
    with pytest.raises(JobFailed, match="is now hidden by"):
        make_venv.main(["--venv", os.path.dirname(os.path.dirname(python))])


def test_missing_libgomp_is_taken_from_a_wheel(environment):
    python = environment("environment")
    site = make_venv.describe(python).site
    assert not make_venv.provide_openmp(python)
    os.makedirs(os.path.join(site, "scikit_learn.libs"))
    with open(os.path.join(site, "scikit_learn.libs", "libgomp-0123abcd.so.1.0.0"), "wb") as file:
        file.write(b"ELF libgomp-0123abcd.so.1.0.0\0 the end")
    assert make_venv.provide_openmp(python)
    with open(os.path.join(site, "libgomp", "libgomp.so.1"), "rb") as file:
        copy = file.read()
    assert copy.startswith(b"ELF libgomp.so.1\0") and copy.endswith(b"\0 the end")
    assert len(copy) == len(b"ELF libgomp-0123abcd.so.1.0.0\0 the end")


def test_paddle_that_does_not_import_fails_with_its_last_line(environment):
    python = environment("environment")
    install_fake_paddle(python, body="raise ImportError('libmissing.so: no such file')\n")
    with pytest.raises(JobFailed, match="libmissing.so: no such file"):
        make_venv.check_import(python)


def test_python_versions():
    make_venv.check_version("python3", [3, 10, 0])
    make_venv.check_version("python3", [3, 12, 9])
    for version in ([3, 9, 18], [3, 13, 0]):
        with pytest.raises(UserError, match=f"is Python 3.{version[1]}.*make PYTHON="):
            make_venv.check_version("python3", version)


def test_half_made_environment_is_named(tmp_path):
    with pytest.raises(UserError, match="does not run .*delete that"):
        make_venv.describe(str(tmp_path / "bin" / "python"))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_name_that_is_installed_has_a_pin(root, lock):
    def names(path):
        lines = (line.split("#")[0].strip() for line in (root / path).read_text().splitlines())
        return {re.split(r"[\s<>=;]", line)[0].lower().replace("_", "-") for line in lines if line}

    locked = names(lock)
    for path in (make_venv.BUILD, *make_venv.PROGRAM, "requirements/submission.txt"):
        assert names(path) <= locked, path
    assert make_venv.CPU_WHEEL in locked
    for path in ("requirements.txt", "requirements/submission.txt"):
        assert make_venv.CPU_WHEEL not in names(path)


def test_a_submission_asks_for_the_paddlenlp_of_the_platforms_lock(root):
    pin = re.search(r"^paddlenlp==\S+$", (root / LOCKS[1]).read_text(), flags=re.MULTILINE).group()
    assert pin in (root / "requirements/submission.txt").read_text().splitlines()
