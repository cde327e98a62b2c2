"""tuned_from.json: the models that a tuning run started from, which hold the tensors that it did not change.

    model_name_or_path        the base, as the run's configuration names it
    text_model_name_or_path   the model whose LLM took the place of the base's, or null
    base_fingerprint          model_fingerprint of each
    text_fingerprint

The folder names are only hints, and the file may be untrusted: the fingerprints identify the models.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

from paddlemix.checkpoint.model_folder import TUNED_FROM_NAME, VOCABULARIES, inside
from paddlemix.checkpoint.shards import open_weights
from paddlemix.checkpoint.structure import structure
from paddlemix.utils.errors import WeightsError
from paddlemix.utils.json_files import read_json_object, write_json
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line

_KEYS = ("model_name_or_path", "text_model_name_or_path", "base_fingerprint", "text_fingerprint")


class Origin(NamedTuple):
    """base: folder of the model that was tuned. text: folder of the model whose LLM replaced the base's, or None.

    The fingerprints are None in files of older versions.
    """

    base: Optional[str] = None
    text: Optional[str] = None
    base_fingerprint: Optional[str] = None
    text_fingerprint: Optional[str] = None

    @classmethod
    def of(cls, base: str, text: Optional[str] = None) -> Origin:
        """The origin of a run on these folders, which are read (see model_fingerprint)."""
        return cls(base, text, model_fingerprint(base), None if text is None else model_fingerprint(text))

    @classmethod
    def read(cls, folder: str) -> Origin:
        """The origin recorded in a folder; all None without one.

        Raises:
            WeightsError: it is not a JSON object, or its values are not texts.
        """
        path = inside(folder, TUNED_FROM_NAME)
        if not os.path.lexists(path):
            return cls()
        values = read_json_object(path)
        found = [values.get(key) for key in _KEYS]
        if not all(value is None or isinstance(value, str) for value in found):
            raise WeightsError(f"{path}: {', '.join(_KEYS)} must be strings", *_KEYS)
        return cls(*found)

    def write(self, folder: str) -> None:
        write_json(os.path.join(folder, TUNED_FROM_NAME), dict(zip(_KEYS, self)))

    def check(
        self,
        tuned: str,
        base: str,
        text: Optional[str] = None,
        force: bool = False,
        warn: Callable[[str], Any] = logger.warning,
    ) -> None:
        """Check that the run in `tuned`, whose origin this is, started from the model in `base` and, if given, the LLM
        of the one in `text`.

        A missing fingerprint is only a warning, passed to `warn`; with `force`, so is another model.

        Raises:
            WeightsError: it started from another model, or the two vocabularies differ.
        """
        if not force:
            check_same_vocabulary(tuned, base)
        if self.base_fingerprint is None:
            warn(
                f"{tuned} does not record which weights it was tuned from (an older version wrote it): "
                f"cannot check that {base} is that model"
            )
        pairs = ((base, self.base, self.base_fingerprint), (text, self.text, self.text_fingerprint))
        for folder, there, noted in pairs:
            if folder is None or noted is None or model_fingerprint(folder) == noted:
                continue
            again = Origin.read(folder).base_fingerprint == noted
            problem = f"{tuned} was tuned from {one_line(str(there), 300)}, and {folder} is another model" + (
                ", itself tuned from that one: has this run been merged into it already?" if again else ""
            )
            if not force:
                code = "already-merged" if again else "other-model"
                raise WeightsError(f"{problem} (merge_lora_params.py --force merges anyway)", code)
            warn(problem)

    def same_weights(self, other: Origin) -> bool:
        """Whether both name the same models, as far as fingerprints are known."""
        pairs = ((self.base_fingerprint, other.base_fingerprint), (self.text_fingerprint, other.text_fingerprint))
        return all(None in pair or pair[0] == pair[1] for pair in pairs)

    def find(self) -> Tuple[Optional[str], Optional[str]]:
        """(base, text) as recorded, each None unless the model there has the recorded fingerprint.

        So an untrusted file can only lead to a model whose fingerprint its author knows.
        """
        pairs = ((self.base, self.base_fingerprint), (self.text, self.text_fingerprint))
        return tuple(folder if folder is not None and _is_model(folder, noted) else None for folder, noted in pairs)


def check_same_vocabulary(tuned: str, base: str) -> None:
    """Check that a tuned folder and its base have the same tokens, where both have a vocabulary: a run changes none.

    Raises:
        WeightsError: they have not.
    """
    both = [tokens for tokens in map(_tokens, (tuned, base)) if tokens is not None]
    if len(both) == 2 and both[0] != both[1]:
        text = f"{tuned} and its base {base} have different vocabularies: copy the base's into {tuned}"
        raise WeightsError(text, "other-vocabulary")


def _tokens(folder: str) -> Optional[List[bytes]]:
    for path in (inside(folder, name) for name in VOCABULARIES):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return sorted(filter(None, file.read().splitlines()))
    return None


def _is_model(folder: str, fingerprint: Optional[str]) -> bool:
    try:
        return fingerprint is not None and os.path.isdir(folder) and model_fingerprint(folder) == fingerprint
    except (WeightsError, OSError):
        return False


def model_fingerprint(folder: str) -> str:
    """SHA-256 (hex) of a model: the structure in its config.json, and each tensor's name, shape and a sample of values.

    Format and sharding do not matter, nor whether float16 or bfloat16 was widened to float32. A few KB of each tensor
    are read: enough to tell models apart, and a tuned one from its base, but not to detect a single altered value.

    Raises:
        WeightsError: no config.json, or weights that cannot be read.
    """
    config = read_json_object(os.path.join(folder, "config.json"))
    digest = hashlib.sha256(json.dumps(structure(config), sort_keys=True).encode())
    with open_weights(folder) as reader:
        for name in sorted(reader.keys()):
            digest.update(json.dumps([name, reader.info(name).shape]).encode())
            digest.update(reader.sample(name).tobytes())
    return digest.hexdigest()
