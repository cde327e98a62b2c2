"""python -m pytest tests/trainer/test_plan.py

The dry run: what it counts, what it finds, and that it reads nothing it need not.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from paddlemix.checkpoint.shards import WeightsReader
from paddlemix.models.mgen_vl.configuration import MGenConfig
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.trainer import checkpoints, command_line, plan
from paddlemix.utils.errors import ConfigError
from tests.helpers import IMAGE_START_ID, byte_vocab_tokenizer
from tests.trainer.runs import LORA_POOL, write_data

# The peak of getrusage begins with that of the process which started this one.
AND_ITS_PEAK = """
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(open("/proc/self/status").read()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NOTEBOOK = "config/mgen_vl/lora_sft_argument.json"


@pytest.fixture
def words(world, tmp_path):
    """The command line of a run in the tiny world, with changes; `...` takes a key away."""

    def make(**changes):
        entry = [{"name": "chatml_dataset", "data_files": world[1]}]
        values = {
            "model_name_or_path": world[0], "output_dir": str(tmp_path / "out"), "dataset": {"train": entry},
            "do_train": True, "per_device_train_batch_size": 2, "max_length": 256, **changes,
        }  # fmt: skip
        path = tmp_path / "run.json"
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
        return [str(path)]

    return make


def make_7b_folder(folder):
    """The 7B's config.json and a vocabulary, without weights."""
    folder.mkdir(parents=True)
    MGenConfig(visual={"image_start_id": IMAGE_START_ID}).save_pretrained(str(folder))
    byte_vocab_tokenizer(str(folder), n_queries=256)
    return folder


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory):
    return make_7b_folder(tmp_path_factory.mktemp("7b") / "model")


def test_a_run_that_can_start(words, capsys, monkeypatch):
    def never(self, name, *more):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(WeightsReader, "read", never)
    monkeypatch.setattr(WeightsReader, "raw", never)
    assert plan.dry_run(words(**LORA_POOL, save_steps=2, save_total_limit=1)) == 0
    out = capsys.readouterr().out
    assert "problems: none" in out and "6 steps, 12 samples, 1.00 epochs" in out
    assert "12 samples; 12 looked at, 0 cannot be used" in out
    assert "image width      min 24" in out and "image formats    PNG 12" in out


def test_what_is_planned_is_what_runs(words):
    """Steps, lengths and counts of the plan are those of the trainer."""
    from paddlemix.trainer.freeze import model_counts
    from paddlemix.trainer.tuned_model import base_of
    from tests.trainer.runs import start

    command = words(**LORA_POOL, gradient_accumulation_steps=4, num_train_epochs=3, disable_tqdm=True)
    found = plan.make_plan(command)
    trainer = start(command_line.parse(command))
    assert found.steps == trainer.planned_steps() == 3 and found.left_over == 4
    assert found.counts == model_counts(base_of(trainer.model))
    lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in range(12)]
    assert sorted(found.data["train"].lengths.tolist()) == sorted(lengths)


def test_packing_is_planned_by_the_planner(words):
    from tests.trainer.runs import start

    command = words(mixtoken=True, disable_tqdm=True)
    found = plan.make_plan(command)
    trainer = start(command_line.parse(command))
    assert found.problems == [] and found.packs.exact
    assert found.packs.count == trainer.packs.count < 12 and found.steps == trainer.planned_steps()
    text = "\n".join(plan.render(found))
    assert f"{found.packs.count} sequences of at most 256 tokens" in text and "packed sequences in an optimizer" in text
    # A sample of the lengths gives nearly the same.
    lengths = trainer.train_dataset.lengths().tokens
    about = plan.packing(lengths, 120_000, 256, 42)
    assert not about.exact and abs(about.count / 120_000 * 12 / found.packs.count - 1) < 0.2


