"""Merge what a run trained into its base model, a tensor at a time.

A checkpoint (LoRA, or a part of the model trained whole) holds two kinds of entries; every one is accounted for:

    adapter pairs   NAME.lora_A [in, r] and NAME.lora_B [r, out]: NAME.weight becomes W + (alpha / r) · A @ B
    whole tensors   under a base tensor's own name: it takes its place

All other tensors are copied as they are: from the base, or the LLM's from the model that it was taken from
(text_model_name_or_path). The arithmetic is float32, whatever the tensors are stored in.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from paddlemix.checkpoint.json_files import read_json_object, write_json
from paddlemix.checkpoint.lora_config import LORA_CONFIG_NAME, read_lora_config
from paddlemix.checkpoint.shards import (
    FORMATS,
    LORA_WEIGHTS_NAME,
    PARTIAL_WEIGHTS_NAME,
    Item,
    WeightsReader,
    find_weights,
    inside,
    open_weights,
    write_sharded,
)
from paddlemix.checkpoint.tensors import FLOATS, NUMPY_TYPES, FileBytes, Rows, TensorInfo, convert_dtype, printable
from paddlemix.checkpoint.tuned_from import TUNED_FROM_NAME, read_tuned_from
from paddlemix.utils.errors import JobFailed, UserError, WeightsError
from paddlemix.utils.files import atomic_folder
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress

# Files beside the weights, all that a prediction reads. What the run wrote goes before what the base has: the
# tokenizer and the template that it trained with are the ones to predict with.
FROM_BASE = ("config.json", "generation_config.json")
FROM_EITHER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "mgen.tiktoken",
    "qwen.tiktoken",
    "chat_template.json",
    "SimSun.ttf",
    "LICENSE",
    "NOTICE",
)
_FROM_LORA = (
    LORA_CONFIG_NAME,
    TUNED_FROM_NAME,
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "trainer_state.json",
    "training_args.bin",
)
VOCABULARIES = ("mgen.tiktoken", "qwen.tiktoken")
LICENCES = re.compile(r"(?i)(license|notice|model_license)(\.(txt|md|pdf))?")

# Parameters outside the LLM.
_NOT_LANGUAGE = "visual."

# About as many elements of a weight are added and rounded at a time, by a thread: they stay near the CPU, and each call
# is long enough that threads do not wait for each other (Python's lock).
_ELEMENTS = 1 << 20
# The largest float32, with room for rounding.
_LARGEST = 3.4e38


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. Counts are tensors of the base; files are names in the merged folder."""

    merged: int
    replaced: int
    copied: int
    files: List[str]


