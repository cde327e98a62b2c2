"""chat.py about one image. `pytest tests/test_chat.py`"""

import re
import subprocess
import sys

import pytest

import chat
from paddlemix.utils import cli
from tests.helpers import image_base64, image_bytes
from tests.inference.talking import save_talking_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_talking_model(tmp_path_factory.mktemp("weights") / "tiny model", seed=5)


@pytest.fixture
def call(model, monkeypatch, capsys):
    """call(*arguments) → (exit status, response, stdout, stderr)."""

    def run(*arguments, weights=model):
        arguments = (str(weights), "--max_new_tokens", "8", *map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        status = cli.run(chat.main)
        said = capsys.readouterr()
        found = re.search(r"^response: (.*)$", said.out, re.MULTILINE)
        return status, found and found.group(1), said.out, said.err

    return run


def test_what_it_prints(call):
    status, response, out, _ = call()
    assert status == 0
    lines = out.split("\n")
    assert lines[0] == "prompt: 请描述图片内容"
    assert lines[1] == f"response: {response}" and response
    assert lines[2] == "------------------"
    assert re.fullmatch(r"It took \d+\.\d+(e-\d+)? seconds!", lines[3])
    assert lines[4:] == [""]


def test_path_and_base64_and_data_uri_are_one_image(call, tmp_path):
    path = tmp_path / "a picture.jpg"
    path.write_bytes(image_bytes(3))
    answer = call(path)[1]
    assert answer != call()[1]
    assert call(image_base64(3))[1] == answer
    assert call("data:image/jpeg;base64," + image_base64(3))[1] == answer
    assert call(chat.EXAMPLE)[1] == call()[1]


def test_the_prompt_and_the_folder_that_holds_the_model(call, model, tmp_path):
    status, response, out, _ = call(chat.EXAMPLE, "What is it?")
    assert status == 0 and out.startswith("prompt: What is it?\n")
    assert response != call()[1]
    inside = call(chat.EXAMPLE, "What is it?", weights=model.rsplit("/", 1)[0])
    assert inside[1] == response


def test_chat_and_predict_agree(call, model, tmp_path):
    from paddlemix.inference.prediction import predict_file

    (tmp_path / "in.tsv").write_text("a\t" + image_base64(3) + "\n")
    predict_file(str(tmp_path / "in.tsv"), str(tmp_path / "out.tsv"), model, max_new_tokens=8)
    assert (tmp_path / "out.tsv").read_text() == "a\t" + call(image_base64(3))[1] + "\n"


@pytest.mark.parametrize(
    "image, says",
    [
        ("no/such/file.jpg", "no/such/file.jpg is no file"),
        ("http://127.0.0.1:9/x.jpg", "private address"),
        ("ftp://example.org/x.jpg", "only http and https"),
    ],
)
def test_images_that_cannot_be_had(call, image, says):
    status, response, _, err = call(image)
    assert (status, response) == (2, None)
    last = err.strip().split("\n")[-1]
    assert last.startswith("error: ") and says in last


def test_bad_options(call, tmp_path):
    status, _, _, err = call(weights=tmp_path)
    assert status == 2 and "no config.json" in err
    for bad in (["--max_new_tokens=0"], ["--dtype=int8"], ["a", "b", "c"], ["--tokens=1"]):
        status, _, _, err = call(*bad)
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and "chat.py --help" in err


def test_as_a_user_runs_it(model, root, tmp_path):
    command = [sys.executable, str(root / "chat.py"), model, "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prompt: 请描述图片内容\nresponse: ")


def test_the_example_is_small_and_an_image(root):
    from PIL import Image

    path = root / "assets" / "example.jpg"
    assert path.stat().st_size < 30_000
    with Image.open(path) as image:
        assert image.size == (448, 336)
