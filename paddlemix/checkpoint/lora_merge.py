"""Merge what a run trained into its base model, a tensor at a time.

A checkpoint (LoRA, or fully trained parts of the model) holds two kinds of entries; every one is accounted for:

    adapter pairs   NAME.lora_A [in, r] and NAME.lora_B [r, out]: NAME.weight becomes W + (alpha / r) · A @ B
    full tensors    under the name of a base tensor, which they replace

All other tensors are copied unchanged: from the base, or those of the LLM from the model whose LLM the run used
(text_model_name_or_path). The arithmetic is float32, whatever the stored dtype.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple, Union

import numpy as np

from paddlemix.checkpoint import model_folder
from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.model_folder import (
    LORA_WEIGHTS_NAME,
    PARTIAL_WEIGHTS_NAME,
    find_tuned_weights,
    find_weights,
    gather,
    inside,
)
from paddlemix.checkpoint.origin import Origin
from paddlemix.checkpoint.shards import WeightsReader, open_weights, write_model
from paddlemix.checkpoint.tensors import FLOATS, Rows, convert_dtype, rows_of
from paddlemix.utils.errors import UserError, WeightsError
from paddlemix.utils.json_files import read_json_object, write_json
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line, some

# Elements that a thread adds and rounds at a time: few enough to stay in the cache, enough that threads do not contend
# for Python's lock.
_ELEMENTS = 1 << 20
# The largest float32, with room for rounding.
_LARGEST = 3.4e38


@dataclass(frozen=True)
class MergeResult:
    """Numbers of base tensors by what became of them, and the names of the files written."""

    merged: int
    replaced: int
    copied: int
    files: List[str]


def _open_tuned(folder: str) -> WeightsReader:
    if not os.path.isdir(folder):
        raise WeightsError(f"no folder {folder}", "no-folder")
    path = find_tuned_weights(folder)
    if path is not None:
        return open_weights(path)
    try:
        full = find_weights(folder)
    except WeightsError:
        text = f"neither {LORA_WEIGHTS_NAME} nor {PARTIAL_WEIGHTS_NAME} in {folder}: give the folder of a tuning run"
        raise WeightsError(text, "no-tuned-weights") from None
    raise WeightsError(f"{folder} holds {full}: a full model. There is nothing to merge; use it directly", "full-model")


def _check_text_folder(origin: Origin, tuned: str, text: Optional[str]) -> None:
    if text is None and origin.text is not None:
        raise UserError(
            f"the run in {tuned} took its LLM from {one_line(origin.text, 300)}: "
            f"add --text_model_name_or_path {shlex.quote(one_line(origin.text, 300))}, or the folder where it is now"
        )
    if text is not None and origin.text is None:
        raise UserError(f"the run in {tuned} took its LLM from the base: leave --text_model_name_or_path out")


def plan_merge(base: WeightsReader, lora: WeightsReader, rank: Optional[int]) -> Tuple[List[str], List[str]]:
    """Names of the base tensors that get an adapter, and of those that are replaced.

    rank: r of lora_config.json, or None when there is none.

    Raises:
        WeightsError: keys that fit no base tensor, half a pair, shapes or a rank that do not fit; lists them.
    """
    pairs: Dict[str, Dict[str, str]] = {}
    replaced, unknown, wrong = [], [], []
    for key in lora.keys():
        module, _, part = key.rpartition(".")
        if part in ("lora_A", "lora_B"):
            pairs.setdefault(module + ".weight", {})[part] = key
        elif key not in base:
            unknown.append(key)
        elif lora.info(key).shape != base.info(key).shape:
            wrong.append(f"{key} is {list(lora.info(key).shape)}, the base has {list(base.info(key).shape)}")
        else:
            replaced.append(key)
    for name, pair in pairs.items():
        if name not in base:
            unknown.extend(pair.values())
        elif len(pair) == 1:
            wrong.append(f"{next(iter(pair.values()))} has no other half")
        elif name in replaced:
            wrong.append(f"{name} is there in full and as an adapter")
        else:
            a, b, w = lora.info(pair["lora_A"]), lora.info(pair["lora_B"]), base.info(name)
            if len(w.shape) != 2 or a.shape != (w.shape[0], rank) or b.shape != (rank, w.shape[1]):
                sizes = f"{list(a.shape)} and {list(b.shape)} for {list(w.shape)}"
                wrong.append(f"the adapter of {name} is {sizes}, with r {rank}")
            elif not {a.dtype, b.dtype, w.dtype} <= set(FLOATS):
                wrong.append(f"the adapter of {name} is not floating-point")
    kinds = (("fit no tensor of the base", unknown), ("do not fit", wrong))
    problems = [
        f"{len(names)} {kind}: {some(one_line(name, 300) for name in names)}" for kind, names in kinds if names
    ]
    if problems:
        raise WeightsError(f"keys of {lora.files[0]}: " + "; ".join(problems), "keys")
    return [name for name in base.keys() if name in pairs], replaced


def merge(
    base_folder: str,
    lora_folder: str,
    out_folder: str,
    *,
    dtype: Optional[str] = None,
    format: Optional[str] = None,
    max_shard_size: Union[int, str] = "10GB",
    overwrite: bool = False,
    progress: bool = True,
    text_folder: Optional[str] = None,
    force: bool = False,
) -> MergeResult:
    """Write the base model with the checkpoint merged into it as a model folder.

    text_folder: the folder whose LLM the run used in place of the base's, if any. Only the folders given here are
    read. force: merge into a base, or with an LLM, that the checkpoint was not tuned from.

    dtype: of the floating-point tensors written (default: each as in the base). format: "pdparams" or "safetensors"
    (default: the base's). The folder is written atomically; a non-empty one is replaced only with `overwrite`. Memory
    holds two of the largest adapted weights in float32, or one other tensor that comes from the checkpoint or changes
    dtype; the rest is copied from file to file.

    Raises:
        UserError: out_folder is one of the inputs or in one, or not empty; text_folder is missing, or not needed.
        WeightsError: files or keys do not fit, or the checkpoint was tuned from another model.
        JobFailed: the disk is full.
    """
    inputs = [folder for folder in (base_folder, lora_folder, text_folder) if folder]
    model_folder.check_new_model(out_folder, inputs, overwrite)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_weights(base_folder))
        lora = stack.enter_context(_open_tuned(lora_folder))
        origin = Origin.read(lora_folder)
        _check_text_folder(origin, lora_folder, text_folder)
        if text_folder is not None:
            base = base.with_llm_of(stack.enter_context(open_weights(text_folder)))
        adapters = any(key.endswith((".lora_A", ".lora_B")) for key in lora.keys())
        config = read_lora_config(lora_folder) if adapters else {}
        rank = config.get("r")
        scaling = config["lora_alpha"] / rank if adapters else 0.0
        merged, replaced = plan_merge(base, lora, rank)
        if not merged and not replaced:
            raise WeightsError(f"{lora.files[0]} holds no tensors", "empty")
        origin.check(lora_folder, base_folder, text_folder, force)
        items = []
        adapted, full = set(merged), set(replaced)
        for name in base.keys():
            _, to, shape, read = base.item(name, dtype)
            if name in adapted:
                read = functools.partial(adapted_rows, base, lora, name, scaling, to)
            elif name in full:
                read = functools.partial(lora.read, name, to)
            items.append((name, to, shape, read))
        logger.info(
            f"Merging {len(merged)} adapters (r {rank}, scale {scaling:g}) and {len(replaced)} full tensors "
            f"into {len(base)} tensors of {base_folder}"
            if merged
            else f"Replacing {len(replaced)} of the {len(base)} tensors of {base_folder}"
        )
        files = write_model(
            out_folder,
            items,
            functools.partial(copy_side_files, base_folder, lora_folder, dtype),
            format=format or ("safetensors" if base.files[0].endswith(".safetensors") else "pdparams"),
            max_shard_size=max_shard_size,
            progress="merge" if progress else None,
        )
    return MergeResult(len(merged), len(replaced), len(items) - len(merged) - len(replaced), files)


def adapted_rows(base: WeightsReader, lora: WeightsReader, name: str, scaling: float, to: str) -> Rows:
    """W + scaling · A · B of one weight in the dtype `to`. The writer calls this in turn; its threads compute the rows.

    Raises:
        WeightsError: A or B is not finite, or W + s·A·B may exceed float32.
    """
    module = name[: -len(".weight")]
    a, b = (lora.load(f"{module}.{part}", "float32") for part in ("lora_A", "lora_B"))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        text = f"the adapter of {name} holds NaN or infinite values: the run has diverged"
        raise WeightsError(text, "not-finite")
    # A bound on every element. Beyond float32, weights would silently become infinite.
    largest = [float(max(part.max(), -part.min())) if part.size else 0.0 for part in (a, b)]
    if max(1.0, scaling) * max(1.0, a.shape[1] * largest[0] * largest[1]) > _LARGEST:
        text = f"the adapter of {name}, times lora_alpha / r = {scaling:g}, is too large for float32"
        raise WeightsError(text, "overflow")
    # One matmul: its last bits depend on the blocking.
    delta, stored, dtype = a @ b, base.raw(name), base.info(name).dtype

    def make(start: int, stop: int) -> np.ndarray:
        # Overwrites these rows of `delta`.
        merged = delta[start:stop]
        merged *= np.float32(scaling)
        merged += convert_dtype(rows_of(stored, start, stop, dtype, delta.shape[1:]), dtype, "float32")
        try:
            return convert_dtype(merged, "float32", to)
        except WeightsError as error:
            raise WeightsError(f"{name} with its adapter: {error}", *error.about) from None

    return Rows(max(1, _ELEMENTS // delta.shape[1]), make)


# ---- files


def copy_side_files(base_folder: str, lora_folder: str, dtype: Optional[str], out_folder: str) -> List[str]:
    """Copy the files that chat.py and predict.py need next to the weights, and the records of the run. Returns names.

    The tokenizer and the chat template are those of the run where it saved them, else the base's.

    Raises:
        WeightsError: no config.json in the base, or a link that leads out of its folder.
    """
    config = read_json_object(inside(base_folder, "config.json"))
    either = (model_folder.TOKENIZER, model_folder.TEMPLATE, model_folder.FONT, model_folder.LICENCE)
    paths = {
        **gather([base_folder], model_folder.CONFIG),
        **gather([lora_folder, base_folder], *either),
        **gather([lora_folder], model_folder.TUNING, model_folder.RECORD),
    }
    for name, path in paths.items():
        shutil.copyfile(path, os.path.join(out_folder, name))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(os.path.join(out_folder, "config.json"), config)
    return list(paths)