def _list(names: List[str], limit: int = 10) -> str:
    return ", ".join(printable(name, 300) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def _open_tuned(folder: str) -> WeightsReader:
    if not os.path.isdir(folder):
        raise WeightsError(f"there is no folder {folder}")
    for name in (LORA_WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME):
        if os.path.lexists(os.path.join(folder, name)):
            return open_weights(inside(folder, name))
    try:
        full = find_weights(folder)
    except WeightsError:
        raise WeightsError(
            f"neither {LORA_WEIGHTS_NAME} nor {PARTIAL_WEIGHTS_NAME} in {folder}: give the folder of a tuning run"
        ) from None
    raise WeightsError(
        f"{folder} holds {full}: a whole model, tuned in full. Nothing is left to merge; use it as it is"
    )


class _TwoModels:
    """The base with the LLM of another model, for one reader: `text` has the language tensors, `base` the others."""

    def __init__(self, base: WeightsReader, text: WeightsReader):
        ours = [name for name in base.keys() if not name.startswith(_NOT_LANGUAGE)]
        lost = [name for name in ours if name not in text or text.info(name).shape != base.info(name).shape]
        if lost:
            raise WeightsError(f"{text.files[0]} has another LLM than {base.files[0]}: {_list(lost)}")
        self._base, self._text = base, text
        self.keys, self.files = base.keys, base.files
        self.total_bytes = base.total_bytes

    def _reader(self, name: str) -> WeightsReader:
        return self._base if name.startswith(_NOT_LANGUAGE) else self._text

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __len__(self) -> int:
        return len(self._base)

    def info(self, name: str) -> TensorInfo:
        return self._reader(name).info(name)

    def read(self, name: str, dtype: Optional[str] = None) -> np.ndarray:
        return self._reader(name).read(name, dtype)

    def raw(self, name: str) -> Union[FileBytes, np.ndarray]:
        return self._reader(name).raw(name)

    def rows(self, name: str) -> Callable[[int, int], np.ndarray]:
        return self._reader(name).rows(name)


def _text_folder(lora_folder: str, given: Optional[str]) -> Optional[str]:
    """Where the LLM came from, if not from the base: as given, else as the run noted it."""
    noted = read_tuned_from(lora_folder).text
    if given is None and noted is not None and not os.path.isdir(noted):
        raise UserError(
            f"the run took its LLM from {noted}, which is not there: give --text_model_name_or_path, where it is now"
        )
    if given is not None and noted is None:
        raise UserError(f"the run in {lora_folder} took its LLM from the base: leave --text_model_name_or_path out")
    return given or noted


def _scaling(folder: str) -> Tuple[int, float]:
    """(rank, alpha / rank) from lora_config.json."""
    config = read_lora_config(folder)
    path, rank = os.path.join(folder, LORA_CONFIG_NAME), config["r"]
    if config.get("enable_lora_list"):
        raise WeightsError(f"{path}: enable_lora_list is a variant of LoRA that is not merged here")
    scaling = config["lora_alpha"] / rank
    stored = config.get("scaling")
    if stored is not None and stored != scaling:
        raise WeightsError(
            f"{path}: scaling is {printable(str(stored))}, but lora_alpha / r is {scaling}; which one is right?"
        )
    return rank, scaling


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
            wrong.append(f"{name} is there whole and as an adapter")
        else:
            a, b, w = lora.info(pair["lora_A"]), lora.info(pair["lora_B"]), base.info(name)
            if len(w.shape) != 2 or a.shape != (w.shape[0], rank) or b.shape != (rank, w.shape[1]):
                sizes = f"{list(a.shape)} and {list(b.shape)} for {list(w.shape)}"
                wrong.append(f"the adapter of {name} is {sizes}, with r {rank}")
            elif not {a.dtype, b.dtype, w.dtype} <= set(FLOATS):
                wrong.append(f"the adapter of {name} is not of floating-point numbers")
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} fit no tensor of the base: {_list(unknown)}")
    if wrong:
        problems.append(f"{len(wrong)} do not fit: {_list(wrong)}")
    if problems:
        raise WeightsError(f"keys of {lora.files[0]}: " + "; ".join(problems))
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
) -> MergeResult:
    """Write the base model with the checkpoint merged into it as a whole model folder (SPEC §3).

    text_folder: where the LLM that the run took from another model is now (default: where it was).

    dtype: of the floating-point tensors written (default: each as in the base). format: "pdparams" or
    "safetensors" (default: the base's). The folder appears when it is whole; an existing one that is not
    empty is replaced only with `overwrite`. Memory holds two of the largest adapted weights in float32, or one
    other tensor that comes from the checkpoint or changes dtype; the rest is copied from file to file.

    Raises:
        UserError: out_folder is one of the inputs or in one, or not empty. WeightsError: files or keys do
        not fit.
        JobFailed: the disk is full.
    """
    text_folder = _text_folder(lora_folder, text_folder)
    check_output(out_folder, [folder for folder in (base_folder, lora_folder, text_folder) if folder], overwrite)
    if dtype is not None and dtype not in FLOATS[1:]:
        raise UserError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_weights(base_folder))
        lora = stack.enter_context(_open_tuned(lora_folder))
        if text_folder is not None:
            base = _TwoModels(base, stack.enter_context(open_weights(text_folder)))
        adapters = any(key.endswith((".lora_A", ".lora_B")) for key in lora.keys())
        rank, scaling = _scaling(lora_folder) if adapters else (None, 0.0)
        merged, replaced = plan_merge(base, lora, rank)
        if not merged and not replaced:
            raise WeightsError(f"{lora.files[0]} holds no tensors")
        if format is None:
            format = default_format(base)
        total = 0
        items = []
        adapted, whole = set(merged), set(replaced)
        for name in base.keys():
            info = base.info(name)
            to = dtype if dtype is not None and info.dtype in FLOATS else info.dtype
            if name in adapted:
                read = _adapted(base, lora, name, scaling, to)
            elif name in whole:
                read = _replacement(lora, name, to)
            elif to == info.dtype:
                read = _copied(base, name)
            else:
                read = _converted(base, name, to)
            item: Item = (name, to, info.shape, read)
            items.append(item)
            total += info.nbytes // NUMPY_TYPES[info.dtype].itemsize * NUMPY_TYPES[to].itemsize
        logger.info(
            f"Merging {len(merged)} adapters (r {rank}, scale {scaling:g}) and {len(replaced)} whole tensors "
            f"into {len(base)} tensors of {base_folder}"
            if merged
            else f"Putting {len(replaced)} whole tensors into {len(base)} tensors of {base_folder}"
        )
        try:
            with atomic_folder(out_folder) as folder:
                with Progress(
                    total=total, desc="merge", unit="B", unit_scale=True, disable=not progress
                ) as bar:
                    files = write_sharded(
                        folder, items, format=format, max_shard_size=max_shard_size, progress=bar.update
                    )
                files += copy_side_files(base_folder, lora_folder, folder, dtype)
        except OSError as error:
            raise JobFailed(f"could not write {out_folder}: {error.strerror}") from None
    return MergeResult(len(merged), len(replaced), len(items) - len(merged) - len(replaced), files)


