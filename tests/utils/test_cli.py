"""Exit statuses, log lines, progress."""

import argparse
import logging
import pickle
import re
import resource
import shutil
import sys
import warnings

import pytest

from paddlemix.inference.prediction import show
from paddlemix.utils import cli, errors
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.log import logger, print_like_ours
from paddlemix.utils.outputs import disk_errors
from paddlemix.utils.progress import Progress


def fail(error):
    def main():
        raise error

    return main


def test_exit_statuses(capsys):
    assert cli.run(lambda: None) == 0
    assert cli.run(lambda: 3) == 3
    assert cli.run(fail(errors.ConfigError("mend it"))) == 2
    assert capsys.readouterr().err == "error: mend it\n"
    assert cli.run(fail(errors.JobFailed("some rows failed"))) == 1
    assert cli.run(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: some rows failed\ninterrupted\n"
    assert cli.run(fail(KeyboardInterrupt()), "try again") == 130
    assert capsys.readouterr().err == "interrupted: try again\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_a_python_without_the_requirements_is_said(capsys):
    assert cli.run(lambda: __import__("no_such_library")) == 2
    assert " has no no_such_library: use the Python of the environment" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        cli.run(lambda: __import__("json.no_such_part"))


def test_names_of_strangers_do_not_steer_the_terminal(capsys):
    cli.run(fail(errors.UserError("no file \x1b[2J\r\n\u2028\udc80图")))
    assert capsys.readouterr().err == "error: no file \\x1b[2J\\r\\n\\u2028\\udc80图\n"
    cli.run(fail(errors.UserError("a" * 10**6)))
    assert len(capsys.readouterr().err) < 5000


def test_what_a_model_says_does_not_either(capsys):
    assert cli.harmless("一\t二\n三\u3000é 😀") == "一\t二\n三\u3000é 😀"
    assert cli.harmless("\r\x1b[2J\x7f\x9b\0") == r"\r\x1b[2J\x7f\x9b\x00"
    show("a\x1b[2J")
    assert capsys.readouterr().out == "a\\x1b[2J\n"


def test_bad_usage_is_one_line(capsys):
    parser = cli.Parser(prog="tool")
    parser.add_argument("--n", type=cli.positive)
    assert parser.parse_args(["--n", "3"]).n == 3
    for words in (["--n", "0"], ["--n", "x"], ["--m"]):
        assert cli.run(lambda words=words: parser.parse_args(words)) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.endswith("(see tool --help)\n") and line.count("\n") == 1


def test_abbreviations_are_refused_with_the_nearest_option(capsys):
    parser = cli.Parser(prog="tool")
    parser.add_argument("--dedupe", action="store_true")
    parser.add_argument("--merge_model_path")
    for word, near in (
        ("--merge", "--merge_model_path"), ("--dedup", "--dedupe"), ("--dedup=1", "--dedupe"), ("--x", None),
    ):  # fmt: skip
        says = f"; did you mean {near}?" if near else ""
        assert cli.run(lambda word=word: parser.parse_args([word])) == 2
        assert capsys.readouterr().err == f"error: unrecognized arguments: {word}{says} (see tool --help)\n"


def test_numbers_are_finite():
    """JSON, in which runs are recorded, has no infinity."""
    parse = cli.number(float, 0)
    assert parse("1e308") == 1e308 and cli.number(int, 0)("9" * 400) == int("9" * 400)
    for text in ("inf", "nan", "1e999", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_a_closed_pipe_is_quiet(capsys):
    assert cli.run(fail(BrokenPipeError())) == 1
    assert capsys.readouterr().err == ""


def test_what_the_system_refuses_is_one_line(capsys, tmp_path):
    def write(path):
        with open(path, "wb", buffering=0) as file:
            file.write(b"x")

    assert cli.run(lambda: write(b"/dev/full")) == 1
    assert cli.run(lambda: write(str(tmp_path / ("x" * 300)))) == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert cli.run(lambda: write(str(tmp_path / "new"))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    first, second, third = capsys.readouterr().err.splitlines()
    assert third == "error: File too large"
    assert first == "error: No space left on device" and second.endswith("xxx: File name too long")
    with pytest.raises(FileNotFoundError):
        cli.run(lambda: open(tmp_path / "none"))


def test_warnings_as_errors_end_no_script(recwarn):
    """PYTHONWARNINGS=error: Paddle and PaddleNLP warn while they are imported."""
    warnings.simplefilter("error")
    assert cli.run(lambda: warnings.warn("deprecated", DeprecationWarning, stacklevel=2)) == 0
    assert [str(one.message) for one in recwarn] == ["deprecated"]


def test_what_copytree_lists_is_one_line(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").symlink_to(tmp_path / "gone")
    with pytest.raises(JobFailed, match="^cannot write out: .*No such file or directory"), disk_errors("out"):
        shutil.copytree(tmp_path / "from", tmp_path / "to")


def test_text_must_be_utf8_and_paths_need_not(capsys):
    parser = cli.Parser(prog="it.py")
    parser.add_argument("--prompt")
    parser.add_argument("--out", type=cli.path)
    assert parser.parse_args(["--prompt", "描述", "--out", "\udcff"]).out == "\udcff"
    for argument in ("--out=", "--prompt=\udcc3\udce8"):
        assert cli.run(lambda words=[argument]: parser.parse_args(words)) == 2
    empty, foreign = capsys.readouterr().err.splitlines()
    assert "argument --out: must be a path, not empty" in empty
    assert "argument --prompt: must be UTF-8 text, not b'\\xc3\\xe8'" in foreign


def test_a_working_folder_that_was_removed_is_said(capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.run(lambda: 0) == 2
    assert capsys.readouterr().err == "error: the working folder was removed: change to another one\n"


def test_image_errors_keep_their_reason_between_processes():
    error = pickle.loads(pickle.dumps(errors.ImageError("too large", "1 × 1e9 pixels")))
    assert error.reason == "too large" and str(error) == "1 × 1e9 pixels"
    assert str(errors.ImageError("empty")) == "empty"
    assert isinstance(errors.ImageTagError("x"), ValueError)


def test_log_lines_have_the_notebooks_form(capsys):
    logger.warning("mind the gap")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[ WARNING\] - mind the gap\n", line)


def test_a_librarys_lines_are_ours_and_hold(capsys):
    other = logging.Logger("other")
    print_like_ours(other)
    print_like_ours(other)
    other.debug("no debug lines")
    other.info("  Will skip the first 4 batches. You can add the `--ignore_data_skip` flag to your launch command")
    other.info("Configuration saved in %s", "out/.partial-2/checkpoint-2/.partial-files/config.json")
    other.info("\nTraining completed. \n")
    other.info("Configuration saved in out/config.json")
    lines = [line.split("] - ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["Training completed. ", "Configuration saved in out/config.json"]


def test_progress_shows_rate_and_count(capsys, monkeypatch):
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    with Progress(total=4, desc="rows") as bar:
        for _ in range(4):
            bar.update()
            logger.info("a line")
        bar.note("1 skipped")
    shown = capsys.readouterr().err
    assert "rows: 100%" in shown and "4/4" in shown and "row/s" in shown
    # A log file gets whole lines: nothing is drawn over, and a message begins its own.
    assert "\r" not in shown and shown.endswith("\n")
    assert all(line.startswith(("rows: ", "[")) for line in shown.splitlines())
    assert sum(line.endswith("a line") for line in shown.splitlines()) == 4
    with Progress(total=4, disable=True) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    # A total that was an upper bound does not leave the bar at 75 %; a failure does.
    with Progress(total=4) as bar:
        bar.update(3)
    assert "100%" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(OSError), Progress(total=4) as bar:
        bar.update(3)
        raise OSError
    assert "75%" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_job_that_is_done_at_once_shows_no_bar(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 1e9)
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
    with Progress(total=4, desc="rows") as bar:
        bar.update()
        logger.info("a line")
    assert "rows" not in capsys.readouterr().err


def screen(text):
    """The lines that a terminal shows of `text`: a carriage return goes back, and what follows is written over."""
    lines, at = [""], 0
    for char in text:
        if char == "\n":
            lines.append("")
        if char in "\r\n":
            at = 0
            continue
        lines[-1] = lines[-1][:at].ljust(at) + char + lines[-1][at + 1 :]
        at += 1
    return [line.rstrip() for line in lines]


def test_a_message_stands_above_the_bar_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    with Progress(total=4, desc="rows") as bar:
        for _ in range(4):
            logger.info("a line")
            bar.update()
        before = screen(capsys.readouterr().err)
    after = screen(capsys.readouterr().err)
    logger.info("the last")
    assert all(line.startswith("[20") and line.endswith("] - a line") for line in before[:4])
    assert [line[:6] for line in before[4:]] == ["rows: "]
    assert [line[:10] for line in after] == ["rows: 100%", ""]
    assert screen(capsys.readouterr().err)[0].endswith("] - the last")
