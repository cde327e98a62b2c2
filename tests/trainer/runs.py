"""Whole runs of a tiny model on a few coloured squares, in this process: what the trainer's tests share.

The fixtures `world` and `run_keys` are in conftest.py. What is in a picture decides its caption.
"""

import base64
import io
import json

import paddle
import pytest

from paddlemix.trainer.finetune import build, finetune
from paddlemix.trainer.run import resolve

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 230), "white": (240, 240, 240)}


def square(colour) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_data(path, captions, bad=()):
    """A train.json whose record i shows the colour that captions[i] names; those in `bad` hold no image."""
    records = []
    for number, caption in enumerate(captions):
        image = "AAAA" if number in bad else square(COLOURS[caption])
        record = {"id": f"identity_{number}", "conversations": [["?", caption]], "image": image}
        records.append(json.dumps(record))
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    return str(path)


def run(keys):
    return finetune(keys)


def start(keys):
    """The trainer of a run, up to its first step."""
    return build(resolve(keys))


LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
LORA_POOL = dict(LORA, freeze_include=["*visual*"], freeze_exclude=["*visual.attn_pool*"])


# What every run leaves in output_dir beside its weights.
LEFT = {
    "tuned_from.json",
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "mgen.tiktoken",
    "chat_template.json",
    "train_results.json",
    "all_results.json",
    "trainer_state.json",
    "training_args.bin",
    "loss_curve.png",
    "runs",
}


def killed_at(trainer, stop, monkeypatch):
    """Train up to step `stop`, where the run ends as by a power cut: nothing is written after checkpoint-<stop>."""

    class Killed(Exception):
        pass

    def killed(self, *args, **kwargs):
        if self.state.global_step == stop:
            raise Killed
        return step(self, *args, **kwargs)

    step = type(trainer).training_step
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "training_step", killed)
        with pytest.raises(Killed):
            trainer.train()


def final_weights(folder):
    """What a LoRA run left in a folder, by name."""
    return paddle.load(str(folder / "lora_model_state.pdparams"), return_numpy=True)
