"""Attributes of the pictured objects (colour, side, number …), extracted from texts with word lists.

A file of word lists is a JSON object: attribute → groups of synonyms.

    {"side": [["左侧", "左边"], ["中间", "正中"], ["右侧", "右边"]], "colour": [["红色", "大红"], ["蓝色"]]}

A row counts for an attribute if one of its references names a value of it. Its caption is right if it names the same
values as one of the references.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Dict, FrozenSet, List, NamedTuple, Sequence, Tuple

import numpy as np

from paddlemix.utils.errors import UserError
from paddlemix.utils.json_files import read_config_object
from paddlemix.utils.progress import Progress

_NOTHING = "nothing"
# Maximum wrong values listed per attribute, the most frequent first.
_LISTED = 10


class AttributeLists:
    """Word lists by attribute, read from a file.

    Raises:
        UserError: the file cannot be read, has another structure, or has a word in two groups.
    """

    def __init__(self, path: str):
        lists = read_config_object(path)
        self.names: List[str] = list(lists)
        # Attribute → (a pattern of its words, the longest first; word → its group's first word).
        self._words: Dict[str, Tuple[Any, Dict[str, str]]] = {}
        for name, groups in lists.items():
            meaning: Dict[str, str] = {}
            if not _is_groups(groups):
                raise UserError(f'{path}: {name} must be groups of words, such as [["左侧", "左边"], ["右侧"]]')
            for group in groups:
                for word in group:
                    if meaning.setdefault(word.lower(), group[0]) != group[0]:
                        raise UserError(f"{path}: {name} has {word} in two groups")
            pattern = "|".join(map(re.escape, sorted(meaning, key=len, reverse=True)))
            self._words[name] = re.compile(pattern), meaning
        if not lists:
            raise UserError(f"{path} names no attribute")

    def values(self, text: str) -> Dict[str, FrozenSet[str]]:
        """The values of each attribute named in a text, each by the first word of its group."""
        text = text.lower()
        return {
            name: frozenset(meaning[word] for word in pattern.findall(text))
            for name, (pattern, meaning) in self._words.items()
        }


def _is_groups(groups: Any) -> bool:
    return (
        isinstance(groups, list)
        and len(groups) > 0
        and all(isinstance(group, list) and group for group in groups)
        and all(isinstance(word, str) and word.strip() for group in groups for word in group)
    )


class Attributes(NamedTuple):
    """counted, right: bool [n, attributes]. wrong: per row, "attribute: value → value in the caption" for each that is
    counted and not right. most: attribute → [("value → …", rows)], the most frequent first."""

    names: List[str]
    counted: np.ndarray
    right: np.ndarray
    wrong: List[Sequence[str]]
    most: Dict[str, List[Tuple[str, int]]]

    def measures(self) -> Dict[str, np.ndarray]:
        """Measure → bool [n, 2]: right, counted. Its value is the share of counted rows that are right."""
        found = {
            f"{name} right": np.stack([self.right[:, column], self.counted[:, column]], axis=1)
            for column, name in enumerate(self.names)
        }
        any_counted = self.counted.any(axis=1)
        all_right = (self.right | ~self.counted).all(axis=1) & any_counted
        return {**found, ALL_RIGHT: np.stack([all_right, any_counted], axis=1)}


ALL_RIGHT = "all attributes right"


def compare_attributes(
    captions: Sequence[str], references: Sequence[Sequence[str]], lists: AttributeLists, quiet: bool = True
) -> Attributes:
    """Compare the attributes of captions with those of each row's references."""
    shape = len(captions), len(lists.names)
    counted, right = np.zeros(shape, bool), np.zeros(shape, bool)
    wrong: List[Sequence[str]] = []
    most: Dict[str, Counter] = {name: Counter() for name in lists.names}
    with Progress(len(captions), "attributes", disable=quiet) as bar:
        for row, (caption, texts) in enumerate(zip(captions, references)):
            found, expected = lists.values(caption), [lists.values(text) for text in texts]
            errors = []
            for column, name in enumerate(lists.names):
                true = [values[name] for values in expected if values[name]]
                if not true:
                    continue
                counted[row, column] = True
                right[row, column] = found[name] in true
                if found[name] not in true:
                    error = f"{_text(true[0])} → {_text(found[name])}"
                    errors.append(f"{name}: {error}")
                    most[name][error] += 1
            wrong.append(errors or ())
            bar.update()
    return Attributes(
        lists.names, counted, right, wrong, {name: counts.most_common(_LISTED) for name, counts in most.items()}
    )


def _text(values: FrozenSet[str]) -> str:
    return "+".join(sorted(values)) or _NOTHING
