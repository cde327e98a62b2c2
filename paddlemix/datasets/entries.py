"""The key `dataset` of a config: {"train": [entry, …], "eval": [entry, …]}. Opens no file."""

from __future__ import annotations

import glob
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from paddlemix.utils.errors import ConfigError, Problem
from paddlemix.utils.texts import nearest, shown

PARTS = ("train", "eval")
NAMES = ("chatml_dataset",)
# Beyond these an epoch would not fit into memory, or shares could not be computed.
MAX_REPEAT, MAX_WEIGHT = 1000, 1_000_000


class Entry(NamedTuple):
    """One entry of `dataset`.

    data_files: paths and patterns. chat_template: a file, None for the default. weight: relative share of the samples
    that an epoch draws. repeat: how often an epoch contains each record. limit: number of records, drawn by seed.
    prompt: replaces the question of records with an image; drawn by seed if there are several.
    """

    name: str
    data_files: Tuple[str, ...]
    chat_template: Optional[str] = None
    weight: Optional[float] = None
    repeat: int = 1
    limit: Optional[int] = None
    prompt: Tuple[str, ...] = ()

    @property
    def mixing(self) -> Dict[str, Any]:
        """The keys that determine its share of an epoch, where they differ from their defaults."""
        names = ("limit", "repeat", "weight", "prompt")
        return {name: getattr(self, name) for name in names if getattr(self, name) != self._field_defaults[name]}


def read_entry(raw: Dict[str, Any]) -> Entry:
    """Parse an entry from a JSON object.

    Raises:
        ConfigError: it has unknown keys or invalid values.
    """
    for name in raw:
        if name not in Entry._fields:
            near = nearest(name, Entry._fields)
            hint = f'did you mean "{near}"?' if near else f"known: {', '.join(Entry._fields)}"
            raise ConfigError(f'unknown key "{name}"; {hint}', name)
    name, files, template = raw.get("name", NAMES[0]), raw.get("data_files"), raw.get("chat_template")
    if name not in NAMES:
        raise ConfigError(f"unknown dataset {shown(name)}; known: {', '.join(NAMES)}", "name")
    files = [files] if isinstance(files, str) else files
    if not files or not isinstance(files, list) or not all(isinstance(path, str) for path in files):
        raise ConfigError('"data_files" must be a path or a list of paths', "data_files")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f'"chat_template" must be a path, not {shown(template)}', "chat_template")
    weight, prompt = raw.get("weight"), raw.get("prompt", [])
    if weight is not None and (type(weight) not in (int, float) or not 0 < weight <= MAX_WEIGHT):
        raise ConfigError(f'"weight" must be a number above 0, up to {MAX_WEIGHT:,}, not {shown(weight)}', "weight")
    for key, most, wanted in (("repeat", MAX_REPEAT, f"from 1 to {MAX_REPEAT:,}"), ("limit", sys.maxsize, "above 0")):
        value = raw.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f'"{key}" must be an integer {wanted}, not {shown(value)}', key)
    prompt = [prompt] if isinstance(prompt, str) else prompt
    empty = "prompt" in raw and not prompt
    if empty or not isinstance(prompt, list) or not all(isinstance(text, str) and text.strip() for text in prompt):
        raise ConfigError('"prompt" must be a text or a list of texts', "prompt")
    files = tuple(map(os.path.expanduser, files))
    template = os.path.expanduser(template) if template else None
    return Entry(name, files, template, weight, raw.get("repeat", 1), raw.get("limit"), tuple(prompt))


def _mixing_problems(part: str, entries: List[Entry]) -> List[str]:
    """Contradictions between the entries of a part."""
    weighted = [entry for entry in entries if entry.weight is not None]
    if part == "eval":
        if weighted or any(entry.repeat > 1 for entry in entries):
            text = "dataset.eval: weight and repeat are for training; an evaluation takes each sample once"
            return [Problem(text, "weight", "repeat")]
        return []
    if any(entry.repeat > 1 for entry in weighted):
        text = "dataset.train: set weight or repeat, not both: a weight says how many samples an epoch draws"
        return [Problem(text, "weight", "repeat")]
    if 0 < len(weighted) < len(entries):
        return [Problem("dataset.train: give a weight to every entry, or to none", "weight")]
    return []


def read_entries(
    dataset: Optional[Dict[str, Any]], chat_template: Optional[str] = None
) -> Tuple[Dict[str, List[Entry]], List[str]]:
    """(the valid entries of each part, without missing files; the problems of `dataset`).

    chat_template: of entries that have none.
    """
    found: Dict[str, List[Entry]] = {}
    problems: List[str] = []
    read: Dict[str, List[Entry]] = {part: [] for part in PARTS}
    for part, raws in (dataset or {}).items():
        if part not in PARTS:
            text = f'dataset: unknown part "{part}"; the parts are "train" and "eval"'
            problems.append(Problem(text, "dataset", part))
            continue
        for raw in raws if isinstance(raws, list) else [raws] if raws else []:
            if not isinstance(raw, dict):
                text = f'dataset.{part} must be a list of objects with "data_files", not {shown(raw)}'
                problems.append(Problem(text, "dataset", part))
                continue
            try:
                entry = read_entry(raw)
            except ConfigError as error:
                problems.append(Problem.of(error, f"dataset.{part}: "))
                continue
            read[part].append(entry)
            there = [path for path in entry.data_files if os.path.isfile(path) or glob.glob(path, recursive=True)]
            problems += [
                Problem(f"dataset.{part}: no file matches {path}", "data_files")
                for path in entry.data_files
                if path not in there
            ]
            template = entry.chat_template
            if template is not None and not os.path.isfile(template):
                problems.append(Problem(f"dataset.{part}: there is no chat template at {template}", "chat_template"))
                template = None
            if there:
                usable = entry._replace(data_files=tuple(there), chat_template=template or chat_template)
                found.setdefault(part, []).append(usable)
        problems += _mixing_problems(part, read[part])
    return found, problems
