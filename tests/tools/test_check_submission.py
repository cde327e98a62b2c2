"""Each rule passes for what is packed, and fails for its own defect.

The real predict.py runs in one test only, as it imports Paddle twice; elsewhere a stand-in answers at once.
"""

import base64
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import subprocess
import sys

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights, write_pdparams
from paddlemix.contest import trial
from paddlemix.contest.check import FAIL, NOT_RUN, PASS, RULES, Verdict, check_submission
from paddlemix.contest.trial import write_sample
from paddlemix.contest.weights import count_not_finite, largest_difference, look_through
from paddlemix.datasets.tsv import read_rows
from paddlemix.utils import cli
from tests.checkpoint.files import pickled
from tests.helpers import image_base64, without_coverage
from tools import check_submission as tool

STAND_IN = """
import sys
rows = [line.split("\\t")[0] for line in open(sys.argv[1], encoding="utf-8")]
lines = [f"{name}\\tcaption\\n" for name in rows]
MORE
open(sys.argv[2], "w", encoding="utf-8").writelines(lines)
"""
RUNS = ("runs", "read_only", "offline", "lines")
WEIGHTS = os.path.join("weights", "mgen_vl_lora_merge")


@pytest.fixture
def stand_in(submission):
    """stand_in(more) puts a predict.py that runs the lines `more`, and then writes `lines`, into the submission."""

    def put(more=""):
        (submission / "src" / "predict.py").write_text("import paddlemix\n" + STAND_IN.replace("MORE", more))
        return str(submission)

    # Its many files need not be read each time.
    shutil.rmtree(submission / "src" / "paddlemix")
    (submission / "src" / "paddlemix.py").write_text("def later():\n    import paddle\n")
    put()
    return put


def check(folder, **kwargs):
    return check_submission(str(folder), progress=False, **kwargs)


def failed(report):
    return {key for key, verdict in report.items() if verdict.status == FAIL}


def said(report, key):
    return "\n".join(report[key].problems + report[key].notes)


def weights_of(folder):
    """{name: (dtype, array)} of a submission's weights, to change and write back with put_weights."""
    with open_weights(os.path.join(folder, WEIGHTS)) as reader:
        return {name: (reader.info(name).dtype, np.array(reader.read(name))) for name in reader.keys()}


def put_weights(folder, tensors):
    write_pdparams(os.path.join(folder, WEIGHTS, "model_state.pdparams"), tensors)


def tune(folder):
    """What LoRA and attn_pool leave behind: two tensors of other values."""
    tensors = weights_of(folder)
    tensors["transformer.llm.h.0.attn.c_attn.weight"][1][3, 4] += 0.5
    tensors["visual.attn_pool.query"][1][:] += 0.25
    put_weights(folder, tensors)


# ---- the whole


@pytest.mark.slow
def test_what_was_packed_passes(submission, merged, tmp_path, monkeypatch, capfd):
    """The real thing, end to end: the packed program predicts, and the report has a line per rule."""
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    tune(submission)
    rows = "".join(f"行 {i}\t{image_base64(i)}\n" for i in range(3))
    (tmp_path / "rows.tsv").write_text(rows + "bad\t!\n", encoding="utf-8")
    words = [str(submission), "--base", merged, "--sample", str(tmp_path / "rows.tsv")]
    monkeypatch.setattr(sys, "argv", ["check_submission.py", *words])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    status = cli.run(tool.main)
    out, err = capfd.readouterr()
    assert status == 0, out + err
    for rule, text in RULES.values():
        assert f"pass  {rule:<6} {text}\n" in out or f"----  {rule:<6} {text}\n" in out
    assert out.count("\n----") == 1 and "without --fresh_venv" in out
    assert "4 rows, 4 lines" in out and "different captions" not in out
    assert "llm layers, LoRA's matrices: 1 of 8 tensors differ, by at most 0.5" in out
    assert "attn_pool: 1 of 11 tensors differ, by at most 0.25" in out
    assert "lm_head: 0 of 1 tensors differ\n" in out
    assert out.endswith("ready to submit\n")
    assert err.count("------predicting finished-----") == 2 and "values: 100%" in err and "copy: 100%" in err
    # Nothing is left behind, and the submission is as it was, modes too.
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert all(path.stat().st_mode & stat.S_IWUSR for path in submission.rglob("*"))


