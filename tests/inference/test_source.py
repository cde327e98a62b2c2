"""What a run tuned, asked directly or on top of its base."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest

from paddlemix.auto import AutoModelMIX
from paddlemix.checkpoint import write_pdparams
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.checkpoint.origin import Origin
from paddlemix.inference.loading import load_model
from paddlemix.inference.prediction import predict_file
from paddlemix.inference.source import Source, find_source
from paddlemix.models.lora import apply_lora
from paddlemix.utils.errors import UserError, WeightsError
from tests.helpers import byte_vocab_tokenizer, image_bytes, prompt_ids, refused, save_tiny_model
from tests.inference.talking import save_talking_model

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
QUERY = "visual.attn_pool.query"


def save_adapters(folder, base, text=None):
    """Adapters far from where they start, and a tensor trained whole beside them, with their note."""
    model = apply_lora(
        AutoModelMIX.from_pretrained(base, dtype="float32"),
        rank=4, alpha=8, target_modules=TARGETS, dropout=0.1, trainable=[QUERY], base_model_name_or_path=base,
    )  # fmt: skip
    paddle.seed(5)
    for tensor in model.model.state_dict().values():
        if not tensor.stop_gradient:
            tensor.set_value(0.1 * paddle.randn(tensor.shape))
    model.save_pretrained(str(folder))
    shutil.copy(os.path.join(base, "config.json"), folder)
    Origin.of(base, text).write(str(folder))
    return str(folder)


def save_part(folder, base, text=None):
    """The embeddings, trained whole."""
    folder.mkdir()
    model = AutoModelMIX.from_pretrained(base, dtype="float32")
    paddle.seed(6)
    name = "transformer.llm.wte.weight"
    trained = 0.1 * paddle.randn(model.state_dict()[name].shape)
    write_pdparams(str(folder / "partial_model_state.pdparams"), {name: ("float32", trained.numpy())})
    shutil.copy(os.path.join(base, "config.json"), folder)
    Origin.of(base, text).write(str(folder))
    return str(folder)


KINDS = pytest.mark.parametrize("save", [save_adapters, save_part], ids=["adapters", "part"])


def logits(model):
    images = np.random.default_rng(0).normal(size=[1, 3, 56, 56]).astype("float32")
    with paddle.no_grad():
        ids = paddle.to_tensor([prompt_ids(range(40, 60))])
        return model(input_ids=ids, images=paddle.to_tensor(images)).logits.numpy()


@pytest.fixture
def base(tmp_path):
    return save_talking_model(tmp_path / "base")


@pytest.fixture
def rows(tmp_path):
    import base64

    path = tmp_path / "rows.tsv"
    images = [base64.b64encode(image_bytes(seed)).decode() for seed in range(3)]
    path.write_text("".join(f"row{number}\t{image}\n" for number, image in enumerate(images)))
    return str(path)


@KINDS
@pytest.mark.parametrize("from_elsewhere", [False, True], ids=["", "text"])
def test_unmerged_equals_merged(save, from_elsewhere, base, rows, tmp_path):
    text = save_talking_model(tmp_path / "text", seed=9) if from_elsewhere else None
    tuned = save(tmp_path / "tuned", base, text)
    merge(base, tuned, str(tmp_path / "merged"), progress=False, text_folder=text)
    plain, merged = logits(load_model(base).model), logits(load_model(str(tmp_path / "merged")).model)
    found = {}
    for name, source in (("direct", find_source(tuned)), ("on the base", find_source(base, tuned))):
        assert source == Source(base, tuned, text)
        loaded = load_model(source, dtype="float32")
        assert not loaded.model.training
        found[name] = logits(loaded.model)
        assert np.abs(found[name] - merged).max() <= 1e-5 * np.abs(merged).max() < 1e-2 < np.abs(merged - plain).max()
    for output, arguments in (
        ("merged.txt", {"model": str(tmp_path / "merged")}),
        ("direct.txt", {"model": tuned}),
        ("on.txt", {"model": base, "lora_path": tuned}),
    ):
        predict_file(rows, str(tmp_path / output), max_new_tokens=6, **arguments)
    assert (tmp_path / "direct.txt").read_bytes() == (tmp_path / "merged.txt").read_bytes()
    assert (tmp_path / "on.txt").read_bytes() == (tmp_path / "merged.txt").read_bytes()


def test_adapters_stay_beside_their_weights(base, tmp_path):
    tuned = save_adapters(tmp_path / "tuned", base)
    state = load_model(find_source(tuned)).model.state_dict()
    before = AutoModelMIX.from_pretrained(base).state_dict()
    name = "transformer.llm.h.0.attn.c_attn"
    assert f"{name}.lora_A" in state
    np.testing.assert_array_equal(state[f"{name}.weight"].numpy(), before[f"{name}.weight"].numpy())


def test_tokenizer_and_template_of_the_run_come_first(base, tmp_path):
    tuned = save_adapters(tmp_path / "tuned", base)
    template = {"system": "You sell cups.", "conversation": ["<|im_start|>user\n{{user}}<|im_end|>\n",
                                                             "<|im_start|>assistant\n{{bot}}<|im_end|>\n"]}  # fmt: skip
    (tmp_path / "base" / "chat_template.json").write_text(json.dumps(template))
    assert load_model(find_source(tuned)).template.system == "You sell cups."
    template["system"] = "You sell tea."
    (tmp_path / "tuned" / "chat_template.json").write_text(json.dumps(template))
    assert load_model(find_source(tuned)).template.system == "You sell tea."
    assert load_model(find_source(base)).template.system == "You sell cups."
    byte_vocab_tokenizer(tuned, n_queries=4)
    assert find_source(tuned).folder_of("mgen.tiktoken") == tuned
    load_model(find_source(tuned))


def test_a_killed_run_does_not_go_on_with_other_adapters(base, rows, tmp_path):
    tuned = save_adapters(tmp_path / "tuned", base)
    first = find_source(tuned).fingerprints()
    assert set(first) == {"sha256", "tuned_sha256"} and find_source(base).fingerprints() == {"sha256": first["sha256"]}
    predict_file(rows, str(tmp_path / "out.txt"), tuned, max_new_tokens=2)
    journal = json.loads((tmp_path / "out.txt.run.json").read_text())
    assert journal["model"] == first
    header = {"format": 2, **{key: journal[key] for key in ("input", "model", "settings")}}
    (tmp_path / "out.txt.partial").write_text(json.dumps(header) + "\nrow0\tx\t\t1 1 9\n")
    weights = tmp_path / "tuned" / "lora_model_state.pdparams"
    data = bytearray(weights.read_bytes())
    data[-200] ^= 1
    weights.write_bytes(data)
    with refused(UserError, "other-run", match="model.tuned_sha256"):
        predict_file(rows, str(tmp_path / "out.txt"), tuned, max_new_tokens=2)


def test_another_base_is_refused(base, tmp_path):
    tuned = save_adapters(tmp_path / "tuned", base)
    other = save_tiny_model(tmp_path / "other", seed=8)
    with refused(WeightsError, "other-model", match="tuned .*base.*other"):
        find_source(other, tuned)
    merge(base, tuned, str(tmp_path / "merged"), progress=False)
    with refused(WeightsError, "already-merged"):
        find_source(str(tmp_path / "merged"), tuned)
    with refused(UserError, "tuned-folder"):
        find_source(tuned, tuned)
    for wrong in (base, str(tmp_path / "none")):
        with refused(UserError, "lora_path"):
            find_source(base, wrong)


def test_a_folder_as_paddlenlp_alone_writes_it(base, tmp_path):
    """Without a config.json, or a note; and whole tensors alone under the name of adapters."""
    tuned = save_adapters(tmp_path / "tuned", base)
    expected = logits(load_model(find_source(tuned)).model)
    for name in ("config.json", "tuned_from.json"):
        os.unlink(os.path.join(tuned, name))
    np.testing.assert_array_equal(logits(load_model(find_source(base, tuned)).model), expected)
    with refused(UserError, "lora_path", match="without a fingerprint"):
        find_source(tuned)
    part = save_part(tmp_path / "part", base)
    expected = logits(load_model(find_source(part)).model)
    os.rename(os.path.join(part, "partial_model_state.pdparams"), os.path.join(part, "lora_model_state.pdparams"))
    np.testing.assert_array_equal(logits(load_model(find_source(part)).model), expected)


def printed_command(error):
    return shlex.split(str(error.value).partition("or merge them: ")[2])


def test_a_relative_base_is_looked_for_where_the_command_runs(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = save_adapters(tmp_path / "tuned", "base")
    assert find_source(tuned) == Source("base", tuned)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    said = "tuned from base, and that model is not there: run this in the directory where it was tuned, give the base"
    with refused(UserError, "lora_path", match=said):
        find_source(tuned)


@pytest.mark.parametrize("case", ["gone", "changed", "without a fingerprint", "without a note"])
def test_a_base_that_is_not_found_is_said_with_the_command(case, base, root, tmp_path):
    tuned = save_adapters(tmp_path / "tu ned", base)
    moved = base
    if case == "gone":
        moved = shutil.move(base, str(tmp_path / "moved"))
    elif case == "changed":
        moved = shutil.move(base, str(tmp_path / "moved"))
        save_tiny_model(tmp_path / "base", seed=8)
    elif case == "without a fingerprint":
        Origin(base).write(tuned)
    else:
        os.unlink(os.path.join(tuned, "tuned_from.json"))
    with pytest.raises(UserError) as error:
        find_source(tuned)
    assert "\n" not in str(error.value) and f"--lora_path {shlex.quote(tuned)}" in str(error.value)
    command = printed_command(error)
    assert command[:2] == ["python", "merge_lora_params.py"] and base in command
    command[command.index(base)] = moved
    done = subprocess.run([sys.executable, *command[1:]], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert find_source(tuned + "-merged") == Source(tuned + "-merged")
    # The base by hand needs no note.
    assert find_source(moved, tuned) == Source(moved, tuned)


def test_a_strangers_note_leads_to_no_model_that_the_stranger_does_not_know(base, tmp_path):
    """Neither the base nor the LLM is taken from a folder that has not the fingerprint of the note."""
    private = save_tiny_model(tmp_path / "private", seed=8)
    tuned = save_adapters(tmp_path / "tuned", base)
    for base_named, text_named in ((private, None), (base, private)):
        note = Origin.of(base)._replace(base=base_named, text=text_named, text_fingerprint="0" * 64)
        note.write(tuned)
        with refused(UserError, "lora_path"):
            find_source(tuned)
    with refused(UserError, "no-text-model", match="python"):
        find_source(base, tuned)
    (tmp_path / "not a model").mkdir()
    Origin(str(tmp_path / "not a model"), None, "0" * 64).write(tuned)
    with refused(UserError, "lora_path"):
        find_source(tuned)


@pytest.mark.slow
def test_both_programs_take_both_ways(base, rows, root, tmp_path):
    tuned = save_adapters(tmp_path / "tuned", base)

    def said(*command):
        done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    image = tmp_path / "image.png"
    image.write_bytes(image_bytes(3))
    answers = set()
    for arguments in ([tuned], [base, "--lora_path", tuned]):
        done = said("chat.py", *arguments, "--image", str(image), "--max_new_tokens", "4")
        answers.add(done.stdout.split("response: ")[1].splitlines()[0])
        assert f"applying the tuned weights of {tuned}, unmerged" in done.stderr
        assert "trainable" not in done.stdout + done.stderr
    assert len(answers) == 1
    done = subprocess.run(
        ["sh", str(root / "run.sh"), rows, str(tmp_path / "out.txt"), base, sys.executable,
         "--lora_path", tuned, "--max_new_tokens", "4"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predict_file(rows, str(tmp_path / "direct.txt"), tuned, max_new_tokens=4)
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "direct.txt").read_bytes()
