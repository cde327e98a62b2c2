"""predict.py from rows of every kind to lines. `pytest tests/test_predict.py`"""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import predict
from paddlemix.inference import prediction
from paddlemix.inference.results import ResultsWriter
from paddlemix.utils import cli
from tests.helpers import image_base64, image_bytes
from tests.inference.talking import save_talking_model

STARTS, FINISHED = "------predicting starts------", "------predicting finished-----"
FALLBACK = "一张广告图片。"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("weights") / "tiny model", seed=5)


@pytest.fixture
def call(tmp_path, model, monkeypatch, capfd):
    """call(content, *flags) → (exit status, output lines as (id, caption), stdout, stderr)."""

    def run(content, *flags, output="out.tsv", weights=model):
        source = tmp_path / "in.tsv"
        if content is not None:
            source.write_bytes(content)
        target = tmp_path / output
        flags = flags if "--max_new_tokens" in flags else (*flags, "--max_new_tokens", "8")
        monkeypatch.setattr(sys, "argv", ["predict.py", str(source), str(target), str(weights), *flags])
        capfd.readouterr()
        status = cli.run(predict.main)
        said = capfd.readouterr()
        lines = None
        if target.exists():
            data = target.read_bytes().decode("utf-8")
            assert data == "" or data.endswith("\n")
            lines = [tuple(line.split("\t")) for line in data.split("\n")[:-1]]
            assert all(len(line) == 2 for line in lines)
        return status, lines, said.out, said.err

    return run


def tsv(*rows):
    return b"".join(b"\t".join(x if isinstance(x, bytes) else x.encode() for x in row) + b"\n" for row in rows)


def image(seed=0, **kwargs):
    return image_base64(seed, **kwargs)


def test_what_it_prints_and_writes(call, tmp_path):
    content = tsv(("b", image(1)), ("a", image(2)), ("c", image(3)))
    status, lines, out, err = call(content)
    assert status == 0
    assert [name for name, _ in lines] == ["b", "a", "c"]
    assert out.split("\n") == [STARTS, *(caption for _, caption in lines), FINISHED, ""]
    assert len({caption for _, caption in lines}) == 3
    assert "images at a time" in err and " on cpu in float32" in err
    assert sorted(os.listdir(tmp_path)) == ["in.tsv", "out.tsv", "out.tsv.run.json"]


def test_batch_size_and_order_change_nothing(call):
    rows = [(str(i), image(i)) for i in range(7)]
    _, alone, _, _ = call(tsv(*rows), "--batch_size", "1")
    assert call(tsv(*rows), "--batch_size", "4")[1] == alone
    assert call(tsv(*rows[::-1]), "--batch_size", "3")[1] == alone[::-1]


def picture(format, mode="RGB", size=(40, 30), **kwargs):
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size, 7 if mode in ("L", "P", "I;16") else None).save(file, format, **kwargs)
    return base64.b64encode(file.getvalue())


GOOD = {
    "caption column": (image(), "一只\t猫"),
    "url-safe, no padding": (base64.urlsafe_b64encode(image_bytes(4)).rstrip(b"="),),
    "wrapped with spaces": (" ".join(image()[i : i + 76] for i in range(0, len(image()), 76)),),
    "data URI": ("data:image/jpeg;base64," + image(),),
    "PNG": (picture("PNG"),),
    "CMYK": (picture("JPEG", "CMYK"),),
    "16 bit": (picture("PNG", "I;16"),),
    "palette": (picture("PNG", "P", transparency=0),),
    "GIF": (picture("GIF", "P"),),
    "1 × 1": (picture("PNG", size=(1, 1)),),
    "10000 × 1": (picture("PNG", size=(10000, 1)),),
    "odd id “'\x01 \u2028%s": (image(),),
    "doubled id": (image(1),),
}
BAD = {
    "no base64": ("not base64!!",),
    "text in base64": (base64.b64encode(b"just some words, no picture"),),
    "empty image": ("",),
    "empty image, caption": ("", "words"),
    "no column": (),
    "half a header": (base64.b64encode(image_bytes()[:20]),),
    "too many pixels": (picture("PNG", "1", size=(20000, 20000)),),
    "not ASCII": ("图片",),
    "NUL": (b"\0\0\0\0",),
}


