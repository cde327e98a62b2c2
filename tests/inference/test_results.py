"""Results: whole when they appear, resumable, never mixed."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from paddlemix.inference import facts as facts_module
from paddlemix.inference import results
from paddlemix.inference.facts import file_facts, fingerprint_folder, input_facts
from paddlemix.inference.results import ResultsWriter, clean_id
from paddlemix.utils.errors import JobFailed, UserError
from tests.helpers import refused

RUN = {"input": {"sha256": "a"}, "model": {"sha256": "m"}, "settings": {"prompt": None, "fallback": "x"}}


def write(path, lines, run=RUN, finish=True, **kwargs):
    with ResultsWriter(str(path), run, **kwargs) as writer:
        for line in lines[writer.done :]:
            writer.write(*line)
            writer.flush()
        if finish:
            writer.finish(len(lines))
    return writer


LINES = [("a", "一只猫"), ("b", "备用", "not an image"), ("a", "two  spaces"), ("", "no id")]
WHOLE = "a\t一只猫\nb\t备用\na\ttwo  spaces\n\tno id\n"


def test_one_row_is_not_rows(capsys):
    results.report_notes(1000, {"empty image": 1}, "x")
    results.report_notes(2000, {"empty image": 1500}, None)
    said = capsys.readouterr().err
    assert "1 row has the fallback caption x\n" in said and "1,500 rows have no score\n" in said


def test_whole_output_and_its_sidecar(tmp_path):
    out = tmp_path / "new folder" / "results.txt"
    write(out, LINES)
    assert out.read_text("utf-8") == WHOLE
    assert sorted(os.listdir(out.parent)) == ["results.txt", "results.txt.run.json"]
    sidecar = json.loads((out.parent / "results.txt.run.json").read_text("utf-8"))
    output = sidecar.pop("output")
    assert sidecar == dict(RUN, format=1, rows=4, notes={"not an image": 1})
    assert output == {"bytes": len(WHOLE.encode()), "sha256": hashlib.sha256(WHOLE.encode()).hexdigest()}


def test_nothing_at_the_output_until_it_is_whole(tmp_path):
    out = tmp_path / "results.txt"
    out.write_text("an older result\n")
    write(out, LINES, finish=False)
    assert out.read_text() == "an older result\n"
    assert (tmp_path / "results.txt.partial").read_text("utf-8").count("\n") == 1 + len(LINES)
    write(out, LINES)
    assert out.read_text("utf-8") == WHOLE


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_a_journal_cut_anywhere_goes_on_to_the_same_output(tmp_path, cut):
    out = tmp_path / "results.txt"
    write(out, LINES, finish=False)
    journal = tmp_path / "results.txt.partial"
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut])
    writer = write(out, LINES)
    assert out.read_text("utf-8") == WHOLE
    assert dict(writer.notes) == {"not an image": 1}


def test_a_run_with_a_name_that_is_not_utf8_goes_on_and_is_recorded(tmp_path):
    out = tmp_path / "results.txt"
    run = dict(RUN, settings={"n_best": "\udcff.jsonl"})
    write(out, LINES, run, finish=False)
    assert write(out, LINES[:4], run).done == 4
    assert json.loads((tmp_path / "results.txt.run.json").read_text("utf-8"))["settings"] == run["settings"]


def test_a_journal_cut_in_its_first_line_starts_anew(tmp_path):
    out = tmp_path / "results.txt"
    write(out, LINES, finish=False)
    journal = tmp_path / "results.txt.partial"
    journal.write_bytes(journal.read_bytes()[:20])
    write(out, LINES)
    assert out.read_text("utf-8") == WHOLE


def test_zeros_left_by_a_power_cut_are_dropped(tmp_path):
    out = tmp_path / "results.txt"
    write(out, LINES[:2], finish=False)
    with open(tmp_path / "results.txt.partial", "ab") as journal:
        journal.write(b"\0" * 50 + b"\t\t\n")
    assert write(out, LINES).done == 4
    assert out.read_text("utf-8") == WHOLE


def test_done_tells_what_to_skip(tmp_path):
    out = str(tmp_path / "results.txt")
    write(out, LINES[:3], finish=False)
    with ResultsWriter(out, RUN) as writer:
        assert writer.done == 3
        assert list(writer.done_rows()) == [("a", ""), ("b", ""), ("a", "")]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"input": {"sha256": "other"}}, "input.sha256 is 'a' there and 'other' here"),
        ({"model": {"sha256": "n"}}, "model.sha256"),
        ({"settings": {"prompt": "p", "fallback": "x"}}, "settings.prompt is None there and 'p' here"),
    ],
)
def test_runs_are_not_mixed(tmp_path, change, named):
    out = tmp_path / "results.txt"
    write(out, LINES[:2], finish=False)
    before = (tmp_path / "results.txt.partial").read_bytes()
    with refused(UserError, "restart") as error:
        ResultsWriter(str(out), dict(RUN, **change))
    assert named in str(error.value)
    assert (tmp_path / "results.txt.partial").read_bytes() == before
    write(out, LINES, dict(RUN, **change), restart=True)
    assert out.read_text("utf-8") == WHOLE


STRANGE = [b"my notes\n", b"{}\n", b"[1]\n", b"x" * (2 << 20), b"notes without a line end", b'{"a": 1}']


@pytest.mark.parametrize("content", STRANGE)
@pytest.mark.parametrize("restart", [False, True])
def test_a_strange_partial_file_is_left_alone(tmp_path, content, restart):
    strange = tmp_path / "results.txt.partial"
    strange.write_bytes(content)
    with refused(UserError, "foreign-journal"):
        ResultsWriter(str(tmp_path / "results.txt"), RUN, restart=restart)
    assert strange.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1, "inp', b"\0" * 5000])
def test_a_journal_of_which_nothing_is_left_is_begun_anew(tmp_path, content):
    (tmp_path / "results.txt.partial").write_bytes(content)
    write(tmp_path / "results.txt", LINES)
    assert (tmp_path / "results.txt").read_text("utf-8") == WHOLE


def test_a_journal_of_another_version_is_dropped_when_asked(tmp_path):
    (tmp_path / "results.txt.partial").write_bytes(b'{"format": 99}\n')
    with refused(UserError, "foreign-journal"):
        ResultsWriter(str(tmp_path / "results.txt"), RUN)
    write(tmp_path / "results.txt", LINES, restart=True)


def test_a_link_in_the_journals_place_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("")
    (tmp_path / "results.txt.partial").symlink_to("mine")
    with refused(UserError, "foreign-journal"):
        ResultsWriter(str(tmp_path / "results.txt"), RUN)
    assert (tmp_path / "results.txt.partial").is_symlink() and (tmp_path / "mine").read_text() == ""


@pytest.mark.parametrize("instead", [None, "another run's\n"])
def test_a_journal_that_is_removed_while_it_is_written(tmp_path, instead):
    out, journal = tmp_path / "results.txt", tmp_path / "results.txt.partial"
    with ResultsWriter(str(out), RUN) as writer:
        for number, line in enumerate(LINES):
            writer.write(*line)
            writer.flush()
            if number == 1:
                journal.unlink()
                if instead:
                    journal.write_text(instead)
        with pytest.raises(JobFailed) as error, writer._explained():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert "safe" not in str(error.value)
        writer.finish(len(LINES))
    assert out.read_text("utf-8") == WHOLE
    assert (journal.read_text() if instead else journal.exists()) == (instead or False)


def test_an_output_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refused(UserError, "not-regular"):
        ResultsWriter(str(tmp_path / "pipe"), RUN)
    assert os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "far").mkdir()
    (tmp_path / "results.txt").symlink_to(tmp_path / "far" / "results.txt")
    write(tmp_path / "results.txt", LINES)
    assert (tmp_path / "far" / "results.txt").read_text("utf-8") == WHOLE and (tmp_path / "results.txt").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["far", "pipe", "results.txt", "results.txt.run.json"]


def test_two_processes_cannot_write_one_output(tmp_path):
    out = str(tmp_path / "results.txt")
    with ResultsWriter(out, RUN):
        with refused(UserError, "busy"):
            ResultsWriter(out, RUN)
    write(out, LINES)


def test_the_count_is_checked(tmp_path):
    out = tmp_path / "results.txt"
    with ResultsWriter(str(out), RUN) as writer:
        writer.write("a", "b")
        with refused(JobFailed, "lines"):
            writer.finish(2)
    assert not out.exists()


def test_a_journal_changed_from_outside_is_noticed(tmp_path):
    out = tmp_path / "results.txt"
    with ResultsWriter(str(out), RUN) as writer:
        writer.write("a", "b")
        writer.flush()
        with open(str(out) + ".partial", "ab") as journal:
            journal.write(b"c\td\t\t2 2 9\n")
        with refused(JobFailed, "changed"):
            writer.finish(1)
    assert not out.exists()


def journal_lines(tmp_path):
    write(tmp_path / "results.txt", LINES, finish=False)
    return (tmp_path / "results.txt.partial").read_bytes().splitlines(True)


@pytest.mark.parametrize("order", [(0, 1, 1, 2, 3, 4), (0, 1, 3, 4), (0, 2, 1, 3, 4)], ids="doubled lost moved".split())
def test_a_journal_with_other_lines_than_it_was_written_with_is_noticed(tmp_path, order):
    lines = journal_lines(tmp_path)
    (tmp_path / "results.txt.partial").write_bytes(b"".join(lines[number] for number in order))
    with refused(JobFailed, "other-row"):
        ResultsWriter(str(tmp_path / "results.txt"), RUN)


def test_the_place_of_the_last_whole_line_is_where_a_run_goes_on(tmp_path):
    out = str(tmp_path / "results.txt")
    with ResultsWriter(out, RUN) as writer:
        writer.write("a", "b", None, 3, 100)
        writer.write("c", "d", None, 5, 250)
        writer.flush()
    journal = tmp_path / "results.txt.partial"
    with ResultsWriter(out, RUN) as writer:
        assert writer.place == (2, 5, 250)
    journal.write_bytes(journal.read_bytes()[:-2])
    with ResultsWriter(out, RUN) as writer:
        assert writer.place == (1, 3, 100)


@pytest.mark.parametrize("caption", ["two\nlines", "a\ttab", "a\rreturn"])
def test_a_caption_that_would_break_the_file_is_a_bug(tmp_path, caption):
    with ResultsWriter(str(tmp_path / "r"), RUN) as writer:
        with pytest.raises(ValueError, match="one line without tabs"):
            writer.write("a", caption)


def test_hostile_ids_and_captions_stay_one_line(tmp_path):
    out = tmp_path / "r"
    lines = [("a\tb\r\nc\0", "x"), ("\ud800", "lone \ud800 surrogate"), ("“ ' \u2028", "nul \0")]
    write(out, lines)
    assert out.read_bytes().decode("utf-8").split("\n") == [
        "a b  c \tx", "?\tlone ? surrogate", "“ ' \u2028\tnul  ", ""
    ]  # fmt: skip
    assert clean_id("\ud800") == "?"


def test_a_full_disk_keeps_the_lines_and_says_so(tmp_path, monkeypatch):
    out = tmp_path / "results.txt"

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    with refused(JobFailed, "not-writable", match="No space left.*the same command resumes"):
        with ResultsWriter(str(out), RUN) as writer:
            writer.write(*LINES[0])
            writer.flush()
            writer._file = Full(writer._file)
            writer.write(*LINES[1])
            writer.flush()
    with ResultsWriter(str(out), RUN) as writer:
        assert writer.done == 1
    write(out, LINES)
    assert out.read_text("utf-8") == WHOLE


@pytest.mark.parametrize("code, allowed", [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_disk_without_locks(tmp_path, monkeypatch, code, allowed):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if allowed:
        write(tmp_path / "results.txt", LINES)
        assert (tmp_path / "results.txt").read_text("utf-8") == WHOLE
    else:
        with refused(UserError, "lock"):
            ResultsWriter(str(tmp_path / "results.txt"), RUN)


@pytest.mark.parametrize("broken", [b"c\td\n", b"\xff\td\t\n"])
def test_a_journal_broken_from_outside_is_noticed(tmp_path, broken):
    out = tmp_path / "results.txt"
    with ResultsWriter(str(out), RUN) as writer:
        writer.write("a", "b")
        writer.flush()
        with open(str(out) + ".partial", "ab") as journal:
            journal.write(broken)
        with refused(JobFailed, "changed"):
            writer.finish(1)
    assert not out.exists()
    # The same command mends it: the broken line goes.
    write(out, [("a", "b")])
    assert out.read_text() == "a\tb\n"


def test_lines_reach_the_disk_now_and_then(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(results.os, "fsync", synced.append)
    monkeypatch.setattr(results, "SYNC_SECONDS", 0.0)
    with ResultsWriter(str(tmp_path / "r"), RUN) as writer:
        writer.write("a", "b")
        writer.flush()
    assert synced


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(UserError, "is-a-folder"):
        ResultsWriter(str(tmp_path), RUN)
    with refused(UserError, "not-writable"):
        ResultsWriter(str(tmp_path / "file" / "results.txt"), RUN)


def test_a_killed_writer_loses_no_flushed_line(tmp_path):
    out = tmp_path / "results.txt"
    code = """
