"""Training runs of a tiny model on a few coloured squares, in this process.

What is in a picture decides its caption, so a model that learns must have looked.
"""

import json
import os
import re
import signal

import numpy as np
import paddle
import pytest

from paddlemix.auto import AutoModelMIX, AutoTokenizerMIX
from paddlemix.checkpoint import load_pdparams_object
from paddlemix.models.lora import load_lora
from paddlemix.trainer import command_line, run_checkpoints
from paddlemix.trainer.order import EpochSampler, Order
from paddlemix.trainer.trainer import FinetuneTrainer
from paddlemix.trainer.tuned_model import add_neftune
from paddlemix.utils import files
from paddlemix.utils.errors import ConfigError, JobFailed, UserError
from tests.helpers import make_tiny_model, refused, save_tiny_model
from tests.trainer.runs import COLOURS, LEFT, LORA, LORA_POOL, final_weights, killed_at, run, start, write_data

# ---- what trains


def test_counts_are_printed_per_group_and_in_the_notebooks_line(run_keys, log):
    start(run_keys(**LORA_POOL))
    assert "|| Trainable parameters:" in log.text and "Freeze parameters: ['*visual*'] and exclude" in log.text
    lines = [record.message for record in log.records if ":" not in record.message]
    rows = [line.split() for line in lines if line.startswith(("vit ", "lora "))]
    assert rows[0][0] == "vit" and rows[0][2] == "0"
    assert rows[1][1] == rows[1][2] == f"{2 * 4 * (4 * 128 + 384 + 3 * 128):,}"


def test_a_pattern_without_a_match_ends_the_run(run_keys):
    with refused(ConfigError, "freeze_exclude"):
        start(run_keys(freeze_include=["*visual*"], freeze_exclude=["*connector*"]))


def test_mm_projector_lr_is_the_connectors_own_rate(run_keys):
    trainer = start(run_keys(mm_projector_lr=1e-30, max_steps=1, lr_scheduler_type="constant"))
    state = trainer.model.state_dict()
    before = {name: tensor.numpy().copy() for name, tensor in state.items()}
    trainer.train()
    same = {name for name, tensor in state.items() if np.abs(tensor.numpy() - before[name]).max() < 1e-20}
    assert same == {name for name in state if name.startswith("visual.") and not name.startswith("visual.vit.")}


def test_weight_decay_spares_vectors(run_keys):
    trainer = start(run_keys(weight_decay=0.5, learning_rate=1e-2, max_steps=1))
    trainer.create_optimizer_and_scheduler(1)
    decays = trainer.optimizer._apply_decay_param_fun
    state = trainer.model.state_dict()
    assert decays(state["lm_head.weight"].name) and not decays(state["transformer.llm.ln_f.weight"].name)
    assert not decays(state["visual.ln_post.bias"].name)


# ---- images count


def test_changing_the_image_changes_the_loss(run_keys):
    trainer = start(run_keys())
    sample = trainer.train_dataset[0]
    batch = {name: paddle.to_tensor(array) for name, array in trainer.data_collator([sample]).items()}
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch).item()
    batch["images"] = batch["images"] + 1.0
    assert abs(trainer.compute_loss(trainer.model, batch).item() - loss) > 1e-3


def test_shuffled_images_make_a_trained_models_loss_worse(run_keys):
    keys = run_keys(max_steps=60, learning_rate=2e-3, per_device_train_batch_size=12, save_strategy="no")
    trainer = start(keys)
    trainer.train()
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    batch = {name: paddle.to_tensor(array) for name, array in batch.items()}
    loss = trainer.compute_loss(trainer.model, batch).item()
    batch["images"] = paddle.roll(batch["images"], 1, axis=0)
    shuffled = trainer.compute_loss(trainer.model, batch).item()
    assert loss < 0.2
    assert shuffled > loss + 0.5


# ---- what is saved


