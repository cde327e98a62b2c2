"""Weights in one file or several: indexes, copies, replacing a set of files, and a full disk."""

import errno
import json
import os

import numpy as np
import pytest

from paddlemix.checkpoint import convert_dtype, find_weights, open_weights, write_pdparams, write_sharded
from paddlemix.checkpoint.tensors import Rows, rows_of
from paddlemix.utils.errors import JobFailed, UserError, WeightsError
from paddlemix.utils.texts import parse_size
from tests import helpers
from tests.checkpoint.files import arrays, refused, torch_file


def items_of(named):
    return [(name, dtype, array.shape, lambda a=array: a) for name, (dtype, array) in named.items()]


def floats(n=6, size=100):
    rng = np.random.default_rng(1)
    return {f"t{i}.weight": ("float32", rng.standard_normal((size, i + 1)).astype(np.float32)) for i in range(n)}


@pytest.mark.parametrize("format", ["pdparams", "safetensors"])
@pytest.mark.parametrize("limit", ["10GB", "2KB", 1])
def test_round_trip(tmp_path, format, limit):
    named = floats()
    counted = []
    written = write_sharded(
        str(tmp_path), items_of(named), format=format, max_shard_size=limit, progress=counted.append
    )
    assert sorted(os.listdir(tmp_path)) == sorted(written)
    total = sum(array.nbytes for _, array in named.values())
    assert sum(counted) == total
    base, ending = ("model_state", ".pdparams") if format == "pdparams" else ("model", ".safetensors")
    if limit == "10GB":
        assert written == [base + ending]
    else:
        n = len(written) - 1
        assert n == (6 if limit == 1 else 5)
        assert written == [f"{base}-{i:05d}-of-{n:05d}{ending}" for i in range(1, n + 1)] + [
            base + ending + ".index.json"
        ]
        index = json.loads((tmp_path / written[-1]).read_text())
        assert index["metadata"] == {"total_size": total} and list(index["weight_map"]) == list(named)
    with open_weights(str(tmp_path)) as reader:
        assert len(reader) == len(named) and sorted(reader) == sorted(named) and "t0.weight" in reader
        assert reader.total_bytes == total
        for name, (_, array) in named.items():
            np.testing.assert_array_equal(reader.read(name), array)
            assert os.path.basename(reader.info(name).file) in written


def test_reading_converts_floats_and_leaves_integers(tmp_path):
    write_sharded(str(tmp_path), items_of(arrays()))
    with open_weights(str(tmp_path)) as reader:
        assert reader.read("a.weight", "float16").dtype == np.float16
        assert reader.read("a.weight", "bfloat16").dtype == np.uint16
        assert reader.read("f.ids", "float16").dtype == np.int64
        assert not reader.read("a.weight", "float32").flags.owndata
        with helpers.refused(WeightsError, "no-tensor"):
            reader.read("z")
        with helpers.refused(WeightsError, "no-tensor"):
            reader.info("z")


def test_a_value_too_large_names_the_tensor(tmp_path):
    write_pdparams(str(tmp_path / "w.pdparams"), {"w": ("float32", np.array([1e9], np.float32))})
    with open_weights(str(tmp_path / "w.pdparams")) as reader:
        with helpers.refused(WeightsError, "overflow", match="w: "):
            reader.read("w", "float16")


def test_writing_again_replaces_the_old_set(tmp_path):
    keep = tmp_path / "config.json"
    keep.write_text("{}")
    write_sharded(str(tmp_path), items_of(floats()), max_shard_size="2KB")
    write_sharded(str(tmp_path), items_of(floats(2)))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model_state.pdparams"]
    write_sharded(str(tmp_path), items_of(floats(3)), max_shard_size=1)
    with open_weights(str(tmp_path)) as reader:
        assert len(reader) == 3
    with helpers.refused(WeightsError, "other-format"):
        write_sharded(str(tmp_path), items_of(floats()), format="safetensors")
    # A LoRA file beside a model's is another set and stays.
    write_pdparams(str(tmp_path / "lora_model_state.pdparams"), floats(1))
    write_sharded(str(tmp_path), items_of(floats(2)))
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "lora_model_state.pdparams",
        "model_state.pdparams",
    ]


