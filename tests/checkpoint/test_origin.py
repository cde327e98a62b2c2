"""The note of what was tuned, and the fingerprint in it."""

import json
import os
import shutil

import numpy as np
import pytest

from paddlemix.checkpoint import convert_dtype, open_weights, write_pdparams, write_sharded
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.checkpoint.origin import Origin, model_fingerprint
from paddlemix.checkpoint.structure import LANGUAGE_KEYS, VISUAL_KEYS
from paddlemix.inference.source import find_source
from paddlemix.utils.errors import UserError, WeightsError
from tests.checkpoint.files import pickled, torch_file
from tests.helpers import refused

NAMES = ("transformer.llm.h.0.attn.c_attn.weight", "transformer.llm.wte.weight", "visual.proj")
SHAPE = (64, 96)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(SHAPE).astype(np.float32) for name in NAMES}


def items(named, dtype="float32"):
    return [
        (name, dtype, SHAPE, lambda array=array: convert_dtype(array, "float32", dtype))
        for name, array in named.items()
    ]


def write_model(folder, named, config=None, dtype="float32", **how):
    write_sharded(str(folder), items(named, dtype), **how)
    (folder / "config.json").write_text(json.dumps({"visual": {"width": 96}, **(config or {})}))
    return str(folder)


def test_the_layout_of_the_weights_does_not_matter(tmp_path):
    named = arrays()
    expected = model_fingerprint(write_model(tmp_path / "a", named))
    assert len(expected) == 64
    backwards = dict(reversed(list(named.items())))
    assert model_fingerprint(write_model(tmp_path / "b", backwards, max_shard_size="30KB")) == expected
    assert model_fingerprint(write_model(tmp_path / "c", named, format="safetensors")) == expected
    for folder in (tmp_path / "d", tmp_path / "e"):
        folder.mkdir()
        shutil.copy(tmp_path / "a" / "config.json", folder)
    torch_file(tmp_path / "d" / "pytorch_model.bin", {name: ("float32", array) for name, array in named.items()})
    # Not in C order.
    pickled({name: np.asfortranarray(array) for name, array in named.items()}, tmp_path / "e" / "model_state.pdparams")
    assert model_fingerprint(str(tmp_path / "d")) == expected
    assert model_fingerprint(str(tmp_path / "e")) == expected


def test_a_wider_type_of_the_same_values_does_not_matter(tmp_path):
    named = {name: convert_dtype(convert_dtype(array, "float32", "bfloat16"), "bfloat16", "float32")
             for name, array in arrays().items()}  # fmt: skip
    half = model_fingerprint(write_model(tmp_path / "half", named, dtype="bfloat16"))
    assert model_fingerprint(write_model(tmp_path / "wide", named)) == half
    assert model_fingerprint(write_model(tmp_path / "other", arrays())) != half


@pytest.mark.parametrize(
    "config, same",
    [
        ({"rotary_emb_base": 10000.0, "no_bias": True, "visual": {"width": 96, "n_queries": 256}}, True),
        ({"dtype": "bfloat16", "architectures": ["X"], "emb_dropout_prob": 0.5}, True),
        ({"rotary_emb_base": 500000}, False),
        ({"use_logn_attn": False}, False),
        ({"visual": {"width": 96, "heads": 4}}, False),
    ],
)
def test_what_counts_of_a_configuration(tmp_path, config, same):
    named = arrays()
    expected = model_fingerprint(write_model(tmp_path / "a", named))
    assert (model_fingerprint(write_model(tmp_path / "b", named, config)) == expected) is same


def test_names_shapes_and_values_count(tmp_path):
    expected = model_fingerprint(write_model(tmp_path / "a", arrays()))
    named = arrays()
    named["visual.proj"] = named["visual.proj"] * np.float32(1.0001)
    assert model_fingerprint(write_model(tmp_path / "b", named)) != expected
    named = arrays()
    named["visual.other"] = named.pop("visual.proj")
    assert model_fingerprint(write_model(tmp_path / "c", named)) != expected
    # The first and the last value always count.
    for place in ((0, 0), (-1, -1)):
        named = arrays()
        named["visual.proj"][place] += 1
        assert model_fingerprint(write_model(tmp_path / f"d{place[0]}", named)) != expected


def test_the_defaults_are_those_of_the_configuration():
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    config = MGenConfig()
    assert {key: getattr(config, key) for key in LANGUAGE_KEYS} == LANGUAGE_KEYS
    assert set(config.visual) == set(VISUAL_KEYS) and config.visual["n_queries"] == 256


def test_read_is_what_was_written(tmp_path):
    assert Origin.read(str(tmp_path)) == Origin()
    note = Origin("base", None, "a" * 64)
    note.write(str(tmp_path))
    assert Origin.read(str(tmp_path)) == note
    (tmp_path / "tuned_from.json").write_text('{"base_fingerprint": 3}')
    with refused(WeightsError, "model_name_or_path", "text_model_name_or_path"):
        Origin.read(str(tmp_path))