def test_status_and_bad_usage(stand_in, tmp_path, monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["check_submission.py", *map(str, words)])
        status = cli.run(tool.main)
        return (status, *capfd.readouterr())

    status, out, _ = run(stand_in("lines.pop()"))
    assert status == 1 and "FAIL  (四) 2  one line per row" in out
    assert out.endswith("1 rules failed, 0 could not be checked because of them\n")
    for words, text in (
        ([tmp_path / "none"], "no folder"),
        ([__file__], "is a file: give the folder; unpack an archive first"),
        ([stand_in(), "--sample", tmp_path / "none"], "none"),
        ([stand_in(), "--base", tmp_path], "no config.json"),
        ([stand_in(), "--base", tmp_path / "none"], "no folder"),
    ):
        status, out, err = run(*words)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert text in err


# ---- names and texts


@pytest.mark.parametrize(
    "name, rules, text",
    [
        ("run.sh", {"names"}, "no run.sh"),
        ("src/predict.py", {"names"}, "no src/predict.py"),
        ("requirements.txt", {"names"}, "no requirements.txt"),
        (WEIGHTS + "/config.json", {"config"}, "no config.json"),
        (WEIGHTS, {"names", "config"}, "must contain exactly one model folder"),
        ("weights", {"names", "config"}, "no weights"),
    ],
)
def test_a_missing_file(stand_in, submission, name, rules, text):
    path = submission / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = check(submission)
    assert failed(report) == rules and not report.passed
    assert any(text in said(report, key) for key in rules)
    assert {report[key].status for key in RUNS} == {NOT_RUN}
    assert set(report) == set(RULES)


def test_a_script_that_is_a_pipe_is_not_waited_for(stand_in, submission):
    os.unlink(submission / "src" / "predict.py")
    os.mkfifo(submission / "src" / "predict.py")
    report = check(submission)
    assert failed(report) == {"names"} and "not a regular file" in said(report, "paddle")


