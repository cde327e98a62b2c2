"""Creating the submission folder and its archive.

submission/
  requirements.txt        what the platform lacks
  run.sh
  src/                    predict.py and the package
  weights/<model folder>/ the merged weights, hard-linked where the file system allows
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from types import SimpleNamespace
from typing import List, NamedTuple, Set

from paddlemix.checkpoint import WeightsReader, find_weights, model_folder, open_weights
from paddlemix.checkpoint.model_folder import INDEX_SUFFIX, VOCABULARIES, find_tuned_weights, gather, inside
from paddlemix.contest.sources import REQUIREMENTS_NAME
from paddlemix.inference.source import find_model_folder
from paddlemix.models.mgen_vl.config_values import plain_config
from paddlemix.models.mgen_vl.parameters import check_weights, parameter_shapes
from paddlemix.utils.errors import UserError, WeightsError
from paddlemix.utils.files import atomic_folder, atomic_write, copy_file, link_or_copy
from paddlemix.utils.outputs import disk_errors
from paddlemix.utils.progress import Progress

SCRIPT, PACKAGE, RUN_SH, SOURCE, WEIGHTS = "predict.py", "paddlemix", "run.sh", "src", "weights"
NAMES = (REQUIREMENTS_NAME, RUN_SH, SOURCE, WEIGHTS)
# In the project's own submission/ folder; kept there, and not part of the submission.
README = "README.md"
SUMS_NAME = "SHA256SUMS"

_LOCAL = (RUN_SH, SCRIPT, PACKAGE)


class Packed(NamedTuple):
    """model: name of the model folder under weights/. large: names of its weights files. linked: whether these are hard
    links. nbytes: total size of all files."""

    folder: str
    model: str
    large: List[str]
    linked: bool
    nbytes: int


def open_model(path: str) -> WeightsReader:
    """The weights of a complete model folder, or of the only one inside `path`.

    Raises:
        UserError: not a merged model (a LoRA or partial checkpoint), or a file or tensor is missing.
    """
    if find_tuned_weights(path) is not None:
        # Raises an error with the merge command, unless there are full weights too.
        find_weights(path)
    folder = find_model_folder(path)
    reader = open_weights(folder)
    try:
        check_weights(reader, parameter_shapes(plain_config(folder)), folder)
        if not any(os.path.isfile(inside(folder, name)) for name in VOCABULARIES):
            raise WeightsError(f"{folder} has no vocabulary: put mgen.tiktoken into it", "no-vocabulary")
    except BaseException:
        reader.close()
        raise
    return reader


def check_target(out: str, inputs: List[str], overwrite: bool) -> None:
    """Check that a submission can be written: not over an input or anything but a submission, and over an older one
    only with `overwrite`.

    Raises:
        UserError: it cannot.
    """
    there = sorted(set(os.listdir(out)) - {README}) if os.path.isdir(out) else []
    model_folder.check_new_folder(out, inputs, overwrite or not there)
    strange = [name for name in there if name not in NAMES]
    if strange:
        text = f"{out} holds {strange[0]}, which does not belong to a submission: give another folder"
        raise UserError(text, "other-files")


def check_beside(folder: str) -> None:
    """Check that a folder to be replaced by split weights holds nothing else.

    Raises:
        UserError: it does.
    """
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name != SUMS_NAME and not name.endswith((".pdparams", ".safetensors", ".bin")):
            raise UserError(f"{folder} holds {name}, which is not a weights file: move it away", "other-files")


def pack_submission(project: str, weights: str, out: str, requirements: str, overwrite: bool = False) -> Packed:
    """Write the submission folder `out` from the sources in `project` and the model folder `weights`, atomically.

    requirements: the file that lists packages that the platform lacks.

    Raises:
        UserError: the weights are not a merged model (see open_model), or `out` cannot be written (check_target).
        JobFailed: the disk is full.
    """
    missing = [name for name in _LOCAL if not os.path.exists(os.path.join(project, name))]
    if missing:
        raise UserError(f"no {missing[0]} in {project}: give the project's top folder")
    if not os.path.isfile(requirements):
        raise UserError(f"no file {requirements}")
    check_target(out, [weights, *(os.path.join(project, name) for name in _LOCAL)], overwrite)
    with open_model(weights) as reader:
        large = [os.path.basename(path) for path in reader.files]
        folder = os.path.dirname(os.path.abspath(reader.files[0]))
        weight_bytes = sum(os.path.getsize(path) for path in reader.files)
    model = os.path.basename(os.path.realpath(folder))
    for name in (os.path.basename(os.path.abspath(out)), model):
        if os.fsencode(name).decode("utf-8", "replace") != name:
            raise UserError(f"the folder name {name} is not UTF-8, as names in an archive must be: rename it")
    needed = (model_folder.CONFIG, model_folder.TOKENIZER, model_folder.TEMPLATE)
    small = gather([folder], *needed, model_folder.FONT, model_folder.LICENCE)
    index = find_weights(folder)
    if index.endswith(INDEX_SUFFIX):
        small[index] = inside(folder, index)

    with disk_errors(out), atomic_folder(out) as partial:
        shutil.copyfile(requirements, os.path.join(partial, REQUIREMENTS_NAME))
        shutil.copy(os.path.join(project, RUN_SH), partial)
        source = os.path.join(partial, SOURCE)
        hidden = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(os.path.join(project, PACKAGE), os.path.join(source, PACKAGE), ignore=hidden)
        shutil.copy(os.path.join(project, SCRIPT), source)
        if os.path.isfile(os.path.join(project, "LICENSE")):
            shutil.copy(os.path.join(project, "LICENSE"), source)
        if os.path.isfile(os.path.join(out, README)):
            shutil.copy2(os.path.join(out, README), partial)
        target = os.path.join(partial, WEIGHTS, model)
        os.makedirs(target)
        for name, path in small.items():
            shutil.copyfile(path, os.path.join(target, name))
        linked = []
        with Progress(weight_bytes, desc="weights", unit="B") as bar:
            for name in large:
                linked.append(link_or_copy(inside(folder, name), os.path.join(target, name), bar.update))
    nbytes = sum(os.path.getsize(path) for path, _ in packed_files(out))
    return Packed(out, model, large, all(linked), nbytes)


# ---- archives


def packed_files(folder: str) -> List[tuple]:
    """(path, name in the archive) of a submission's files, in a fixed order; names start with the folder's name."""
    top = os.path.basename(os.path.abspath(folder))
    found = []
    for name in NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            found.append((path, f"{top}/{name}"))
        for parent, folders, names in os.walk(path):
            folders[:] = sorted(one for one in folders if one != "__pycache__")
            for one in sorted(names):
                inner = os.path.relpath(os.path.join(parent, one), folder).replace(os.sep, "/")
                found.append((os.path.join(parent, one), f"{top}/{inner}"))
    return found


def write_zip(folder: str, path: str, leave_out: Set[str] = frozenset()) -> int:
    """Write a submission folder as an uncompressed archive, atomically, with ZIP64 if needed. Returns its size.

    leave_out: paths of files to omit.

    Raises:
        JobFailed: the disk is full.
    """
    files = [pair for pair in packed_files(folder) if pair[0] not in leave_out]
    total = sum(os.path.getsize(file) for file, _ in files)
    with disk_errors(path), atomic_write(path, "wb") as target:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with Progress(total, desc=os.path.basename(path), unit="B") as bar:
                for file, name in files:
                    # With known sizes, zipfile uses ZIP64 only for entries that need it.
                    entry = zipfile.ZipInfo.from_file(file, name, strict_timestamps=False)
                    with archive.open(entry, "w") as out:
                        copy_file(file, out, bar.update)
    return os.path.getsize(path)


def split_weights(packed: Packed, out: str) -> Set[str]:
    """Write the weights files to the folder `out`, with their SHA-256 sums, so that they can be downloaded one at a
    time. Returns their paths in the submission.

    Raises:
        JobFailed: the disk is full.
    """
    folder = os.path.join(packed.folder, WEIGHTS, packed.model)
    total = sum(os.path.getsize(os.path.join(folder, name)) for name in packed.large)
    with disk_errors(out), atomic_folder(out) as partial:
        with Progress(total, desc="SHA-256", unit="B") as bar:
            with open(os.path.join(partial, SUMS_NAME), "w", encoding="utf-8") as sums:
                for name in packed.large:
                    link_or_copy(os.path.join(folder, name), os.path.join(partial, name))
                    digest = hashlib.sha256()
                    copy_file(os.path.join(folder, name), SimpleNamespace(write=digest.update), bar.update)
                    sums.write(f"{digest.hexdigest()}  {name}\n")
    return {os.path.join(folder, name) for name in packed.large}