# ---- merging


@pytest.fixture
def world(tmp_path):
    """Base, another model of the same shapes, adapters on the base, output."""
    base, other = write_model(tmp_path / "base", arrays()), write_model(tmp_path / "other", arrays(1))
    lora = tmp_path / "lora"
    lora.mkdir()
    pair = {"lora_A": (64, 2), "lora_B": (2, 96)}
    named = {f"{NAMES[0][:-7]}.{part}": ("float32", np.ones(shape, np.float32)) for part, shape in pair.items()}
    write_pdparams(str(lora / "lora_model_state.pdparams"), named)
    (lora / "lora_config.json").write_text('{"r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}')
    Origin.of(base).write(str(lora))
    return base, other, str(lora), str(tmp_path / "out")


def merged(*args, **kwargs):
    return merge(*args, progress=False, **kwargs)


def test_another_base_of_equal_shapes_is_refused(world, capfd):
    base, other, lora, out = world
    with refused(WeightsError, "other-model", match="lora .*base.* .*other.*--force"):
        merged(other, lora, out)
    assert not os.path.exists(out)
    merged(other, lora, out, force=True)
    assert "other is another model" in capfd.readouterr().err
    merged(base, lora, out, overwrite=True)
    assert "another model" not in capfd.readouterr().err


def test_a_vocabulary_of_another_model_is_refused(world):
    """As many tokens, but others: every number of them would fit."""
    base, _, lora, out = world
    for folder, tokens in ((base, "QQ== 0\nQg== 1\n"), (lora, "QQ== 0\nQw== 1\n")):
        with open(os.path.join(folder, "mgen.tiktoken"), "w") as file:
            file.write(tokens)
    for call in (lambda: merged(base, lora, out), lambda: find_source(lora), lambda: find_source(base, lora)):
        with refused(WeightsError, "other-vocabulary"):
            call()
    # The same ones in another order of lines, under the other name.
    os.unlink(os.path.join(lora, "mgen.tiktoken"))
    with open(os.path.join(lora, "qwen.tiktoken"), "w") as file:
        file.write("Qg== 1\nQQ== 0\n")
    assert find_source(lora).base == base
    merged(base, lora, out)


def test_merging_twice_is_refused(world):
    base, _, lora, out = world
    merged(base, lora, out)
    with refused(WeightsError, "already-merged", match="/out "):
        merged(out, lora, out + "2")
    merged(out, lora, out + "2", force=True)
    with open_weights(base) as before, open_weights(out + "2") as after:
        np.testing.assert_allclose(after.read(NAMES[0]) - before.read(NAMES[0]), 4, rtol=1e-5)


def test_the_same_base_elsewhere_and_in_another_format_is_taken(world, tmp_path):
    _, _, lora, out = world
    merged(write_model(tmp_path / "moved", arrays(), format="safetensors", max_shard_size="30KB"), lora, out)


def test_parts_that_were_trained_whole_have_a_base_too(world, tmp_path):
    base, other, _, out = world
    part = tmp_path / "part"
    part.mkdir()
    trained = {"visual.proj": ("float32", np.zeros(SHAPE, np.float32))}
    write_pdparams(str(part / "partial_model_state.pdparams"), trained)
    Origin.of(base).write(str(part))
    with refused(WeightsError, "other-model", match="/other "):
        merged(other, str(part), out)
    merged(base, str(part), out)


def test_adapters_of_an_older_version_merge_with_a_warning(world, capfd):
    base, other, lora, out = world
    for note in ('{"model_name_or_path": "gone"}', None):
        if note is None:
            os.unlink(os.path.join(lora, "tuned_from.json"))
        else:
            Origin("gone").write(lora)
        merged(other, lora, out, overwrite=True)
        assert "does not record which weights it was tuned from" in capfd.readouterr().err


def test_a_note_leads_to_no_folder_that_the_user_did_not_give(world):
    """Were it followed, a stranger's adapters could bring any folder's LLM into the merged model."""
    base, other, lora, out = world
    Origin.of(base, other).write(lora)
    with refused(UserError, "text_model_name_or_path", match="--text_model_name_or_path '?.*other"):
        merged(base, lora, out)
    with refused(WeightsError, "other-model", match="/other.*/base "):
        merged(base, lora, out, text_folder=base)
    merged(base, lora, out, text_folder=other)
    with open_weights(out) as found, open_weights(other) as expected:
        np.testing.assert_array_equal(found.read(NAMES[1]), expected.read(NAMES[1]))


def test_a_note_that_is_a_link_is_refused(world, tmp_path):
    base, _, lora, out = world
    note = os.path.join(lora, "tuned_from.json")
    shutil.move(note, tmp_path / "elsewhere.json")
    os.symlink(tmp_path / "elsewhere.json", note)
    with refused(WeightsError, "leads-out"):
        merged(base, lora, out)