def test_a_failed_write_leaves_the_old_set(tmp_path):
    write_sharded(str(tmp_path), items_of(floats()), max_shard_size="2KB")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    items = items_of(floats(5)) + [("last", "float32", (2,), full)]
    with helpers.refused(JobFailed, "disk", match="No space left"):
        write_sharded(str(tmp_path), items, max_shard_size="2KB")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_bad_requests(tmp_path):
    items = items_of(floats(1))
    with helpers.refused(UserError, "format"):
        write_sharded(str(tmp_path), items, format="bin")
    with helpers.refused(WeightsError, "duplicate"):
        write_sharded(str(tmp_path), items + items)
    with helpers.refused(WeightsError, "dtype"):
        write_sharded(str(tmp_path), [("w", "complex64", (1,), lambda: None)])
    with pytest.raises(ValueError, match="bytes to copy"):
        with open_weights_of(tmp_path, floats(1)) as reader:
            write_sharded(str(tmp_path / "o"), [("w", "float32", (1,), lambda: reader.raw("t0.weight"))])
    assert not os.listdir(tmp_path / "o")


def open_weights_of(folder, named):
    write_pdparams(str(folder / "some.pdparams"), named)
    return open_weights(str(folder / "some.pdparams"))


@pytest.mark.parametrize("send", [True, False])
def test_tensors_are_copied_without_being_looked_at(tmp_path, monkeypatch, send):
    if not send:

        def none(*args):
            raise OSError(errno.EINVAL, "not here")

        monkeypatch.setattr(os, "copy_file_range", none, raising=False)
    named = {"big": ("float32", np.random.default_rng(0).standard_normal((700, 1024)).astype(np.float32))}
    named.update(arrays())
    with open_weights_of(tmp_path, named) as reader:
        items = [(n, reader.info(n).dtype, reader.info(n).shape, lambda n=n: reader.raw(n)) for n in reader]
        write_sharded(str(tmp_path / "o"), items, format="safetensors", max_shard_size="1MB")
    with open_weights(str(tmp_path / "o")) as reader:
        for name, (_, array) in named.items():
            np.testing.assert_array_equal(reader.read(name), array)


@pytest.mark.parametrize("format", ["pdparams", "safetensors"])
def test_tensors_made_in_rows_stand_between_others(tmp_path, format):
    named = {**floats(2), "rows": ("int32", np.arange(100 * 6, dtype=np.int32).reshape(100, 2, 3))}
    named["empty"] = ("float32", np.zeros((0, 5), np.float32))
    named["line"] = ("float32", np.arange(1000, dtype=np.float32))
    written = []

    def made(array):
        return lambda: Rows(7, lambda start, stop: array[start:stop])

    with open_weights_of(tmp_path, floats(2)) as reader:
        items = [
            (name, dtype, array.shape, (lambda n=name: reader.raw(n)) if name in reader else made(array))
            for name, (dtype, array) in named.items()
        ]
        write_sharded(str(tmp_path / "o"), items, format=format, progress=written.append)
        # Rows that are read alone are what the whole tensor has there.
        info, raw = reader.info("t0.weight"), reader.raw("t0.weight")
        found = rows_of(raw, 1, 3, info.dtype, info.shape[1:])
        np.testing.assert_array_equal(found, reader.read("t0.weight")[1:3])
    with open_weights(str(tmp_path / "o")) as reader:
        for name, (_, array) in named.items():
            np.testing.assert_array_equal(reader.read(name), array)
        assert sum(written) == reader.total_bytes

    def full(start, stop):
        if start:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return np.zeros(stop, np.float32)

    for make, error in ((full, JobFailed), (lambda start, stop: np.zeros(3, np.float32), ValueError)):
        with pytest.raises(error):
            write_sharded(str(tmp_path / "p"), [("w", "float32", (20,), lambda m=make: Rows(7, m))], format=format)
        assert not os.listdir(tmp_path / "p")


