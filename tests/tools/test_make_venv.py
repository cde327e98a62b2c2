"""`make venv` decides rightly about Paddle. pip itself is replaced here: nothing is downloaded."""

import os
import subprocess
import sys

import pytest

from paddlemix.utils.errors import JobFailed, UserError
from tools import make_venv


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
    assert make_venv.choose_paddle(python, "auto") == ["-r", "requirements/cpu.txt"]
    assert make_venv.choose_paddle(python, "none") == []
    assert make_venv.choose_paddle(python, "paddlepaddle-gpu==3.3.1") == ["paddlepaddle-gpu==3.3.1"]


@pytest.mark.parametrize("wanted", ["auto", "none", "paddlepaddle==3.3.1"])
def test_paddle_in_the_environment_is_kept(environment, monkeypatch, capsys, wanted):
    python = environment("environment")
    as_base(monkeypatch, environment("base"))
    folder = install_fake_paddle(python)
    assert make_venv.choose_paddle(python, wanted) == []
    assert f"keeping paddlepaddle-gpu 3.3.1 in {folder}" in capsys.readouterr().out


def test_paddle_of_the_base_python_is_used_in_place(environment, monkeypatch, capsys):
    base, python = environment("base"), environment("environment")
    folder = install_fake_paddle(base, body="flavour = 'gpu'\n")
    before = sorted(os.listdir(os.path.dirname(folder)))
    as_base(monkeypatch, base)
    assert make_venv.choose_paddle(python, "auto") == []
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
    make_venv.choose_paddle(python, "auto")
    assert run_code(python, "import pinned; print(pinned.whose)") == "ours\n"


def test_paddle_2_is_refused_and_kept(environment, monkeypatch):
    base, python = environment("base"), environment("environment")
    folder = install_fake_paddle(base, version="2.6.2")
    as_base(monkeypatch, base)
    with pytest.raises(UserError, match="paddlepaddle-gpu 2.6.2 .* is kept, but"):
        make_venv.choose_paddle(python, "auto")
    assert os.path.isdir(folder)


def test_whole_run_names_no_wheel_when_a_paddle_is_there(environment, monkeypatch, capsys):
    python = environment("environment")
    install_fake_paddle(python)
    calls = []
    monkeypatch.setattr(make_venv, "has_pip", lambda python: True)
    monkeypatch.setattr(make_venv, "run_pip", lambda python, *arguments: calls.append(arguments))
    assert make_venv.main(["--venv", os.path.dirname(os.path.dirname(python))]) == 0
    asked = [argument for call in calls for argument in call]
    assert "requirements.txt" in asked and "requirements/cpu.txt" not in asked
    assert "ready: " in capsys.readouterr().out


def test_a_paddle_that_pip_brought_in_unasked_is_an_error(environment, monkeypatch):
    base, python = environment("base"), environment("environment")
    install_fake_paddle(base)
    as_base(monkeypatch, base)

    def pip_with_a_surprise(python, *arguments):
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


def test_every_pin_is_used_by_the_names_that_are_installed(root):
    """Names in the requirement files have a pin in the lock, so nothing floats."""

    def names(path):
        lines = (line.split("#")[0].strip() for line in (root / path).read_text().splitlines())
        return {make_venv.re.split(r"[\s<>=;]", line)[0].lower().replace("_", "-") for line in lines if line}

    locked = names(make_venv.LOCK)
    for path in (make_venv.BUILD, make_venv.CPU_WHEEL, *make_venv.PROGRAM):
        assert names(path) <= locked, path
    assert "paddlepaddle" not in names("requirements.txt")
