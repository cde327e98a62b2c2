"""tuned_from.json: where the tensors come from that a checkpoint does not hold, because its run did not change them."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

from paddlemix.checkpoint.json_files import read_json_object, write_json
from paddlemix.utils.errors import WeightsError

TUNED_FROM_NAME = "tuned_from.json"
_KEYS = ("model_name_or_path", "text_model_name_or_path")


class TunedFrom(NamedTuple):
    """base: the model folder that was tuned. text: the folder whose LLM took the place of the base's, or None."""

    base: Optional[str] = None
    text: Optional[str] = None


def write_tuned_from(folder: str, base: str, text: Optional[str]) -> None:
    write_json(os.path.join(folder, TUNED_FROM_NAME), dict(zip(_KEYS, (base, text))))


def read_tuned_from(folder: str) -> TunedFrom:
    """What the file says; without one, nothing.

    Raises:
        WeightsError: it is no JSON object, or its values are no texts.
    """
    path = os.path.join(folder, TUNED_FROM_NAME)
    if not os.path.lexists(path):
        return TunedFrom()
    values = read_json_object(path)
    found = [values.get(key) for key in _KEYS]
    if not all(value is None or isinstance(value, str) for value in found):
        raise WeightsError(f"{path}: {' and '.join(_KEYS)} must be folders")
    return TunedFrom(*found)
