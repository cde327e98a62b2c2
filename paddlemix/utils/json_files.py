"""Strict reading of JSON files of a model or a run, which may be untrusted: bounded size, no duplicate keys."""

from __future__ import annotations

import codecs
import json
from typing import Any, Dict, List, Tuple, Type, Union

from paddlemix.utils.errors import ConfigError, UserError, WeightsError
from paddlemix.utils.files import atomic_write, open_plain
from paddlemix.utils.texts import one_line

# A configuration has a few KB, the index of a 7B 80 KB, the log of a million steps some MB.
MAX_CONFIG_BYTES = 4 << 20
MAX_JSON_BYTES = 64 << 20
# Lists and objects take fifty times their two characters in memory.
MAX_CONTAINERS = 1 << 20
MAX_DIGITS = 20


def short_int(digits: Union[str, bytes]) -> int:
    """int() with at most 20 digits, else ValueError: older Pythons take quadratic time."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {one_line(key)} is in it twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not allowed here")


def strict_json(
    data: bytes, path: str, constants: bool = False, error: Type[UserError] = WeightsError
) -> Dict[str, Any]:
    """Parse a JSON object without duplicate keys, integers of more than 20 digits, or more than MAX_CONTAINERS.

    constants: accept NaN and Infinity, which logs of losses may hold.

    Raises:
        `error`: anything else; the message starts with `path`.
    """
    if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
        raise error(f"{path}: refused: more than {MAX_CONTAINERS:,} lists and objects", "json")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=short_int,
            parse_constant=float if constants else _refuse_constant,
        )
    except RecursionError:
        raise error(f"{path} is not JSON: nested too deeply", "json") from None
    except ValueError as reason:
        raise error(f"{path} is not JSON: {one_line(str(reason), 200)}", "json") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object", "json")
    return value


def _read(path: str, limit: int, constants: bool, error: Type[UserError]) -> Dict[str, Any]:
    try:
        with open_plain(path) as file:
            data = file.read(limit + 1)
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}", "unreadable") from None
    if len(data) > limit:
        raise error(f"{path} is larger than {limit >> 20} MB, too large for such a file", "size")
    # Notepad and PowerShell write a BOM.
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    return strict_json(data[start:], path, constants, error)


def read_config_object(path: str) -> Dict[str, Any]:
    """The JSON object in a configuration file, parsed by strict_json.

    Raises:
        ConfigError: missing, not a regular file, over MAX_CONFIG_BYTES, or not such an object.
    """
    return _read(path, MAX_CONFIG_BYTES, False, ConfigError)


def read_json_object(path: str, constants: bool = False) -> Dict[str, Any]:
    """The JSON object in a file of a model or run folder, parsed by strict_json.

    Raises:
        WeightsError: missing, not a regular file, over MAX_JSON_BYTES, or not such an object.
    """
    return _read(path, MAX_JSON_BYTES, constants, WeightsError)


def write_json(path: str, value: Dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
