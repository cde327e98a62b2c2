"""Every key that is accepted works; every other is refused in one line that says what to change."""

import json
import re
import subprocess
import sys

import pytest

from paddlemix.datasets.entries import Entry, read_entries
from paddlemix.trainer import command_line, keys, keys_help, reading, rules
from paddlemix.utils import language
from paddlemix.utils.errors import ConfigError


@pytest.fixture
def base(tmp_path):
    """The least a training run needs: existing files, by key."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data = tmp_path / "train.json"
    data.write_text("[]")
    return {
        "model_name_or_path": str(model),
        "output_dir": str(tmp_path / "out"),
        "dataset": {"train": [{"name": "chatml_dataset", "data_files": str(data)}]},
        "do_train": True,
    }


@pytest.fixture
def parse(base, tmp_path):
    """Write base and changes to a config file and parse it with further words of a command line."""

    def run(changes=(), *words):
        values = dict(base, **dict(changes))
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
        return command_line.parse([str(path), *words])

    return run


def test_notebook_config_is_accepted_as_it_stands(root, base, tmp_path):
    template = tmp_path / "chat_template.json"
    template.write_text("{}")
    data = base["dataset"]["train"][0]["data_files"]
    entry = [{"name": "chatml_dataset", "data_files": data, "chat_template": str(template)}]
    given = json.dumps({"train": entry, "eval": entry})
    words = ["--model_name_or_path", base["model_name_or_path"], "--dataset", given]
    lora = command_line.parse([str(root / "config/mgen_vl/lora_sft_argument.json"), *words])
    full = command_line.parse([str(root / "config/mgen_vl/sft_argument.json"), *words])
    assert (lora.model.lora, full.model.lora) == (True, False)
    assert lora.model.lora_rank == 64 and lora.model.lora_alpha == 16 and lora.model.lora_dropout == 0.05
    assert lora.model.freeze_exclude == ["*visual.attn_pool*"]
    training = lora.training
    assert training.learning_rate == 1e-5 and training.adam_beta2 == 0.95 and training.max_steps == 10
    assert training.gradient_accumulation_steps == 16 and training.fp16 and training.fp16_opt_level == "O2"
    assert training.evaluation_strategy == "epoch" and training.lr_scheduler_type == "cosine"
    entries, problems = read_entries(lora.data.dataset)
    assert entries["eval"] == [Entry("chatml_dataset", (data,), str(template))] and not problems


def test_every_config_file_uses_known_keys_of_the_right_kind(root):
    known = keys.known_keys()
    paths = sorted((root / "config").rglob("*.json"))
    assert len(paths) >= 4
    for path in paths:
        for name, value in reading.read_config(str(path)).items():
            assert name in known, f"{path}: {name}"
            assert reading.from_json(known[name], value) == value


@pytest.mark.parametrize(
    "wrong, right", [("disabe_tqdm", "disable_tqdm"), ("lora_rnak", "lora_rank"), ("Learning_Rate", "learning_rate")]
)
def test_unknown_key_names_the_nearest(parse, wrong, right):
    for given in ({wrong: 1},), ({}, f"--{wrong}", "1"):
        with pytest.raises(ConfigError, match=f'"{right}"') as caught:
            parse(*given)
        assert caught.value.about == (wrong,)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[" * 100_000, "not JSON"),
        ('{"lora_rank": 1%s}' % ("0" * 5000), "not JSON"),
        ('{"output_dir": "\\ud800"}', "a lone surrogate or a zero byte"),
        ('{"dataset": {"train": [{"data_files": ["a\\u0000"]}]}}', "a lone surrogate or a zero byte"),
        ('{"a\\nb": 1, "a\\nb": 1}', r"the key a\\nb is in it twice"),
        ('{"a\\nb": 1}', r'unknown key "a\\nb"'),
    ],
)
def test_configs_that_are_none(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        command_line.parse([str(tmp_path / "config.json")])
    assert "\n" not in str(caught.value)


def test_key_like_none_points_to_the_list(parse):
    with pytest.raises(ConfigError, match="docs/config.md") as caught:
        parse({"zzz": 1})
    assert caught.value.about == ("zzz",)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("lora_rank", 1.5, "an integer, not 1.5"),
        ("lora_rank", "64", 'an integer, not "64"'),
        ("lora_rank", True, "an integer, not true"),
        ("lora_rank", None, "an integer, not null"),
        ("learning_rate", "1e-5", "a number"),
        ("fp16", "true", 'true or false, not "true"'),
        ("fp16", 1, "true or false, not 1"),
        ("output_dir", 3, "a string or null, not 3"),
        ("freeze_include", {"a": 1}, "a list of strings or null"),
        ("freeze_include", [1], "a list of strings or null"),
        ("dataset", [], "an object or null"),
        ("lora_rank", 0, "at least 1, not 0"),
        ("lora_dropout", 1.0, "at most 0.99"),
        ("max_steps", 10**18, "at most 2147483647"),
        ("seed", 1e308, "at most 2147483647, not 1000"),
        ("per_device_train_batch_size", 10**9, "at most 4096"),
        ("lora_rank", 10**9, "at most 65536"),
        ("num_train_epochs", 0, "above 0"),
        ("num_train_epochs", 1e10, "at most 1000000"),
        ("max_grad_norm", 1e300, "at most 3e+38"),
        ("lr_scheduler_type", "cosin", 'did you mean "cosine"'),
        ("fp16_opt_level", "O3", '"O1", "O2"'),
        ("report_to", ["wandb"], '"visualdl"'),
    ],
)
def test_wrong_kind_or_range_is_named(parse, name, value, says):
    with pytest.raises(ConfigError) as caught:
        parse({name: value})
    assert caught.value.about == (name,) and says in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("from_aistudio", True),
        ("prefix_tuning", True),
        ("sep_parallel_degree", 2),
        ("pipeline_parallel_degree", 2),
        ("unified_checkpoint", True),
        ("to_static", True),
        ("task_name", "caption"),
    ],
)
def test_keys_that_cannot_work_are_refused_with_a_reason(parse, name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*: .{{15,}}") as caught:
        parse({name: value})
    assert caught.value.about == (name,)


def test_refused_keys_may_stand_with_the_value_that_leaves_them_off(parse):
    off = {name: one.may_be[0] for name, one in keys.REFUSED.items() if one.may_be}
    assert len(off) > 20
    assert parse(dict(off, pipeline_parallel_degree=1, sep_parallel_degree=0)) == parse()
    assert parse({}, "--prefix_tuning", "no", "--aistudio_token", "null", "--past_index=-1") == parse()


def test_printed_names_that_are_no_settings_say_what_decides(parse):
    with pytest.raises(ConfigError, match="per_device_train_batch_size") as caught:
        parse({"train_batch_size": 4})
    assert caught.value.about == ("train_batch_size",)
    assert not set(keys.REFUSED) & set(keys.known_keys())


def test_command_line_wins_over_the_file_and_stands_alone(base, parse):
    assert parse({"max_steps": 7}, "--max_steps", "9").training.max_steps == 9
    words = ["--model_name_or_path", base["model_name_or_path"], f"--output_dir={base['output_dir']}"]
    words += ["--dataset", json.dumps(base["dataset"]), "--do_train", "--learning-rate", "2e-4"]
    parsed = command_line.parse(words)
    assert parsed.training.do_train is True and parsed.training.learning_rate == 2e-4
    assert parsed.given == {"model_name_or_path", "output_dir", "dataset", "do_train", "learning_rate"}


def test_forms_of_values_on_the_command_line(parse):
    parsed = parse({}, "--freeze_include", "*visual*", "*lm_head*", "--lora", "--max_steps", "-1", "--fp16", "no")
    assert parsed.model.freeze_include == ["*visual*", "*lm_head*"] and parsed.model.lora is True
    assert parsed.training.max_steps == -1 and parsed.training.fp16 is False
    parsed = parse({"freeze_include": ["a*"]}, "--freeze_include", '["x*", "y*"]', "--save_total_limit", "null")
    assert parsed.model.freeze_include == ["x*", "y*"] and parsed.training.save_total_limit is None
    assert parse({"freeze_include": "*visual*"}).model.freeze_include == ["*visual*"]
    assert parse({}, "--freeze_include", "null").model.freeze_include is None
    assert parse({"learning_rate": 1}).training.learning_rate == 1.0
    assert parse({"max_steps": 5.0}).training.max_steps == 5


@pytest.mark.parametrize(
    "words, about",
    [
        (["--lora_rank"], "lora_rank"),
        (["--lora_rank", "a"], "lora_rank"),
        (["--lora_rank", "1", "2"], "lora_rank"),
        (["--lora", "maybe"], "lora"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--dataset", "[]"], "dataset"),
        (["--dataset", "{"], "dataset"),
        (["extra"], "no-key"),
    ],
)
def test_wrong_words_on_the_command_line(parse, words, about):
    with pytest.raises(ConfigError) as caught:
        parse({}, *words)
    assert caught.value.about == (about,)


@pytest.mark.parametrize("word", ["nan", "inf", "-infinity", "1e999"])
def test_every_number_is_finite(parse, word):
    for name, key in keys.known_keys().items():
        if "float" in str(key.hint):
            with pytest.raises(ConfigError) as caught:
                parse({}, f"--{name}={word}")
            assert caught.value.about == (name,)


def test_broken_config_files(tmp_path):
    path = tmp_path / "c.json"
    for text, says in [
        ('{"lora": true,\n "lora": false}', 'the key lora is in it twice'),
        ('{"lora": true,\n', "line 2"),
        ("[1]", "must hold a JSON object"),
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
        ('{"learning_rate": NaN}', "NaN is not allowed"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            command_line.parse([str(path)])
        assert says in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        command_line.parse([str(tmp_path / "missing.json")])
    with pytest.raises(ConfigError, match="not a regular file"):
        command_line.parse([str(tmp_path)])


# An entry of a file that is there.
ENTRY = {"data_files": __file__}
# (keys of a config, the keys that the error is about)
WRONG = [
    ({"do_train": False}, "do_train do_eval"),
    ({"model_name_or_path": None}, "model_name_or_path"),
    ({"model_name_or_path": "/no/such"}, "model_name_or_path"),
    ({"output_dir": None}, "output_dir"),
    ({"dataset": None}, "do_train dataset"),
    ({"do_eval": True}, "do_eval dataset"),
    ({"evaluation_strategy": "epoch"}, "evaluation_strategy dataset"),
    ({"dataset": {"train": [{"data_files": "/no/such.json"}]}}, "data_files"),
    ({"dataset": {"train": [{"data_file": "x"}]}}, "data_file"),
    ({"dataset": {"train": ["x.json"]}}, "dataset train"),
    ({"dataset": {"training": []}}, "dataset training"),
    ({"dataset": {"train": [{"name": "llava", "data_files": "x"}]}}, "name"),
    ({"fp16": True, "bf16": True}, "fp16 bf16"),
    ({"lora_path": "x"}, "lora_path lora"),
    ({"lora": True, "lora_path": "/no"}, "lora_path"),
    ({"lora_rank": 8}, "lora_rank lora"),
    ({"lora": True, "lora_target_modules": []}, "lora_target_modules"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end evaluation_strategy"),
    ({"metric_for_best_model": "cider"}, "metric_for_best_model eval_with_do_generation"),
    ({"metric_for_best_model": "loss"}, "metric_for_best_model evaluation_strategy"),
    ({"greater_is_better": False}, "greater_is_better metric_for_best_model load_best_model_at_end"),
    ({"save_generation_output": True}, "save_generation_output eval_with_do_generation"),
    ({"eval_with_do_generation": True}, "eval_with_do_generation do_eval"),
    ({"eval_image_gain": True}, "eval_image_gain do_eval"),
    ({"benchmark": True, "resume": True}, "benchmark"),
    ({"resume": True, "resume_from_checkpoint": "x"}, "resume resume_from_checkpoint"),
    ({"resume_from_checkpoint": "/no"}, "resume_from_checkpoint"),
    ({"tensor_parallel_degree": 2}, "tensor_parallel_degree"),
    ({"sharding": "stage1"}, "sharding"),
    ({"chat_template": "/no.json"}, "chat_template"),
    ({"lora_dropout": 0.1}, "lora_dropout lora"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "lr_scheduler_type"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "lr_scheduler_type"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-6, "lr_end": 1e-6}, "learning_rate lr_end"),
    ({"mm_projector_lr": 1e-4, "learning_rate": 0}, "mm_projector_lr learning_rate"),
    ({"lora_alpha": 8}, "lora_alpha lora"),
    ({"lora_target_modules": ["a"]}, "lora_target_modules lora"),
    ({"mixtoken": True, "group_by_modality_length": True}, "mixtoken group_by_modality_length"),
    ({"mixtoken": True, "neftune": True}, "mixtoken neftune"),
    ({"mixtoken": True, "dataset": {"train": [dict(ENTRY, weight=1)]}}, "mixtoken dataset"),
    (
        {"group_by_modality_length": True, "dataset": {"train": [dict(ENTRY, weight=1)]}},
        "group_by_modality_length dataset",
    ),
    ({"dataset": {"train": [dict(ENTRY, weight=0)]}}, "weight"),
    ({"dataset": {"train": [dict(ENTRY, weight=1e308), dict(ENTRY, weight=1)]}}, "weight"),
    ({"dataset": {"train": [dict(ENTRY, repeat=10**9)]}}, "repeat"),
    ({"dataset": {"train": [dict(ENTRY, weight="2")]}}, "weight"),
    ({"dataset": {"train": [dict(ENTRY, repeat=0)]}}, "repeat"),
    ({"dataset": {"train": [dict(ENTRY, repeat=1.5)]}}, "repeat"),
    ({"dataset": {"train": [dict(ENTRY, limit=True)]}}, "limit"),
    ({"dataset": {"train": [dict(ENTRY, prompt=[""])]}}, "prompt"),
    ({"dataset": {"train": [dict(ENTRY, prompt=3)]}}, "prompt"),
    ({"dataset": {"train": [dict(ENTRY, prompt=[])]}}, "prompt"),
    ({"dataset": {"train": [dict(ENTRY, weight=1, repeat=2)]}}, "weight repeat"),
    ({"dataset": {"train": [dict(ENTRY, weight=1), ENTRY]}}, "weight"),
    ({"dataset": {"train": [ENTRY], "eval": [dict(ENTRY, weight=1)]}}, "weight repeat"),
    ({"dataset": {"train": [ENTRY], "eval": [dict(ENTRY, repeat=2)]}}, "weight repeat"),
    (
        {"load_best_model_at_end": True, "evaluation_strategy": "steps", "save_steps": 3, "eval_steps": 2},
        "load_best_model_at_end save_steps eval_steps",
    ),
    ({"do_train": False, "do_eval": True, "resume": True}, "resume do_train"),
    ({"dataset": {"train": 3}}, "dataset train"),
    ({"dataset": {"train": [{"data_files": [3]}]}}, "data_files"),
    ({"dataset": {"train": [{"data_files": "x", "chat_template": 3}]}}, "chat_template"),
    ({"dataset": {"train": [{"data_files": "x", "name": ["y"]}]}}, "name"),
]
# With three processes.
WRONG_TOGETHER = [
    ({"sharding": "stage1", "sharding_parallel_degree": 2}, "tensor_parallel_degree sharding_parallel_degree"),
    ({"sharding_parallel_degree": 3}, "sharding_parallel_degree sharding"),
    *(
        (
            {"sharding": "stage1", "sharding_parallel_config": f"enable_stage1_overlap {option}"},
            "sharding_parallel_config",
        )
        for option in (
            "split_param",
            "enable_stage1_tensor_fusion",
            "enable_stage1_allgather_overlap",
            "enable_fuse_optimizer_states",
        )
    ),
    ({"sharding": "stage1", "sharding_parallel_config": "enable_everything"}, "sharding_parallel_config"),
    (
        {"sharding": "stage1", "sharding_parallel_config": "enable_stage2_overlap", "logging_steps": 2},
        "sharding_parallel_config sharding",
    ),
    (
        {"sharding": "stage2", "sharding_parallel_config": "disable_stage1_reduce_avg"},
        "sharding_parallel_config sharding",
    ),
    (
        {"sharding": "stage2", "sharding_parallel_config": "enable_stage2_overlap", "logging_steps": 1},
        "sharding_parallel_config logging_steps",
    ),
]


@pytest.mark.parametrize("changes, about", WRONG)
def test_what_cannot_work_together_is_said_before_anything_loads(parse, changes, about):
    with pytest.raises(ConfigError) as caught:
        parse(changes)
    assert set(about.split()) <= set(caught.value.about)


@pytest.mark.parametrize("changes, about", WRONG_TOGETHER)
def test_what_several_processes_cannot(parse, monkeypatch, changes, about):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "3")
    with pytest.raises(ConfigError) as caught:
        parse(changes)
    assert set(about.split()) <= set(caught.value.about)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.says[:40])
def test_every_rule_has_a_run_that_breaks_it(base, rule):
    def broken(changes, cards):
        return rule.broken(rules.all_keys(keys.blocks_of({**base, **changes}, cards)))

    assert not broken({}, 1) and not broken({}, 3)
    wrong = [(changes, 1) for changes, _ in WRONG] + [(changes, 3) for changes, _ in WRONG_TOGETHER]
    assert any(broken(*one) for one in wrong)


def test_the_model_to_tune_may_not_lie_where_the_run_writes(base, parse):
    for folder in (base["model_name_or_path"], base["model_name_or_path"] + "/.."):
        with pytest.raises(ConfigError) as caught:
            parse({"output_dir": folder})
        assert caught.value.about == ("model_name_or_path", "output_dir")
    assert parse({"output_dir": base["model_name_or_path"] + "_tuned"})


def test_degrees_must_divide_the_processes(parse, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    assert parse({"sharding": "stage1", "sharding_parallel_degree": 2}).training.sharding_parallel_degree == 2


def test_several_problems_are_said_at_once(parse):
    with pytest.raises(ConfigError) as caught:
        parse({"model_name_or_path": "/no/such", "fp16": True, "bf16": True})
    assert "/no/such" in str(caught.value) and caught.value.about == ("fp16", "bf16", "model_name_or_path")


def test_values_from_code_are_checked_the_same_way(base):
    assert command_line.from_values(base).training.do_train is True
    for change in ({"lora_rnak": 1}, {"lora_rank": "1"}, {"to_static": True}):
        with pytest.raises(ConfigError):
            command_line.from_values(dict(base, **change))


def test_defaults_are_paddlenlps():
    import dataclasses
    import enum

    from paddlenlp.trainer import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    # Chosen by the device, and a bar unless it is turned off.
    ours_differ = {"device": None, "disable_tqdm": False, "output_dir": None}
    shared = 0
    for field in dataclasses.fields(keys.TrainingKeys):
        if field.name in theirs:
            shared += 1
            default = theirs[field.name]
            default = default.value if isinstance(default, enum.Enum) else default
            assert field.default == ours_differ.get(field.name, default), field.name
    assert shared > 60


def test_script_answers_without_paddle(root):
    code = "import sys, runpy; sys.argv = ['s', *sys.argv[1:]]\n"
    code += "try: runpy.run_path('supervised_finetune.py', run_name='__main__')\n"
    code += "except SystemExit as end: status = end.code\n"
    code += "assert not {'paddle', 'paddlenlp', 'numpy'} & set(sys.modules), 'heavy import'; sys.exit(status)"

    def run(*words):
        return subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True)

    shown = run("--help")
    assert shown.returncode == 0 and "usage: python supervised_finetune.py" in shown.stdout
    for name in ("freeze_exclude", "lora_rank", "docs/config.md", "--resume"):
        assert name in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 115
    wrong = run("--disabe_tqdm")
    assert wrong.returncode == 2
    assert wrong.stderr == 'error: unknown key "disabe_tqdm"; did you mean "disable_tqdm"?\n'
    assert run().returncode == 2


# What the notebook's log prints in its blocks, by name; its table of keys names no other.
NOTEBOOK = """
aistudio_repo_id aistudio_repo_license aistudio_repo_private aistudio_token freeze_exclude freeze_include from_aistudio
lora lora_alpha lora_dropout lora_path lora_rank lora_target_modules model_name_or_path neftune neftune_noise_alpha
num_prefix_tokens prefix_tuning save_to_aistudio text_model_name_or_path use_flash_attention

