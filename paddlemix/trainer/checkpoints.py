"""Checkpoints of a run: sealed when whole, found again for resuming, thinned out, and never thrown away
unsaid.

output_dir/checkpoint-<step>/ is written under another name and renamed once every file is on disk and
listed, with its size, in `checkpoint.json`. A folder whose list does not hold is no checkpoint.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from typing import Any, Dict, List, Optional

from paddlemix.utils.errors import ConfigError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger

SEAL_NAME = "checkpoint.json"
PARTIAL_PREFIX = ".partial-"
# What a finished run leaves in output_dir beside its weights.
RESULT_NAME = "train_results.json"
_RESULTS = (
    RESULT_NAME,
    "all_results.json",
    "eval_results.json",
    "trainer_state.json",
    "training_args.bin",
    "lora_config.json",
    "lora_model_state.pdparams",
    "model_state*.pdparams",
    "model_state.pdparams.index.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)


def step_of(folder: str) -> int:
    """The optimizer step in a checkpoint folder's name, or -1."""
    match = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(folder)))
    return int(match.group(1)) if match else -1


def seal(folder: str, state: Dict[str, Any]) -> None:
    """Flush every file of a checkpoint to disk and list them, with `state` (small values), in its seal."""
    files = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        files[name] = os.path.getsize(path)
    with atomic_write(os.path.join(folder, SEAL_NAME)) as file:
        json.dump({"files": files, "state": state}, file, indent=1)


def read_seal(folder: str) -> Optional[Dict[str, Any]]:
    """The `state` a checkpoint was sealed with, or None when it is not whole."""
    try:
        with open(os.path.join(folder, SEAL_NAME), encoding="utf-8") as file:
            content = json.load(file)
        for name, size in content["files"].items():
            if os.path.getsize(os.path.join(folder, name)) != size:
                return None
        return content["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def checkpoints(output_dir: str) -> List[str]:
    """Checkpoint folders by step, oldest first, whole or not."""
    found = [
        path
        for path in glob.glob(os.path.join(glob.escape(output_dir), "checkpoint-*"))
        if step_of(path) >= 0
    ]
    return sorted((path for path in found if os.path.isdir(path)), key=step_of)


def last_whole(output_dir: str) -> Optional[str]:
    """The newest whole checkpoint; broken ones newer than it are named in the log and passed over."""
    for path in reversed(checkpoints(output_dir)):
        if read_seal(path) is not None:
            return path
        logger.warning(
            f"{path} is not whole (a file is missing or shorter than when it was saved); passed over"
        )
    return None


def remove_partial(output_dir: str) -> None:
    """Remove what a save that was interrupted left behind."""
    for path in glob.glob(os.path.join(glob.escape(output_dir), PARTIAL_PREFIX + "*")):
        shutil.rmtree(path)


def thin_out(output_dir: str, keep: Optional[int], best: Optional[str]) -> None:
    """Delete the oldest checkpoints so that `keep` remain; the best one is kept besides. None keeps all."""
    if not keep:
        return
    for path in checkpoints(output_dir)[:-keep]:
        if best is None or os.path.abspath(path) != os.path.abspath(best):
            logger.info(f"Deleting older checkpoint [{path}] due to save_total_limit={keep}")
            shutil.rmtree(path)


def prepare_output(
    output_dir: str, *, overwrite: bool, resume: bool, resume_from: Optional[str], write: bool = True
) -> Optional[str]:
    """Make output_dir ready for a run and return the checkpoint to resume from, or None for a fresh start.

    resume: from the newest whole checkpoint in output_dir, if any. resume_from: from this folder. Otherwise
    a folder with an unfinished run is refused, and the result of a finished one is replaced only with
    `overwrite`, after saying what is deleted. write=False (not the first process) only finds the
    checkpoint.

    Raises:
        ConfigError: the folder holds a run and neither resume nor overwrite says what to do with it.
    """
    if resume_from:
        if read_seal(resume_from) is None:
            raise ConfigError(
                f"resume_from_checkpoint: {resume_from} is not a whole checkpoint of this program"
            )
        return resume_from
    last = last_whole(output_dir)
    if resume and last is not None:
        return last
    old = checkpoints(output_dir)
    results = [
        path for name in _RESULTS for path in sorted(glob.glob(os.path.join(glob.escape(output_dir), name)))
    ]
    finished = os.path.isfile(os.path.join(output_dir, RESULT_NAME))
    if last is not None and not finished:
        raise ConfigError(
            f"{output_dir} holds an unfinished run ({os.path.basename(last)}): add --resume to go on "
            "with it, or delete the folder to begin anew"
        )
    if (old or results) and not overwrite:
        raise ConfigError(
            f"{output_dir} holds the result of a run: set overwrite_output_dir=true or another output_dir"
        )
    if write:
        remove_partial(output_dir)
        # Checkpoints go first: while the result file stands, what is left cannot pass for an unfinished run.
        for path in old:
            shutil.rmtree(path)
        for path in results:
            os.unlink(path)
        if old or results:
            names = ", ".join(os.path.basename(path) for path in old + results)
            logger.warning(f"overwrite_output_dir: deleted from {output_dir} the finished run's {names}")
    return None
