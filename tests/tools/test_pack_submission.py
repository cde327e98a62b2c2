"""What is packed, what is refused, and the archives.

That a packed folder predicts is tested in test_check_submission.py.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from paddlemix.checkpoint import open_weights, write_pdparams
from paddlemix.contest import fresh, pack, sources
from paddlemix.utils import cli
from paddlemix.utils.errors import JobFailed, UserError
from tools import pack_submission


@pytest.fixture
def call(tmp_path, merged, monkeypatch, capfd):
    """call(*flags) → (exit status, stdout, stderr) of the tool, with `merged` packed into tmp_path/submission."""

    def run(*flags, weights=merged, out=tmp_path / "submission"):
        words = ["pack_submission.py", "--weights", str(weights), "--out", str(out), *flags]
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        return (cli.run(pack_submission.main), *capfd.readouterr())

    return run


def test_hard_links_are_made_without_paddle(merged, root, tmp_path):
    words = ["--weights", str(merged), "--out", str(tmp_path / "submission")]
    program = f"""
import sys
sys.argv[1:] = {words!r}
from tools import pack_submission
assert pack_submission.main() == 0
loaded = {{"paddle", "paddlenlp", "PIL", "transformers"}} & set(sys.modules)
assert not loaded, loaded
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def refused(call, *flags, **kwargs):
    status, _, err = call(*flags, **kwargs)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def all_files(folder):
    return {
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    }


def test_what_is_in_it(packed, merged, root):
    files = all_files(packed)
    assert {name.split(os.sep)[0] for name in files} == {"requirements.txt", "run.sh", "src", "weights"}
    assert {os.path.basename(name) for name in files if name.startswith("weights/")} == set(os.listdir(merged))
    assert {os.path.dirname(name) for name in files if name.startswith("weights/")} == {"weights/mgen_vl_lora_merge"}
    weights = "weights/mgen_vl_lora_merge/model_state.pdparams"
    assert os.path.samefile(packed / weights, os.path.join(merged, "model_state.pdparams"))
    source = {name[len("src/") :] for name in files if name.startswith("src/")}
    assert {"predict.py", "paddlemix/models/mgen_vl/vision.py", "paddlemix/inference/prediction.py"} <= source
    # The package and no more: neither tests nor caches.
    assert {name.split(os.sep)[0] for name in source} == {"predict.py", "LICENSE", "paddlemix"}
    for name in source:
        assert "__pycache__" not in name
        assert (packed / "src" / name).read_bytes() == (root / name).read_bytes()
    assert (packed / "run.sh").read_bytes() == (root / "run.sh").read_bytes()


def test_requirements(packed, call, tmp_path, root):
    assert (packed / "requirements.txt").read_bytes() == (root / "requirements" / "submission.txt").read_bytes()
    assert "nowhere.txt" in refused(call, "--requirements", str(tmp_path / "nowhere.txt"))
    assert call("--requirements", str(root / "requirements.txt"))[0] == 0
    assert (tmp_path / "submission" / "requirements.txt").read_bytes() == (root / "requirements.txt").read_bytes()


def test_only_what_a_prediction_reads(call, merged, tmp_path):
    """Records, optimizer states and other sets of weights stay; links into a cache become files."""
    cache = tmp_path / "models--x" / "snapshots" / "one"
    cache.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    for number, name in enumerate(sorted(os.listdir(merged))):
        shutil.copy(os.path.join(merged, name), tmp_path / "models--x" / "blobs" / str(number))
        (cache / name).symlink_to(f"../../blobs/{number}")
    for name in ("training_args.bin", "optimizer.pdopt", "trainer_state.json", "pytorch_model.bin"):
        (cache / name).write_text("{}")
    (cache / "LICENSE").write_text("free")
    # A link in the place of a folder, too: `weights/` of the working copy may lead to another disk.
    (tmp_path / "weights").symlink_to(cache)
    status, out, _ = call(weights=tmp_path / "weights")
    assert status == 0 and "in 1 weights file (hard linked), 0.00" in out and "0.00 GB" not in out
    inside = tmp_path / "submission" / "weights" / "one"
    assert set(os.listdir(inside)) == {*os.listdir(merged), "LICENSE"}
    assert not any(path.is_symlink() for path in inside.iterdir())