@pytest.mark.parametrize("to", [None, "float32", "float16", "bfloat16"])
def test_tensors_loaded_in_pieces_are_those_read(tmp_path, monkeypatch, to):
    monkeypatch.setattr("paddlemix.checkpoint.shards.PIECE", 1000)
    for dtype in ("float32", "bfloat16"):
        values = np.random.default_rng(0).standard_normal((70, 11)).astype(np.float32)
        named = {"w": (dtype, convert_dtype(values, "float32", dtype)), "n": ("int64", np.arange(400)),
                 "one": ("float32", np.array(3, np.float32)),
                 "none": ("float32", np.zeros((0, 2), np.float32))}  # fmt: skip
        with open_weights_of(tmp_path, named) as reader:
            for name in named:
                loaded = reader.load(name, to)
                np.testing.assert_array_equal(loaded, reader.read(name, to))
                assert loaded.dtype == reader.read(name, to).dtype and loaded.flags.writeable
            loaded = reader.load("w", to)
            os.truncate(tmp_path / "some.pdparams", 1500)
            with helpers.refused(WeightsError, "truncated", match="some.pdparams: w: "):
                reader.load("w", to)
            assert loaded.shape == (70, 11) and np.isfinite(loaded[:1]).all()


def test_a_source_cut_short_while_it_is_copied(tmp_path):
    with open_weights_of(tmp_path, floats(1, 1000)) as reader:
        os.truncate(tmp_path / "some.pdparams", 200)
        items = [(n, "float32", reader.info(n).shape, lambda n=n: reader.raw(n)) for n in reader]
        with helpers.refused(WeightsError, "truncated"):
            write_sharded(str(tmp_path / "o"), items)


