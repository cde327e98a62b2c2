"""Weights of a model folder in any layout: one file or shards with an index; .pdparams, safetensors or PyTorch's .bin.

reader = open_weights(folder)          headers only
reader.info(name)                      dtype, shape, file
reader.read(name, "float32")           one tensor
write_sharded(folder, items)           one tensor in memory at a time, in files that are renamed at the end
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import numpy as np

from paddlemix.checkpoint import pdparams, safetensors, torch_bin
from paddlemix.checkpoint.model_folder import INDEX_SUFFIX, WEIGHTS, files_of, find_weights, inside
from paddlemix.checkpoint.sink import Sink
from paddlemix.checkpoint.structure import is_language
from paddlemix.checkpoint.tensors import (
    FLOATS,
    NUMPY_TYPES,
    PIECE,
    FileBytes,
    MappedFile,
    Rows,
    StoredTensor,
    TensorInfo,
    convert_dtype,
    io_threads,
    own_pages,
    size_of,
)
from paddlemix.utils.errors import UserError, WeightsError
from paddlemix.utils.files import atomic_folder, atomic_write
from paddlemix.utils.json_files import read_json_object
from paddlemix.utils.outputs import disk_errors
from paddlemix.utils.progress import Progress
from paddlemix.utils.surroundings import allow_open_files
from paddlemix.utils.texts import one_line, parse_size, some

# Values that sample() takes from a tensor, in how many runs.
_SAMPLE, _STRETCHES = 1024, 4

# Base name and extension of each format that is written.
FORMATS = {"pdparams": ("model_state", ".pdparams"), "safetensors": ("model", ".safetensors")}

# (name, dtype, shape, read): read() returns the array, a FileBytes to copy, or Rows to compute.
Item = Tuple[str, str, Tuple[int, ...], Callable[[], Union[np.ndarray, FileBytes, Rows]]]

# ---- reading


def _parse(file: MappedFile) -> Dict[str, StoredTensor]:
    if file.path.endswith(".safetensors"):
        return safetensors.open_safetensors(file)
    if bytes(file.view[:4]) == torch_bin.MAGIC:
        return torch_bin.open_torch_bin(file)
    return pdparams.open_pdparams(file)


def _read_index(folder: str, name: str) -> Dict[str, str]:
    """weight_map of an index: key → file name."""
    path = inside(folder, name)
    table = read_json_object(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise WeightsError(f"{path} has no weight_map of keys and files", "weight_map")
    return table


def _converted(stored: str, dtype: Optional[str]) -> str:
    """The dtype of a stored tensor that is converted to `dtype`, if any: only floating-point tensors are."""
    return dtype if dtype is not None and stored in FLOATS else stored


class WeightsReader:
    """Tensors by name, over one file or many. Made by open_weights.

    read() returns read-only views of the mapped files. Their pages are released when the next tensor is read, so that
    reading a checkpoint does not fill the memory; a view stays valid, and its pages are read again when touched.
    """

    def __init__(self, tensors: Dict[str, StoredTensor], paths: Dict[str, str], files: List[MappedFile]):
        self._tensors = tensors
        self._paths = paths
        self._files = files
        self._shown: Optional[FileBytes] = None

    def keys(self) -> List[str]:
        return list(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def files(self) -> List[str]:
        """Paths of the weights files."""
        return [file.path for file in self._files]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise WeightsError(f"no tensor {one_line(name)} in {', '.join(self.files)}", "no-tensor")
        return self._tensors[name]

    def info(self, name: str) -> TensorInfo:
        """Raises WeightsError if there is no such tensor."""
        tensor = self._tensor(name)
        return TensorInfo(name, tensor.dtype, tensor.shape, tensor.nbytes, self._paths[name])

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: Optional[str] = None) -> np.ndarray:
        """A tensor as stored (a view of the file; bfloat16 as uint16), or converted to `dtype` (a new array).

        Raises:
            WeightsError: no such tensor, its bytes are broken, or a value does not fit `dtype`.
        """
        tensor = self._tensor(name)
        if self._shown is not None:
            self._shown.file.forget(self._shown.offset, self._shown.length)
        self._shown = tensor.where
        array = tensor.load()
        try:
            return convert_dtype(array, tensor.dtype, _converted(tensor.dtype, dtype))
        except WeightsError as error:
            raise WeightsError(f"{self._paths[name]}: {one_line(name)}: {error}", *error.about) from None

    def load(self, name: str, dtype: Optional[str] = None) -> np.ndarray:
        """A tensor as from read(), but always in memory of its own, read and converted by several threads.

        Raises:
            WeightsError: as read().
        """
        tensor = self._tensor(name)
        to = _converted(tensor.dtype, dtype)
        loaded = own_pages(tensor.shape, to)
        flat, kind = loaded.reshape(-1), NUMPY_TYPES[tensor.dtype]
        if tensor.where is None:
            loaded[...] = self.read(name, to)
            return loaded
        step = PIECE // kind.itemsize

        def piece(start: int) -> None:
            into = flat[start : start + step]
            place = start * kind.itemsize
            if to == tensor.dtype:
                tensor.where.read(place, into)
            else:
                convert_dtype(tensor.where.read(place, np.empty(into.shape, kind)), tensor.dtype, to, into)

        starts = range(0, flat.size, step)
        try:
            if len(starts) > 1:
                with ThreadPoolExecutor(io_threads()) as pool:
                    list(pool.map(piece, starts))
            else:
                list(map(piece, starts))
        except WeightsError as error:
            raise WeightsError(f"{self._paths[name]}: {one_line(name)}: {error}", *error.about) from None
        return loaded

    def raw(self, name: str) -> Union[FileBytes, np.ndarray]:
        """The tensor's byte range in its file, for write_sharded to copy; the array if its bytes are not in C order."""
        return self._tensor(name).where or self.read(name)

    def item(self, name: str, dtype: Optional[str] = None) -> Item:
        """The tensor for write_sharded; with `dtype`, converted to it if it is of a floating-point type."""
        info = self.info(name)
        to = _converted(info.dtype, dtype)
        read = functools.partial(self.raw, name) if to == info.dtype else functools.partial(self.read, name, to)
        return name, to, info.shape, read

    def sample(self, name: str) -> np.ndarray:
        """Up to _SAMPLE values spread over a tensor, in one dimension; those of floating-point types as float32.

        Raises:
            WeightsError: no such tensor, or its bytes are broken.
        """
        tensor = self._tensor(name)
        kind, size = NUMPY_TYPES[tensor.dtype], math.prod(tensor.shape)
        if size <= _SAMPLE:
            values = tensor.load().reshape(-1)
        else:
            length = _SAMPLE // _STRETCHES
            starts = [(size - length) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
            if tensor.where is not None:
                parts = [tensor.where.read(start * kind.itemsize, np.empty(length, kind)) for start in starts]
                values = np.concatenate(parts)
            else:
                places = np.concatenate([np.arange(start, start + length) for start in starts])
                values = tensor.load()[np.unravel_index(places, tensor.shape)]
        if tensor.dtype == "bfloat16":
            return convert_dtype(values, "bfloat16", "float32")
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float32) if tensor.dtype in FLOATS else values

    def with_llm_of(self, other: WeightsReader) -> WeightsReader:
        """These tensors, with those of the LLM taken from another reader. Both must stay open.

        Raises:
            WeightsError: the other LLM lacks tensors of this one, or has them in other shapes.
        """
        ours = [name for name in self.keys() if is_language(name)]
        lost = [name for name in ours if name not in other or other.info(name).shape != self.info(name).shape]
        if lost:
            names = some(one_line(name, 300) for name in lost)
            raise WeightsError(f"{other.files[0]} has another LLM than {self.files[0]}: {names}", "other-llm")
        tensors = {name: (other if is_language(name) else self)._tensors[name] for name in self.keys()}
        paths = {name: (other if is_language(name) else self)._paths[name] for name in self.keys()}
        return WeightsReader(tensors, paths, self._files)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def open_weights(path: str) -> WeightsReader:
    """Open the weights of a model folder, or one weights file. Reads headers only, and executes nothing.

    Raises:
        WeightsError: in one line: no weights, several layouts at once, a broken file, a key in no file or in two, an
        index that names files outside the folder.
    """
    path = str(path)
    if os.path.isdir(path) or not os.path.exists(path):
        folder, name = path, find_weights(path)
    else:
        folder, name = os.path.split(path)
        folder = folder or "."
    table: Optional[Dict[str, str]] = None
    if name.endswith(INDEX_SUFFIX):
        table = _read_index(folder, name)
        names = sorted(set(table.values()))
        paths = [inside(folder, shard) for shard in names]
    elif folder is not path and os.path.isfile(path):
        # Named by the user, so a link may lead anywhere.
        names, paths = [name], [path]
    else:
        names, paths = [name], [inside(folder, name)]

    files: List[MappedFile] = []
    tensors: Dict[str, StoredTensor] = {}
    where: Dict[str, str] = {}
    try:
        for shard, shard_path in zip(names, paths):
            files.append(MappedFile(shard_path))
            for key, tensor in _parse(files[-1]).items():
                if key in tensors:
                    raise WeightsError(f"{one_line(key)} is in both {where[key]} and {shard_path}", "duplicate")
                if table is not None and table.get(key) != shard:
                    listed = "another file" if key in table else "no file"
                    text = f"{shard_path} holds {one_line(key)}, but the index has it in {listed}"
                    raise WeightsError(text, "weight_map")
                tensors[key] = tensor
                where[key] = shard_path
        lost = sorted(set(table or ()) - set(tensors))
        if lost:
            text = (
                f"{os.path.join(folder, name)} lists {len(lost)} keys that no file holds: {some(map(one_line, lost))}"
            )
            raise WeightsError(text, "weight_map")
    except BaseException:
        for file in files:
            file.close()
        raise
    return WeightsReader(tensors, where, files)


