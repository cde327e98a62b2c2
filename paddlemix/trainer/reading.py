"""Text and JSON to typed values, strictly. It knows no key by name: a Key says what its value must be."""

from __future__ import annotations

import json
import os
import typing
from typing import Any, Dict, List, NamedTuple

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.json_files import read_config_object
from paddlemix.utils.texts import nearest, shown


class Key(NamedTuple):
    """A name that takes a value.

    hint: its type as a typing object. default: a fresh value. limits: choices=(…) the only values; at_least=n,
    above=n, at_most=n for numbers. path=True: a path, in which a leading ~ is the home.
    """

    name: str
    hint: Any
    default: Any = None
    meaning: str = ""
    block: str = ""
    limits: Dict[str, Any] = {}


def _parts(hint: Any) -> tuple:
    """(whether None is allowed, the type without it, the type of a list's items or None)."""
    optional = False
    if typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = True, inner[0]
    if typing.get_origin(hint) is list:
        return optional, list, typing.get_args(hint)[0]
    if typing.get_origin(hint) is dict:
        return optional, dict, None
    return optional, hint, None


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list of strings",
    dict: "an object",
}


def type_name(hint: Any) -> str:
    """The type as docs and errors say it: "a whole number", "a text or null", …"""
    optional, kind, _ = _parts(hint)
    return _KINDS[kind] + (" or null" if optional else "")


def _wrong_kind(key: Key, value: Any) -> ConfigError:
    return ConfigError(f"{key.name} must be {type_name(key.hint)}, not {shown(value)}", key.name)


def from_json(key: Key, value: Any) -> Any:
    """A JSON value as the key's type. Texts are not read as numbers, nor numbers as texts."""
    optional, kind, item = _parts(key.hint)
    if value is None:
        if optional:
            return None
        raise _wrong_kind(key, value)
    if kind is list:
        items = [value] if isinstance(value, item) else value
        if not isinstance(items, list) or not all(isinstance(part, item) for part in items):
            raise _wrong_kind(key, value)
        return items
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_kind(key, value)
    return value


TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def from_text(key: Key, words: List[str]) -> Any:
    """The words after `--key` on the command line as the key's type."""
    optional, kind, _ = _parts(key.hint)
    if kind is bool and not words:
        return True
    if not words:
        raise ConfigError(f"--{key.name} needs a value: {type_name(key.hint)}", key.name)
    if kind is list and not (len(words) == 1 and words[0].lstrip().startswith("[")):
        if optional and words in (["null"], ["None"]):
            return None
        return list(words)
    if len(words) > 1:
        raise ConfigError(f"--{key.name} takes one value, not {len(words)}: {' '.join(words)}", key.name)
    word = words[0]
    if optional and word in ("null", "None"):
        return None
    if kind is str:
        return word
    if kind is bool:
        if word.lower() in TRUE + FALSE:
            return word.lower() in TRUE
        raise _wrong_kind(key, word)
    try:
        value = float(word) if kind in (int, float) and word.lower() not in ("nan", "inf") else json.loads(word)
    except ValueError:
        raise _wrong_kind(key, word) from None
    return from_json(key, value)


def expand_path(key: Key, value: Any) -> Any:
    """The value, without a leading ~ if it is a path."""
    return os.path.expanduser(value) if value and key.limits.get("path") else value


def check_limits(key: Key, value: Any) -> None:
    """Raise ConfigError when a value of the right type lies outside the key's limits."""
    if value is None:
        return
    limits = key.limits
    for one in value if isinstance(value, list) else [value]:
        if "choices" in limits and one not in limits["choices"]:
            choices = ", ".join(shown(choice) for choice in limits["choices"])
            near = nearest(str(one), [str(choice) for choice in limits["choices"]])
            hint = f"; did you mean {shown(near)}?" if near else ""
            raise ConfigError(f"{key.name} must be one of {choices}, not {shown(one)}{hint}", key.name)
        if "at_least" in limits and not one >= limits["at_least"]:
            raise ConfigError(f"{key.name} must be at least {limits['at_least']}, not {one}", key.name)
        if "above" in limits and not one > limits["above"]:
            raise ConfigError(f"{key.name} must be above {limits['above']}, not {one}", key.name)
        if "at_most" in limits and not one <= limits["at_most"]:
            raise ConfigError(f"{key.name} must be at most {limits['at_most']}, not {one}", key.name)


def _check_texts(value: Any) -> None:
    """No path can hold half a character (a lone surrogate) or a zero byte; here both are said in one line."""
    if isinstance(value, dict):
        for pair in value.items():
            _check_texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_texts(item)
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ConfigError(f"{json.dumps(value)[:80]} holds a character that no text or path can have")


def read_config(path: str) -> Dict[str, Any]:
    """The names and raw values of a JSON config file.

    Raises:
        ConfigError: there is no such file, it is not a JSON object, or it holds a text that no path can have.
    """
    path = os.path.expanduser(path)
    config = read_config_object(path)
    try:
        _check_texts(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config
