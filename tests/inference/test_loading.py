"""Finding a model folder and loading it."""

import base64
import json

import pytest

from paddlemix.inference.loading import load_model
from paddlemix.inference.source import find_model_folder
from paddlemix.utils.errors import UserError
from tests.helpers import refused, save_tiny_model


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return str(path)


def test_the_folder_itself_or_the_one_inside(tmp_path):
    inside = model_folder(tmp_path / "weights" / "a model")
    (tmp_path / "weights" / "README.md").write_text("")
    (tmp_path / "weights" / "empty").mkdir()
    assert find_model_folder(inside) == inside
    assert find_model_folder(str(tmp_path / "weights")) == inside


def test_none_or_several(tmp_path):
    with refused(UserError, "no-folder"):
        find_model_folder(str(tmp_path / "missing"))
    with refused(UserError, "is-a-file"):
        find_model_folder(__file__)
    with refused(UserError, "no-model"):
        find_model_folder(str(tmp_path))
    model_folder(tmp_path / "one")
    model_folder(tmp_path / "two")
    with refused(UserError, "several-models"):
        find_model_folder(str(tmp_path))


def test_load_takes_the_template_of_the_folder(tmp_path, capfd):
    folder = save_tiny_model(tmp_path / "model")
    loaded = load_model(folder, device="cpu")
    assert loaded.template.system == "You are a helpful assistant."
    assert not loaded.model.training
    assert "on cpu in float32; threads: " in capfd.readouterr().err
    template = {
        "system": "You sell cups.",
        "conversation": [
            "<|im_start|>user\n{{user}}<|im_end|>\n",
            "<|im_start|>assistant\n{{bot}}<|im_end|>\n",
        ],
    }
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps(template))
    assert load_model(folder).template.system == "You sell cups."
    template["conversation"][0] = "Q: {{user}}\n"
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps(template))
    loaded = load_model(folder)
    assert loaded.template.user == ("Q: ", "\n")


@pytest.mark.parametrize(
    "change, says",
    [
        ("more ids", "the tokenizer has 517 ids, the model 480 rows of embeddings"),
        ("other ids", "<img> is 474 in the tokenizer and 470 in config.json"),
        ("another config", "an image span has 4 ids in the tokenizer and 9 in config.json"),
    ],
)
def test_a_tokenizer_or_config_of_another_model_is_refused_before_the_weights(tmp_path, change, says):
    folder = save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model_state.pdparams").write_bytes(b"never read")
    if change == "another config":
        path = tmp_path / "model" / "config.json"
        config = json.loads(path.read_text())
        config["visual"]["n_queries"] = 9
        path.write_text(json.dumps(config))
    else:
        with open(tmp_path / "model" / "mgen.tiktoken", "ab") as file:
            for rank in range(256, 300 if change == "more ids" else 260):
                file.write(base64.b64encode(b"w%d" % rank) + b" %d\n" % rank)
    with pytest.raises(UserError, match=says):
        load_model(folder, device="cpu")


def test_a_dtype_or_device_that_is_not_there_is_said(tmp_path, capfd):
    import paddle

    if paddle.is_compiled_with_cuda():
        pytest.skip("for a CPU wheel")
    folder = save_tiny_model(tmp_path / "model")
    loaded = load_model(folder, dtype="bfloat16", device="gpu")
    assert str(loaded.model.config.dtype) == "float32"
    said = capfd.readouterr().err
    assert "has no CUDA; running on the CPU" in said
    assert said.count("bfloat16 is not supported on the CPU") == 1