# ---- writing

def _plan(items: List[Item], format: str, limit: int) -> Dict[str, List[Item]]:
    """File name → the tensors in it: one file if all fit the limit in bytes, else shards."""
    groups: List[List[Item]] = [[]]
    used = 0
    for item in items:
        nbytes = size_of(item[1], item[2])
        if groups[-1] and used + nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += nbytes
    if format == "safetensors":
        # Wide types first, so that the contiguous arrays are aligned.
        groups = [sorted(group, key=lambda item: -NUMPY_TYPES[item[1]].itemsize) for group in groups]
    base, extension = FORMATS[format]
    n = len(groups)
    names = [f"{base}-{i:05d}-of-{n:05d}{extension}" for i in range(1, n + 1)] if n > 1 else [base + extension]
    return dict(zip(names, groups))


def _write_file(file: Any, format: str, items: List[Item], progress: Optional[Callable[[int], None]]) -> None:
    with Sink(file, progress) as sink:
        if format == "safetensors":
            sink.write(safetensors.header([item[:3] for item in items]))
            for item in items:
                _write_tensor(sink, *item)
            return
        writer = pdparams.PdparamsWriter(sink)
        for item in items:
            writer.tensor(*item[:3])
            _write_tensor(sink, *item)
            writer.after_tensor()
        writer.end()