def test_names_that_do_not_travel(stand_in, submission, tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (submission / "src" / "far.txt").symlink_to(tmp_path / "elsewhere")
    (submission / "src" / "near.txt").symlink_to("predict.py")
    (submission / "src" / "gone.txt").symlink_to("nothing")
    (submission / "run.sh").write_text("if true; then\n")
    (submission / "notes.txt").write_text("")
    (submission / "weights" / "second").mkdir()
    report = check(submission)
    assert failed(report) == {"names"} and len(report["names"].problems) == 4
    for text in ("src/far.txt is a link to", "src/gone.txt is a link to", "sh cannot parse run.sh",
                 "not mgen_vl_lora_merge, second", "notes.txt"):  # fmt: skip
        assert text in said(report, "names")


def test_names_do_not_steer_the_terminal(stand_in, submission, monkeypatch, capsys):
    (submission / "\x1b[31m.txt").write_text("")
    os.unlink(submission / "run.sh")
    monkeypatch.setattr(sys, "argv", ["check_submission.py", str(submission)])
    assert tool.main() == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "not needed: \\x1b[31m.txt" in out


def test_the_line_ends_of_windows(stand_in, submission):
    run_sh = submission / "run.sh"
    run_sh.write_bytes(run_sh.read_bytes().replace(b"\n", b"\r\n"))
    report = check(submission)
    assert report["names"].problems == ["run.sh has Windows line endings (CR LF): save it with LF"]
    assert not report.passed and report["runs"].status == NOT_RUN


def test_imports_and_requirements(stand_in, submission):
    stand_in("try:\n    import spare\nexcept ImportError:\n    pass\nif 0:\n    import torch\n    import absent.part")
    with open(submission / "requirements.txt", "a") as file:
        file.write("paddlepaddle-gpu==2.6.2\ntorch  # of course\nnot a package\n")
    report = check(submission)
    assert failed(report) == {"requirements", "paddle"}
    problems = said(report, "requirements")
    assert "imports absent, which requirements.txt does not list" in problems
    assert "paddlepaddle-gpu==2.6.2 would replace the platform's Paddle" in problems
    assert "'not a package' does not name a package" in problems
    assert "spare is not listed; src" not in problems and "works without" in problems
    assert len(report["requirements"].problems) == 3
    assert report["paddle"].problems == ["predict.py:11 imports torch"]


def test_a_program_without_paddle(stand_in, submission):
    (submission / "src" / "paddlemix.py").write_text("")
    assert failed(check(submission)) == {"paddle"}


def test_sources_that_are_no_python(stand_in, submission):
    (submission / "src" / "half.py").write_text("def half(:\n")
    assert check(submission).passed
    report = check(stand_in("import half"))
    assert not report.passed and "half.py cannot be read as Python" in said(report, "paddle")
    assert report["requirements"].status == report["paddle"].status == NOT_RUN


# ---- weights


def rename(tensors):
    tensors["transformer.llm.h.0.ln_one.weight"] = tensors.pop("transformer.llm.h.0.ln_1.weight")


def reshape(tensors):
    dtype, array = tensors["transformer.llm.h.1.mlp.w1.weight"]
    tensors["transformer.llm.h.1.mlp.w1.weight"] = (dtype, array[:, :-1])


def reshape_vision(tensors):
    dtype, array = tensors["visual.attn_pool.query"]
    tensors["visual.attn_pool.query"] = (dtype, array[:, :-1])


def leave_adapter(tensors):
    tensors["transformer.llm.h.0.attn.c_attn.lora_A"] = ("float32", np.zeros((128, 4), np.float32))


def spoil(tensors):
    tensors["lm_head.weight"][1][5, 7] = np.nan
    tensors["visual.proj"][1][0, :3] = -np.inf


@pytest.mark.parametrize(
    "change, rules, texts",
    [
        (rename, {"weights", "language"}, ["1 missing: transformer.llm.h.0.ln_1.weight",
                                           "unexpected: transformer.llm.h.0.ln_one.weight"]),
        (reshape, {"weights", "language"}, ["[128, 127], not [128, 128]", "the LLM has"]),
        (leave_adapter, {"weights", "language"}, ["unexpected: transformer.llm.h.0.attn.c_attn.lora_A"]),
        (reshape_vision, {"weights"}, ["visual.attn_pool.query is [4, 127]"]),
        (spoil, {"finite"}, ["lm_head.weight (1)", "visual.proj (3)"]),
    ],
)  # fmt: skip
def test_weights_that_are_wrong(stand_in, submission, merged, change, rules, texts):
    tensors = weights_of(submission)
    change(tensors)
    put_weights(submission, tensors)
    for base in (None, merged):
        report = check(submission, base=base)
        assert failed(report) == rules
        for text in texts:
            assert any(text in said(report, key) for key in rules), text
        assert {report[key].status for key in RUNS} == {NOT_RUN}


def test_a_shard_that_is_missing(stand_in, submission):
    tensors = weights_of(submission)
    os.unlink(submission / WEIGHTS / "model_state.pdparams")
    names = list(tensors)
    table = {}
    for number, part in enumerate((names[:30], names[30:]), 1):
        file = f"model_state-{number:05d}-of-00002.pdparams"
        write_pdparams(str(submission / WEIGHTS / file), {name: tensors[name] for name in part})
        table.update(dict.fromkeys(part, file))
    index = submission / WEIGHTS / "model_state.pdparams.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert check(submission).passed
    # A key that the index does not have; then a whole file.
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(table, extra=table[names[0]])}))
    assert "lists 1 keys that no file holds: extra" in said(check(submission), "weights")
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    os.unlink(submission / WEIGHTS / "model_state-00002-of-00002.pdparams")
    report = check(submission)
    assert failed(report) == {"weights"} and "model_state-00002" in said(report, "weights")
    assert report["language"].status == NOT_RUN


class Attack:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def test_weights_that_execute(stand_in, submission, tmp_path):
    canary = tmp_path / "canary"
    path = submission / WEIGHTS / "model_state.pdparams"
    pickled({"lm_head.weight": Attack(str(canary))}, path)
    report = check(submission)
    assert failed(report) == {"weights"} and not canary.exists()
    # The attack is a real one.
    pickle.loads(path.read_bytes())
    assert canary.exists()


def test_files_beside_the_weights_are_not_opened(stand_in, submission, tmp_path):
    canary = tmp_path / "canary"
    pickled(Attack(str(canary)), submission / WEIGHTS / "training_args.bin")
    report = check(submission)
    assert report.passed and not canary.exists()
    assert "neither opened nor needed: training_args.bin" in said(report, "weights")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "mgen"}', '{"visual": {}, "hidden_size": 1e9}'])
