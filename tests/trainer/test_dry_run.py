"""The dry run: what it counts, what it finds, and that it reads nothing it need not."""

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
from paddlemix.trainer import command_line, dry_run, forecast, machine, run_checkpoints
from paddlemix.trainer.eval_captions import CaptionEvaluator
from paddlemix.utils.errors import ConfigError
from tests.helpers import IMAGE_START_ID, byte_vocab_tokenizer
from tests.trainer.runs import LORA, LORA_POOL, write_data

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


def test_text_that_max_length_cuts_is_in_the_plan(words, capsys):
    shortest = int(forecast.foresee(words()).data["train"].lengths.min())
    found = forecast.foresee(words(max_length=shortest))
    assert found.notes[-1] == (
        f"dataset.train: max_length={shortest} truncates the text of 9 of 12 inspected records, by up to 2 tokens"
    )
    assert not found.problems


def test_the_time_of_an_epoch_is_in_the_plan_of_a_card(words, monkeypatch):
    """A card that computes a sample in an hour: 12 samples, half as long on twice the cards."""

    def said(cards, **changes):
        lines = dry_run.render(forecast.foresee(words(num_train_epochs=2, **changes), f"{cards}xA100-80GB"))
        return [line.split(", at 35%")[0] for line in lines if " per epoch, " in line]

    sample = forecast.sample_work(forecast.foresee(words()))
    card = machine.CARDS["A100-80GB"]
    monkeypatch.setitem(machine.CARDS, "A100-80GB", card._replace(flops=sample / 3600 / 0.35))
    assert said(1) == ["about 12.0 hours per epoch, 24.0 hours in total"]
    assert said(2) == ["about 6.0 hours per epoch, 12.0 hours in total"]
    assert said(1, max_steps=3) == ["about 12.0 hours per epoch, 6.0 hours in total"]
    # A CPU has no published peak here.
    assert not [line for line in dry_run.render(forecast.foresee(words())) if " per epoch, " in line]


def test_the_work_of_a_sample_follows_what_trains(words):
    def work_of(**changes):
        return forecast.sample_work(forecast.foresee(words(**changes)))

    adapters, full = work_of(**LORA), work_of()
    assert adapters < work_of(**LORA_POOL) < full < work_of(recompute=True)


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory):
    return make_7b_folder(tmp_path_factory.mktemp("7b") / "model")


def test_a_run_that_can_start(words, capsys, monkeypatch):
    def never(self, name, *more):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(WeightsReader, "read", never)
    monkeypatch.setattr(WeightsReader, "raw", never)
    assert dry_run.dry_run(words(**LORA_POOL, save_steps=2, save_total_limit=1)) == 0
    out = capsys.readouterr().out
    assert "problems: none" in out and "6 steps, 12 samples, 1.00 epochs" in out
    assert "12 samples; 12 inspected, 0 unusable" in out
    assert "image width      min 24" in out and "image formats    PNG 12" in out


def test_the_lines_are_those_of_the_run(words):
    found = forecast.foresee(words(**LORA_POOL, gradient_accumulation_steps=4, num_train_epochs=3))
    text = "\n".join(dry_run.render(found))
    assert found.run.order.steps == 3 and found.run.order.left_over == 4
    assert "1 steps per epoch; 4 samples left out of each epoch" in text
    assert "3 steps, 24 samples, 3.00 epochs" in text
    dataset = found.run.datasets["train"]
    lengths = [len(dataset[i]["input_ids"]) for i in range(12)]
    assert sorted(found.data["train"].lengths.tolist()) == sorted(lengths)