def test_the_notebooks_run_at_7b_without_weights(folder_7b, words, root, capsys):
    config = json.loads((root / NOTEBOOK).read_text())
    kept = {name: config[name] for name in config if name not in ("dataset", "model_name_or_path", "output_dir")}
    command = words(**{**kept, "model_name_or_path": str(folder_7b), "evaluation_strategy": "no"})
    assert plan.dry_run(command, "V100-32GB") == 2
    out = capsys.readouterr().out
    for text in (
        "9,656,935,168 in the model, 187,203,584 trainable",
        "lora                 112,197,632     112,197,632",
        "attn_pool             76,054,528      75,005,952",
        "computes in float16, O2",
        "10 steps, 160 samples",
        "master weights",
        "no weights in",
        "recompute off *",
    ):
        assert text in out, text
    # 12 samples are no 16, and the weights are missing: nothing else is wrong.
    assert "==== problems: 2" in out and "an epoch has 12 batches" in out


def test_7b_weights_are_headers_only_within_1_gb(words, tmp_path, root):
    """19 GB of weights, which are a hole in a file, take no time and no memory."""
    folder = make_7b_folder(tmp_path / "model")
    header, offset = {}, 0
    for name, shape in parameter_shapes(MGenConfig()).items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    keys = dict(LORA_POOL, bf16=True, fp16_opt_level="O2", max_length=2048)
    config = words(**keys, model_name_or_path=str(folder))
    script = str(root / "supervised_finetune.py")
    command = [sys.executable, "-c", AND_ITS_PEAK, script, *config, "--dry_run", "--plan_for", "2xA100-80GB"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(root)))
    out = done.stdout
    assert done.returncode == 0 and "problems: none" in out, out + done.stderr
    assert "853 tensors in 1 files, 17.99 GiB, bfloat16 (853)" in out and "2 × A100-80GB" in out
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stderr).group(1)) * 1024 < 1e9


def test_every_problem_is_found_at_once(words, tmp_path):
    data = write_data(tmp_path / "texts.json", ["red"] * 3)
    records = json.loads((tmp_path / "texts.json").read_text())
    (tmp_path / "texts.json").write_text(json.dumps([dict(record, image="") for record in records]))
    command = words(
        lora_rnak=3, learning_rate="fast", fp16=True, freeze_include=["*visaul*"],
        freeze_exclude=["*attn_pol*"], lora=True, lora_target_modules=["nothing.*"],
        gradient_accumulation_steps=9, tensor_parallel_degree=3, max_steps=5,
        dataset={"train": [{"data_files": data}], "eval": [{"data_files": "/no/such.json"}]},
        resume_from_checkpoint="/no/checkpoint", evaluation_strategy="steps", load_best_model_at_end=True,
        save_strategy="epoch",
    )  # fmt: skip
    found = "\n".join(plan.make_plan(command).problems)
    for text in (
        'did you mean "lora_rank"',
        "learning_rate must be a number",
        "float16 is not supported on the CPU",
        '"*visaul*" matches no parameter',
        '"*attn_pol*" matches no parameter',
        '"nothing.*" matches no module',
        "an epoch has 2 batches",
        "tensor_parallel_degree=3 needs 3 processes",
        "tensor_parallel_degree=3 does not divide num_attention_heads (4)",
        "no file matches /no/such.json",
        "resume_from_checkpoint",
        "load_best_model_at_end needs",
        "no image in any of the 3 records",
    ):
        assert text in found, text


def test_missing_model_and_output(words):
    found = plan.make_plan(words(model_name_or_path="/no/model", output_dir=...))
    assert found.trained is None and found.steps_per_epoch == 0
    assert any("/no/model is no folder" in problem for problem in found.problems)
    assert any("output_dir is missing" in problem for problem in found.problems)
    assert "problems: 2" in "\n".join(plan.render(found))


def test_a_template_that_says_nothing_of_the_user_is_a_problem(words, tmp_path, world):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"conversation": ["no place for the prompt", "{{bot}}"]}))
    entry = [{"data_files": world[1], "chat_template": str(template)}]
    assert any("template" in problem for problem in plan.make_plan(words(dataset={"train": entry})).problems)