def test_lora_run_leaves_the_files_of_the_spec_and_loads_again(run_keys, world, tmp_path):
    run(run_keys(**LORA_POOL, save_strategy="no", evaluation_strategy="epoch"))
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"lora_config.json", "lora_model_state.pdparams", *LEFT}
    assert list((out / "runs").rglob("vdlrecords*"))
    results = json.loads((out / "train_results.json").read_text())
    assert results["train_loss"] > 0 and results["epoch"] == pytest.approx(2 / 3, abs=1e-3)
    state = json.loads((out / "trainer_state.json").read_text())
    assert [line["global_step"] for line in state["log_history"] if "loss" in line] == [1, 2]
    assert any("eval_loss" in line for line in state["log_history"])
    assert json.loads((out / "lora_config.json").read_text())["base_model_name_or_path"] == world[0]
    # A dict of plain values: our reader refuses whatever names a class.
    arguments = load_pdparams_object(str(out / "training_args.bin"))
    assert arguments["output_dir"] == str(out) and arguments["max_steps"] == 2
    assert {type(value) for value in arguments.values()} <= {bool, int, float, str}
    stored = paddle.load(str(out / "lora_model_state.pdparams"), return_numpy=True)
    assert "visual.attn_pool.query" in stored and "visual.attn_pool.pos_embed" not in stored
    load_lora(AutoModelMIX.from_pretrained(world[0]), str(out))
    assert len(AutoTokenizerMIX.from_pretrained(str(out))) == 256 + 217


def test_saved_lora_is_the_trained_model(run_keys, world, tmp_path):
    trainer = start(run_keys(**LORA_POOL))
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch = {name: paddle.to_tensor(array) for name, array in batch.items()}
    loaded = load_lora(AutoModelMIX.from_pretrained(world[0]), str(tmp_path / "out"))
    np.testing.assert_array_equal(trainer.model(**batch).logits.numpy(), loaded(**batch).logits.numpy())


def test_full_run_leaves_a_model_folder(run_keys, tmp_path):
    trainer = start(run_keys(use_flash_attention=True))
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    for name in (
        "config.json",
        "generation_config.json",
        "model_state.pdparams",
        "mgen.tiktoken",
        "chat_template.json",
    ):
        assert (out / name).is_file(), name
    assert not json.loads((out / "config.json").read_text()).get("use_flash_attention")
    loaded = AutoModelMIX.from_pretrained(str(out)).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), loaded[name].numpy())
    assert not list(out.glob(".partial*"))


def test_save_total_limit_holds_in_one_process(run_keys, tmp_path):
    run(run_keys(**LORA, max_steps=5, save_steps=1, save_total_limit=2))
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-5"]


def test_benchmark_saves_nothing_and_says_so(run_keys, tmp_path, log):
    metrics = run(run_keys(benchmark=True, save_steps=1))
    assert metrics["train_samples_per_second"] > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["runs"]
    said = [record.message for record in log.records if record.message.startswith("benchmark:")]
    assert "it saves nothing" in said[0]
    assert re.match(r"benchmark: [\d.,]+ samples, [\d.,]+ tokens, [\d.,]+ steps per second", said[-1])
    assert said[-1].endswith("nothing was saved")


def test_a_benchmark_that_is_stopped_says_its_rates_and_not_how_to_resume(run_keys, log, monkeypatch):
    step = FinetuneTrainer.training_step
    stopping = lambda self, *inputs: os.kill(os.getpid(), signal.SIGTERM) or step(self, *inputs)  # noqa: E731
    monkeypatch.setattr(FinetuneTrainer, "training_step", stopping)
    run(run_keys(benchmark=True, max_steps=9, **LORA))
    assert "stopping after step 1" in log.text and "steps per second over the entire run" in log.text
    assert "--resume" not in log.text


def test_benchmark_leaves_an_earlier_result(run_keys, tmp_path):
    result = tmp_path / "out" / "train_results.json"
    result.parent.mkdir()
    result.write_text("{}")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    run(run_keys(benchmark=True, overwrite_output_dir=True, max_steps=1))
    assert result.read_text() == "{}" and (tmp_path / "out" / "checkpoint-1").exists()


