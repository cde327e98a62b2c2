"""`[CONFIG.json] [--key value …]` to Arguments.

A run is described by a JSON file, by `--key value` pairs, or by a file and pairs that override it. Imports neither
Paddle nor PaddleNLP, so that typos are answered at once.
"""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from paddlemix.trainer.keys import REFUSED, Arguments, blocks_of, known_keys
from paddlemix.trainer.reading import FALSE, TRUE, Key, check_limits, expand_path, from_json, from_text, read_config
from paddlemix.trainer.rules import broken_rules
from paddlemix.utils.errors import ConfigError, Problem
from paddlemix.utils.texts import nearest, shown

# (name, function that reads the value, raw value, prefix of errors)
_Given = Tuple[str, Callable[[Key, Any], Any], Any, str]


def read(argv: Sequence[str], cards: Optional[int] = None) -> Tuple[Arguments, List[str]]:
    """(arguments, a problem for each unusable key). Rules between keys are not checked.

    cards: of the run, by default those of the launcher.

    Raises:
        ConfigError: the config file cannot be read, is not JSON, or there is a stray argument.
    """
    path, pairs = _split(argv)
    config = read_config(path) if path is not None else {}
    given: List[_Given] = [(name, from_json, value, f"{path}: ") for name, value in config.items()]
    given += [(name, from_text, args, "") for name, args in pairs.items()]
    values, problems = _take(given)
    return blocks_of(values, cards), problems


def parse(argv: Sequence[str]) -> Arguments:
    """Checked arguments from `[CONFIG.json] [--key value …]`.

    Raises:
        ConfigError: lists all problems.
    """
    return _checked(*read(argv))


def from_values(values: Dict[str, Any]) -> Arguments:
    """Checked arguments from keys and values of the right types (a config read elsewhere, a test)."""
    values, problems = _take((name, from_json, value, "") for name, value in values.items())
    return _checked(blocks_of(values), problems)


def _checked(arguments: Arguments, problems: List[str]) -> Arguments:
    # Unusable keys would only cause follow-up errors.
    problems = problems or broken_rules(arguments)
    if problems:
        raise ConfigError.of(problems)
    return arguments


def _take(given: Iterable[_Given]) -> Tuple[Dict[str, Any], List[str]]:
    """(values of known keys, a problem for each unusable pair)."""
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
    """(config path or None, {key: the arguments after it})."""
    path, pairs, current = None, {}, None
    for index, arg in enumerate(argv):
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            pairs[name] = [value] if equals else []
            current = None if equals else name
        elif current is not None:
            pairs[current].append(arg)
        elif index == 0:
            path = arg
        else:
            raise ConfigError(f'"{arg}" has no key; write the config file first, then --key value pairs', "no-key")
    return path, pairs


def split_dry_run(argv: Sequence[str]) -> Tuple[bool, Optional[str], List[str]]:
    """(whether `--dry_run` is given, the value of `--plan_for` or None, the other arguments).

    Options of the command line only: a config file cannot hold them.
    """
    dry_run, cards, rest = False, None, []
    args = list(argv)
    while args:
        arg = args.pop(0)
        name, equals, value = arg.partition("=")
        name = name.replace("-", "_")
        if name == "__dry_run":
            if equals or (args and args[0] in TRUE + FALSE):
                raise ConfigError("--dry_run takes no value", "dry_run")
            dry_run = True
        elif name == "__plan_for":
            if not equals and (not args or args[0].startswith("--")):
                raise ConfigError("--plan_for needs cards, such as 8xA100-80GB", "plan_for")
            cards = value if equals else args.pop(0)
        else:
            rest.append(arg)
    if cards is not None and not dry_run:
        raise ConfigError("--plan_for goes with --dry_run", "plan_for")
    return dry_run, cards, rest
