"""Strict conversion of text and JSON to typed values, by the type and limits of a Key."""

from __future__ import annotations

import json
import os
import typing
from typing import Any, Dict, List, NamedTuple

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.json_files import read_config_object
from paddlemix.utils.texts import nearest, shown


class Key(NamedTuple):
    """A configuration key.

    hint: its type as a typing object. limits: choices=(…), the allowed values; at_least=n, above=n, at_most=n for
    numbers; path=True for a path, in which a leading ~ is expanded.
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
    """The type as docs and errors name it: "an integer", "a string or null", …"""
    optional, kind, _ = _parts(hint)
    return _KINDS[kind] + (" or null" if optional else "")


def _wrong_kind(key: Key, value: Any) -> ConfigError:
    return ConfigError(f"{key.name} must be {type_name(key.hint)}, not {shown(value)}", key.name)


def from_json(key: Key, value: Any) -> Any:
    """A JSON value as the key's type. Strings are not converted to numbers, nor numbers to strings."""
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


def from_text(key: Key, args: List[str]) -> Any:
    """The arguments after `--key` on the command line as the key's type."""
    optional, kind, _ = _parts(key.hint)
    if kind is bool and not args:
        return True
    if not args:
        raise ConfigError(f"--{key.name} needs a value: {type_name(key.hint)}", key.name)
    if optional and args in (["null"], ["None"]):
        return None
    if kind is list and not (len(args) == 1 and args[0].lstrip().startswith("[")):
        return list(args)
    if len(args) > 1:
        raise ConfigError(f"--{key.name} takes one value, not {len(args)}: {' '.join(args)}", key.name)
    text = args[0]
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise _wrong_kind(key, text)
    try:
        value = float(text) if kind in (int, float) else json.loads(text)
    except ValueError:
        raise _wrong_kind(key, text) from None
    return from_json(key, value)


def expand_path(key: Key, value: Any) -> Any:
    """The value, with a leading ~ expanded if it is a path."""
    return os.path.expanduser(value) if value and key.limits.get("path") else value


# Of numbers without a limit: what visualdl, Paddle and numpy take, and what float32 holds.
_MOST = {int: 2**31 - 1, float: 3e38}


def check_limits(key: Key, value: Any) -> None:
    """Raise ConfigError if a value of the right type is outside the key's limits."""
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
        most = limits.get("at_most", _MOST.get(type(one)))
        if most is not None and not one <= most:
            raise ConfigError(f"{key.name} must be at most {most}, not {shown(one)}", key.name)


def _check_texts(value: Any) -> None:
    """Raise ConfigError for lone surrogates and zero bytes, which no path can hold."""
    if isinstance(value, dict):
        for pair in value.items():
            _check_texts(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_texts(item)
    elif isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ConfigError(f"{json.dumps(value)[:80]} holds a lone surrogate or a zero byte", "character")


def read_config(path: str) -> Dict[str, Any]:
    """The names and raw values of a JSON config file.

    Raises:
        ConfigError: the file is missing, is not a JSON object, or holds a lone surrogate or zero byte.
    """
    path = os.path.expanduser(path)
    config = read_config_object(path)
    try:
        _check_texts(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", *error.about) from None
    return config