def _write_tensor(sink: Sink, name: str, dtype: str, shape: Tuple[int, ...], read: Callable[[], Any]) -> None:
    data = read()
    if isinstance(data, Rows):
        sink.rows(data, NUMPY_TYPES[dtype], shape)
    elif isinstance(data, FileBytes):
        if data.length != size_of(dtype, shape):
            raise ValueError(f"{name}: {data.length} bytes to copy do not make a {dtype} of shape {list(shape)}")
        sink.copy(data)
    else:
        data = np.asarray(data)
        if data.shape != tuple(shape) or data.dtype != NUMPY_TYPES[dtype]:
            raise ValueError(f"{name} is {data.dtype} {list(data.shape)}, not {dtype} {list(shape)} as announced")
        sink.array(data)


def write_sharded(
    folder: str,
    items: Iterable[Item],
    *,
    format: str = "pdparams",
    max_shard_size: Union[int, str] = "10GB",
    progress: Optional[Callable[[int], None]] = None,
) -> List[str]:
    """Write weights into a folder, a tensor at a time: one file if it fits `max_shard_size`, else shards and an index.

    items: (name, dtype, shape, read) per tensor; read() is called once, in turn. progress: called with the number of
    bytes written. All files are renamed into place once all are complete; weights that were there before are then
    removed. Returns the file names written.

    Raises:
        UserError: unknown format or size. WeightsError: a duplicate name, or weights of another format in the folder.
        JobFailed: the disk is full or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"weights can be written as {' or '.join(FORMATS)}, not {format}", "format")
    base, extension = FORMATS[format]
    items = list(items)
    seen = set()
    for name, dtype, _, _ in items:
        if name in seen:
            raise WeightsError(f"the tensor {name} would be written twice", "duplicate")
        if dtype not in NUMPY_TYPES:
            raise WeightsError(f"{name}: tensors of type {dtype} cannot be written", "dtype")
        seen.add(name)
    shards = _plan(items, format, parse_size(max_shard_size))
    # All are renamed at the end, so all are open at once.
    allow_open_files(len(shards), "give a larger --max_shard_size")
    with disk_errors(f"the weights into {folder}"):
        os.makedirs(folder, exist_ok=True)
        old = files_of(folder, WEIGHTS)
        other = [name for name in old if extension not in name]
        if other:
            text = f"{folder} already holds {other[0]}: give another folder, or remove it first"
            raise WeightsError(text, "other-format")
        written = list(shards)
        with contextlib.ExitStack() as stack:
            if len(shards) > 1:
                # Entered first, so renamed last: an index never names a missing file.
                written.append(base + extension + INDEX_SUFFIX)
                index_file = stack.enter_context(atomic_write(os.path.join(folder, written[-1])))
                total = sum(size_of(dtype, shape) for _, dtype, shape, _ in items)
                table = {item[0]: name for name, group in shards.items() for item in group}
                json.dump({"metadata": {"total_size": total}, "weight_map": table}, index_file, indent=2)
                index_file.write("\n")
            for name, group in shards.items():
                file = stack.enter_context(atomic_write(os.path.join(folder, name), "wb", buffering=0))
                _write_file(file, format, group, progress)
        for name in set(old) - set(written):
            os.unlink(os.path.join(folder, name))
    return written


def write_model(
    target: str,
    items: List[Item],
    beside: Callable[[str], List[str]],
    *,
    format: str,
    max_shard_size: Union[int, str],
    progress: Optional[str],
) -> List[str]:
    """Write a model folder atomically: the weights, and the files that beside(folder) writes, whose names it returns.

    progress: the title of a bar, or None. Returns the names of all files.

    Raises:
        JobFailed: the disk is full, or the folder cannot be written.
    """
    total = sum(size_of(dtype, shape) for _, dtype, shape, _ in items)
    with disk_errors(target), atomic_folder(target) as folder:
        with Progress(total, desc=progress or "", unit="B", disable=progress is None) as bar:
            files = write_sharded(folder, items, format=format, max_shard_size=max_shard_size, progress=bar.update)
        return files + beside(folder)


def write_items(path: str, items: Iterable[Item]) -> None:
    """Write one .pdparams file at `path`, a tensor at a time.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    with disk_errors(path), atomic_write(path, "wb", buffering=0) as file:
        _write_file(file, "pdparams", list(items), None)


def write_pdparams(path: str, tensors: Dict[str, Tuple[str, np.ndarray]]) -> None:
    """Write {name: (dtype, array)} as one .pdparams file (bfloat16 arrays are uint16); raises as write_items."""
    items = [(name, dtype, np.shape(array), lambda array=array: array) for name, (dtype, array) in tensors.items()]
    write_items(path, items)
