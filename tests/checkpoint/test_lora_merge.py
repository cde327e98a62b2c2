"""Merging a LoRA folder into its base: the formula, the folder that results, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from paddlemix.checkpoint import convert_dtype, open_weights, write_pdparams, write_sharded
from paddlemix.checkpoint.lora_merge import merge
from paddlemix.checkpoint.origin import Origin
from paddlemix.utils.errors import UserError, WeightsError
from tests.helpers import refused

RANK, ALPHA = 3, 8
SHAPES = {
    "visual.attn_pool.query": (4, 8),
    "visual.attn_pool.pos_embed": (4, 8),
    "llm.h.0.attn.c_attn.weight": (600, 24),
    "llm.h.0.attn.c_attn.bias": (24,),
    "llm.h.1.attn.c_attn.weight": (16, 48),
    "llm.wte.weight": (30, 16),
}
ADAPTED = ("llm.h.0.attn.c_attn", "llm.h.1.attn.c_attn")


def base_tensors(dtype):
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in SHAPES.items():
        kept = "float32" if "pos_embed" in name else dtype
        values = rng.standard_normal(shape).astype(np.float32)
        made[name] = (kept, convert_dtype(values, "float32", kept))
    return made


def adapters(dtype="float32", whole=True):
    rng = np.random.default_rng(1)
    made = {}
    for module in ADAPTED:
        n_in, n_out = SHAPES[module + ".weight"]
        for part, shape in (("lora_A", (n_in, RANK)), ("lora_B", (RANK, n_out))):
            values = rng.standard_normal(shape).astype(np.float32)
            made[f"{module}.{part}"] = (dtype, convert_dtype(values, "float32", dtype))
    if whole:
        values = rng.standard_normal((4, 8)).astype(np.float32)
        made["visual.attn_pool.query"] = (dtype, convert_dtype(values, "float32", dtype))
    return made


def write_base(folder, dtype="float32", format="pdparams", limit="10GB"):
    named = base_tensors(dtype)
    items = [(name, d, a.shape, lambda a=a: a) for name, (d, a) in named.items()]
    write_sharded(str(folder), items, format=format, max_shard_size=limit)
    for name, text in {
        "config.json": json.dumps({"model_type": "mgen", "dtype": dtype, "torch_dtype": dtype}),
        "generation_config.json": "{}",
        "tokenizer_config.json": '{"from": "base"}',
        "special_tokens_map.json": "{}",
        "qwen.tiktoken": "a vocabulary",
        "LICENSE.txt": "license",
        "modeling_qwen.py": "not copied",
    }.items():
        (folder / name).write_text(text)
    return named


def write_lora(folder, named, **config):
    folder.mkdir(exist_ok=True)
    write_pdparams(str(folder / "lora_model_state.pdparams"), named)
    values = {"r": RANK, "lora_alpha": ALPHA, "target_modules": [".*c_attn.*"], "scaling": ALPHA / RANK}
    values.update(config)
    (folder / "lora_config.json").write_text(json.dumps(values))
    for name, text in {
        "tokenizer_config.json": '{"from": "lora"}',
        "chat_template.json": "{}",
        "trainer_state.json": "{}",
        "train_results.json": "{}",
        "all_results.json": "{}",
        "training_args.bin": "data, never opened",
        "mgen.tiktoken": "a vocabulary",
        "optimizer.pdopt": "not copied",
    }.items():
        (folder / name).write_text(text)


@pytest.fixture
def folders(tmp_path):
    base, lora, out = tmp_path / "base", tmp_path / "lora", tmp_path / "out"
    base.mkdir()
    return base, lora, out


def to_float(stored):
    return convert_dtype(stored[1], stored[0], "float32")


def naive(base, lora, name, to):
    """The formula, tensor by tensor, without anything of the merge's own code."""
    if name in lora:
        return convert_dtype(to_float(lora[name]), "float32", to)
    values = to_float(base[name])
    module = name[: -len(".weight")]
    if name.endswith(".weight") and module + ".lora_A" in lora:
        a, b = to_float(lora[module + ".lora_A"]), to_float(lora[module + ".lora_B"])
        values = values + np.float32(ALPHA / RANK) * (a @ b)
    return convert_dtype(values, "float32", to)