def test_copies_where_links_cannot_be(call, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("another disk")))
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    status, out, err = call()
    assert status == 0 and "(copied)" in out and "weights: 100%" in err
    path = tmp_path / "submission" / "weights" / "mgen_vl_lora_merge" / "model_state.pdparams"
    assert path.read_bytes() == open(os.path.join(merged, path.name), "rb").read()


def test_weights_that_are_no_model(call, merged, tmp_path):
    folder = tmp_path / "model"

    def fresh_copy():
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(merged, folder)

    lora = tmp_path / "lora"
    lora.mkdir()
    for name in ("lora_model_state.pdparams", "partial_model_state.pdparams"):
        write_pdparams(str(lora / name), {"x": ("float32", np.zeros(1, np.float32))})
        assert "merge_lora_params.py" in refused(call, weights=lora)
        os.unlink(lora / name)
    assert "no config.json" in refused(call, weights=lora)
    assert "no folder" in refused(call, weights=tmp_path / "nowhere")

    os.unlink(fresh_copy() / "mgen.tiktoken")
    assert "no vocabulary" in refused(call, weights=folder)
    os.unlink(fresh_copy() / "model_state.pdparams")
    assert "no weights" in refused(call, weights=folder)
    # A part of the tensors under the name of the whole.
    with open_weights(merged) as reader:
        part = {name: ("float32", reader.read(name)) for name in reader.keys()[:-1]}
        last = reader.keys()[-1]
        write_pdparams(str(fresh_copy() / "model_state.pdparams"), part)
    assert f"1 missing: {last}" in refused(call, weights=folder)
    assert not (tmp_path / "submission").exists()