def test_what_evaluations_cost_is_in_the_plan(words, world):
    entries = [{"data_files": world[1]}]
    dataset = {"train": entries, "eval": entries}
    keys = dict(dataset=dataset, shown_captions=0, evaluation_strategy="steps", eval_steps=2, max_steps=6)
    keys.update(per_device_train_batch_size=2)
    found = forecast.foresee(words(**LORA, **keys, per_device_eval_batch_size=5))
    planned = forecast.evaluations(found.run)
    assert (planned.times, planned.batches, planned.samples, planned.every) == (3, 3, 12, 2)
    # A forward of 12 samples; a step's passes are a little more than two, with 2 samples each.
    assert 2.5 < planned.steps < 3.0
    text = "\n".join(dry_run.render(found))
    assert re.search(r"\nevaluations: 3, each with 12 samples in 3 batches, taking about as long as 3.0 steps\n", text)
    (note,) = [note for note in found.notes if "an evaluation takes as long as" in note]
    assert "as 3 training steps, but there are only 2 between two" in note
    doubled = forecast.evaluations(forecast.foresee(words(**LORA, **keys, eval_image_gain=True)).run)
    assert doubled.steps == pytest.approx(2 * planned.steps)
    recomputed = forecast.evaluations(forecast.foresee(words(**LORA, **keys, recompute=True)).run)
    assert recomputed.steps < 0.75 * planned.steps
    keys.update(max_evaluate_steps=1, eval_with_do_generation=True, max_new_tokens=9, per_device_eval_batch_size=4)
    found = forecast.foresee(words(**LORA, **keys))
    assert not [note for note in found.notes if "an evaluation" in note]
    text = "\n".join(dry_run.render(found))
    assert "each with 4 samples in 1 batches" in text and "; each generates 4 captions of at most 9 tokens" in text
    # As many as are generated: the cards do not share them, and a benchmark shows none.
    keys.update(shown_captions=3)
    for changes, count in (({}, 4), ({"eval_with_do_generation": False, "benchmark": True}, 0)):
        run = forecast.foresee(words(**LORA, **dict(keys, **changes)), "2xA100-80GB").run
        assert forecast.evaluations(run).captions == count
        assert CaptionEvaluator(run.datasets["eval"], run.tokenizer, run.arguments).limit == count
    assert forecast.evaluations(forecast.foresee(words(do_eval=True, max_steps=6, dataset=dataset)).run).times == 1
    assert forecast.evaluations(forecast.foresee(words(max_steps=6)).run) is None


def test_packs_are_described(words):
    found = forecast.foresee(words(mixtoken=True))
    packs = found.run.order.packs
    assert found.problems == [] and packs.count < 12
    text = "\n".join(dry_run.render(found))
    assert f"{packs.count} sequences of at most 256 tokens" in text and "packed sequences per optimizer" in text
    tokens = [found.run.lengths.tokens[list(packs.samples(pack))] for pack in range(packs.count)]
    assert found.packs.longest == max(map(sum, tokens)) and found.packs.most == max(map(len, tokens))
    assert found.packs.squares == max(sum(held**2) for held in tokens)


def test_the_notebooks_run_at_7b_without_weights(folder_7b, words, root, capsys):
    config = json.loads((root / NOTEBOOK).read_text())
    kept = {name: config[name] for name in config if name not in ("dataset", "model_name_or_path", "output_dir")}
    command = words(**{**kept, "model_name_or_path": str(folder_7b), "evaluation_strategy": "no"})
    assert dry_run.dry_run(command, "V100-32GB") == 2
    out = capsys.readouterr().out
    for text in (
        "9,656,935,168 in the model, 187,203,584 trainable",
        "lora                 112,197,632     112,197,632",
        "attn_pool             76,054,528      75,005,952",
        "computes in float16, O2",
        "10 steps, 120 samples",
        "an epoch has 12 batches",
        "master weights",
        "no weights in",
        "recompute off *",
    ):
        assert text in out, text
    # The weights are missing: nothing else is wrong.
    assert "==== problems: 1" in out


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
    assert "853 tensors in 1 file, 17.99 GiB, bfloat16 (853)" in out and "2 × A100-80GB" in out
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
    found = forecast.foresee(command)
    # The run takes place all the same with these.
    notes = "\n".join(found.notes)
    assert "float16 is not supported on the CPU" in notes and "an epoch has 2 batches" in notes
    problems = "\n".join(found.problems)
    for text in (
        'did you mean "lora_rank"',
        "learning_rate must be a number",
        '"*visaul*" matches no parameter',
        '"*attn_pol*" matches no parameter',
        '"nothing.*" matches no module',
        "tensor_parallel_degree=3 needs 3 processes",
        "tensor_parallel_degree=3 does not divide num_attention_heads (4)",
        "no file matches /no/such.json",
        "resume_from_checkpoint",
        "load_best_model_at_end needs",
        "none of the 3 inspected records has an image",
    ):
        assert text in problems, text


