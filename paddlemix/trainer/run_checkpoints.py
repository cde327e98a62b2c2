"""Checkpoints of a run: sealed when complete, found for resuming, pruned; every deletion is logged.

output_dir/checkpoint-<step>/ is written under another name and renamed once every file is on disk and listed, with its
size, in `checkpoint.json` (the seal). A folder that differs from its list is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from typing import Any, Dict, Iterator, List, Optional, Tuple

from paddlemix.checkpoint import model_folder
from paddlemix.checkpoint.model_folder import inside
from paddlemix.utils.errors import ConfigError, JobFailed, WeightsError
from paddlemix.utils.files import atomic_write, rename_folder, sync
from paddlemix.utils.json_files import read_json_object
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line, some

SEAL_NAME = "checkpoint.json"
PARTIAL_PREFIX = ".partial-"
# Marks a finished run in output_dir.
RESULT_NAME = "train_results.json"
_RESULTS = (model_folder.WEIGHTS, model_folder.TUNED_WEIGHTS, model_folder.TUNING, model_folder.RECORD)


def step_of(folder: str) -> int:
    """The optimizer step in a checkpoint folder's name, or -1."""
    match = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(folder)))
    return int(match.group(1)) if match else -1


def seal(folder: str, state: Dict[str, Any]) -> None:
    """Flush every file of a checkpoint to disk and list it, with `state` (small values), in the seal."""
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


def publish(written: str, final: str) -> None:
    """Rename a sealed checkpoint durably: older ones may be deleted after this."""
    if os.path.isdir(final):
        shutil.rmtree(final)
    sync(written)
    rename_folder(written, final)
    sync(os.path.dirname(final))


def read_seal(folder: str) -> Optional[Dict[str, Any]]:
    """The `state` of a checkpoint's seal, or None if it is incomplete or its seal names files elsewhere."""
    try:
        # A loss of float16 may be NaN.
        content = read_json_object(os.path.join(folder, SEAL_NAME), constants=True)
        for name, size in content["files"].items():
            if os.path.getsize(inside(folder, name)) != size:
                return None
        return content["state"]
    except (OSError, KeyError, TypeError, AttributeError, WeightsError):
        return None


def check_order(folder: str, stored: Dict[str, Any], ours: Dict[str, Any]) -> None:
    """Raise ConfigError if the settings that determine the sample order differ from those of checkpoint `folder`.

    stored, ours: these settings in the checkpoint and in this run.
    """
    changed = {
        name: f"{one_line(name)} was {one_line(str(stored.get(name, 'off')))}, is {ours.get(name, 'off')}"
        for name in {**ours, **stored}
        if stored.get(name) != ours.get(name)
    }
    if changed:
        raise ConfigError(f"{folder} belongs to another run: {', '.join(changed.values())}", *changed)


def checkpoints(output_dir: str) -> List[str]:
    """Checkpoint folders by step, oldest first, complete or not."""
    found = [path for path in glob.glob(os.path.join(glob.escape(output_dir), "checkpoint-*")) if step_of(path) >= 0]
    return sorted((path for path in found if os.path.isdir(path)), key=step_of)


def last_complete(output_dir: str) -> Optional[str]:
    """The newest complete checkpoint; newer broken ones are logged and skipped."""
    for path in reversed(checkpoints(output_dir)):
        if read_seal(path) is not None:
            return path
        logger.warning(f"{path} is incomplete (a file is missing or was truncated); skipped")
    return None


def thin_out(output_dir: str, keep: Optional[int], best: Optional[str]) -> None:
    """Delete the oldest checkpoints so that `keep` complete ones remain, and the best one. None keeps all."""
    complete = [path for path in checkpoints(output_dir) if read_seal(path) is not None]
    if not keep or len(complete) < keep:
        return
    # Broken ones do not count: they may be newer than what a resumed run has just saved.
    kept = None if best is None else os.path.abspath(best)
    for path in checkpoints(output_dir):
        if step_of(path) < step_of(complete[-keep]) and os.path.abspath(path) != kept:
            logger.info(f"Deleting older checkpoint [{path}] due to save_total_limit={keep}")
            shutil.rmtree(path)


def check_output(
    output_dir: str, *, overwrite: bool, resume: bool, resume_from: Optional[str]
) -> Tuple[Optional[str], List[str]]:
    """(checkpoint to resume from or None, files of a finished run to delete). Changes nothing.

    resume: from the newest complete checkpoint in output_dir; without one the folder must hold no result. resume_from:
    from this folder, which must be the newest in output_dir if that has any. Otherwise a folder with an unfinished run
    is refused. A finished run that is resumed counts as unfinished again, so its RESULT_NAME is to be deleted; any
    other result is replaced only with `overwrite`.

    Raises:
        ConfigError: the folder holds a run and neither resume nor overwrite is set.
    """
    if resume_from and read_seal(resume_from) is None:
        raise ConfigError(
            f"resume_from_checkpoint: {resume_from} is not a complete checkpoint of this program",
            "resume_from_checkpoint",
        )
    last, result = last_complete(output_dir), os.path.join(output_dir, RESULT_NAME)
    finished = [result] if os.path.isfile(result) else []
    if resume_from and last is not None and not os.path.samefile(last, resume_from):
        # With both, the next --resume would take the newest, whichever run it belongs to.
        raise ConfigError(
            f"{output_dir} also contains {os.path.basename(last)}, from which --resume would continue; to "
            f"resume from {resume_from}, set another output_dir, or delete the newer checkpoints",
            "resume_from_checkpoint",
        )
    if last is not None and (resume or resume_from):
        return last, finished
    old = checkpoints(output_dir)
    if os.path.isdir(output_dir):
        old += [os.path.join(output_dir, name) for name in model_folder.files_of(output_dir, *_RESULTS)]
    if resume and old:
        names = some([os.path.basename(path) for path in old], 3)
        raise ConfigError(
            f"--resume: {output_dir} has no complete checkpoint to resume from, but {names}: to continue training "
            "from a finished result, give it as lora_path (LoRA) or model_name_or_path and set another output_dir; to "
            "replace it, remove --resume",
            "resume",
        )
    if last is not None and not finished:
        raise ConfigError(
            f"{output_dir} contains an unfinished run ({os.path.basename(last)}): add --resume to "
            "continue it, or delete the folder to start over",
            "unfinished-run",
        )
    # The result file last: as long as it exists, the rest does not look like an unfinished run.
    old.sort(key=lambda path: os.path.basename(path) == RESULT_NAME)
    if old and not overwrite:
        raise ConfigError(
            f"{output_dir} contains the result of a run: set overwrite_output_dir=true or another output_dir",
            "overwrite_output_dir",
        )
    return resume_from, old


def clear_output(output_dir: str, old: List[str]) -> None:
    """Delete these files of a finished run, which are logged, and leftovers of killed saves."""
    for path in glob.glob(os.path.join(glob.escape(output_dir), PARTIAL_PREFIX + "*")):
        shutil.rmtree(path)
    for path in old:
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    if old:
        names = ", ".join(os.path.basename(path) for path in old)
        logger.warning(f"deleted from {output_dir} the finished run's {names}")


@contextlib.contextmanager
def disk_errors(what: str, partial: str) -> Iterator[None]:
    """Turn a failed write into a JobFailed that says what to do, and remove the partial folder."""
    try:
        yield
    except (OSError, JobFailed) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise JobFailed(
            f"{what} could not be written ({reason}); earlier checkpoints are intact: free the disk and add --resume",
            "disk",
        ) from error
