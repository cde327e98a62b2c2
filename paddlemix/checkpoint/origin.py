"""tuned_from.json: the models that a tuning run started from, for the tensors that it did not change.

    model_name_or_path        the base, as the run's configuration names it
    text_model_name_or_path   the model whose LLM took the place of the base's, or null
    base_fingerprint          model_fingerprint of each
    text_fingerprint

The folders are names only. Whether a folder is the one meant is told by its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import NamedTuple, Optional

from paddlemix.checkpoint.json_files import read_json_object, write_json
from paddlemix.checkpoint.model_folder import TUNED_FROM_NAME, inside
from paddlemix.checkpoint.shards import open_weights
from paddlemix.checkpoint.structure import structure
from paddlemix.utils.errors import WeightsError

_KEYS = ("model_name_or_path", "text_model_name_or_path", "base_fingerprint", "text_fingerprint")


class Origin(NamedTuple):
    """base: the folder of the model that was tuned. text: the one whose LLM took the place of the base's, or None.

    The fingerprints are None in the note of an older version.
    """

    base: Optional[str] = None
    text: Optional[str] = None
    base_fingerprint: Optional[str] = None
    text_fingerprint: Optional[str] = None

    @classmethod
    def of(cls, base: str, text: Optional[str] = None) -> Origin:
        """The note of a run on these folders, which are read (see model_fingerprint)."""
        return cls(base, text, model_fingerprint(base), None if text is None else model_fingerprint(text))

    @classmethod
    def read(cls, folder: str) -> Origin:
        """What the note in a folder says; nothing without one.

        Raises:
            WeightsError: it is not a JSON object, or its values are not texts.
        """
        path = inside(folder, TUNED_FROM_NAME)
        if not os.path.lexists(path):
            return cls()
        values = read_json_object(path)
        found = [values.get(key) for key in _KEYS]
        if not all(value is None or isinstance(value, str) for value in found):
            raise WeightsError(f"{path}: {' and '.join(_KEYS[:2])} must be folders, the fingerprints texts")
        return cls(*found)

    def write(self, folder: str) -> None:
        write_json(os.path.join(folder, TUNED_FROM_NAME), dict(zip(_KEYS, self)))


def model_fingerprint(folder: str) -> str:
    """A SHA-256, as hex, of what a model folder computes: the structure in its config.json, and each tensor's name,
    shape and a sample of its values.

    The format and the sharding of the weights do not matter, nor whether float16 or bfloat16 was widened to float32.
    A few KB of each tensor are read: that tells models apart, and a tuned one from its base, but not a single value
    changed on purpose.

    Raises:
        WeightsError: no config.json, or weights that cannot be read.
    """
    config = read_json_object(inside(folder, "config.json"))
    digest = hashlib.sha256(json.dumps(structure(config), sort_keys=True).encode())
    with open_weights(folder) as reader:
        for name in sorted(reader.keys()):
            digest.update(json.dumps([name, reader.info(name).shape]).encode())
            digest.update(reader.sample(name).tobytes())
    return digest.hexdigest()