def test_missing_model_and_output(words):
    found = forecast.foresee(words(model_name_or_path="/no/model", output_dir=...))
    assert not found.run.trained and found.run.order is None
    assert any("/no/model is not a folder" in problem for problem in found.problems)
    assert any("output_dir is missing" in problem for problem in found.problems)
    assert any("output_dir is missing" in problem for problem in forecast.foresee(words(output_dir="")).problems)
    shown = "\n".join(dry_run.render(found))
    assert "problems: 2" in shown and "that file in the folder of model_name_or_path is enough, and with mgen" in shown


def test_the_batch_that_memory_is_estimated_for(words, tmp_path, world):
    found = forecast.foresee(words())
    longest = int(found.data["train"].lengths.max())
    heading = f"a batch of 2 × {-(-longest // 8) * 8} tokens (the longest sample inspected, padded to a multiple of 8);"
    assert any(line.startswith(heading) for line in dry_run.render(found))
    shutil.copy(os.path.join(world[0], "config.json"), tmp_path)
    shown = dry_run.render(forecast.foresee(words(model_name_or_path=str(tmp_path))))
    assert any(line.startswith("a batch of 2 × 256 tokens (max_length, as there is no tokenizer);") for line in shown)
    shown = dry_run.render(forecast.foresee(words(dataset={"train": [{"data_files": "/no/such.json"}]})))
    assert any(line.startswith("a batch of 2 × 256 tokens (max_length, as there is no data);") for line in shown)


def test_a_template_that_says_nothing_of_the_user_is_a_problem(words, tmp_path, world):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"conversation": ["no place for the prompt", "{{bot}}"]}))
    entry = [{"data_files": world[1], "chat_template": str(template)}]
    assert any("template" in problem for problem in forecast.foresee(words(dataset={"train": entry})).problems)


def test_a_file_that_is_missing_is_said_once_and_hides_nothing(words, world):
    entry = [{"data_files": world[1], "chat_template": "/no/template.json"}]
    keys = {"dataset": {"train": entry}, "text_model_name_or_path": "/no/model", "num_train_epochs": 0.1}
    problems = forecast.foresee(words(**keys)).problems
    wanted = ["/no/template.json", "/no/model", "before the first optimizer step"]
    assert sorted(text for text in wanted for one in problems if text in one) == sorted(wanted)
    assert len(problems) == 3


def test_adapters_to_start_from_must_be_those_of_the_run(words, run_keys, tmp_path):
    from tests.trainer.runs import LORA, run

    run(run_keys(**LORA, max_steps=1, save_strategy="no"))
    keys = dict(lora_path=str(tmp_path / "out"), output_dir=str(tmp_path / "next"))
    assert forecast.foresee(words(**LORA, **keys)).problems == []
    problems = forecast.foresee(words(**LORA_POOL, **keys)).problems
    assert len(problems) == 1 and "missing: visual.attn_pool.query" in problems[0]
    problems = forecast.foresee(words(**dict(LORA, lora_rank=8), **keys)).problems
    assert problems[0] == "lora_rank is 8, but the adapters in lora_path have 4"


