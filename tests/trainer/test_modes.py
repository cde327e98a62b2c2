"""The tuning modes, each by its config file: what trains, what is saved, and the way to a prediction and back.

The model is tiny, but has 32 decoder layers as the 7B has, so that the patterns of the files in config/ are the ones
that are tested.
"""

import base64
import json
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.auto import AutoConfigMIX, AutoModelMIX
from paddlemix.checkpoint import open_weights
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.checkpoint.origin import model_fingerprint
from paddlemix.checkpoint.structure import is_language
from paddlemix.inference.captioner import Captioner
from paddlemix.inference.loading import load_model
from paddlemix.inference.prediction import predict_file
from paddlemix.trainer import run_checkpoints
from paddlemix.trainer.guard import LanguageGuard
from paddlemix.trainer.tuned_model import base_of
from paddlemix.utils.errors import ConfigError, UserError, WeightsError
from tests.helpers import image_bytes, refused, save_tiny_model
from tests.inference.talking import save_talking_model
from tests.trainer.runs import COLOURS, LEFT, LORA, run, square, start

# Keys of a config file that say what trains.
MODE_KEYS = ("freeze_include", "freeze_exclude", "lora", "lora_rank", "lora_alpha", "lora_target_modules")


def is_adapter(name):
    return ".lora_" in name


def in_pool(name):
    return name.startswith("visual.attn_pool.") and not name.endswith("pos_embed")


def in_upper_half(name):
    return name.startswith("transformer.llm.h.") and int(name.split(".")[3]) >= 16


# config file → (what trains, the file that holds it)
MODES = {
    "lora_only_sft_argument.json": (is_adapter, "lora_model_state.pdparams"),
    "lora_sft_argument.json": (lambda name: is_adapter(name) or in_pool(name), "lora_model_state.pdparams"),
    "attn_pool_sft_argument.json": (in_pool, "partial_model_state.pdparams"),
    "layers_sft_argument.json": (lambda name: in_upper_half(name) or in_pool(name), "partial_model_state.pdparams"),
    "sft_argument.json": (lambda name: in_pool(name) or is_language(name), "partial_model_state.pdparams"),
    "full_sft_argument.json": (lambda name: not name.endswith("pos_embed"), "model_state.pdparams"),
}