@pytest.mark.parametrize(
    "text, size",
    [("10GB", 10**10), ("500MB", 5 * 10**8), ("4GiB", 1 << 32), ("7 kb", 7000), (123, 123), ("9", 9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "10", "GB", "0", "-1", "1.5GB", "ten", "1TB", "9" * 30])
def test_sizes_that_are_none(text):
    if text == "10":
        return
    with helpers.refused(UserError, "size"):
        parse_size(text)


# ---- folders


def index(folder, weight_map, name="model_state.pdparams.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1.5e9}, "weight_map": weight_map}))


def test_what_a_folder_may_hold(tmp_path):
    refused(tmp_path / "none", "no-folder")
    refused(tmp_path, "no-weights")
    write_pdparams(str(tmp_path / "lora_model_state.pdparams"), floats(1))
    refused(tmp_path, "not-merged")
    write_pdparams(str(tmp_path / "model_state-00001-of-00002.pdparams"), floats(1))
    refused(tmp_path, "no-index")
    write_pdparams(str(tmp_path / "model_state.pdparams"), floats(1))
    assert find_weights(str(tmp_path)) == "model_state.pdparams"
    # A .bin for older programs may stand beside; a second set of ours may not.
    torch_file(tmp_path / "pytorch_model.bin", floats(2))
    assert find_weights(str(tmp_path)) == "model_state.pdparams"
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "several-weights")


def test_sharded_torch_files(tmp_path):
    named = floats()
    names = list(named)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch_file(tmp_path / file, {name: named[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    with open_weights(str(tmp_path)) as reader:
        for name, (_, array) in named.items():
            np.testing.assert_array_equal(reader.read(name), array)


def test_indexes_that_lie(tmp_path):
    first, second = "model_state-00001-of-00002.pdparams", "model_state-00002-of-00002.pdparams"
    one = np.zeros(1, np.float32)
    write_pdparams(str(tmp_path / first), {"a": ("float32", one)})
    write_pdparams(str(tmp_path / second), {"b": ("float32", one)})
    index(tmp_path, {"a": first, "b": second})
    with open_weights(str(tmp_path)) as reader:
        assert reader.keys() == ["a", "b"]
    index(tmp_path, {"a": first, "b": second, "c": second})
    refused(tmp_path, "weight_map")
    index(tmp_path, {"a": first, "c": second})
    refused(tmp_path, "weight_map")
    index(tmp_path, {"a": second, "b": first})
    refused(tmp_path, "weight_map")
    index(tmp_path, {"a": first, "b": "model_state-00003-of-00002.pdparams"})
    refused(tmp_path, "unreadable")
    write_pdparams(str(tmp_path / second), {"a": ("float32", one)})
    index(tmp_path, {"a": first, "b": second})
    refused(tmp_path, "duplicate")
    for text in (
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        "{",
        '{"weight_map": 1, "weight_map": 2}',
    ):
        (tmp_path / "model_state.pdparams.index.json").write_text(text)
        refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["../out.pdparams", "/etc/passwd", "a/b.pdparams", "..", ".", "", "a\\b", "a\0b", "a\nb", "\ud800"]
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write_pdparams(str(tmp_path / "out.pdparams"), {"a": ("float32", np.zeros(1, np.float32))})
    index(folder, {"a": name})
    refused(folder, "leads-out")


def test_links(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    one = {"a": ("float32", np.zeros(1, np.float32))}
    write_pdparams(str(outside / "w.pdparams"), one)
    (folder / "model_state.pdparams").symlink_to(outside / "w.pdparams")
    refused(folder, "leads-out")
    (folder / "model_state.pdparams").unlink()
    (folder / "model_state.pdparams").symlink_to("nowhere")
    refused(folder, "unreadable")
    # Inside the folder, to the folder itself, and a file that the user names: all fine.
    (folder / "model_state.pdparams").unlink()
    write_pdparams(str(folder / "real.pdparams"), one)
    (folder / "model_state.pdparams").symlink_to("real.pdparams")
    (tmp_path / "alias").symlink_to(folder)
    (tmp_path / "w.pdparams").symlink_to(outside / "w.pdparams")
    for path in (folder, tmp_path / "alias", tmp_path / "w.pdparams"):
        with open_weights(str(path)) as reader:
            assert reader.keys() == ["a"]
    # The layout of a Hugging Face cache.
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    torch_file(blobs / "1234", floats(2))
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/1234")
    with open_weights(str(snapshot)) as reader:
        assert len(reader) == 2
    # Two folders up and no further; and nothing but weights files of the cache.
    for target in ("../../elsewhere/1234", "../blobs/1234", "../../blobs/deeper/1234", str(outside / "w.pdparams")):
        (snapshot / "pytorch_model.bin").unlink()
        (snapshot / "pytorch_model.bin").symlink_to(target)
        refused(snapshot, "leads-out")


def test_a_shard_or_an_index_that_is_a_link(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    shards = ["model_state-00001-of-00002.pdparams", "model_state-00002-of-00002.pdparams"]
    for name, shard in zip("ab", shards):
        write_pdparams(str(folder / shard), {name: ("float32", np.zeros(1, np.float32))})
    index(folder, dict(zip("ab", shards)))
    assert len(open_weights(str(folder))) == 2
    for name in (shards[1], "model_state.pdparams.index.json"):
        os.rename(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)
        refused(folder, "leads-out")
        os.replace(outside / name, folder / name)
    # A link to a link inside the folder is followed to its end.
    os.rename(folder / shards[1], outside / "x")
    (folder / "within").symlink_to(outside / "x")
    (folder / shards[1]).symlink_to("within")
    refused(folder, "leads-out")


def test_reading_everything_does_not_keep_everything(tmp_path):
    """What was read before is given back to the system: resident memory stays that of a tensor, not of
    the file.
    """
    named = {f"t{i}": ("uint8", np.full(8 << 20, i, np.uint8)) for i in range(12)}
    write_pdparams(str(tmp_path / "model_state.pdparams"), named)

    def resident():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss")) >> 10

    with open_weights(str(tmp_path)) as reader:
        del named
        before = resident()
        seen = [reader.read(name) for name in reader.keys() if reader.read(name).sum() >= 0]
        assert resident() - before < 40
        assert [int(view[5]) for view in seen] == list(range(12))