import os, sys
from paddlemix.inference.results import ResultsWriter
with ResultsWriter(sys.argv[1], {"settings": {}}) as writer:
    for i in range(100):
        writer.write(str(i), "caption %d" % i)
        writer.flush()
    writer.write("lost", "not flushed")
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(out)])
    assert done.returncode == -signal.SIGKILL
    with ResultsWriter(str(out), {"settings": {}}) as writer:
        assert writer.done == 100


def test_a_large_input_is_read_once_per_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "_BAR_BYTES", 10)
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(facts_module, "temporary_folder", lambda: str(notes))
    path = tmp_path / "in.tsv"
    path.write_bytes(b"a\tAAAA\n" * 5)
    facts = file_facts(str(path))
    assert input_facts(str(path)) == facts
    calls = []
    monkeypatch.setattr(facts_module, "file_facts", lambda name: calls.append(name) or facts)
    assert input_facts(str(path)) == facts and not calls
    path.write_bytes(b"b\tAAAA\n" * 5)
    os.utime(path, ns=(1, 1))
    input_facts(str(path))
    assert calls == [str(path)]
    # A note that cannot be read, and no folder for one, cost a reading.
    for note in notes.iterdir():
        note.write_text("{")
    input_facts(str(path))
    monkeypatch.setattr(facts_module, "temporary_folder", lambda: None)
    input_facts(str(path))
    assert len(calls) == 3