def test_a_config_that_cannot_be(stand_in, submission, text):
    (submission / WEIGHTS / "config.json").write_text(text)
    report = check(submission)
    assert failed(report) == {"config"} and "config.json" in said(report, "config")


def test_another_llm_than_the_bases(stand_in, submission, merged):
    """Whole and right by its own config.json; only the base shows that the LLM computes otherwise."""
    path = submission / WEIGHTS / "config.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), rotary_emb_base=500, seq_length=256)))
    assert check(submission).passed
    report = check(submission, base=merged)
    assert failed(report) == {"language"}
    assert "rotary_emb_base is 500, but 10000 in the base" in said(report, "language")
    assert "nothing differs from the base" in said(report, "changes")


def test_what_changed_where_the_dtypes_differ(tmp_path, merged):
    """A merge into float16 has changed what was tuned, not all that was rounded."""
    with open_weights(merged) as base:
        tensors = {name: ("float16", base.read(name, "float16")) for name in base.keys()}
        tensors["lm_head.weight"][1][0, 0] += 1
        tensors["visual.new"] = ("int64", np.arange(3))
        tensors["visual.attn_pool.query"] = ("float16", np.zeros((9, 128), np.float16))
        del tensors["visual.proj"]
        write_pdparams(str(tmp_path / "model_state.pdparams"), tensors)
        with open_weights(str(tmp_path)) as ours:
            bad, changes = look_through(ours, base, progress=False)
    assert bad == {}
    assert {group for group, change in changes.items() if change.changed} == {"lm_head"}
    assert changes["lm_head"].largest == pytest.approx(1, abs=1e-2)
    assert changes["ln_post and proj"].gone == ["visual.proj"] and changes["ln_post and proj"].new == ["visual.new"]
    assert changes["attn_pool"].reshaped == ["visual.attn_pool.query"]


def test_values_of_every_kind():
    assert count_not_finite(np.array([1, np.nan, np.inf, -np.inf, 6e4], np.float16), "float16") == 3
    assert count_not_finite(np.array([[0x7F80, 0x7FC0], [0xFF80, 0x7F7F]], np.uint16), "bfloat16") == 3
    assert count_not_finite(np.array([1, np.nan, -np.inf]), "float64") == 2
    assert count_not_finite(np.array([-1, 2]), "int64") == 0
    many = np.ones((3, 1 << 20), np.float32)
    many[2, 5] = many[0, 0] = np.nan
    assert count_not_finite(many, "float32") == 2
    one = np.array([0x3F80, 0x7FC0], np.uint16)
    assert largest_difference(one, one.copy(), "bfloat16") is None
    assert largest_difference(one, np.array([0x4000, 0x7FC0], np.uint16), "bfloat16") == 1
    assert largest_difference(one, np.array([0x3F80, 0x3F80], np.uint16), "bfloat16") == 0


# ---- runs


def test_a_run_that_is_right(stand_in, tmp_path):
    """Where it runs, and with what: a path with blanks, a home of its own, the notebook's relative paths."""
    notes = tmp_path / "notes"
    folder = stand_in(
        f"import os\nopen({str(notes)!r}, 'a').write(repr([os.getcwd(), sys.argv[1:], __file__, "
        "dict(os.environ), sys.executable]) + '\\n')"
    )
    report = check(folder)
    assert report.passed and "4 rows, 4 lines" in said(report, "lines")
    first, second = (eval(line) for line in notes.read_text().splitlines())
    for cwd, argv, file, environment, python in (first, second):
        assert " " in file and " " in argv[0] and not file.startswith(folder)
        assert os.path.basename(cwd) == "submission" and os.path.dirname(cwd) == environment["HOME"][: -len("/home")]
        assert "HF_HUB_OFFLINE" not in environment and os.path.samefile(python, sys.executable)
        assert all(os.path.isabs(path) for path in argv)
    assert "/src/../../dataset/" not in first[1][0] and os.path.normpath(second[1][2]).endswith("/submission/weights")