@pytest.mark.parametrize("format, limit", [("pdparams", "10GB"), ("pdparams", "10KB"), ("safetensors", "10KB")])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
def test_equals_the_formula(folders, format, limit, base_dtype, lora_dtype):
    base_folder, lora_folder, out = folders
    base, lora = write_base(base_folder, base_dtype, format, limit), adapters(lora_dtype)
    write_lora(lora_folder, lora)
    result = merge(str(base_folder), str(lora_folder), str(out), max_shard_size=limit, progress=False)
    assert (result.merged, result.replaced, result.copied) == (2, 1, 3)
    with open_weights(str(out)) as reader:
        assert sorted(reader.keys()) == sorted(SHAPES)
        assert reader.files[0].endswith(format)
        for name in SHAPES:
            assert reader.info(name).dtype == base[name][0]
            np.testing.assert_array_equal(reader.read(name), naive(base, lora, name, base[name][0]), name)


def test_dtype_and_format_on_the_way(folders):
    base_folder, lora_folder, out = folders
    base, lora = write_base(base_folder, "bfloat16"), adapters()
    write_lora(lora_folder, lora)
    merge(str(base_folder), str(lora_folder), str(out), dtype="float32", format="safetensors", progress=False)
    assert json.loads((out / "config.json").read_text()) == {"model_type": "mgen", "dtype": "float32"}
    with open_weights(str(out)) as reader:
        for name in SHAPES:
            np.testing.assert_array_equal(reader.read(name), naive(base, lora, name, "float32"))
            assert reader.info(name).dtype == "float32"


def test_the_folder_is_whole(folders):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    write_lora(lora_folder, adapters())
    merge(str(base_folder), str(lora_folder), str(out), progress=False)
    assert sorted(os.listdir(out)) == [
        "LICENSE.txt",
        "all_results.json",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "lora_config.json",
        "mgen.tiktoken",
        "model_state.pdparams",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "train_results.json",
        "trainer_state.json",
        "training_args.bin",
    ]
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "lora"}
    assert (out / "mgen.tiktoken").read_text() == "a vocabulary"
    # Without a tokenizer in the run, the base's goes along.
    (lora_folder / "mgen.tiktoken").unlink()
    (lora_folder / "tokenizer_config.json").unlink()
    merge(str(base_folder), str(lora_folder), str(out), overwrite=True, progress=False)
    assert (out / "qwen.tiktoken").read_text() == "a vocabulary" and not (out / "mgen.tiktoken").exists()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "base"}


def test_whole_tensors_alone_need_no_adapter(folders):
    base_folder, lora_folder, out = folders
    base = write_base(base_folder)
    whole = {"llm.h.1.attn.c_attn.weight": ("float32", np.ones((16, 48), np.float32))}
    write_lora(lora_folder, whole)
    (lora_folder / "lora_config.json").unlink()
    result = merge(str(base_folder), str(lora_folder), str(out), progress=False)
    assert (result.merged, result.replaced, result.copied) == (0, 1, 5)
    with open_weights(str(out)) as reader:
        assert (reader.read("llm.h.1.attn.c_attn.weight") == 1).all()
        np.testing.assert_array_equal(reader.read("llm.wte.weight"), base["llm.wte.weight"][1])