def test_file_facts(tmp_path):
    path = tmp_path / "f"
    for content, lines in ((b"", 0), (b"a\n", 1), (b"a\nb", 2), (b"\n\n", 2)):
        path.write_bytes(content)
        assert file_facts(str(path))[:2] == (len(content), lines)
    path.write_bytes(b"abc")
    # The SHA-256 of "abc" (FIPS 180-2, appendix B.1).
    assert file_facts(str(path)).sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with refused(UserError, "unreadable"):
        file_facts(str(tmp_path / "missing"))


def test_fingerprint_of_a_model_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "_CHUNK", 4)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 2)
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint_folder(str(tmp_path))
    (tmp_path / "train_results.json").write_text("a record of training, not the model")
    assert fingerprint_folder(str(tmp_path)) == first
    (tmp_path / "chat_template.json").write_text("{}")
    with_template = fingerprint_folder(str(tmp_path))
    assert with_template != first
    # Also of a folder with adapters, or with weights of PyTorch, whole or in shards.
    torch = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin")
    tuned = ("lora_model_state.pdparams", "lora_config.json", "partial_model_state.pdparams")
    for name in (*torch, *tuned, "model_state-00001-of-00002.pdparams", "mgen.tiktoken"):
        found = set()
        for text in ("one", "two"):
            (tmp_path / name).write_text(text)
            found.add(fingerprint_folder(str(tmp_path)))
        (tmp_path / name).unlink()
        assert len(found | {with_template}) == 3, name
    # 512 bytes are more than 64 blocks of 4: sampled, but first and last bytes always count.
    for changed in (0, 511):
        data = bytearray(range(256)) * 2
        data[changed] ^= 255
        weights.write_bytes(data)
        assert fingerprint_folder(str(tmp_path)) != with_template
