"""Model folders: the role of each file by its name, finding the weights, and checking a folder to write.

One table serves merging, importing, packing, the fingerprint of a prediction run, saving and clearing an output folder.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Dict, List, Optional, Sequence

from paddlemix.utils.errors import UserError, WeightsError
from paddlemix.utils.files import is_empty, remove_leftovers
from paddlemix.utils.outputs import check_folder
from paddlemix.utils.texts import one_line

LORA_WEIGHTS_NAME = "lora_model_state.pdparams"
# Written by a run that trains parts of the model without adapters: the trained tensors.
PARTIAL_WEIGHTS_NAME = "partial_model_state.pdparams"
LORA_CONFIG_NAME = "lora_config.json"
TUNED_FROM_NAME = "tuned_from.json"
INDEX_SUFFIX = ".index.json"
# In search order. Either name is fine; a folder must not hold both.
VOCABULARIES = ("mgen.tiktoken", "qwen.tiktoken")

# ---- roles

CONFIG = "configuration"
WEIGHTS = "weights"
TORCH_WEIGHTS = "weights of PyTorch, which are read and never written"
TUNED_WEIGHTS = "weights that a run tuned, without those of its base"
TUNING = "what was tuned, and from which base"
TOKENIZER = "tokenizer"
TEMPLATE = "chat template"
FONT = "font of drawn boxes"
LICENCE = "licence"
RECORD = "record of a run"

_SHARD = r"(-\d{5}-of-\d{5})?"
_INDEX = r"(\.index\.json)?"
_TABLE = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"config\.json|generation_config\.json", CONFIG),
        (rf"model_state{_SHARD}\.pdparams{_INDEX}|model{_SHARD}\.safetensors{_INDEX}", WEIGHTS),
        (rf"pytorch_model{_SHARD}\.bin{_INDEX}", TORCH_WEIGHTS),
        (r"(lora|partial)_model_state\.pdparams", TUNED_WEIGHTS),
        (r"lora_config\.json|tuned_from\.json", TUNING),
        (r"(mgen|qwen)\.tiktoken|(tokenizer_config|special_tokens_map|added_tokens)\.json", TOKENIZER),
        (r"chat_template\.json", TEMPLATE),
        (r"SimSun\.ttf", FONT),
        (r"(?i:(license|notice|model_license)(\.(txt|md|pdf))?)", LICENCE),
        (r"(all|eval|train)_results\.json|trainer_state\.json|training_args\.bin|loss_curve\.png", RECORD),
    )
)

# The files that a model's answers depend on.
ANSWERS = (CONFIG, WEIGHTS, TORCH_WEIGHTS, TUNED_WEIGHTS, TUNING, TOKENIZER, TEMPLATE)


def role(name: str) -> Optional[str]:
    """The role of a file by its name, or None."""
    return next((role for pattern, role in _TABLE if pattern.fullmatch(name)), None)


def files_of(folder: str, *roles: str) -> List[str]:
    """Names of the files in `folder` that have one of these roles, sorted."""
    named = [name for name in sorted(os.listdir(folder)) if role(name) in roles]
    return [name for name in named if os.path.isfile(os.path.join(folder, name))]


def gather(folders: Sequence[str], *roles: str) -> Dict[str, str]:
    """{name: path} of the files with these roles, each from the first folder that has it; at most one vocabulary.

    Raises:
        WeightsError: a file is a link that leads out of its folder.
    """
    found: Dict[str, str] = {}
    for folder in folders:
        for name in files_of(folder, *roles):
            if name not in found and not (name in VOCABULARIES and any(other in found for other in VOCABULARIES)):
                found[name] = inside(folder, name)
    return found


# ---- weights


def inside(folder: str, name: str) -> str:
    """The path of `name` in `folder`: a plain, printable file name, and no link that leads out of the folder.

    Links from a `snapshots` folder into its sibling `blobs` are allowed: a Hugging Face cache is built that way.

    Raises:
        WeightsError: it leads elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise WeightsError(f"{folder}: refused: the file name {one_line(name)} leads out of the folder", "leads-out")
    path = os.path.join(folder, name)
    if os.path.islink(path):
        real_folder, real_path = os.path.realpath(folder), os.path.realpath(path)
        snapshots = os.path.dirname(real_folder)
        allowed = [real_folder]
        if os.path.basename(snapshots) == "snapshots":
            allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
        if os.path.dirname(real_path) not in allowed:
            text = f"{path}: refused: a link that leads out of the folder; put the file itself there"
            raise WeightsError(text, "leads-out")
    return path