def test_best_model_is_loaded_at_the_end(run_keys, tmp_path):
    # The loss falls, and the highest is asked for: the last weights are not the best.
    keys = dict(
        LORA,
        max_steps=2,
        learning_rate=1e-2,
        save_steps=1,
        eval_steps=1,
        evaluation_strategy="steps",
        load_best_model_at_end=True,
        greater_is_better=True,
        lr_scheduler_type="constant",
    )
    run(run_keys(**keys))
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    assert losses[0] > losses[1] and state["best_metric"] == losses[0]
    assert state["best_model_checkpoint"] == str(out / "checkpoint-1")
    final, expected = final_weights(out), final_weights(out / "checkpoint-1")
    assert all(np.array_equal(final[name], expected[name]) for name in expected)
    # Also of a run that was killed before it could write the result.
    (out / "train_results.json").unlink()
    run(run_keys(**keys, resume=True))
    again = final_weights(out)
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_a_checkpoint_whose_loss_is_not_finite_is_never_the_best(run_keys, tmp_path, monkeypatch):
    keys = dict(LORA, save_steps=1, eval_steps=1, evaluation_strategy="steps", load_best_model_at_end=True)
    trainer = start(run_keys(**keys))
    evaluate = trainer.evaluate

    def overflowing(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        return dict(metrics, eval_loss=float("nan")) if trainer.state.global_step == 1 else metrics

    monkeypatch.setattr(trainer, "evaluate", overflowing)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.state.best_metric > 0


def test_merged_folder_gives_the_adapters_logits(run_keys, world, tmp_path):
    from paddlemix.checkpoint.lora_merge import merge

    run(run_keys(**LORA_POOL, learning_rate=1e-2))
    merge(world[0], str(tmp_path / "out"), str(tmp_path / "merged"))
    merged = AutoModelMIX.from_pretrained(str(tmp_path / "merged"))
    adapted = load_lora(AutoModelMIX.from_pretrained(world[0]), str(tmp_path / "out"))
    base = AutoModelMIX.from_pretrained(world[0])
    sample = start(run_keys(do_train=False, do_eval=True)).eval_dataset[0]
    batch = {"input_ids": sample["input_ids"][None], "images": sample["images"]}
    batch = {name: paddle.to_tensor(array) for name, array in batch.items()}
    expected = adapted(**batch).logits.numpy()
    np.testing.assert_allclose(merged(**batch).logits.numpy(), expected, atol=2e-4)
    assert np.abs(base(**batch).logits.numpy() - expected).max() > 0.05


# ---- logs


def test_log_has_the_notebooks_blocks_and_lines(run_keys, log):
    run(run_keys(gradient_accumulation_steps=2, warmup_ratio=0.5, lr_scheduler_type="cosine"))
    text = log.text
    for title in ("Model", "Data", "Generation", "Training"):
        assert f"{title} Configuration Arguments".center(40) in text
    for line in ("lora_rank                     : 64", "max_length                    : 2048", "top_p   ", "seed   "):
        assert line in text
    assert "past_index" not in text
    lines = [record.message for record in log.records if record.message.startswith("loss: ")]
    assert len(lines) == 2
    names = [part.split(": ")[0] for part in lines[0].split(", ")]
    assert names[:6] == [
        "loss",
        "learning_rate",
        "global_step",
        "interval_runtime",
        "interval_samples_per_second",
        "interval_steps_per_second",
    ]
    assert names[-3:] == ["epoch", "step", "time left"] and "progress_or_epoch" not in text
    steps = [re.search(r", step: (\d+)/(\d+), time left: \d+:\d\d:\d\d$", line).groups() for line in lines]
    assert steps == [("1", "2"), ("2", "2")]
    assert "\x1b[" not in text


def test_half_precision_on_the_cpu_is_float32_with_one_warning(run_keys, log):
    trainer = start(run_keys(fp16=True, fp16_opt_level="O2", **LORA))
    assert trainer.model.model.lm_head.weight.dtype == paddle.float32
    assert trainer.args.fp16 is False and trainer.do_grad_scaling is False
    trainer.train()
    warnings = [record.message for record in log.records if "float16" in record.message]
    assert warnings == ["float16 is not supported on the CPU, change to float32"]


def test_do_eval_means_once_at_the_end_without_a_strategy(run_keys, log, tmp_path):
    metrics = run(run_keys(do_eval=True, max_steps=3))
    assert sum("eval_loss" in record.message for record in log.records) == 1
    assert metrics["eval_loss"] > 0
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


def test_captions_at_evaluation_are_scored_and_decide_the_best(run_keys, log, tmp_path):
    keys = run_keys(
        max_steps=60,
        learning_rate=2e-3,
        per_device_train_batch_size=12,
        evaluation_strategy="steps",
        eval_steps=30,
        save_steps=30,
        logging_steps=30,
        eval_with_do_generation=True,
        save_generation_output=True,
        shown_captions=4,
        max_new_tokens=8,
        metric_for_best_model="cider",
        load_best_model_at_end=True,
    )
    run(keys)
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [line["eval_cider"] for line in state["log_history"] if "eval_cider" in line]
    # Captions of one word have no longer n-grams, so a perfect score is 10 / 4.
    assert len(scores) == 2 and scores[1] == pytest.approx(2.5)
    best = 30 * (1 + scores.index(max(scores)))
    assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}") and state["best_metric"] == max(scores)
    rows = [line.split("\t") for line in (out / "generation-60.tsv").read_text().splitlines()]
    assert len(rows) == 12 and rows[0][0] == "identity_0#0"
    assert sum(text == reference for _, text, reference in rows) >= 11
    assert "identity_0#0: red | reference: red" in log.text