def f32(*shape):
    return "float32", np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            {"llm.h.7.attn.c_attn.lora_A": f32(16, 3)},
            "1 fit no tensor of the base: llm.h.7.attn.c_attn.lora_A",
        ),
        ({"something.else": f32(1)}, "fit no tensor of the base: something.else"),
        ({"llm.h.1.attn.c_attn.lora_AB": f32(3, 3)}, "fit no tensor of the base: .*lora_AB"),
        ({"llm.h.1.attn.c_attn.lora_B": None}, "lora_A has no other half"),
        ({"llm.h.1.attn.c_attn.lora_A": f32(16, 4)}, r"\[16, 4\] and \[3, 48\] for \[16, 48\], with r 3"),
        (
            {"llm.h.1.attn.c_attn.lora_A": f32(48, 3), "llm.h.1.attn.c_attn.lora_B": f32(3, 16)},
            "for .16, 48.",
        ),
        ({"llm.h.1.attn.c_attn.weight": f32(16, 48)}, "there in full and as an adapter"),
        ({"visual.attn_pool.query": f32(8, 4)}, r"query is \[8, 4\], the base has \[4, 8\]"),
        (
            {"llm.h.1.attn.c_attn.lora_A": ("int64", np.zeros((16, 3), np.int64))},
            "not floating-point",
        ),
        (
            {"llm.h.1.attn.c_attn.lora_A": ("float32", np.full((16, 3), np.nan, np.float32))},
            "NaN or infinite values: the run has diverged",
        ),
        (
            {"llm.h.1.attn.c_attn.lora_A": ("float32", np.full((16, 3), -3e38, np.float32))},
            "c_attn.weight, times lora_alpha / r = 2.66667, is too large for float32",
        ),
    ],
)
def test_keys_that_do_not_fit(folders, change, match):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    named = adapters()
    named.update(change)
    write_lora(lora_folder, {name: value for name, value in named.items() if value is not None})
    with pytest.raises(WeightsError, match=match) as caught:
        merge(str(base_folder), str(lora_folder), str(out), progress=False)
    assert "\n" not in str(caught.value) and sorted(os.listdir(out.parent)) == ["base", "lora"]


@pytest.mark.parametrize(
    "config, code",
    [
        ({"r": 0}, "r"),
        ({"r": 3.5, "scaling": None}, "r"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "json"),
        ({"lora_alpha": 1e999}, "json"),
        ({"target_modules": [1]}, "target_modules"),
        ({"scaling": 1.0}, "scaling"),
        ({"scaling": [1] * 10_000}, "scaling"),
        ({"r": [1] * 10_000}, "r"),
        ({"lora_alpha": 1e308, "scaling": None}, "overflow"),
        ({"rslora": True}, "rslora"),
        ({"pissa": True}, "pissa"),
        ({"use_mora": True}, "use_mora"),
        ({"lora_use_mixer": True}, "lora_use_mixer"),
        ({"enable_lora_list": [[True, False, True]]}, "enable_lora_list"),
        ({"r": 4, "scaling": 2.0}, "keys"),
    ],
)
def test_configurations_that_do_not_fit(folders, config, code):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    write_lora(lora_folder, adapters(), **config)
    with refused(WeightsError, code) as caught:
        merge(str(base_folder), str(lora_folder), str(out), progress=False)
    assert not out.exists() and len(str(caught.value)) < 500


def test_what_a_sum_cannot_hold(folders):
    base_folder, lora_folder, out = folders
    write_base(base_folder, "float16")
    named = adapters()
    a, b = "llm.h.1.attn.c_attn.lora_A", "llm.h.1.attn.c_attn.lora_B"
    named[a] = ("float32", np.full((16, 3), 300.0, np.float32))
    named[b] = ("float32", np.full((3, 48), 300.0, np.float32))
    write_lora(lora_folder, named)
    with refused(WeightsError, "overflow", match="llm.h.1.attn.c_attn.weight"):
        merge(str(base_folder), str(lora_folder), str(out), progress=False)
    merge(str(base_folder), str(lora_folder), str(out), dtype="bfloat16", progress=False)


