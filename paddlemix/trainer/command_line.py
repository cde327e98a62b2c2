"""`[CONFIG.json] [--key value …]` to Arguments.

A run is described by a JSON file, by `--key value` pairs, or by a file with pairs after it that override it. Neither
Paddle nor PaddleNLP is imported, so that a typo is answered at once.
"""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from paddlemix.trainer.keys import REFUSED, Arguments, blocks_of, known_keys
from paddlemix.trainer.reading import FALSE, TRUE, Key, check_limits, expand_path, from_json, from_text, read_config
from paddlemix.trainer.rules import broken_rules
from paddlemix.utils.errors import ConfigError, Problem
from paddlemix.utils.texts import nearest, shown

# (name, how to read the value, the value as it was given, what an error begins with)
_Given = Tuple[str, Callable[[Key, Any], Any], Any, str]


def read(argv: Sequence[str], cards: Optional[int] = None) -> Tuple[Arguments, List[str]]:
    """What the words ask for, and a sentence for each key that cannot be taken. Rules are not looked at.

    cards: of the run, as the launcher says by default.

    Raises:
        ConfigError: the config file cannot be read, is not JSON, or there is a stray word.
    """
    path, pairs = _split(argv)
    config = read_config(path) if path is not None else {}
    given: List[_Given] = [(name, from_json, value, f"{path}: ") for name, value in config.items()]
    given += [(name, from_text, words, "") for name, words in pairs.items()]
    values, problems = _take(given)
    return blocks_of(values, cards), problems


def parse(argv: Sequence[str]) -> Arguments:
    """Checked arguments from `[CONFIG.json] [--key value …]`.

    Raises:
        ConfigError: with everything that cannot work.
    """
    return _checked(*read(argv))


def from_values(values: Dict[str, Any]) -> Arguments:
    """Checked arguments from keys and values of the right types (a config read elsewhere, a test)."""
    values, problems = _take((name, from_json, value, "") for name, value in values.items())
    return _checked(blocks_of(values), problems)


def _checked(arguments: Arguments, problems: List[str]) -> Arguments:
    # What a key that was not taken leads to is not said.
    problems = problems or broken_rules(arguments)
    if problems:
        raise ConfigError.of(problems)
    return arguments


def _take(given: Iterable[_Given]) -> Tuple[Dict[str, Any], List[str]]:
    """(the values of known keys, a sentence for each pair that cannot be taken)."""
    known = known_keys()
    values: Dict[str, Any] = {}
    problems: List[str] = []
    for name, read_value, raw, where in given:
        try:
            if name in REFUSED:
                _check_refused(name, read_value, raw)
            elif name in known:
                value = expand_path(known[name], read_value(known[name], raw))
                check_limits(known[name], value)
                values[name] = value
            else:
                raise _unknown(name, list(known))
        except ConfigError as error:
            problems.append(Problem.of(error, where))
    return values, problems


def _check_refused(name: str, read_value: Callable[[Key, Any], Any], raw: Any) -> None:
    why, may_be = REFUSED[name]
    if not may_be:
        raise ConfigError(f"{name} is not a setting here: {why}", name)
    value = read_value(Key(name, Optional[str] if may_be[0] is None else type(may_be[0])), raw)
    if value not in may_be:
        raise ConfigError(f"{name}={shown(value)} cannot be used here: {why}", name)


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    name = name[:80]
    near = nearest(name, known)
    hint = f'did you mean "{near}"?' if near else "docs/config.md lists all keys"
    return ConfigError(f"unknown key {json.dumps(name, ensure_ascii=False)}; {hint}", name)


def _split(argv: Sequence[str]) -> Tuple[Optional[str], Dict[str, List[str]]]:
    """(config path or None, {key: the words after it})."""
    path, pairs, current = None, {}, None
    for index, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            pairs[name] = [value] if equals else []
            current = None if equals else name
        elif current is not None:
            pairs[current].append(word)
        elif index == 0:
            path = word
        else:
            raise ConfigError(f'"{word}" has no key; write the config file first, then --key value pairs', "no-key")
    return path, pairs


def split_dry_run(argv: Sequence[str]) -> Tuple[bool, Optional[str], List[str]]:
    """(whether `--dry_run` is asked, the value of `--plan_for` or None, the other words).

    They belong to the command line alone: a config file cannot hold them.
    """
    dry_run, cards, rest = False, None, []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if name == "__dry_run":
            if equals or (words and words[0] in TRUE + FALSE):
                raise ConfigError("--dry_run takes no value", "dry_run")
            dry_run = True
        elif name == "__plan_for":
            if not equals and (not words or words[0].startswith("--")):
                raise ConfigError("--plan_for needs cards, such as 8xA100-80GB", "plan_for")
            cards = value if equals else words.pop(0)
        else:
            rest.append(word)
    if cards is not None and not dry_run:
        raise ConfigError("--plan_for goes with --dry_run", "plan_for")
    return dry_run, cards, rest
