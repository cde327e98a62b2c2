"""`--help` of a finetuning run and the tables of docs/config.md, generated from the keys."""

from __future__ import annotations

import json

from paddlemix.trainer.keys import BLOCKS, REFUSED, known_keys
from paddlemix.trainer.reading import type_name
from paddlemix.trainer.rules import rule_lines
from paddlemix.utils.language import tr, wrap
from paddlemix.utils.texts import shown

_MAIN_KEYS = (
    ("the model:", ("model_name_or_path", "output_dir")),
    ("the data:", ("dataset", "max_length", "label_all_turn_markers", "dataloader_num_workers")),
    ("what trains:", ("freeze_include", "freeze_exclude", "lora", "lora_rank", "lora_alpha", "lora_target_modules")),
    ("the run:", ("do_train", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                  "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "fp16", "bf16",
                  "fp16_opt_level", "recompute")),
    ("logs, checkpoints, evaluation:", ("logging_steps", "save_steps", "save_total_limit", "evaluation_strategy",
                                        "resume", "overwrite_output_dir", "disable_tqdm")),
)  # fmt: skip


_HEAD = """\
usage: python supervised_finetune.py CONFIG.json [--key value …]
       python supervised_finetune.py --key value …

Tune MGen-VL on image captions: LoRA adapters, selected parameters, or the full model. CONFIG.json is a
JSON object with the keys below; --key on the command line overrides the file. Unknown keys are refused
with exit status 2.

examples:
  python supervised_finetune.py config/mgen_vl/lora_sft_argument.json
  python supervised_finetune.py config/mgen_vl/lora_sft_argument.json --max_steps 100 --learning_rate 2e-5
  python supervised_finetune.py config/mgen_vl/lora_sft_argument.json --resume
  python supervised_finetune.py config/mgen_vl/lora_sft_argument.json --dry_run
  python supervised_finetune.py config/mgen_vl/lora_sft_argument.json --dry_run --plan_for 8xA100-80GB

--dry_run trains nothing and loads no weights: it prints what would train, steps, lengths, memory, disk
space and every problem it finds; exit status 0 if the run can start, 2 if not. --plan_for plans for other
cards than this machine's. --lang en or zh: language of help and dry run.

Lists take several words (--freeze_include '*visual*' '*lm_head*'), objects take JSON."""


def help_text() -> str:
    """The text of `--help`: usage, examples, and the most common keys."""
    known = known_keys()
    lines = tr(_HEAD).splitlines()
    for title, names in _MAIN_KEYS:
        lines += ["", tr(title)]
        for name in names:
            one = known[name]
            text = tr(one.meaning) + tr(f" ({type_name(one.hint)}; default {shown(one.default)})")
            wrapped = wrap(text, 82)
            lines.append(f"  {name:<28} {wrapped[0]}")
            lines += [f"  {'':<28} {line}" for line in wrapped[1:]]
    lines += ["", tr(f"docs/config.md describes all {len(known)} keys.")]
    return "\n".join(lines)


def config_tables() -> str:
    """The generated part of docs/config.md, or of its Chinese version: a table of keys per block; the rules between
    keys; the names without effect."""
    lines = []
    for block, _ in BLOCKS:
        lines += [f"## {tr(block)}", "", tr("| key | type | default | meaning |"), "|---|---|---|---|"]
        for one in known_keys().values():
            if one.block == block:
                meaning = tr(one.meaning)
                if "choices" in one.limits:
                    choices = ", ".join(f"`{shown(choice)}`" for choice in one.limits["choices"])
                    meaning += tr(f" One of {choices}.")
                default = json.dumps(one.default, ensure_ascii=False)
                cells = (f"`{one.name}`", tr(type_name(one.hint)), f"`{default}`", meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += [f"## {tr('Rules between keys')}", ""]
    lines += [tr("A run that breaks one of these is refused with exit status 2 and the message:"), ""]
    lines += [f"- {tr(says)}" for says in rule_lines()]
    lines += ["", f"## {tr('Names without effect')}", ""]
    lines += [
        tr("They come from PaddleNLP and older configs. The values in the second column are accepted, others are "
           "refused.")
    ]
    lines += ["", tr("| name | accepted | reason |"), "|---|---|---|"]
    for name, (why, may_be) in REFUSED.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in may_be)
        lines.append(f"| `{name}` | {values} | {tr(why)} |")
    return "\n".join(lines) + "\n"