@pytest.mark.parametrize(
    "more, rules, text",
    [
        ("lines.pop()", {"lines"}, "3 lines for 4 rows"),
        ("lines.append(lines[0])", {"lines"}, "5 lines for 4 rows"),
        ("lines.reverse()", {"lines"}, "line 1 must be the id 'sample0'"),
        ("lines[2] = 'sample2 caption\\n'", {"lines"}, "line 3 must be the id 'sample2'"),
        ("print('so long'); sys.exit(3)", {"runs", "lines"}, "so long"),
        ("open(__file__.replace('predict.py', 'cache.txt'), 'w').close()",
         {"runs", "read_only", "lines"}, "cache.txt"),
        ("import subprocess, time\nsubprocess.Popen(['sleep', '99'])\ntime.sleep(99)",
         {"runs", "lines"}, "took more than 1 s"),
    ],
)  # fmt: skip
def test_a_run_that_is_wrong(stand_in, more, rules, text):
    report = check(stand_in(more), time_limit=1.0 if "sleep" in more else 60.0)
    if os.geteuid() != 0 or trial._works(*trial._MODES_BIND_ROOT):
        # It was kept from writing, so nothing was written.
        rules = rules - {"read_only"}
    assert failed(report) == rules
    assert any(text in said(report, key) for key in rules)
    if "runs" in rules:
        assert report["offline"].status == NOT_RUN


def test_what_is_written_is_seen_without_modes(stand_in, monkeypatch):
    monkeypatch.setattr(trial.TrialFolder, "freeze", lambda self: self._before.update(self._state()))
    report = check(stand_in("open(__file__.replace('predict.py', 'cache.txt'), 'w').close()"))
    assert failed(report) == {"read_only"} and "it wrote src/cache.txt" in said(report, "read_only")


def test_linked_weights_are_read_only_while_it_runs(stand_in, submission, monkeypatch):
    weights = submission / WEIGHTS / "model_state.pdparams"
    os.chmod(weights, 0o640)
    os.link(weights, submission / WEIGHTS / "again.bin")
    before = weights.read_bytes()
    monkeypatch.setattr(trial, "_LINK_FROM", 1)
    report = check(stand_in(f"open(sys.argv[3] + '/{weights.parent.name}/model_state.pdparams', 'r+b').write(b'!')"))
    if os.geteuid() != 0 or trial._works(*trial._MODES_BIND_ROOT):
        assert "runs" in failed(report) and "Permission denied" in said(report, "runs")
        assert weights.read_bytes() == before
    assert "read_only" in failed(report) or weights.read_bytes() == before
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640