def test_captions_are_bounded_and_leave_bad_samples_out(run_keys, tmp_path):
    data = write_data(tmp_path / "bad.json", list(COLOURS) * 2, bad=(1,))
    entry = [{"data_files": data}]
    keys = dict(do_train=False, do_eval=True, eval_with_do_generation=True, max_new_tokens=3, top_k=0, top_p=0.9)
    keys.update(dataset={"eval": entry}, per_device_eval_batch_size=3, max_evaluate_steps=2)
    trainer = start(run_keys(**keys))
    found = trainer.captions.captions(trainer.model)
    assert [one.id for one in found] == [f"identity_{number}#{number}" for number in (0, 2, 3, 4, 5)]
    assert [one.reference for one in found] == ["red", "blue", "white", "red", "green"]


def test_the_image_gain_is_the_loss_with_blank_images_minus_the_loss(run_keys, tmp_path, log):
    texts = "".join(json.dumps({"id": i, "conversations": [["?", "no picture"]]}) + "\n" for i in range(3))
    (tmp_path / "texts.json").write_text(texts)
    pictures = write_data(tmp_path / "pictures.json", list(COLOURS) * 2)
    keys = dict(do_train=False, do_eval=True, max_length=128, per_device_eval_batch_size=3, eval_image_gain=True)
    trainer = start(run_keys(**keys, dataset={"eval": [{"data_files": [pictures, str(tmp_path / "texts.json")]}]}))
    metrics = trainer.evaluate()
    assert re.search(r"eval_image_gain: \S+", log.text)
    assert "eval_image_gain" not in start(run_keys(**dict(keys, eval_image_gain=False))).evaluate()
    decode = trainer.eval_dataset.image_processor.blank()

    class Blank:
        """The data with blank images."""

        n_skipped = n_shortened = 0

        def __len__(self):
            return len(trainer.eval_dataset)

        def __getitem__(self, index):
            sample = trainer.eval_dataset[index]
            return dict(sample, images=np.stack([decode] * len(sample["images"])) if len(sample["images"]) else [])

    trainer.image_gain = False
    without = trainer.evaluate(Blank())["eval_loss"]
    assert abs(without - metrics["eval_loss"]) > 1e-3
    assert metrics["eval_image_gain"] == pytest.approx(without - metrics["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_evaluation_alone_leaves_the_output_folder_alone(run_keys, tmp_path, strategy):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    metrics = run(run_keys(do_train=False, do_eval=True, evaluation_strategy=strategy))
    assert set(metrics) >= {"eval_loss", "eval_samples_per_second"} and (out / "checkpoint-1").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_samples_are_counted_in_the_log(run_keys, tmp_path, log, workers):
    data = write_data(tmp_path / "bad.json", list(COLOURS) * 2, bad=(2, 5))
    entry = [{"data_files": data}]
    run(run_keys(dataset={"train": entry}, dataloader_num_workers=workers, num_train_epochs=1, max_steps=...))
    last = [record.message for record in log.records if "train_loss" in record.message][0]
    assert "skipped_samples: 2" in last


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_that_max_length_cuts_are_counted(run_keys, log, workers):
    """red 3, green 5, blue 4, white 5 letters, each of them three times, and all of them evaluated."""
    blue = len(start(run_keys()).train_dataset[2]["input_ids"])
    keys = dict(dataloader_num_workers=workers, num_train_epochs=1, max_steps=..., evaluation_strategy="epoch")
    metrics = run(run_keys(max_length=blue, **keys))
    lines = [record.message for record in log.records]
    assert [line for line in lines if "train_loss" in line and "shortened_samples: 12" in line]
    assert metrics["train_loss"] > 0
    if not workers:  # whose warnings are not caught here
        assert [line for line in lines if "is 1 tokens too long for max_length=" in line][0].endswith("(1 so far)")


@pytest.mark.parametrize("words, kind", [("(Fatal) DataLoader process (pid 9) exited", JobFailed), ("x", SystemError)])
def test_a_dead_worker_ends_the_run_in_words(run_keys, monkeypatch, words, kind):
    trainer = start(run_keys(max_steps=1))

    def dies(*args, **kwargs):
        raise SystemError(words)

    monkeypatch.setattr(trainer, "training_step", dies)
    with pytest.raises(kind, match="dataloader_num_workers" if kind is JobFailed else "x"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_good_sample_ends_the_run_in_words(run_keys, tmp_path, workers):
    data = write_data(tmp_path / "bad.json", list(COLOURS), bad=range(4))
    keys = run_keys(dataset={"train": [{"data_files": data}]}, dataloader_num_workers=workers)
    with pytest.raises(UserError, match="no good sample"):
        run(keys)


def test_recompute_changes_nothing_but_memory(run_keys, tmp_path):
    weights = []
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        run(run_keys(**LORA_POOL, recompute=recompute, output_dir=str(out), save_strategy="no"))
        weights.append(final_weights(out))
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_progress_bar_and_no_reports(run_keys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("paddlemix.utils.progress.LOG_SECONDS", 0.0)
    run(run_keys(disable_tqdm=False, report_to=["none"], **LORA))
    assert "training: 100%" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


# ---- resuming


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_ends_with_the_weights_of_one_go(run_keys, tmp_path, stop, monkeypatch):
    # Three batches of four, so that steps 1 and 2 stop inside the first epoch and 4 inside the second.
    keys = dict(LORA_POOL, max_steps=5, save_steps=1, logging_steps=2, lora_dropout=0.3)
    whole = run(run_keys(**keys, output_dir=str(tmp_path / "whole")))
    trainer = start(run_keys(**keys))

    killed_at(trainer, stop, monkeypatch)
    resumed = run(run_keys(**keys, resume=True))
    ours, theirs = final_weights(tmp_path / "out"), final_weights(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["global_step"] for line in history if "loss" in line][-1] == 4


def test_resuming_a_run_that_is_done_trains_no_further(run_keys, tmp_path, log):
    run(run_keys(save_steps=2, **LORA))
    before = final_weights(tmp_path / "out")
    metrics = run(run_keys(save_steps=2, resume=True, **LORA))
    assert "nothing left to train" in log.text and metrics["train_loss"] > 0
    assert all(np.array_equal(before[name], array) for name, array in final_weights(tmp_path / "out").items())


def test_resuming_with_another_order_of_samples_is_refused(run_keys):
    run(run_keys(save_steps=1, **LORA))
    with refused(ConfigError, "seed", match="42.* 7"):
        run(run_keys(save_steps=1, resume=True, seed=7, max_steps=4, **LORA))
    # It decides where epochs end.
    with refused(ConfigError, "dataloader_drop_last"):
        run(run_keys(save_steps=1, resume=True, dataloader_drop_last=True, max_steps=4, **LORA))


def test_an_unfinished_run_is_not_overwritten(run_keys, tmp_path):
    keys = run_keys(save_steps=1, overwrite_output_dir=True, **LORA)
    run(keys)
    (tmp_path / "out" / "train_results.json").unlink()
    with refused(ConfigError, "unfinished-run", match="checkpoint-2"):
        run(keys)


def test_a_run_without_a_step_is_refused_and_deletes_nothing(run_keys, tmp_path):
    run(run_keys(**LORA, max_steps=1, save_strategy="no"))
    with refused(ConfigError, "num_train_epochs"):
        run(run_keys(**LORA, max_steps=-1, num_train_epochs=0.1, overwrite_output_dir=True))
    assert final_weights(tmp_path / "out")


def test_the_old_result_stays_until_the_new_run_can_start(run_keys, tmp_path):
    run(run_keys(**LORA))
    wrong = run_keys(overwrite_output_dir=True, lora=True, lora_target_modules=[".*nowhere.*"])
    with refused(ConfigError, "lora_target_modules", match="nowhere"):
        run(wrong)
    assert (tmp_path / "out" / "lora_model_state.pdparams").is_file()
    run(run_keys(overwrite_output_dir=True, **LORA))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(run_keys, tmp_path, log, number, request):
    before = signal.signal(number, signal.SIG_DFL)  # which may be to ignore it
    request.addfinalizer(lambda: signal.signal(number, before))
    # With an epoch, too, the checkpoint is written once: there may be only seconds.
    trainer = start(run_keys(max_steps=50, save_strategy="epoch", **LORA))
    step = trainer.training_step

    def step_with_signal(*args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)

    trainer.training_step = step_with_signal
    trainer.train()
    assert signal.getsignal(number) is signal.SIG_DFL
    assert f"{signal.Signals(number).name}: stopping after step 3" in log.text
    assert trainer.stop.received and trainer.state.global_step == 3
    assert run_checkpoints.last_complete(str(tmp_path / "out")).endswith("checkpoint-3")
    assert log.text.count("Saved model checkpoint to") == 1


def test_a_log_names_no_folder_that_is_there_for_a_moment(run_keys, tmp_path, capsys):
    run(run_keys(**LORA, max_steps=2, save_steps=1))
    (tmp_path / "out" / "train_results.json").unlink()
    run(run_keys(**LORA, max_steps=3, save_steps=1, resume=True))
    said = capsys.readouterr().err
    assert "Continuing training from global step 2" in said
    assert ".partial" not in said and "--ignore_data_skip" not in said
    for name in ("checkpoint-1", "checkpoint-3"):
        assert f"Saved model checkpoint to {tmp_path}/out/{name}" in said


def test_nohup_goes_on_without_a_terminal(run_keys, request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    trainer = start(run_keys(max_steps=2, save_strategy="no", **LORA))
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGHUP) or step(*args, **kwargs)
    trainer.train()
    assert trainer.state.global_step == 2 and not trainer.stop.received


def test_workers_need_no_room_in_shared_memory(run_keys, monkeypatch):
    """Docker gives 64 MB, and a batch without room ends a run, or hangs it."""
    trainer = start(run_keys(dataloader_num_workers=1, do_eval=True, **LORA))
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.num_workers == 1 and not loader.use_shared_memory
        before = set(os.listdir("/dev/shm"))
        batches = iter(loader)
        next(batches)
        # Paddle's are called so; what else lies there is other programs' business.
        mine = f"paddle_{os.getpid()}_"
        assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(mine)]
    monkeypatch.setattr("multiprocessing.Lock", lambda: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with refused(UserError, "shared-memory", match="dataloader_num_workers 0"):
        trainer.get_train_dataloader()


def test_a_tilde_is_the_home_in_every_path(run_keys, tmp_path, monkeypatch, world):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.json").write_bytes(open(world[1], "rb").read())
    (tmp_path / "model").symlink_to(world[0])
    values = {
        "model_name_or_path": "~/model", "output_dir": "~/out", "dataset": {"train": [{"data_files": "~/train.json"}]},
        "do_train": True, "max_steps": 1, "lora": True, "report_to": ["none"], "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    run(command_line.parse(["~/config.json"]))
    with pytest.raises(ConfigError, match="contains the result of a run"):
        run(command_line.parse(["~/config.json", "--output_dir=~/out", "--logging_dir", "~/runs"]))
    assert final_weights(tmp_path / "out") and not os.path.exists("~")


def test_one_run_writes_into_a_folder(run_keys, tmp_path):
    with files.only_writer(str(tmp_path / "out")):
        with pytest.raises(UserError, match="another process is writing .*out: wait for it"):
            run(run_keys(**LORA))
        assert not os.listdir(tmp_path / "out")
    run(run_keys(**LORA))


@pytest.mark.parametrize("moment", ["loss", "captions"])
def test_sigterm_ends_an_evaluation(run_keys, tmp_path, monkeypatch, moment):
    """At the next batch, and without its result; the step is saved."""
    keys = {"evaluation_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1, "save_strategy": "no"}
    trainer = start(run_keys(max_steps=4, eval_with_do_generation=True, max_new_tokens=2, **keys, **LORA))
    seen = []
    owner, name = (trainer, "prediction_step") if moment == "loss" else (trainer.captions.dataset, "question")
    work = getattr(owner, name)

    def with_signal(*args, **kwargs):
        seen.append(trainer.state.global_step)
        os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, with_signal)
    trainer.train()
    assert seen == [2] and trainer.state.global_step == 2
    assert run_checkpoints.last_complete(str(tmp_path / "out")).endswith("checkpoint-2")
    assert not any("eval_cider" in line for line in trainer.state.log_history)


def test_a_full_disk_leaves_the_earlier_checkpoint(run_keys, tmp_path, monkeypatch):
    trainer = start(run_keys(max_steps=3, save_steps=1, **LORA))
    save = trainer._save

    def full(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(trainer, "_save", full)
    with refused(JobFailed, "disk", match="checkpoint-2 .*No space left on device"):
        trainer.train()
    assert run_checkpoints.last_complete(str(tmp_path / "out")).endswith("checkpoint-1")
    assert not list((tmp_path / "out").glob(".partial*"))


# ---- starting points and noise


def test_adapters_to_start_from(run_keys, tmp_path):
    run(run_keys(**LORA_POOL))
    first = final_weights(tmp_path / "out")
    path = str(tmp_path / "out")
    trainer = start(run_keys(**LORA_POOL, lora_path=path, output_dir=str(tmp_path / "second")))
    state = trainer.model.model.state_dict()
    assert all(np.array_equal(state[name].numpy(), array) for name, array in first.items())
    with refused(ConfigError, "lora_rank", match="8.* 4"):
        start(run_keys(**dict(LORA_POOL, lora_rank=8), lora_path=path, output_dir=str(tmp_path / "second")))


def test_language_part_of_another_model(run_keys, world, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=5)
    state = start(run_keys(text_model_name_or_path=other)).model.state_dict()
    base, theirs = (AutoModelMIX.from_pretrained(folder).state_dict() for folder in (world[0], other))
    for name in state:
        source = base if name.startswith("visual.") else theirs
        assert np.array_equal(state[name].numpy(), source[name].numpy()), name


def test_neftune_adds_bounded_noise_while_training_only():
    model = make_tiny_model()
    ids = paddle.arange(16).reshape([2, 8])
    clean = model.transformer.llm.wte(ids).numpy()
    add_neftune(model, 4.0)
    np.testing.assert_array_equal(model.transformer.llm.wte(ids).numpy(), clean)
    model.train()
    noise = model.transformer.llm.wte(ids).numpy() - clean
    bound = 4.0 / np.sqrt(8 * 128)
    assert 0.5 * bound < np.abs(noise).max() <= bound * 1.001


def test_a_loss_that_is_no_number_ends_the_run(run_keys, monkeypatch):
    trainer = start(run_keys())
    loss = trainer.compute_loss
    trainer.compute_loss = lambda *args: loss(*args) * float("nan")
    with refused(JobFailed, "loss", match="nan .*step 1.*learning_rate"):
        trainer.train()


# ---- order of samples


def batches(sampler):
    return list(sampler)


def test_epochs_differ_and_repeat_by_seed():
    def order(seed, epoch):
        sampler = EpochSampler(Order(10, 2, seed=seed))
        sampler.start_at(epoch, 0)
        return sum(batches(sampler), [])

    assert sorted(order(1, 0)) == list(range(10))
    assert order(1, 0) == order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_starting_inside_an_epoch_is_its_rest():
    sampler = EpochSampler(Order(11, 2, accumulation=2, seed=3))
    sampler.start_at(4, 0)
    whole = batches(sampler)
    assert len(whole) == len(sampler) == 6
    sampler.start_at(4, 3)
    assert batches(sampler) == whole[3:]


def test_an_epoch_holds_whole_steps():
    assert len(EpochSampler(Order(11, 2, accumulation=4))) == 4
    assert len(EpochSampler(Order(5, 2, accumulation=4))) == 3
    assert len(EpochSampler(Order(5, 2, drop_last=True))) == 2
    (problem,) = Order(3, 4, drop_last=True).problems()
    assert problem.startswith("3 samples do not fill one batch of 4")


def test_processes_share_an_epoch():
    ranks = [EpochSampler(Order(9, 2, seed=1, cards=2), rank) for rank in (0, 1)]
    first, second = map(batches, ranks)
    alone = batches(EpochSampler(Order(9, 2, seed=1)))
    assert [first[0], second[0], first[1], second[1]] == alone[:4]
    assert len(first) == len(second) and all(len(batch) == 2 for batch in first + second)
    assert set(sum(first + second, [])) == set(range(9))