chat_template dataset eval_with_do_generation lazy max_length mixtoken save_generation_output splits src_length
task_name

top_k top_p

_no_sync_in_gradient_accumulation adam_beta1 adam_beta2 adam_epsilon amp_custom_black_list amp_custom_white_list
amp_master_grad benchmark bf16 bf16_full_eval current_device data_parallel_rank dataloader_drop_last
dataloader_num_workers dataset_rank dataset_world_size device disable_tqdm distributed_dataloader do_eval do_export
do_predict do_train eta_min eval_accumulation_steps eval_batch_size eval_steps evaluation_strategy flatten_param_grads
force_reshard_pp fp16 fp16_full_eval fp16_opt_level gradient_accumulation_steps greater_is_better
group_by_modality_length hybrid_parallel_topo_order ignore_data_skip ignore_load_lr_and_optim label_names
lazy_data_processing learning_rate load_best_model_at_end load_sharded_model local_process_index local_rank log_level
log_level_replica log_on_each_node logging_dir logging_first_step logging_steps logging_strategy logical_process_index
lr_end lr_scheduler_name lr_scheduler_type max_evaluate_steps max_grad_norm max_steps metric_for_best_model
minimum_eval_times mm_projector_lr no_cuda num_cycles num_train_epochs optim optimizer_name_suffix output_dir
overwrite_output_dir past_index per_device_eval_batch_size per_device_train_batch_size pipeline_parallel_config
pipeline_parallel_degree pipeline_parallel_rank power prediction_loss_only process_index profiler_options recompute
remove_unused_columns report_to resume_from_checkpoint run_name save_on_each_node save_sharded_model save_steps
save_strategy save_total_limit scale_loss seed sep_parallel_degree sharding sharding_degree sharding_parallel_config
sharding_parallel_degree sharding_parallel_rank should_load_dataset should_load_sharding_stage1_model should_log
should_save should_save_model_state should_save_sharding_stage1_model skip_memory_metrics skip_profile_timer
tensor_parallel_config tensor_parallel_degree tensor_parallel_rank to_static train_batch_size unified_checkpoint
unified_checkpoint_config use_auto_parallel use_hybrid_parallel warmup_ratio warmup_start_lr warmup_steps weight_decay
weight_name_suffix world_size
"""


def test_every_name_of_the_notebooks_log_has_a_row(root):
    text = (root / "docs" / "config.md").read_text(encoding="utf-8")
    titles = ["Model", "Data", "Generation", "Training"]
    tables = dict(part.split("\n", 1) for part in text.split("\n## ") if "\n" in part)
    for title, names in zip(titles, NOTEBOOK.strip().split("\n\n")):
        for name in names.split():
            assert f"| `{name}` | " in tables[title] or f"| `{name}` | " in tables["Names without effect"], name


@pytest.mark.parametrize("name, page", [("en", "docs/config.md"), ("zh", "docs/zh/config.md")])
def test_docs_tables_are_the_codes(root, monkeypatch, name, page):
    monkeypatch.setattr(language, "_given", name)
    text = (root / page).read_text(encoding="utf-8")
    tables = keys_help.config_tables()
    assert text.endswith(tables), f"{page}: replace its tables by keys_help.config_tables()"
    assert tables.count("\n| `") == len(keys.known_keys()) + len(keys.REFUSED)
    if name == "zh":
        english = [line for line in tables.splitlines() if re.search("[A-Za-z]{3}", line) and line.isascii()]
        assert not english, "add to paddlemix/utils/zh.json"