def test_a_kill_leaves_no_copy_and_the_weights_as_they_were(stand_in, submission, root):
    weights = submission / WEIGHTS / "model_state.pdparams"
    os.chmod(weights, 0o640)
    before = sorted(os.listdir(submission.parent))
    code = """if True:
        import os, signal, sys
        from paddlemix.contest import check, trial
        trial._LINK_FROM = 1

        def both_calls(*arguments):
            print(oct(os.stat(sys.argv[2]).st_mode), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

        trial.both_calls = both_calls
        check.check_submission(sys.argv[1], progress=False)
    """
    command = [sys.executable, "-c", code, str(submission), str(weights)]
    done = subprocess.run(command, cwd=root, env=without_coverage(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout.startswith("0o100444"), done.stderr
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640 and sorted(os.listdir(submission.parent)) == before


def test_empty_captions_are_noted(stand_in):
    report = check(stand_in("lines = [name + '\\t\\n' for name in rows]"))
    assert report.passed and "4 captions are empty" in said(report, "lines")


def test_a_run_sh_that_splits_paths(stand_in, submission):
    (submission / "run.sh").write_text("#!/bin/sh\ncd src && python predict.py $1 $2 $3\n")
    report = check(submission)
    assert "runs" in failed(report) and "lines" in failed(report)


def apart():
    return trial._works(*trial._NO_NETWORK) or trial._works(*trial._NO_NETWORK_FOR_USERS)


def test_network_that_is_asked_for(stand_in):
    """From Python and from what it starts; a local socket is no network."""
    if not apart():
        pytest.skip("this system lets no process leave its network")
    ask = "import socket as s; s.socket(s.AF_UNIX); s.create_connection(('192.0.2.1', 80), 5)"
    for more in (ask, f"import subprocess\nsys.exit(subprocess.call([sys.executable, '-IS', '-c', {ask!r}]))"):
        report = check(stand_in(more))
        assert failed(report) == {"runs", "lines"} and "Network is unreachable" in "".join(report["runs"].problems)
        assert report["offline"] == Verdict(NOT_RUN, ["unknown: a run without a network failed"])


def test_a_system_that_keeps_its_network(stand_in, monkeypatch):
    monkeypatch.setattr(trial, "_NO_NETWORK", ("false",))
    monkeypatch.setattr(trial, "_NO_NETWORK_FOR_USERS", ("no-such-command",))
    report = check(stand_in())
    assert report.passed and report["offline"].status == NOT_RUN
    assert "not checked" in said(report, "offline")


def test_a_program_that_listens_to_itself(stand_in):
    """As paddle.distributed.launch does. Only root can have a loopback interface in a new network."""
    if not trial._works(*trial._NO_NETWORK):
        pytest.skip("not root, or this system lets no process leave its network")
    server = "import socket\ns = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(s.getsockname(), 5)"
    report = check(stand_in(server))
    assert report.passed, report.lines()


@pytest.mark.parametrize("place", ["dataset", "../dataset", "../../dataset"])
def test_files_around_the_submission_are_not_touched(stand_in, submission, place):
    """Wherever the folder lies: the notebook's ../../dataset must not be the user's own, seen from the copy."""
    theirs = submission / place
    theirs.mkdir()
    (theirs / "test_samples.txt").write_text("theirs\tAAAA\n")
    (theirs / "results 2.txt").write_text("precious")
    report = check(stand_in())
    assert report.passed and "4 rows, 4 lines" in said(report, "lines"), report.lines()
    assert (theirs / "results 2.txt").read_text() == "precious"


def test_a_submission_made_by_the_notebook(submission, root):
    """cp -a paddlemix/* submission/src/: tests, tools and archives come along, and predict.py reaches none of them."""
    shutil.rmtree(submission / "src")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "demo", "weights", "dataset", "submission")
    shutil.copytree(root, submission / "src", ignore=left_out)
    imports = "def later():\n    import paddle\n    from paddlemix.inference import prediction\n"
    (submission / "src" / "predict.py").write_text(imports + STAND_IN.replace("MORE", ""))
    shutil.copy(root / "requirements.txt", submission)
    report = check(submission)
    assert report.passed, report.lines()
    note = [line for line in report["names"].notes if "not imported by predict.py" in line]
    assert len(note) == 1 and "tests (" in note[0] and "paddlemix" not in note[0]


def test_the_sample_that_is_made(tmp_path, capsys):
    write_sample(str(tmp_path / "rows.tsv"))
    rows = list(read_rows(str(tmp_path / "rows.tsv"), want_caption=False))
    assert len(rows) == 4 and not any(row.error for row in rows)
    data = [base64.b64decode(bytes(row.image)) for row in rows]
    assert data[0][:2] == data[1][:2] == data[2][:2] == struct.pack("BB", 0xFF, 0xD8) and data[3] == b"no image"
    assert "4 rows to caption; the last two are broken on purpose\n" in capsys.readouterr().err


def test_the_fresh_environment_is_the_fourth_argument(stand_in, tmp_path, monkeypatch):
    """What make_environment gives is reported, and run.sh gets its interpreter; see test_pack_submission.py."""
    from paddlemix.contest import fresh

    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\necho used >> "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    made = [fresh.Fresh(str(wrapper), "paddlepaddle==2.6.2", [])]
    monkeypatch.setattr(fresh, "try_requirements", lambda *args: made[0])
    report = check(stand_in(), fresh_venv=True)
    assert report.passed and report["fresh"].status == PASS and "paddlepaddle==2.6.2" in said(report, "fresh")
    assert (tmp_path / "used").exists()
    made[0] = made[0]._replace(problems=["thing: ModuleNotFoundError"])
    assert failed(check(stand_in(), fresh_venv=True)) == {"fresh"}


def test_nothing_it_starts_outlives_it(stand_in, tmp_path):
    marker = f"99.{os.getpid()}"
    check(stand_in(f"import subprocess; subprocess.Popen(['sleep', '{marker}'])"))
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"sleep {marker}" not in running
