"""What `--help` of a finetuning run and the tables of docs/config.md say, both from the keys themselves."""

from __future__ import annotations

import json

from paddlemix.trainer.keys import BLOCKS, REFUSED, known_keys
from paddlemix.trainer.reading import type_name
from paddlemix.trainer.rules import rule_lines
from paddlemix.utils.texts import shown

_MAIN_KEYS = (
    ("the model", ("model_name_or_path", "output_dir")),
    ("the data", ("dataset", "max_length", "label_all_turn_markers", "dataloader_num_workers")),
    ("what trains", ("freeze_include", "freeze_exclude", "lora", "lora_rank", "lora_alpha", "lora_target_modules")),
    (
        "the run",
        (
            "do_train",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler_type",
            "warmup_ratio",
            "weight_decay",
            "fp16",
            "bf16",
            "fp16_opt_level",
            "recompute",
        ),
    ),
    (
        "logs, checkpoints, evaluation",
        (
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "evaluation_strategy",
            "resume",
            "overwrite_output_dir",
            "disable_tqdm",
        ),
    ),
)


def help_text(program: str = "supervised_finetune.py") -> str:
    """What `--help` prints: how to call it, three examples, and the keys most runs set."""
    import textwrap

    known = known_keys()
    lines = [
        f"usage: python {program} CONFIG.json [--key value …]",
        f"       python {program} --key value …",
        "",
        "Tune MGen-VL on image captions: LoRA adapters, chosen parts, or the whole model. CONFIG.json is one",
        "JSON object of the keys below; a --key on the command line wins over the file. An unknown key ends",
        "the run with status 2.",
        "",
        "examples:",
        f"  python {program} config/mgen_vl/lora_sft_argument.json",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --max_steps 100 --learning_rate 2e-5",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --resume",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --dry_run",
        f"  python {program} config/mgen_vl/lora_sft_argument.json --dry_run --plan_for 8xA100-80GB",
        "",
        "--dry_run trains nothing and reads no weights: it prints what would train, steps, lengths, memory and",
        "disk, and every problem it finds; status 0 when the run can start, 2 when not. --plan_for names other",
        "cards to plan for than this machine's.",
        "",
        "lists take several words (--freeze_include '*visual*' '*lm_head*'), objects JSON.",
    ]
    for title, names in _MAIN_KEYS:
        lines += ["", f"{title}:"]
        for name in names:
            one = known[name]
            text = f"{one.meaning} ({type_name(one.hint)}; default {shown(one.default)})"
            wrapped = textwrap.wrap(text, 82, break_long_words=False, break_on_hyphens=False)
            lines.append(f"  {name:<28} {wrapped[0]}")
            lines += [f"  {'':<28} {line}" for line in wrapped[1:]]
    lines += ["", f"docs/config.md describes all {len(known)} keys."]
    return "\n".join(lines)


def config_tables() -> str:
    """The end of docs/config.md: a table per block, a row per key; the rules; the names that are no settings."""
    lines = []
    for block, _ in BLOCKS:
        lines += [f"## {block}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for one in known_keys().values():
            if one.block == block:
                meaning = one.meaning
                if "choices" in one.limits:
                    choices = ", ".join(f"`{shown(choice)}`" for choice in one.limits["choices"])
                    meaning += f" One of {choices}."
                default = json.dumps(one.default, ensure_ascii=False)
                cells = (f"`{one.name}`", type_name(one.hint), f"`{default}`", meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## Rules between keys", "", "A run that breaks one of these ends with status 2 and these words:", ""]
    lines += [f"- {says}" for says in rule_lines()]
    lines += ["", "## Names that are no settings", ""]
    lines += ["PaddleNLP and older configs have them. The values in the second column may stay, others are refused."]
    lines += ["", "| name | may be | why |", "|---|---|---|"]
    for name, (why, may_be) in REFUSED.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in may_be)
        lines.append(f"| `{name}` | {values} | {why} |")
    return "\n".join(lines) + "\n"
