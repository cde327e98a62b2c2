"""supervised_finetune.py as a user starts it: a config file, another folder, its output and exit status."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import image_base64, save_tiny_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model, six samples, their chat template and a LoRA config with paths relative to it."""
    folder = tmp_path_factory.mktemp("work place")
    save_tiny_model(folder / "model")
    records = [
        {
            "id": f"identity_{number}",
            "conversations": [["请描述图片内容", f"图 {number}"]],
            "image": image_base64(number),
        }
        for number in range(6)
    ]
    (folder / "train.json").write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    turns = ["<|im_start|>user\n{{user}}<|im_end|>\n", "<|im_start|>assistant\n{{bot}}<|im_end|>\n"]
    (folder / "chat_template.json").write_text(json.dumps({"conversation": turns}))
    entry = [{"name": "chatml_dataset", "data_files": "train.json", "chat_template": "chat_template.json"}]
    config = {
        "model_name_or_path": "model",
        "output_dir": "out",
        "dataset": {"train": entry, "eval": entry},
        "do_train": True,
        "evaluation_strategy": "epoch",
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 1,
        "fp16": True,
        "fp16_opt_level": "O2",
        "freeze_include": ["*visual*"],
        "freeze_exclude": ["*visual.attn_pool*"],
        "lora": True,
        "lora_rank": 2,
        "disable_tqdm": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(root, folder, *words):
    environment = dict(os.environ, PYTHONPATH=str(root))
    return subprocess.run(
        [sys.executable, str(root / "supervised_finetune.py"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_run_from_a_config_and_going_on_with_it(root, workplace):
    done = start(root, workplace, "config.json")
    assert done.returncode == 0, done.stderr
    for text in (
        "Model Configuration Arguments",
        "Training Configuration Arguments",
        "Frozen parameters: ",
        "Number of trainable parameters = ",
        "llm layers",
        "float16 is not supported on the CPU, change to float32",
        "global_step: 2",
        "eval_loss",
        "train_loss",
    ):
        assert text in done.stderr, text
    out = workplace / "out"
    assert {"lora_config.json", "lora_model_state.pdparams", "train_results.json"} <= {p.name for p in out.iterdir()}
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert list(out.glob("runs/*/vdlrecords*"))

    again = start(root, workplace, "config.json")
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: out contains the result of a run: set overwrite_output_dir")
    longer = start(root, workplace, "config.json", "--resume", "--max_steps", "3")
    assert longer.returncode == 0, longer.stderr
    assert "global_step: 3" in longer.stderr and "global_step: 2," not in longer.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["config.json", "--disabe_tqdm", "true"], 'error: unknown key "disabe_tqdm"; did you mean "disable_tqdm"?'),
        (["config.json", "--max_steps", "two"], 'error: max_steps must be an integer, not "two"'),
        (["config.json", "--to_static"], "error: to_static=true cannot be used here: "),
        (["missing.json"], "error: cannot read missing.json: No such file or directory"),
    ],
)
def test_bad_use_is_one_line_and_status_2(root, workplace, words, says):
    done = start(root, workplace, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_one_line_and_status_2(root, workplace):
    config = json.loads((workplace / "model" / "config.json").read_text())
    other = workplace / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(dict(config, num_hidden_layers=3)))
    for name in ("model_state.pdparams", "mgen.tiktoken", "tokenizer_config.json"):
        os.link(workplace / "model" / name, other / name)
    done = start(root, workplace, "config.json", "--model_name_or_path", "other", "--output_dir", "out2")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "h.2.attn.c_attn" in done.stderr.splitlines()[-1]