def _adapted(base: WeightsReader, lora: WeightsReader, name: str, scaling: float, to: str) -> Callable[[], Rows]:
    module = name[: -len(".weight")]

    def read() -> Rows:
        a, b = (lora.load(f"{module}.{part}", "float32") for part in ("lora_A", "lora_B"))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise WeightsError(f"the adapter of {name} holds NaN or infinite values: the run has diverged")
        # The most that an element can become. Beyond what float32 holds, weights would be infinite without a word.
        largest = [float(max(part.max(), -part.min())) if part.size else 0.0 for part in (a, b)]
        if max(1.0, scaling) * max(1.0, a.shape[1] * largest[0] * largest[1]) > _LARGEST:
            raise WeightsError(f"the adapter of {name}, times lora_alpha / r = {scaling:g}, is too large for float32")
        # In one piece: the last bits of a matmul depend on how it is cut.
        delta = a @ b
        weight, dtype = base.rows(name), base.info(name).dtype

        def make(start: int, stop: int) -> np.ndarray:
            merged = delta[start:stop]
            merged *= np.float32(scaling)
            merged += convert_dtype(weight(start, stop), dtype, "float32")
            try:
                return convert_dtype(merged, "float32", to)
            except WeightsError as error:
                raise WeightsError(f"{name} with its adapter: {error}") from None

        return Rows(max(1, _ELEMENTS // delta.shape[1]), make)

    return read


def _replacement(lora: WeightsReader, name: str, to: str) -> Callable[[], np.ndarray]:
    return lambda: lora.read(name, to)


def _converted(base: WeightsReader, name: str, to: str) -> Callable[[], np.ndarray]:
    return lambda: base.read(name, to)


def _copied(base: WeightsReader, name: str) -> Callable:
    return lambda: base.raw(name)


# ---- folders and files


def check_output(out_folder: str, inputs: List[str], overwrite: bool) -> None:
    """Refuse an output folder that would harm an input, or something else that stands there.

    Raises:
        UserError: it is an input, holds one, lies in one, is a file, or is not empty without `overwrite`.
    """
    out = os.path.realpath(out_folder)
    for folder in inputs:
        real = os.path.realpath(folder)
        if out == real or out.startswith(real + os.sep) or real.startswith(out + os.sep):
            raise UserError(f"{out_folder} and {folder} overlap: give an output folder of its own")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out_folder} is a file: give a folder")
    if os.path.isdir(out) and os.listdir(out) and not overwrite:
        raise UserError(f"{out_folder} is not empty: give another folder, or --overwrite to replace it")


def copy_side_files(base_folder: str, lora_folder: str, out_folder: str, dtype: Optional[str]) -> List[str]:
    """Copy what chat.py and predict.py need beside the weights, and the records of the run. Returns the
    names.

    Links that lead out of the folders are refused, as for weights.

    Raises:
        WeightsError: no config.json in the base, or a refused link.
    """
    written = []

    def copy(folders: Tuple[str, ...], name: str) -> None:
        for folder in folders:
            path = inside(folder, name)
            if os.path.isfile(path):
                shutil.copyfile(path, os.path.join(out_folder, name))
                written.append(name)
                return

    config = read_json_object(inside(base_folder, "config.json"))
    for name in FROM_BASE:
        copy((base_folder,), name)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(os.path.join(out_folder, "config.json"), config)
    # Either vocabulary name is fine, but two vocabularies in one folder are not.
    ours = [name for name in VOCABULARIES if os.path.isfile(os.path.join(lora_folder, name))]
    for name in FROM_EITHER:
        if name not in VOCABULARIES:
            copy((lora_folder, base_folder), name)
        elif not ours or name == ours[0]:
            copy((lora_folder, base_folder), name)
    for name in _FROM_LORA:
        copy((lora_folder,), name)
    # A license or model card of the base under another name goes with the weights that it covers.
    for name in sorted(os.listdir(base_folder)):
        if LICENCES.fullmatch(name) and name not in written:
            copy((base_folder,), name)
    return written


def default_format(reader: WeightsReader) -> str:
    """The format to write what this reader reads."""
    return next(
        (name for name, (_, ending) in FORMATS.items() if reader.files[0].endswith(ending)), "pdparams"
    )