def mode(root, name):
    config = json.loads((root / "config" / "mgen_vl" / name).read_text(encoding="utf-8"))
    keys = {key: config[key] for key in MODE_KEYS if key in config}
    return dict(keys, lora_rank=4) if keys.get("lora") else keys


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """A model folder with 32 decoder layers."""
    return save_talking_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=32)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file to predict: id and image per line."""
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    images = [square(colour) for colour in COLOURS.values()][:2] + [base64.b64encode(image_bytes(3)).decode()]
    path.write_text("".join(f"row{number}\t{image}\n" for number, image in enumerate(images)))
    return path


def tensors(model):
    return {name: tensor.numpy().copy() for name, tensor in base_of(model).state_dict().items()}


def read_all(path):
    with open_weights(str(path)) as reader:
        return {name: np.array(reader.read(name)) for name in reader.keys()}


def captions(model, folder, rows):
    """What a model in memory says about each row, with the tokenizer and image settings of a folder."""
    loaded = load_model(str(folder))
    captioner = Captioner(model, loaded.tokenizer, loaded.image_processor, template=loaded.template, max_new_tokens=6)
    images = [line.split("\t")[1] for line in rows.read_text().splitlines()]
    return [answer.caption for answer in captioner.captions(images)]


def predicted(folder, rows, output):
    predict_file(str(rows), str(output), str(folder), max_new_tokens=6)
    return [line.split("\t")[1] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MODES)
def test_train_save_merge_predict(name, root, deep, rows, run_keys, tmp_path):
    trains, file = MODES[name]
    out = tmp_path / "out"
    trainer = start(run_keys(**mode(root, name), model_name_or_path=deep, save_strategy="no"))
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    expected = {one for one in after if trains(one)}
    changed = {one for one in after if not np.array_equal(after[one], before[one])}
    assert changed == expected

    trainer.save_model()
    weights = [path.name for path in out.iterdir() if path.name.endswith(".pdparams")]
    assert weights == [file]
    stored = read_all(out / file)
    assert set(stored) == (set(after) if file.startswith("model_state") else expected)
    assert all(np.array_equal(array, after[one]) for one, array in stored.items())

    merged = out
    if not file.startswith("model_state"):
        with refused(WeightsError, "not-merged"):
            load_model(str(out))
        merged = tmp_path / "merged"
        merge(deep, str(out), str(merged), progress=False)
    found = read_all(merged)
    scale = trainer.model.lora_config.lora_alpha / 4 if any(map(is_adapter, after)) else 0.0
    base = {one: array for one, array in after.items() if not is_adapter(one)}
    assert set(found) == set(base)
    for one, array in base.items():
        module = one[: -len(".weight")]
        if module + ".lora_A" in after:
            delta = after[module + ".lora_A"].astype("float64") @ after[module + ".lora_B"]
            np.testing.assert_allclose(found[one], array + scale * delta, atol=1e-6, err_msg=one)
        else:
            np.testing.assert_array_equal(found[one], array, one)

    trainer.model.eval()
    ours = captions(base_of(trainer.model), merged, rows)
    assert predicted(merged, rows, tmp_path / "results.txt") == ours
    # What was tuned, with the base that it names, and put on the base by hand.
    assert predicted(out, rows, tmp_path / "direct.txt") == ours
    if merged != out:
        predict_file(str(rows), str(tmp_path / "on.txt"), deep, max_new_tokens=6, lora_path=str(out))
        assert (tmp_path / "on.txt").read_bytes() == (tmp_path / "direct.txt").read_bytes()
    assert ours != captions(AutoModelMIX.from_pretrained(deep), merged, rows)


PART = {"freeze_include": ["*"], "freeze_exclude": ["transformer.llm.h.{1..1}.*", "visual.attn_pool.*"]}


def test_a_part_is_saved_with_its_base_and_without_the_rest(run_keys, world, tmp_path):
    run(run_keys(**PART, save_strategy="no"))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"partial_model_state.pdparams", *LEFT}
    origin = json.loads((out / "tuned_from.json").read_text())
    assert origin == {
        "model_name_or_path": world[0],
        "text_model_name_or_path": None,
        "base_fingerprint": model_fingerprint(world[0]),
        "text_fingerprint": None,
    }
    size = (out / "partial_model_state.pdparams").stat().st_size
    with open_weights(world[0]) as reader:
        assert size < 0.6 * reader.total_bytes


def test_a_part_resumes_bitwise(run_keys, tmp_path):
    keys = dict(PART, max_steps=4, save_steps=2, lr_scheduler_type="cosine", weight_decay=0.1)
    run(run_keys(**keys, output_dir=str(tmp_path / "whole")))
    run(run_keys(**keys))
    out = tmp_path / "out"
    # As if it had been killed after step 2.
    shutil.rmtree(out / "checkpoint-4")
    for name in ("train_results.json", "partial_model_state.pdparams"):
        (out / name).unlink()
    run(run_keys(**keys, resume=True))
    ours, theirs = (read_all(folder / "partial_model_state.pdparams") for folder in (out, tmp_path / "whole"))
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_best_part_is_loaded_at_the_end(run_keys, tmp_path):
    keys = dict(PART, max_steps=2, learning_rate=1.0, save_steps=1, eval_steps=1, lr_scheduler_type="constant")
    trainer = start(run_keys(**keys, evaluation_strategy="steps", load_best_model_at_end=True))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert run_checkpoints.step_of(best) == 1
    stored, state = read_all(best + "/partial_model_state.pdparams"), tensors(trainer.model)
    assert all(np.array_equal(array, state[name]) for name, array in stored.items())


def test_a_part_of_another_run_is_refused(run_keys, tmp_path):
    run(run_keys(**PART, save_steps=1))
    other = dict(PART, freeze_exclude=["visual.attn_pool.*"])
    with pytest.raises(WeightsError, match="unexpected: transformer.llm.h.1"):
        run(run_keys(**other, resume=True, max_steps=4))


@pytest.mark.parametrize("keys", [PART, LORA], ids=["part", "lora"])
def test_a_run_does_not_go_on_with_another_base(run_keys, tmp_path, keys):
    base = save_tiny_model(tmp_path / "base")
    run(run_keys(**keys, model_name_or_path=base, max_steps=1, save_steps=1))
    shutil.rmtree(base)
    save_tiny_model(tmp_path / "base", seed=8)
    with refused(WeightsError, "other-weights", match="checkpoint-1 .*base"):
        run(run_keys(**keys, model_name_or_path=base, max_steps=2, save_steps=1, resume=True))


def test_adapters_of_another_base_to_begin_with_are_said(run_keys, tmp_path, log):
    run(run_keys(**LORA, max_steps=1, save_strategy="no"))
    other = save_tiny_model(tmp_path / "base", seed=8)
    keys = dict(LORA, lora_path=str(tmp_path / "out"), max_steps=1, save_strategy="no")
    run(run_keys(**keys, model_name_or_path=other, output_dir=str(tmp_path / "second")))
    assert "base is another model" in log.text


# ---- the LLM of another model


@pytest.mark.parametrize("keys", [PART, LORA, {}], ids=["part", "lora", "full"])
def test_an_llm_from_elsewhere_reaches_the_merged_model(run_keys, world, tmp_path, keys, monkeypatch):
    text = save_tiny_model(tmp_path / "text", seed=7)
    trainer = start(run_keys(**keys, text_model_name_or_path=text, save_strategy="no"))
    trainer.train()
    trainer.save_model()
    out, merged = tmp_path / "out", tmp_path / "merged"
    if not keys:
        merged = out
    else:
        moved = str(tmp_path / "moved")
        shutil.move(text, moved)
        with refused(UserError, "text_model_name_or_path"):
            merge(world[0], str(out), str(merged), progress=False)
        merge(world[0], str(out), str(merged), progress=False, text_folder=moved)
    trainer.model.eval()
    ids = paddle.arange(8).reshape([1, 8])
    expected = trainer.model(ids).logits.numpy()
    found = AutoModelMIX.from_pretrained(str(merged))(ids).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_text_model_that_the_run_did_not_have_is_refused(run_keys, world, tmp_path):
    run(run_keys(**LORA, save_strategy="no"))
    with refused(UserError, "text_model_name_or_path"):
        merge(world[0], str(tmp_path / "out"), str(tmp_path / "merged"), progress=False, text_folder=world[0])


# ---- the LLM's structure


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, not 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, not 2"),
        ({"vocab_size": 512}, "vocab_size is 512, not 480"),
        ({"num_attention_heads": 2, "kv_channels": 64}, "num_attention_heads is 2, not 4"),
        ({"rotary_emb_base": 500000}, "rotary_emb_base is 500000, not 10000"),
    ],
)
def test_an_llm_of_another_structure_is_refused(run_keys, tmp_path, changes, said):
    other = save_tiny_model(tmp_path / "other", **changes)
    with refused(ConfigError, "language-model", match=said):
        start(run_keys(text_model_name_or_path=other))


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 1), ("vocab_size", 496), ("intermediate_size", 512)])
def test_a_config_that_promises_another_llm_is_refused(run_keys, world, tmp_path, key, value):
    base = tmp_path / "base"
    shutil.copytree(world[0], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(config, **{key: value})))
    with refused(ConfigError, "language-model"):
        start(run_keys(model_name_or_path=str(base)))


def test_a_tokenizer_that_needs_more_embeddings_is_refused(run_keys, world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world[0], base)
    with open(base / "mgen.tiktoken", "ab") as file:
        for rank in range(256, 300):
            file.write(base64.b64encode(b"w%d" % rank) + b" %d\n" % rank)
    with refused(ConfigError, "vocabulary", match="517 .*480"):
        start(run_keys(model_name_or_path=str(base)))


def test_a_model_that_grew_is_neither_trained_on_nor_saved(run_keys, world, tmp_path):
    trainer = start(run_keys(**PART))
    head = trainer.model.lm_head
    head.weight = head.create_parameter([128, 496])
    with refused(ConfigError, "language-model", match=r"lm_head.weight .*\[128, 496\].*\[128, 480\]"):
        trainer.save_model()
    with open_weights(world[0]) as reader:
        guard = LanguageGuard(world[0], AutoConfigMIX.from_pretrained(world[0]), reader)
    trainer.model.transformer.llm.h.append(trainer.model.transformer.llm.h[0])
    with refused(ConfigError, "language-model", match="transformer.llm.h.2.ln_1.weight, .* and "):
        guard.check(trainer.model)