def test_folders_that_do_not_fit(folders, tmp_path):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    write_lora(lora_folder, adapters())

    def fails(code, *args, kind=UserError, **kwargs):
        with refused(kind, code):
            merge(*map(str, args), progress=False, **kwargs)

    for bad in (base_folder, lora_folder, base_folder / "inside", tmp_path, lora_folder / ".." / "base"):
        fails("overlap", base_folder, lora_folder, bad)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    fails("overwrite", base_folder, lora_folder, out)
    fails("other-files", base_folder, lora_folder, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    fails("is-a-file", base_folder, lora_folder, tmp_path / "file")
    fails("no-folder", base_folder, tmp_path / "none", out / "o", kind=WeightsError)
    fails("dtype", base_folder, lora_folder, out / "o", dtype="int8")
    fails("size", base_folder, lora_folder, out / "o", max_shard_size="big")
    fails("not-merged", lora_folder, base_folder, out / "o", kind=WeightsError)
    # A run that tuned in full has nothing to merge.
    full = tmp_path / "full"
    full.mkdir()
    write_base(full)
    fails("full-model", base_folder, full, out / "o", kind=WeightsError)
    empty = tmp_path / "empty"
    empty.mkdir()
    fails("no-tuned-weights", base_folder, empty, out / "o", kind=WeightsError)
    write_lora(empty, {})
    fails("empty", base_folder, empty, out / "o", kind=WeightsError)
    (base_folder / "config.json").write_text("[]")
    fails("json", base_folder, lora_folder, out / "o", kind=WeightsError)
    (base_folder / "config.json").write_text("{")
    fails("json", base_folder, lora_folder, out / "o", kind=WeightsError)
    (base_folder / "config.json").unlink()
    fails("unreadable", base_folder, lora_folder, out / "o", kind=WeightsError)
    (base_folder / "config.json").symlink_to(tmp_path / "file")
    fails("leads-out", base_folder, lora_folder, out / "o", kind=WeightsError)
    fails("not-writable", full, lora_folder, tmp_path / "file/o")
    assert sorted(os.listdir(out)) == ["notes.txt"]


def test_what_a_killed_merge_left_is_removed_or_put_back(folders, tmp_path):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    write_lora(lora_folder, adapters())
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    (tmp_path / ".out.abcdefgh.partial" / "model_state.pdparams").write_text("half")
    aside = tmp_path / ".out.hgfedcba.old" / "old"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("an older model")
    with refused(UserError, "overwrite", match="out"):
        merge(str(base_folder), str(lora_folder), str(out), progress=False)
    assert sorted(os.listdir(tmp_path)) == ["base", "lora", "out"] and os.listdir(out) == ["config.json"]
    merge(str(base_folder), str(lora_folder), str(out), overwrite=True, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["base", "lora", "out"] and len(os.listdir(out)) > 10


def script(root, *args):
    return subprocess.run(
        [sys.executable, str(root / "merge_lora_params.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=root,
    )


def test_the_script(folders, root):
    base_folder, lora_folder, out = folders
    write_base(base_folder)
    write_lora(lora_folder, adapters())
    command = ["--model_name_or_path", base_folder, "--lora_path", lora_folder, "--merge_model_path", out]
    done = script(root, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "--------merge lora successfully----------"
    assert "2 tensors merged, 1 replaced, 3 copied" in done.stderr
    again = script(root, *command)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.splitlines()[-1].startswith("error: ") and "--overwrite" in again.stderr
    assert script(root, *command, "--overwrite", "--disable_tqdm").returncode == 0


def test_a_part_that_was_trained_whole(folders):
    base_folder, part, out = folders
    base = write_base(base_folder)
    part.mkdir()
    trained = {"llm.wte.weight": ("float32", np.full((30, 16), 7, np.float32))}
    write_pdparams(str(part / "partial_model_state.pdparams"), trained)
    (part / "tuned_from.json").write_text(json.dumps({"model_name_or_path": "base"}))
    result = merge(str(base_folder), str(part), str(out), progress=False)
    assert (result.merged, result.replaced, result.copied) == (0, 1, len(SHAPES) - 1)
    with open_weights(str(out)) as reader:
        for name in SHAPES:
            expected = trained.get(name, base[name])[1]
            np.testing.assert_array_equal(reader.read(name), expected, name)
    with refused(WeightsError, "not-merged"):
        open_weights(str(part))
    (part / "tuned_from.json").write_text(json.dumps({"text_model_name_or_path": 3}))
    with refused(WeightsError, "model_name_or_path", "text_model_name_or_path"):
        merge(str(base_folder), str(part), str(out / "again"), progress=False)


def test_the_folder_of_the_llm_is_named_as_it_is(tmp_path):
    """In a command to be copied; a Chinese name was escaped."""
    write_base(tmp_path / "base")
    write_lora(tmp_path / "lora", adapters())
    Origin(str(tmp_path / "base"), "/数据/大 模型").write(str(tmp_path / "lora"))
    with refused(UserError, "text_model_name_or_path", match="add --text_model_name_or_path '/数据/大 模型'"):
        merge(str(tmp_path / "base"), str(tmp_path / "lora"), str(tmp_path / "out"), progress=False)