def test_every_row_gives_its_line(call):
    rows = [(name, *columns) for name, columns in {**GOOD, **BAD}.items()]
    rows.insert(3, ("doubled id", image(2)))
    status, lines, out, err = call(tsv(*rows), "--fallback", "没有 图片")
    assert status == 0
    assert [name for name, _ in lines] == [name for name, *_ in rows]
    for (name, *_), (_, caption) in zip(rows, lines):
        assert (caption == "没有 图片") == (name in BAD), name
    assert f"{len(BAD)} rows have the fallback caption 没有 图片" in err
    assert "1 × too many pixels" in err and "2 × empty image" in err


def test_a_truncated_image_is_captioned_and_counted(call, tmp_path):
    data = image_bytes(6, size=(300, 300))
    status, lines, _, err = call(tsv(("cut", base64.b64encode(data[: len(data) // 2]))))
    assert status == 0
    assert lines[0][1] != FALLBACK
    assert "1 × truncated image" in err and "fallback" not in err
    assert json.loads((tmp_path / "out.tsv.run.json").read_text())["notes"] == {"truncated image": 1}


def test_line_endings_bom_and_blank_lines(call):
    plain = call(tsv(("a", image(1)), ("b", image(2))))[1]
    dressed = b"\xef\xbb\xbf" + tsv(("a", image(1))).replace(b"\n", b"\r\n\r\n") + f"b\t{image(2)}".encode()
    assert call(dressed)[1] == plain


def test_rows_without_an_id_have_their_line_number(call):
    content = tsv((image(1), "caption"), (image(2),), ("", image(3)), ("id \xe9".encode("latin1"), image(4)))
    status, lines, _, _ = call(content)
    assert status == 0
    assert [name for name, _ in lines] == ["1", "2", "3", "id \ufffd"]
    assert [caption == FALLBACK for _, caption in lines] == [False, True, False, False]


def test_a_row_of_50_mb_and_one_too_long(call, monkeypatch):
    """A JPEG with 38 MB of rubbish behind it is 50 MB of base64, and still a picture."""
    big = base64.b64encode(image_bytes(1) + bytes(38 << 20))
    monkeypatch.setattr(prediction, "read_rows", lambda path, want_caption: _read(path, 60 << 20))
    from paddlemix.datasets.tsv import read_rows as _whole

    def _read(path, limit):
        return _whole(path, want_caption=False, max_line_bytes=limit)

    status, lines, _, err = call(tsv(("big", big), ("huge", big + big[: 12 << 20]), ("a", image(1))))
    assert status == 0
    assert lines[0][1] == lines[2][1] != FALLBACK
    assert lines[1] == ("huge", FALLBACK)
    assert "1 × line too long" in err


def test_an_empty_file_gives_an_empty_file(call):
    for content in (b"", b"\n \r\n"):
        status, lines, out, err = call(content)
        assert (status, lines) == (0, [])
        assert out == f"{STARTS}\n{FINISHED}\n"
        assert "holds no rows" in err


def test_all_rows_bad_is_a_failed_job_with_a_whole_output(call):
    status, lines, out, err = call(tsv(("a", "!"), ("b",)))
    assert status == 1
    assert lines == [("a", FALLBACK), ("b", FALLBACK)]
    assert FINISHED in out
    assert err.strip().split("\n")[-1].startswith("error: not one of the 2 rows could be captioned: ")


@pytest.mark.parametrize(
    "content, flags, says",
    [
        (None, (), "cannot read"),
        (b"\x1f\x8b\x08", (), "gunzip"),
        (b"a\tb\n", ("--fallback", "\t "), "--fallback must hold text"),
        (b"a\tb\n", ("--device", "tpu"), "the device is cpu, gpu or gpu:N, not 'tpu'"),
        (b"a\tb\n", ("--prompt", "<img>x</img>"), "must not hold"),
    ],
)
def test_bad_usage_is_one_line_and_2(call, tmp_path, content, flags, says):
    status, lines, _, err = call(content, *flags)
    assert (status, lines) == (2, None)
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: ") and says in last and "Traceback" not in err
    # Nothing is left that would stand in the way of the next try.
    assert not (tmp_path / "out.tsv.partial").exists()


def test_bad_numbers_and_the_input_as_output(call, tmp_path, monkeypatch):
    for bad in ("--batch_size=0", "--batch_size=x", "--max_new_tokens=-3", "--dtype=int8", "--bath_size=3"):
        status, _, _, err = call(b"a\tb\n", bad)
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and "predict.py --help" in err
    status, _, _, err = call(b"a\tb\n", output="in.tsv")
    assert status == 2 and "same file" in err
    assert (tmp_path / "in.tsv").read_bytes() == b"a\tb\n"


def test_the_folder_that_holds_the_model(call, model, tmp_path):
    content = tsv(("a", image(1)))
    assert call(content, weights=os.path.dirname(model))[:2] == call(content)[:2]
    status, _, _, err = call(content, weights=tmp_path)
    assert status == 2 and "no config.json" in err


def test_an_interrupted_run_goes_on(call, tmp_path, monkeypatch):
    content = tsv(*((str(i), image(i) if i != 1 else "bad!") for i in range(8)))
    _, whole, _, _ = call(content, "--batch_size", "2", output="whole.tsv")

    wanted = ResultsWriter.write

    def stop_at_5(self, *args):
        if self.done == 5:
            raise KeyboardInterrupt
        wanted(self, *args)

    monkeypatch.setattr(ResultsWriter, "write", stop_at_5)
    status, lines, out, _ = call(content, "--batch_size", "2")
    assert (status, lines) == (130, None)
    assert FINISHED not in out
    monkeypatch.setattr(ResultsWriter, "write", wanted)

    # Half a line more, as a kill leaves it.
    with open(tmp_path / "out.tsv.partial", "ab") as journal:
        journal.write("5\t一".encode()[:-1])
    # Other settings are refused; nothing is decoded or answered twice by the same ones.
    status, _, _, err = call(content, "--prompt", "Else?")
    assert status == 2 and "settings.prompt" in err
    status, lines, out, err = call(content, "--batch_size", "4")
    assert (status, lines) == (0, whole)
    assert "going on after the 5 rows of an earlier run" in err
    assert out.split("\n")[1:-2] == [caption for _, caption in whole[5:]]
    assert "1 × bad base64" in err


def test_restart_drops_an_unfinished_run(call, tmp_path):
    content = tsv(("a", image(1)))
    (tmp_path / "out.tsv.partial").write_text('{"format": 1}\na\told\t\n')
    assert call(content)[0] == 2
    status, lines, _, _ = call(content, "--restart")
    assert status == 0 and lines[0][1] != "old"


def test_a_journal_of_other_rows_is_refused(call, tmp_path, monkeypatch):
    content = tsv(("a", image(1)), ("b", image(2)))
    wanted = ResultsWriter.finish
    monkeypatch.setattr(ResultsWriter, "finish", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(content)
    monkeypatch.setattr(ResultsWriter, "finish", wanted)
    journal = tmp_path / "out.tsv.partial"
    journal.write_bytes(journal.read_bytes().replace(b"\nb\t", b"\nx\t"))
    status, lines, _, err = call(content)
    assert (status, lines) == (1, None)
    assert "is not of row 2" in err
    # A journal that was whole already needs no model to be finished.
    journal.write_bytes(journal.read_bytes().replace(b"\nx\t", b"\nb\t"))
    monkeypatch.setattr(prediction, "load_model", None)
    assert call(content)[0] == 0


def test_a_log_of_many_bad_rows_stays_short(call, monkeypatch):
    monkeypatch.setattr(prediction, "LOG_EVERY", 10)
    content = tsv(("good", image(1)), *((f"bad{i}", "!") for i in range(25)))
    status, lines, _, err = call(content)
    assert status == 0 and len(lines) == 26
    assert [line.split(" - ")[1] for line in err.split("\n") if "bad base64 (" in line] == [
        f"line {n + 1}, id 'bad{n - 1}': bad base64 (number {n})" for n in (1, 10, 20)
    ]


def test_on_a_terminal_the_bar_makes_room(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prediction.show("一只猫")
    assert capsys.readouterr().out == "一只猫\n"


# ---- as a user runs it


def test_sigkill_at_any_time_and_an_ascii_locale(model, root, tmp_path):
    # The fallback caption is Chinese, so it is printed too.
    rows = [(str(i), image(i) if i != 1 else "bad!") for i in range(40)]
    (tmp_path / "in.tsv").write_bytes(tsv(*rows))
    command = [sys.executable, str(root / "predict.py"), "in.tsv", "out.tsv", model]
    command += ["--max_new_tokens", "8", "--batch_size", "2"]
    environment = dict(os.environ, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "out.tsv.partial"
    try:
        while first.stdout.readline():
            if journal.exists() and journal.read_bytes().count(b"\n") > 7:
                break
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    done = journal.read_bytes().count(b"\n") - 1
    assert 5 < done < 40 and not (tmp_path / "out.tsv").exists()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert second.returncode == 0, second.stderr.decode()
    assert b"going on after the" in second.stderr
    killed = (tmp_path / "out.tsv").read_text("utf-8")
    assert killed.count("\n") == 40

    # The same rows in one go, in this process.
    prediction.predict_file(
        str(tmp_path / "in.tsv"), str(tmp_path / "whole.tsv"), model, max_new_tokens=8, batch_size=8
    )
    assert (tmp_path / "whole.tsv").read_text("utf-8") == killed


def test_help_is_quick(root):
    begin = time.monotonic()
    for script in ("predict.py", "chat.py"):
        done = subprocess.run([sys.executable, str(root / script), "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("usage: " + script)
        assert "paddle" not in done.stderr
    # The limit is a second each (issue 2, point 1); a busy machine may be slower.
    assert time.monotonic() - begin < 5


def test_ten_real_rows_through_run_sh(shared, root, model, tmp_path):
    """The platform's own call on real input, in a submission folder whose path has spaces."""
    submission = tmp_path / "my work" / "submission"
    (submission / "src").mkdir(parents=True)
    (submission / "weights").mkdir()
    shutil.copy(root / "run.sh", submission)
    shutil.copy(root / "predict.py", submission / "src")
    shutil.copytree(root / "paddlemix", submission / "src" / "paddlemix", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, submission / "weights" / "a model")
    (tmp_path / "my work" / "dataset").mkdir()
    samples = shared / "real_samples" / "test_samples.txt"
    shutil.copy(samples, tmp_path / "my work" / "dataset")

    paths = ["../../dataset/test_samples.txt", "../../dataset/results.txt", "../weights"]
    done = subprocess.run(["sh", "run.sh", *paths, sys.executable], cwd=submission, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "my work" / "dataset" / "results.txt").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    ids = [line.split("\t")[0] for line in samples.read_text("utf-8").splitlines()]
    assert len(ids) == 10
    assert [line.split("\t")[0] for line in lines] == ids
    captions = [line.split("\t")[1] for line in lines]
    assert FALLBACK not in captions and all(captions)
    assert done.stdout.split("\n") == [STARTS, *captions, FINISHED, ""]