def test_what_is_never_replaced(call, merged, tmp_path, root):
    out = tmp_path / "submission"
    out.mkdir()
    (out / "README.md").write_text("ours")
    assert call()[0] == 0
    assert (out / "README.md").read_text() == "ours"
    assert "--overwrite" in refused(call)
    (out / "run.sh").write_text("old")
    assert call("--overwrite")[0] == 0
    assert (out / "run.sh").read_bytes() == (root / "run.sh").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["submission"]
    (out / "diary.txt").write_text("years of it")
    assert "diary.txt" in refused(call, "--overwrite")
    for path in (root, root / "paddlemix", os.path.dirname(merged), merged, os.path.join(merged, "in")):
        assert "overlap" in refused(call, "--overwrite", out=path)
    assert "overlap" in refused(call, "--overwrite", weights=out / "weights" / "mgen_vl_lora_merge")
    (tmp_path / "other.zip").write_text("x")
    assert "other.zip is there" in refused(call, "--zip", out=tmp_path / "other")
    # Of two faults the weights come first: the other is about what they would become.
    assert "no folder nope" in refused(call, "--zip", weights="nope", out=tmp_path / "other")
    assert "other.zip exists and is not a zip archive" in refused(call, "--zip", "--overwrite", out=tmp_path / "other")
    (tmp_path / "other.zip").write_bytes(b"PK\3\4")
    (tmp_path / "other.weights").mkdir()
    (tmp_path / "other.weights" / "diary.txt").write_text("more")
    assert "diary.txt" in refused(call, "--split_weights", "--overwrite", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_archives_that_cannot_be(call, merged, tmp_path):
    (tmp_path / "other.zip").mkdir()
    assert "other.zip is a folder" in refused(call, "--zip", "--overwrite", out=tmp_path / "other")
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert "\\udcff is not UTF-8" in refused(call, "--zip", out=strange)
    shutil.copytree(merged, strange)
    assert "\\udcff is not UTF-8" in refused(call, weights=strange)
    assert sorted(os.listdir(tmp_path)) == ["other.zip", "\udcff"]


def test_the_archive(call, tmp_path, packed, monkeypatch):
    # As if a file of 10 kB were one of 5 GB.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10_000)
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    status, out, err = call("--zip")
    monkeypatch.undo()
    assert status == 0 and "submission.zip" in out and "submission.zip: 100%" in err
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.testzip() is None
        entries = {entry.filename: entry for entry in archive.infolist()}
        assert set(entries) == {f"submission/{name}" for name in all_files(packed)}
        for name, entry in entries.items():
            assert archive.read(entry) == (packed / name[len("submission/") :]).read_bytes()
            assert entry.compress_type == zipfile.ZIP_STORED
        assert entries["submission/run.sh"].external_attr >> 16 & 0o777 == (packed / "run.sh").stat().st_mode & 0o777
    # The field of ZIP64 sizes stands in front of the data of the large entry, and of no small one.
    data = (tmp_path / "submission.zip").read_bytes()
    for name, wide in (("weights/mgen_vl_lora_merge/model_state.pdparams", True), ("requirements.txt", False)):
        start = data.index(f"submission/{name}".encode()) + len(f"submission/{name}")
        assert (data[start : start + 2] == b"\x01\x00") is wide


def test_weights_apart(call, tmp_path, packed):
    status, out, _ = call("--split_weights")
    assert status == 0
    beside = tmp_path / "submission.weights"
    assert sorted(os.listdir(beside)) == ["SHA256SUMS", "model_state.pdparams"]
    digest, name = (beside / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((beside / name).read_bytes()).hexdigest() == digest
    large = "weights/mgen_vl_lora_merge/model_state.pdparams"
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert set(archive.namelist()) == {f"submission/{name}" for name in all_files(packed) - {large}}
        archive.extractall(tmp_path / "home")
    # Put back as --help says, it is what was packed.
    (move,) = [line.strip() for line in pack_submission.MORE.splitlines() if line.strip().startswith("mv ")]
    shutil.move(str(beside), tmp_path / "home")
    subprocess.run(["sh", "-ec", move], cwd=tmp_path / "home", check=True)
    assert os.listdir(tmp_path / "home" / "submission.weights") == ["SHA256SUMS"]
    assert all_files(tmp_path / "home" / "submission") == all_files(packed)


def test_a_full_disk_is_one_line(call, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "link_or_copy", full)
    status, _, err = call()
    assert status == 1 and "No space left on device" in err and "Traceback" not in err


# ---- sources


@pytest.fixture
def project(tmp_path):
    """project({path: text}) → a folder of such files."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / "project" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "project")

    return make


def test_files_reached(project):
    folder = project({
        "predict.py": "def main():\n    from paddlemix.a import b\n    import helper\n",
        "helper.py": "", "other.py": "",
        "paddlemix/__init__.py": "",
        "paddlemix/a/__init__.py": "", "paddlemix/a/b.py": "from .c import NAME\nfrom .. import d\nfrom . import e\n",
        "paddlemix/a/c.py": "NAME = 1\n", "paddlemix/a/e/__init__.py": "", "paddlemix/a/unused.py": "def",
        "paddlemix/d.py": "", "paddlemix/z/__init__.py": "",
    })  # fmt: skip
    assert sources.files_reached(folder, "predict.py") == [
        "helper.py", "paddlemix/__init__.py", "paddlemix/a/__init__.py", "paddlemix/a/b.py", "paddlemix/a/c.py",
        "paddlemix/a/e/__init__.py", "paddlemix/d.py", "predict.py",
    ]  # fmt: skip
    with pytest.raises(UserError, match="cannot be read as Python"):
        sources.files_reached(project({"paddlemix/d.py": "def"}), "predict.py")


def test_foreign_imports(project):
    folder = project({
        "a.py": "import os, json.decoder\nimport b\nfrom numpy import array\n"
        "try:\n    import quick\nexcept ImportError:\n    import slow\n"
        "try:\n    import asked\nexcept ValueError:\n    pass\n",
        "b.py": "try:\n    import numpy\nexcept (ImportError, OSError):\n    numpy = None\n",
        "c.py": "import not_asked",
    })  # fmt: skip
    found = sources.foreign_imports(folder, ["a.py", "b.py"])
    assert {name: one.guarded for name, one in found.items()} == {
        "numpy": False, "quick": True, "slow": False, "asked": False,
    }  # fmt: skip
    assert (found["numpy"].file, found["numpy"].line) == ("a.py", 3)


@pytest.mark.parametrize(
    "line, package",
    [
        ("numpy", "numpy"), ("Foo.Bar_x[a,b] >= 1, <2 ; python_version < '3.9'  # why", "foo-bar-x"), ("", None),
        ("# numpy", None), ("-r other.txt", None), ("x @ https://example.org/x.whl", "x"),
    ],
)  # fmt: skip
def test_requirement_lines(line, package):
    found = sources.parse_requirement(line)
    assert (found and found.package) == package


def test_a_line_that_is_no_requirement():
    with pytest.raises(UserError, match="does not name a package"):
        sources.parse_requirement("pip install numpy")


def test_modules_of_installed_packages():
    assert "PIL" in sources.modules_of("pillow")
    assert "yaml" in sources.modules_of("pyyaml")
    assert sources.modules_of("no-such-package") == {"no_such_package"}


# ---- a fresh environment; pip is replaced here, nothing is downloaded


@pytest.mark.parametrize(
    "installed, problem",
    [
        ({"thing/__init__.py": ""}, None),
        ({}, "thing: ModuleNotFoundError: No module named 'thing'"),
        ({"thing/__init__.py": "", "paddlepaddle-2.6.2.dist-info/METADATA": None}, "changes the platform's Paddle"),
    ],
)
def test_a_fresh_environment(tmp_path, monkeypatch, installed, problem):
    folder = tmp_path / "a submission"
    (folder / "src" / "paddlemix").mkdir(parents=True)
    text = "import thing\ntry:\n    import spare\nexcept ImportError: 0\n"
    (folder / "src" / "paddlemix" / "__init__.py").write_text(text)
    (folder / "requirements.txt").write_text("thing\n")
    real, asked = fresh._run, []

    def fake(command):
        if "pip" not in command:
            return real(command)
        asked.append(command[command.index("install") :])
        site = next((tmp_path / "an env" / "lib").glob("python*/site-packages"))
        files = installed if "-r" in command else {"paddlepaddle-2.6.2.dist-info/METADATA": "2.6.2"}
        for name, text in files.items():
            (site / name).parent.mkdir(exist_ok=True)
            version = f"Metadata-Version: 2.1\nName: paddlepaddle\nVersion: {text or '3.0.0'}\n"
            (site / name).write_text(version if name.endswith("METADATA") else text)

    monkeypatch.setattr(fresh, "_run", fake)
    paddle_of = fresh._paddle_of
    platforms = {sys.executable: "paddlepaddle==2.6.2"}
    monkeypatch.setattr(fresh, "_paddle_of", lambda python: platforms.get(python) or paddle_of(python))
    files = ["paddlemix/__init__.py"]
    made = fresh.try_requirements(sys.executable, str(folder), files, str(tmp_path / "an env"))
    assert "paddlepaddle==2.6.2" in asked[0] and str(folder / "requirements.txt") in asked[1]
    if problem is None:
        assert made.problems == [] and made.paddle == "paddlepaddle==2.6.2"
    else:
        assert any(problem in text for text in made.problems)


def test_a_failed_command_is_named():
    with pytest.raises(JobFailed, match="status 3: it broke"):
        fresh._run([sys.executable, "-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"])


def test_the_paddle_of_an_interpreter():
    assert fresh._paddle_of(sys.executable).startswith("paddlepaddle")