def test_where_the_result_cannot_be_written(words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    problems = forecast.foresee(words(output_dir=str(tmp_path / "file" / "out"))).problems
    assert problems == [f"output_dir: {tmp_path / 'file'} is a file"]
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    assert forecast.foresee(words()).problems == [f"output_dir: {tmp_path} is not writable"]


def test_a_run_that_ends_before_its_first_step(words):
    keys = {"num_train_epochs": 0.1}
    assert any("before the first optimizer step" in problem for problem in forecast.foresee(words(**keys)).problems)
    assert forecast.foresee(words(**keys, max_steps=1)).problems == []


def test_evaluation_alone_needs_no_step(words, world):
    keys = {"do_train": False, "do_eval": True, "gradient_accumulation_steps": 99}
    found = forecast.foresee(words(**keys, dataset={"eval": [{"data_files": world[1]}]}))
    assert found.problems == [] and found.data["eval"].records == 12
    assert not {"==== steps", "==== disk"} & set(dry_run.render(found))


def test_a_tokenizer_of_another_model_is_a_problem(words, tmp_path, world):
    folder = tmp_path / "model"
    shutil.copytree(world[0], folder)
    byte_vocab_tokenizer(str(folder), n_queries=16)
    problems = forecast.foresee(words(model_name_or_path=str(folder))).problems
    assert any("an image span has 16 ids" in problem for problem in problems)


def test_weights_of_another_shape_are_a_problem(words, tmp_path, world):
    folder = tmp_path / "model"
    shutil.copytree(world[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(config, num_hidden_layers=3)))
    problems = forecast.foresee(words(model_name_or_path=str(folder))).problems
    assert len(problems) == 1 and "unexpected: transformer.llm.h.2.ln_1.weight" in problems[0]


def test_nothing_to_resume_is_said(words, tmp_path):
    says = f"nothing to resume in {tmp_path / 'out'}: starting from step 0"
    assert says in forecast.foresee(words(resume=True)).notes
    assert says not in forecast.foresee(words()).notes


def test_an_unfinished_run_in_output_dir(words, world, tmp_path):
    from tests.trainer.runs import run

    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run(command_line.parse(words(**batches, max_steps=3, save_steps=3, disable_tqdm=True)))
    folder = tmp_path / "out" / "checkpoint-3"
    (tmp_path / "out" / run_checkpoints.RESULT_NAME).unlink()
    assert any("contains an unfinished run" in problem for problem in forecast.foresee(words()).problems)
    keys = {"resume": True, **batches, "max_steps": 5}
    resumed = forecast.foresee(words(**keys))
    assert resumed.problems == [] and f"resumes from {folder}" in resumed.notes
    # What is left is foreseen: steps 4 and 5, and of five checkpoints two.
    assert "resumes after step 3: 2 steps left" in dry_run.render(resumed)
    says = "nothing is left to train: the checkpoint is after step 3, and the run has 2 steps"
    assert says in forecast.foresee(words(**dict(keys, max_steps=2))).notes and says not in resumed.notes
    evaluating = {"evaluation_strategy": "steps", "eval_steps": 2, "save_steps": 1}
    evaluating["dataset"] = {part: [{"name": "chatml_dataset", "data_files": world[1]}] for part in ("train", "eval")}
    left = forecast.foresee(words(**keys, **evaluating))
    assert (left.saves, forecast.evaluations(left.run).times) == (2, 1)
    for changes, says in (
        ({"seed": 7}, "seed was 42, is 7"),
        ({"per_device_train_batch_size": 2}, "batch was 4, is 2"),
        ({"mixtoken": True}, "mixtoken was off, is "),
        ({"group_by_modality_length": True}, "group_by_modality_length was off, is "),
    ):
        problems = forecast.foresee(words(**dict(keys, **changes))).problems
        assert any(one.startswith(f"{folder} belongs to another run: ") and says in one for one in problems), problems
    (folder / run_checkpoints.SEAL_NAME).unlink()
    run_checkpoints.seal(str(folder), [])
    assert [one.about for one in forecast.foresee(words(**keys)).problems] == [("position",)]


def test_a_disk_that_is_too_small(words, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 3_000_000))
    found = forecast.foresee(words(save_steps=1))
    assert any("the disk has 2.9 MiB free" in problem for problem in found.problems)
    assert found.disk_needed > 6 * found.checkpoint
    assert forecast.foresee(words(save_steps=1, save_total_limit=1)).disk_needed < found.disk_needed / 2


