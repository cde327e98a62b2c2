"""What one Paddle writes and another reads, for test_two_paddles.py: `python tests/two_paddles.py THEIRS OURS`.

Reads the folder THEIRS and goes on with the run in it, then writes a folder OURS.
"""

from __future__ import annotations

import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import paddlemix  # noqa: F401
from tests.helpers import prompt_ids, save_tiny_model

MERGED = [(format, dtype) for format in ("pdparams", "safetensors") for dtype in ("float32", "bfloat16")]
STEPS, STOP = 4, 2
# Dropout draws other numbers in each version.
KEYS = {"lora": True, "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0, "max_steps": STEPS, "save_steps": STOP}


def train(folder, output, **changes):
    """A LoRA run on the model and the data in `folder`."""
    from paddlemix.trainer.command_line import from_values
    from tests.trainer.runs import run

    run(
        from_values(
            dict(
                KEYS,
                model_name_or_path=os.path.join(folder, "model"),
                output_dir=output,
                dataset={"train": [{"name": "chatml_dataset", "data_files": os.path.join(folder, "train.json")}]},
                do_train=True,
                per_device_train_batch_size=4,
                # Far enough from the base to be told apart from it.
                learning_rate=2e-2,
                logging_steps=1,
                disable_tqdm=True,
                **changes,
            )
        )
    )


def logits(folder) -> dict:
    """What each model in `folder` says to one image and twenty tokens: [1, T, V] by the model's name."""
    import paddle

    from paddlemix.auto import AutoModelMIX
    from paddlemix.models.lora import load_lora

    def answer(model):
        model.eval()
        images = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
        ids = paddle.to_tensor([prompt_ids(range(40, 60))])
        with paddle.no_grad():
            return model(input_ids=ids, images=paddle.to_tensor(images)).logits.numpy()

    def load(name):
        return AutoModelMIX.from_pretrained(os.path.join(folder, name), dtype="float32")

    found = {"model": answer(load("model"))}
    for name in ("lora", f"lora/checkpoint-{STOP}"):
        found[name] = answer(load_lora(load("model"), os.path.join(folder, name)))
    for format, dtype in MERGED:
        found[f"merged {format} {dtype}"] = answer(load(f"merged-{format}-{dtype}"))
    return found


def lora_weights(folder) -> dict:
    """The adapters in a folder, by name."""
    from paddlemix.checkpoint import load_pdparams_object

    return load_pdparams_object(os.path.join(folder, "lora_model_state.pdparams"))


def write(folder) -> None:
    """A model, a run on it with its checkpoints, merged weights, and what each says (logits.npz)."""
    import pathlib

    from paddlemix.checkpoint.lora_merge import merge
    from tests.trainer.runs import COLOURS, write_data

    model, lora = save_tiny_model(os.path.join(folder, "model")), os.path.join(folder, "lora")
    write_data(pathlib.Path(folder, "train.json"), list(COLOURS) * 4)
    train(folder, lora)
    for format, dtype in MERGED:
        merge(model, lora, os.path.join(folder, f"merged-{format}-{dtype}"), format=format, dtype=dtype, progress=False)
    np.savez(os.path.join(folder, "logits.npz"), **logits(folder))


def read(folder) -> None:
    """What this Paddle makes of a written folder (read.npz), and the run continued from its checkpoint (resumed/)."""
    np.savez(os.path.join(folder, "read.npz"), **logits(folder))
    resumed = os.path.join(folder, "resumed")
    shutil.copytree(
        os.path.join(folder, "lora"),
        resumed,
        ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "*_results.json", "lora_model_state.pdparams"),
    )
    # The pattern took the checkpoint's weights along.
    name = os.path.join(f"checkpoint-{STOP}", "lora_model_state.pdparams")
    shutil.copy(os.path.join(folder, "lora", name), os.path.join(resumed, name))
    train(folder, resumed, resume=True)


if __name__ == "__main__":
    read(sys.argv[1])
    write(sys.argv[2])