def test_a_file_that_is_missing_is_said_once_and_hides_nothing(words, world):
    entry = [{"data_files": world[1], "chat_template": "/no/template.json"}]
    keys = {"dataset": {"train": entry}, "text_model_name_or_path": "/no/model", "gradient_accumulation_steps": 9}
    problems = plan.make_plan(words(**keys)).problems
    assert [text for text in ("/no/template.json", "/no/model", "an epoch has 6 batches") for one in problems
            if text in one] == ["/no/template.json", "/no/model", "an epoch has 6 batches"]  # fmt: skip
    assert len(problems) == 3


def test_adapters_to_start_from_must_be_those_of_the_run(words, run_keys, tmp_path):
    from tests.trainer.runs import LORA, run

    run(run_keys(**LORA, max_steps=1, save_strategy="no"))
    keys = dict(lora_path=str(tmp_path / "out"), output_dir=str(tmp_path / "next"))
    assert plan.make_plan(words(**LORA, **keys)).problems == []
    problems = plan.make_plan(words(**LORA_POOL, **keys)).problems
    assert len(problems) == 1 and "missing: visual.attn_pool.query" in problems[0]
    problems = plan.make_plan(words(**dict(LORA, lora_rank=8), **keys)).problems
    assert problems[0] == "lora_rank is 8, but the adapters in lora_path have 4"


def test_where_the_result_cannot_be_written(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    problems = plan.make_plan(words(output_dir=str(tmp_path / "file" / "out"))).problems
    assert problems == [f"output_dir: {tmp_path / 'file'} is a file"]
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    assert plan.make_plan(words()).problems == [f"output_dir: {tmp_path} cannot be written to"]


def test_a_run_that_ends_before_its_first_step(words):
    keys = {"num_train_epochs": 0.1}
    assert any("before the first optimizer step" in problem for problem in plan.make_plan(words(**keys)).problems)
    assert plan.make_plan(words(**keys, max_steps=1)).problems == []


def test_evaluation_alone_needs_no_step(words, world):
    keys = {"do_train": False, "do_eval": True, "gradient_accumulation_steps": 99}
    found = plan.make_plan(words(**keys, dataset={"eval": [{"data_files": world[1]}]}))
    assert found.problems == [] and found.data["eval"].records == 12
    assert not {"==== steps", "==== disk"} & set(plan.render(found))


def test_a_tokenizer_of_another_model_is_a_problem(words, tmp_path, world):
    folder = tmp_path / "model"
    shutil.copytree(world[0], folder)
    byte_vocab_tokenizer(str(folder), n_queries=16)
    problems = plan.make_plan(words(model_name_or_path=str(folder))).problems
    assert any("an image span has 16 ids" in problem for problem in problems)


def test_weights_of_another_shape_are_a_problem(words, tmp_path, world):
    folder = tmp_path / "model"
    shutil.copytree(world[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(config, num_hidden_layers=3)))
    problems = plan.make_plan(words(model_name_or_path=str(folder))).problems
    assert len(problems) == 1 and "8 missing: transformer.llm.h.2.ln_1.weight, " in problems[0]


def test_an_unfinished_run_in_output_dir(words, tmp_path):
    folder = tmp_path / "out" / "checkpoint-3"
    folder.mkdir(parents=True)
    order = {"samples": 12, "batch": 4, "accumulation": 2, "seed": 42}
    checkpoints.seal(str(folder), {"global_step": 3, "order": order})
    assert any("holds an unfinished run" in problem for problem in plan.make_plan(words()).problems)
    keys = {"resume": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5}
    resumed = plan.make_plan(words(**keys))
    assert resumed.problems == [] and f"goes on from {folder}" in resumed.notes
    for changes, says in (
        ({"seed": 7}, "seed was 42, is 7"),
        ({"per_device_train_batch_size": 2}, "batch was 4, is 2"),
        ({"mixtoken": True}, "mixtoken was off, is on"),
        ({"group_by_modality_length": True}, "group_by_modality_length was off, is on"),
    ):
        problems = plan.make_plan(words(**dict(keys, **changes))).problems
        assert any(one.startswith(f"{folder} is of another run: ") and says in one for one in problems), problems
    (folder / checkpoints.SEAL_NAME).unlink()
    checkpoints.seal(str(folder), [])
    assert plan.make_plan(words(**keys)).problems == [f"{folder} does not say where the run stood"]


def test_a_disk_that_is_too_small(words, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 3_000_000))
    found = plan.make_plan(words(save_steps=1))
    assert any("the disk has 2.9 MiB left" in problem for problem in found.problems)
    assert found.disk_needed > 6 * found.checkpoint
    assert plan.make_plan(words(save_steps=1, save_total_limit=1)).disk_needed < found.disk_needed / 2