def test_more_than_the_card_has(folder_7b, words):
    keys = dict(LORA_POOL, fp16=True, fp16_opt_level="O2", max_length=2048, model_name_or_path=str(folder_7b))
    problems = forecast.foresee(words(**keys), "V100-16GB").problems
    assert any("V100-16GB has 15.78 GiB" in problem for problem in problems)
    assert not any("V100" in problem for problem in forecast.foresee(words(**keys), "V100-32GB").problems)


def test_cards_share_the_work(words):
    found = forecast.foresee(words(sharding="stage2", gradient_accumulation_steps=1), "3xA100-80GB")
    assert (found.run.data_parallel, found.run.order.per_step, found.run.order.steps) == (3, 6, 2)
    assert found.setting.sharding == 3 and found.setting.stage == 2 and found.problems == []
    found = forecast.foresee(words(tensor_parallel_degree=2, gradient_accumulation_steps=1), "4xA100-80GB")
    assert (found.run.data_parallel, found.run.order.per_step, found.setting.tensor) == (2, 4, 2)
    assert found.problems == []
    problems = forecast.foresee(words(tensor_parallel_degree=2), "3xA100-80GB").problems
    assert any("3 processes cannot be divided" in problem for problem in problems)


def test_what_this_device_has_no_kernels_for(words):
    assert any("sharding=stage2 needs GPUs" in one for one in forecast.foresee(words(sharding="stage2")).problems)


@pytest.mark.parametrize(
    ("key", "why"),
    [("bf16", "bfloat16 is not supported on your device"), ("use_flash_attention", "compute capability 8.0")],
)
def test_what_a_card_cannot_do_the_run_does_otherwise(words, key, why):
    changes = {key: True, **({"fp16": True} if key == "use_flash_attention" else {})}
    found = forecast.foresee(words(**changes), "V100-32GB")
    assert found.problems == [] and any(why in note for note in found.notes)
    assert not any(why in note for note in forecast.foresee(words(**changes), "A100-80GB").notes)


def test_a_card_for_a_run_on_the_cpu(words):
    assert any("asks for the CPU" in one for one in forecast.foresee(words(no_cuda=True), "A100-80GB").problems)
    assert forecast.foresee(words(no_cuda=True)).problems == []


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
            machine.card(bad)
    assert machine.card("8xa100-80gb").cards == 8


def test_the_dry_run_speaks_chinese(words, world, tmp_path, monkeypatch):
    from paddlemix.utils import language

    monkeypatch.setattr(language, "_given", "zh")
    entry = [{"name": "chatml_dataset", "data_files": world[1]}]
    found = [
        forecast.foresee(words(**LORA_POOL, dataset={"train": entry, "eval": entry}, evaluation_strategy="epoch")),
        forecast.foresee(words(**LORA_POOL, mixtoken=True, save_steps=2), "8xA100-80GB"),
        forecast.foresee(words(max_length=24, learning_rate=0.0, lora_rank=4, model_name_or_path=...)),
    ]
    assert [bool(one.problems) for one in found] == [False, False, True]
    names = re.compile(r"(vit|attn_pool|ln_post and proj|llm embeddings|llm layers|lm_head|lora) |$")
    for line in (line for one in found for line in dry_run.render(one)):
        assert re.search("[\u4e00-\u9fff]", line) or names.match(line), line
