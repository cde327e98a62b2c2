"""Checking the weights of a submission in one pass, a tensor at a time: finite values, and changes from the base."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import numpy as np

from paddlemix.checkpoint import WeightsReader, convert_dtype
from paddlemix.checkpoint.tensors import FLOATS
from paddlemix.models.mgen_vl.parameters import group_of
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.progress import Progress

# Elements processed at a time, to keep scratch arrays small.
_CHUNK = 1 << 20
# With all bits of the exponent set, a value is not finite.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
# The matrices adapted by the contest's LoRA.
_ADAPTED = re.compile(r"transformer\.llm\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2)\.weight")


@dataclass
class Change:
    """Tensors of a group: their number, how many differ from the base, the largest difference of finite values; those
    with another shape; and names that only one side has."""

    tensors: int = 0
    changed: int = 0
    largest: float = 0.0
    reshaped: List[str] = field(default_factory=list)
    new: List[str] = field(default_factory=list)
    gone: List[str] = field(default_factory=list)


def change_group(name: str) -> str:
    """The group under which a tensor's change is reported."""
    if _ADAPTED.fullmatch(name):
        return "llm layers, LoRA's matrices"
    try:
        group = group_of(name)
    except KeyError:
        return "others"
    return "llm layers, the rest" if group == "llm layers" else group


def count_not_finite(array: np.ndarray, dtype: str) -> int:
    """NaN and infinite values in an array as stored (bfloat16 as uint16)."""
    bad = 0
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if dtype in _EXPONENT:
            mask = np.uint16(_EXPONENT[dtype])
            bad += int(np.count_nonzero((part.view(np.uint16) & mask) == mask))
        elif dtype in FLOATS:
            bad += part.size - int(np.count_nonzero(np.isfinite(part)))
    return bad


def largest_difference(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> Optional[float]:
    """None if two arrays of a floating-point `dtype` are bitwise equal, else the largest |difference| of finite values.

    Raises:
        WeightsError: arrays of another dtype differ.
    """
    largest: Optional[float] = None
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    for start in range(0, ours.size, _CHUNK):
        pair = [np.ascontiguousarray(side[start : start + _CHUNK]) for side in (ours, theirs)]
        if pair[0].tobytes() == pair[1].tobytes():
            continue
        wide = [convert_dtype(side, dtype, "float64" if dtype == "float64" else "float32") for side in pair]
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.abs(wide[0] - wide[1])
        largest = max(largest or 0.0, float(gap[np.isfinite(gap)].max(initial=0.0)))
    return largest


def look_through(
    reader: WeightsReader, base: Optional[WeightsReader] = None, progress: bool = True
) -> Tuple[Dict[str, int], Dict[str, Change]]:
    """({name: number of non-finite values}, {group: Change}); without a base there are no changes.

    A base in another dtype is converted first, so that only tuned values count as changed.

    Raises:
        WeightsError: a tensor is broken.
    """
    bad: Dict[str, int] = {}
    changes: Dict[str, Change] = {}
    with Progress(reader.total_bytes, desc="values", unit="B", disable=not progress) as bar:
        for name in reader.keys():
            info = reader.info(name)
            array = reader.read(name)
            count = count_not_finite(array, info.dtype)
            if count:
                bad[name] = count
            if base is not None:
                change = changes.setdefault(change_group(name), Change())
                change.tensors += 1
                if name not in base:
                    change.new.append(name)
                elif base.info(name).shape != info.shape:
                    change.reshaped.append(name)
                else:
                    gap = _gap(array, info.dtype, base, name)
                    if gap is not None:
                        change.changed += 1
                        change.largest = max(change.largest, gap)
            bar.update(info.nbytes)
    if base is not None:
        for name in base.keys():
            if name not in reader:
                changes.setdefault(change_group(name), Change()).gone.append(name)
    return bad, changes


def _gap(array: np.ndarray, dtype: str, base: WeightsReader, name: str) -> Optional[float]:
    try:
        return largest_difference(array, base.read(name, dtype), dtype)
    except WeightsError:
        # A value of the base overflows our dtype, so it has changed.
        wide = convert_dtype(array, dtype, "float32")
        return largest_difference(wide, base.read(name, "float32"), "float32") or 0.0