def test_more_than_the_card_has(folder_7b, words):
    keys = dict(LORA_POOL, fp16=True, fp16_opt_level="O2", max_length=2048, model_name_or_path=str(folder_7b))
    problems = plan.make_plan(words(**keys), "V100-16GB").problems
    assert any("V100-16GB has 15.78 GiB" in problem for problem in problems)
    assert not any("V100" in problem for problem in plan.make_plan(words(**keys), "V100-32GB").problems)


def test_cards_share_the_work(words):
    found = plan.make_plan(words(sharding="stage2", gradient_accumulation_steps=1), "3xA100-80GB")
    assert (found.data_parallel, found.per_step, found.steps) == (3, 6, 2)
    assert found.setting.sharding == 3 and found.setting.stage == 2 and found.problems == []
    found = plan.make_plan(words(tensor_parallel_degree=2, gradient_accumulation_steps=1), "4xA100-80GB")
    assert (found.data_parallel, found.per_step, found.setting.tensor, found.problems) == (2, 4, 2, [])
    problems = plan.make_plan(words(tensor_parallel_degree=2), "3xA100-80GB").problems
    assert any("3 processes cannot be divided" in problem for problem in problems)


def test_what_this_device_has_no_kernels_for(words):
    assert any("sharding=stage2 needs GPUs" in one for one in plan.make_plan(words(sharding="stage2")).problems)


@pytest.mark.parametrize(
    ("key", "card", "why"),
    [
        ("bf16", "V100-32GB", "bfloat16 is not supported on your device"),
        ("use_flash_attention", "V100-32GB", "compute capability 8.0"),
        ("no_cuda", "A100-80GB", "asks for the CPU"),
    ],
)
def test_what_a_card_cannot_do(words, key, card, why):
    changes = {key: True, **({"fp16": True} if key == "use_flash_attention" else {})}
    assert any(why in problem for problem in plan.make_plan(words(**changes), card).problems)
    assert not any(why in problem for problem in plan.make_plan(words(**changes)).problems if card != "V100-32GB")


def test_the_dry_runs_own_words():
    assert command_line.split_dry_run(["c.json", "--dry_run"]) == (True, None, ["c.json"])
    assert command_line.split_dry_run(["c.json", "--plan-for=A100-80GB", "--dry-run", "--max_steps", "3"]) == (
        True, "A100-80GB", ["c.json", "--max_steps", "3"],
    )  # fmt: skip
    for bad in (["--dry_run=true"], ["--dry_run", "true"], ["--dry_run", "--plan_for"], ["--plan_for", "A100-80GB"]):
        with pytest.raises(ConfigError):
            command_line.split_dry_run(bad)
    for bad in ("A100", "0xA100-80GB", "8 A100-80GB"):
        with pytest.raises(ConfigError, match="is not"):
            plan.card(bad)
    assert plan.card("8xa100-80gb").cards == 8