def find_weights(folder: str) -> str:
    """Name of the weights file or index in a model folder.

    Raises:
        WeightsError: there is none, there are several, or shards have lost their index.
    """
    if not os.path.isdir(folder):
        raise WeightsError(f"no folder {folder}", "no-folder")
    names = set(os.listdir(folder))
    layouts = ("model_state.pdparams", "model.safetensors", "pytorch_model.bin")
    found = [name for single in layouts for name in (single, single + INDEX_SUFFIX) if name in names]
    # Public checkpoints may hold both safetensors and, for older programs, .bin.
    ours = [name for name in found if role(name) == WEIGHTS]
    if len(ours or found) > 1:
        names = ", ".join(ours or found)
        raise WeightsError(f"{folder} holds several sets of weights ({names}); keep one of them", "several-weights")
    if found:
        return (ours or found)[0]
    shards = sorted(name for name in names if role(name) in (WEIGHTS, TORCH_WEIGHTS))
    if shards:
        text = f"{folder} holds {shards[0]} but no index ({shards[0].split('-')[0]}….index.json)"
        raise WeightsError(text, "no-index")
    for tuned, what in ((LORA_WEIGHTS_NAME, "is a LoRA checkpoint"),
                        (PARTIAL_WEIGHTS_NAME, "holds the tensors that a run trained")):  # fmt: skip
        if tuned in names:
            raise WeightsError(f"{folder} {what}, not a model: merge it first: {merge_command(folder)}", "not-merged")
    raise WeightsError(f"no weights in {folder} (looked for {', '.join(layouts)} and their shards)", "no-weights")


def find_tuned_weights(folder: str) -> Optional[str]:
    """Path of the adapters or the trained tensors in the folder of a tuning run; None in any other folder.

    Raises:
        WeightsError: it is a link that leads out of the folder.
    """
    for name in (LORA_WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME):
        if os.path.lexists(os.path.join(folder, name)):
            return inside(folder, name)
    return None


def merge_command(tuned: str, base: Optional[str] = None, text: Optional[str] = None) -> str:
    """The merge command for a tuned folder, ready to be copied; an unknown base is written BASE."""
    command = ["python", "merge_lora_params.py", "--model_name_or_path", base or "BASE", "--lora_path", tuned]
    command += ["--text_model_name_or_path", text] if text is not None else []
    return " ".join(map(shlex.quote, [*command, "--merge_model_path", os.path.normpath(tuned) + "-merged"]))


# ---- folders to write


def check_new_folder(new: str, inputs: Sequence[str], overwrite: bool) -> None:
    """Check that writing the folder `new` harms neither an input nor anything already there.

    Leftovers of killed processes that were writing it are removed first.

    Raises:
        UserError: it overlaps an input, is a file, is being written by another process, or is not empty and
        `overwrite` is not set.
    """
    out = os.path.realpath(new)
    if remove_leftovers(out):
        raise UserError(f"another process is writing {new}: wait for it, or give another folder", "busy")
    for folder in inputs:
        real = os.path.realpath(folder)
        if out == real or out.startswith(real + os.sep) or real.startswith(out + os.sep):
            raise UserError(f"{new} and {folder} overlap: choose another output folder", "overlap")
    check_folder(new)
    if os.path.isdir(out) and not is_empty(out) and not overwrite:
        raise UserError(f"{new} is not empty: give another folder, or --overwrite to replace it")


def check_new_model(new: str, inputs: Sequence[str], overwrite: bool) -> None:
    """check_new_folder; `overwrite` only replaces a folder with a config.json or weights, whatever else it holds.

    Raises:
        UserError: as check_new_folder, or it holds other things.
    """
    check_new_folder(new, inputs, overwrite)
    there = os.listdir(new) if os.path.isdir(new) and not is_empty(new) else ["config.json"]
    if not any(name == "config.json" or name.endswith((".pdparams", ".safetensors", ".bin")) for name in there):
        raise UserError(f"{new} holds other things than a model: give another folder, or remove it", "other-files")
