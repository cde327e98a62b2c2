"""Reading JSON from untrusted files."""

import json
import os

import pytest

from paddlemix.utils.errors import ConfigError, WeightsError
from paddlemix.utils.json_files import read_config_object, read_json_object, write_json

READERS = pytest.mark.parametrize(
    "read, error", [(read_config_object, ConfigError), (read_json_object, WeightsError)], ids=["config", "weights"]
)


@READERS
def test_what_is_read(read, error, tmp_path):
    path = str(tmp_path / "a.json")
    write_json(path, {"名": [1, 2.5, None]})
    assert read(path) == {"名": [1, 2.5, None]}
    for mark in ("", "\ufeff"):
        (tmp_path / "b.json").write_text(mark + '{"a": 1}', encoding="utf-8")
        assert read(str(tmp_path / "b.json")) == {"a": 1}


@READERS
@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": %s}' % (b"1" * 21), "an integer of more than 20 digits"),
        (b'{"a": NaN}', "NaN is not allowed here"),
        (b'{"a": -Infinity}', "-Infinity is not allowed here"),
        (b'{"b": {"a\\n": 1, "a\\n": 2}}', r"the key a\\n is in it twice"),
        (b'{"a": [%s0]}' % (b"{}," * (1 << 20)), "more than 1,048,576 lists and objects"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_refused(read, error, data, says, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(error, match=says) as caught:
        read(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@READERS
def test_what_is_no_file(read, error, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "No such file")):
        with pytest.raises(error, match=f"cannot read .*: {says}"):
            read(str(tmp_path / path))


def test_a_log_may_hold_a_loss_that_is_not_a_number(tmp_path):
    (tmp_path / "log.json").write_text('{"loss": NaN}')
    assert str(read_json_object(str(tmp_path / "log.json"), constants=True)) == "{'loss': nan}"


def test_a_mark_in_front_of_every_file_of_a_model(tmp_path):
    """As Notepad and PowerShell write them."""
    from paddlemix.checkpoint import write_pdparams
    from paddlemix.checkpoint.lora_merge import merge
    from paddlemix.inference.loading import load_model
    from tests.helpers import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")
    template = {"system": "You sell cups.", "conversation": ["<|im_start|>user\n{{user}}<|im_end|>\n",
                                                             "<|im_start|>assistant\n{{bot}}<|im_end|>\n"]}  # fmt: skip
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps(template))
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.json")
    for name in names:
        text = (tmp_path / "model" / name).read_text("utf-8")
        (tmp_path / "model" / name).write_text(text, encoding="utf-8-sig")
    part = tmp_path / "part"
    part.mkdir()
    loaded = load_model(folder)
    assert loaded.template.system == "You sell cups."
    name = "visual.attn_pool.query"
    trained = {name: ("float32", loaded.model.state_dict()[name].numpy())}
    write_pdparams(str(part / "partial_model_state.pdparams"), trained)
    merge(folder, str(part), str(tmp_path / "merged"), dtype="float32", progress=False)
    assert load_model(str(tmp_path / "merged")).template.system == "You sell cups."
