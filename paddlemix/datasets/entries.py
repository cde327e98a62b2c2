"""What a config's `dataset` names: {"train": [entry, …], "eval": [entry, …]}. No file is opened."""

from __future__ import annotations

import glob
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from paddlemix.utils.errors import ConfigError, Problem
from paddlemix.utils.texts import nearest, shown

PARTS = ("train", "eval")
NAMES = ("chatml_dataset",)


class Entry(NamedTuple):
    """One entry of `dataset`. data_files: paths and patterns; chat_template: a file, None for the default."""

    name: str
    data_files: Tuple[str, ...]
    chat_template: Optional[str] = None


def read_entry(raw: Dict[str, Any]) -> Entry:
    """An entry from the object that JSON holds.

    Raises:
        ConfigError: it has other keys or values than an entry.
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
    files = tuple(map(os.path.expanduser, files))
    return Entry(name, files, os.path.expanduser(template) if template else None)


def read_entries(
    dataset: Optional[Dict[str, Any]], chat_template: Optional[str] = None
) -> Tuple[Dict[str, List[Entry]], List[str]]:
    """(the entries of each part, a sentence for everything that is wrong with `dataset`).

    What is wrong is left out: an entry, a file that is missing. chat_template: of entries that name none.
    """
    found: Dict[str, List[Entry]] = {}
    problems: List[str] = []
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
    return found, problems
