"""The roles of the files in a model folder."""

import pytest

from paddlemix.checkpoint import model_folder
from paddlemix.checkpoint.model_folder import files_of, gather, role
from paddlemix.utils.errors import WeightsError
from tests.helpers import refused


@pytest.mark.parametrize(
    "expected, names",
    [
        (model_folder.CONFIG, ["config.json", "generation_config.json"]),
        (
            model_folder.WEIGHTS,
            [
                "model_state.pdparams",
                "model_state-00001-of-00002.pdparams",
                "model_state.pdparams.index.json",
                "model.safetensors",
                "model-00010-of-00010.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        (
            model_folder.TORCH_WEIGHTS,
            ["pytorch_model.bin", "pytorch_model-00001-of-00010.bin", "pytorch_model.bin.index.json"],
        ),
        (model_folder.TUNED_WEIGHTS, ["lora_model_state.pdparams", "partial_model_state.pdparams"]),
        (model_folder.TUNING, ["lora_config.json", "tuned_from.json"]),
        (
            model_folder.TOKENIZER,
            ["mgen.tiktoken", "qwen.tiktoken", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
        ),
        (model_folder.TEMPLATE, ["chat_template.json"]),
        (model_folder.FONT, ["SimSun.ttf"]),
        (model_folder.LICENCE, ["LICENSE", "NOTICE", "license.txt", "MODEL_LICENSE.md", "Notice.pdf"]),
        (
            model_folder.RECORD,
            ["train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "training_args.bin",
             "loss_curve.png"],
        ),
        (None, ["README.md", "optimizer.pdopt", "model_state", "xmodel_state.pdparams", "config.json.bak", "license.py",
                "model.bin", "model_state-1-of-2.pdparams"]),
    ],
    ids=str,
)  # fmt: skip
def test_roles(expected, names):
    assert {name: role(name) for name in names} == dict.fromkeys(names, expected)


def test_the_template_that_is_read_is_in_the_table():
    from paddlemix.processors.mgen_vl_processing import CHAT_TEMPLATE_NAME

    assert role(CHAT_TEMPLATE_NAME) == model_folder.TEMPLATE


def test_gather_takes_the_first_folder_that_has_a_file(tmp_path):
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    for folder, names in (
        (tuned, ["tokenizer_config.json", "qwen.tiktoken"]),
        (base, ["tokenizer_config.json", "mgen.tiktoken", "qwen.tiktoken", "LICENSE", "config.json"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    (base / "chat_template.json").mkdir()
    found = gather([str(tuned), str(base)], model_folder.TOKENIZER, model_folder.TEMPLATE, model_folder.LICENCE)
    assert found == {
        "qwen.tiktoken": str(tuned / "qwen.tiktoken"),
        "tokenizer_config.json": str(tuned / "tokenizer_config.json"),
        "LICENSE": str(base / "LICENSE"),
    }
    assert files_of(str(base), model_folder.CONFIG, model_folder.TEMPLATE) == ["config.json"]
    (tuned / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert "LICENSE" in gather([str(tuned), str(base)], model_folder.LICENCE)
    (tmp_path / "elsewhere").write_text("not of this folder")
    with refused(WeightsError, "leads-out"):
        gather([str(tuned), str(base)], model_folder.LICENCE)
