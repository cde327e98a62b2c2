"""Which parameters train: patterns on parameter names, resolved before any tensor exists, and counts per group.

A pattern is matched as in a shell (`*` any text, `?` one character, `[abc]`, `{16..31}` the numbers from 16 to 31)
against a full parameter name, such as `visual.attn_pool.query` or `transformer.llm.h.31.mlp.w1.weight`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from typing import Collection, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.models.lora import adapted_modules
from paddlemix.models.mgen_vl.parameters import CONSTANTS, GROUPS, group_of
from paddlemix.trainer.keys import ModelArguments
from paddlemix.utils.errors import ConfigError, Problem

# In the order of the data flow.
_GROUP_ORDER = tuple(group for group, _ in GROUPS) + ("lora",)


class GroupCount(NamedTuple):
    """Elements of one module group."""

    frozen: int
    trainable: int


_RANGE = re.compile(r"\{(\d{1,4})\.\.(\d{1,4})\}")


def _spelled_out(pattern: str) -> List[str]:
    """Brace expansion: the pattern once per number of {FIRST..LAST}."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = map(int, found.groups())
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for number in range(first, last + 1) for one in _spelled_out(f"{before}{number}{after}")]


def _matched(patterns: Optional[Sequence[str]], names: Sequence[str], key: str) -> Tuple[set, List[str]]:
    """Names matched by any of the patterns, and a problem for each pattern without a match (in a range, its first)."""
    found, problems = set(), []
    for pattern in patterns or ():
        spelled = _spelled_out(pattern)
        if not spelled:
            problems.append(Problem(f'{key}: "{pattern}" contains an empty range', key))
        for one in spelled:
            # fnmatch.filter ignores case on some systems.
            compiled = re.compile(fnmatch.translate(one))
            matches = [name for name in names if compiled.match(name)]
            if not matches:
                within = "" if one == pattern else f' (of "{pattern}")'
                text = f'{key}: "{one}"{within} matches no parameter (names are like {names[0]} and {names[-1]})'
                problems.append(Problem(text, key))
                break
            found.update(matches)
    return found, problems


def plan_freeze(
    names: Sequence[str],
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
    lora: bool = False,
) -> List[str]:
    """The base parameters that train (with LoRA: in addition to the adapters), in the model's order.

    A name matched by `include` and not by `exclude` is frozen. With `lora` all base parameters are frozen except those
    that `exclude` matches. CONSTANTS are always frozen.

    Raises:
        ConfigError: lists patterns that match no name; or nothing is left to train.
    """
    included, unmatched = _matched(include, names, "freeze_include")
    excluded, more = _matched(exclude, names, "freeze_exclude")
    if unmatched or more:
        raise ConfigError.of(unmatched + more)
    trainable = [
        name
        for name in names
        if (name in excluded or (not lora and name not in included)) and name not in CONSTANTS
    ]
    if not trainable and not lora:
        raise ConfigError(
            "freeze_include leaves nothing to train; name what trains in freeze_exclude", "freeze_include"
        )
    return trainable


def check_lora_path(model_args: ModelArguments, shapes: Dict[str, Tuple[int, ...]]) -> None:
    """Raise ConfigError if the adapters in lora_path contradict the other lora_* keys.

    shapes: of the model's parameters by name.
    """
    stored = read_lora_config(model_args.lora_path)
    wanted = {
        "lora_rank": (model_args.lora_rank, stored["r"]),
        "lora_alpha": (model_args.lora_alpha, stored["lora_alpha"]),
        "lora_target_modules": (model_args.lora_target_modules, stored["target_modules"]),
    }
    for name, (ours, theirs) in wanted.items():
        same = ours == theirs
        if name == "lora_target_modules" and not same:
            # Different expressions may select the same layers.
            same = adapted_modules(shapes, ours) == adapted_modules(shapes, theirs)
        if not same:
            raise ConfigError(f"{name} is {ours}, but the adapters in lora_path have {theirs}", name)


def is_everything(trainable: Collection[str], names: Collection[str]) -> bool:
    """Whether these are all the parameters of a model that can train."""
    return len(trainable) == len(names) - len(CONSTANTS)


def apply_freeze(model, trainable: Iterable[str]) -> None:
    """Set stop_gradient on every tensor of the model's state except these."""
    names = set(trainable)
    for name, tensor in model.state_dict().items():
        tensor.stop_gradient = name not in names


def count_groups(parameters: Iterable[Tuple[str, Sequence[int], bool]]) -> Dict[str, GroupCount]:
    """Count elements per group from (name, shape, whether it trains), groups in data-flow order."""
    counts: Dict[str, GroupCount] = {}
    for name, shape, trains in parameters:
        frozen, trainable = counts.get(group_of(name), GroupCount(0, 0))
        size = math.prod(shape)
        counts[group_of(name)] = GroupCount(frozen + size * (not trains), trainable + size * bool(trains))
    return {group: counts[group] for group in _GROUP_ORDER if group in counts}


def summary_line(counts: Dict[str, GroupCount]) -> str:
    """The notebook's line: `Frozen parameters: 9.66e+09 || Trainable parameters:1.12e+08 || …`."""
    frozen = sum(count.frozen for count in counts.values())
    trainable = sum(count.trainable for count in counts.values())
    total = frozen + trainable
    return (
        f"Frozen parameters: {frozen:.2e} || Trainable parameters:{trainable:.2e} || "
        f"Total parameters:{total:.2e}|| Trainable:{trainable / total:.2%}"
    )


def table_lines(counts: Dict[str, GroupCount]) -> List[str]:
    """A table of the groups: all parameters, and the trainable ones."""
    rows = [(group, count.frozen + count.trainable, count.trainable) for group, count in counts.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'module group':<16}{'parameters':>16}{'trainable':>16}"]
    return lines + [f"{group:<16}{total:>16,}{trainable:>16,}" for group, total, trainable in rows]
