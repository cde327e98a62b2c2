"""JSON beside weights (indexes, configurations): bounded, and strict where a reader could be misled."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

from paddlemix.checkpoint.tensors import MappedFile, printable
from paddlemix.utils.errors import WeightsError

# The index of a 7B has 80 KB.
MAX_JSON = 64 << 20
# Lists and objects take fifty times their two letters. A log of a million steps has as many.
MAX_CONTAINERS = 1 << 20


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise WeightsError(f"the key {printable(key)} stands in it twice")
        result[key] = value
    return result


def _integer(text: str) -> int:
    if len(text) > 20:
        raise WeightsError("a number without measure")
    return int(text)


def _no_number(text: str) -> None:
    raise WeightsError(f"{printable(text)} is no number")


def strict_json(data: bytes, path: str, constants: bool = False) -> Dict[str, Any]:
    """A JSON object without doubled keys, numbers of more than 20 digits, or more than MAX_CONTAINERS.

    constants: take NaN and Infinity, as a log of losses may hold them.

    Raises:
        WeightsError: it is not that; the message starts with `path`.
    """
    if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
        raise WeightsError(f"{path}: refused: more than {MAX_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=float if constants else _no_number,
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return value


def read_json_object(path: str, constants: bool = False) -> Dict[str, Any]:
    """A JSON object from a file, as strict_json reads it.

    Raises:
        WeightsError: missing, no regular file, over MAX_JSON bytes, or not that.
    """
    file = MappedFile(path)
    try:
        if file.size > MAX_JSON:
            raise WeightsError(f"{path} is too large for a JSON file beside weights")
        return strict_json(bytes(file.view), path, constants)
    finally:
        file.close()


def write_json(path: str, value: Dict[str, Any]) -> None:
    """Write into a folder that is itself not in place yet."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
