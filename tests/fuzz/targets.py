"""What fuzzing calls with a stranger's bytes: each function returns, or raises because a promise is broken.

The promise: a result within the limits, or one of the project's errors in one line; never another exception. Used by
test_fuzz.py (hypothesis) and coverage_guided.py (atheris). Nothing here needs Paddle.
"""

from __future__ import annotations

import contextlib
import os

from paddlemix.checkpoint import load_pdparams_object, open_weights
from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.tensors import MAX_SHARING
from paddlemix.datasets.json_index import scan_records
from paddlemix.datasets.tsv import read_rows
from paddlemix.processors import images
from paddlemix.utils.errors import ImageError, UserError, WeightsError
from paddlemix.utils.json_files import read_json_object

SUFFIXES = (".pdparams", ".bin", ".safetensors")
REASONS = ("empty image", "bad base64", "not an image", "broken image", "too many pixels", "image too large")
ROW_ERRORS = (
    None, "missing column", "no image", "empty image", "no caption", "empty caption", "caption is not UTF-8",
    "line too long",
)  # fmt: skip
# Images of more are decoded as surely, and take the time that other cases need.
FEW_PIXELS = 1 << 22


@contextlib.contextmanager
def only(*kinds):
    """Let these errors pass, if they are one line."""
    try:
        yield
    except kinds as error:
        assert "\n" not in str(error) and len(str(error)) < 10_000, error


def put(folder, name: str, data: bytes) -> str:
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(data)
    return path


def weights(data: bytes, suffix: str, folder) -> None:
    path = put(folder, "weights" + suffix, data)
    with only(WeightsError), open_weights(path) as reader:
        total = 0
        for name in reader.keys():
            array = reader.read(name)
            assert array.shape == reader.info(name).shape and array.nbytes == reader.info(name).nbytes
            total += array.nbytes
        assert total == reader.total_bytes <= MAX_SHARING * len(data)
    if suffix == ".pdparams":
        with only(WeightsError):
            load_pdparams_object(path)


def index(data: bytes, folder) -> None:
    """An index of shards, beside nothing that it could name."""
    put(folder, "model_state.pdparams.index.json", data)
    with only(WeightsError):
        open_weights(folder)
        raise AssertionError("weights were opened, and there are none")


def image(data: bytes) -> None:
    try:
        images.read_header(data, FEW_PIXELS)
        picture = images.open_image(data, FEW_PIXELS)
        assert picture.mode == "RGB" and 0 < picture.width * picture.height <= FEW_PIXELS
        pixels = images.MGenVLImageProcessor(28)(picture)
        assert pixels.shape == (3, 28, 28) and abs(pixels).max() < 4
    except ImageError as error:
        assert error.reason in REASONS and "\n" not in str(error)


def base64_image(data: bytes) -> None:
    try:
        images.decode_base64(data)
    except ImageError as error:
        assert error.reason in REASONS and "\n" not in str(error)


def rows(data: bytes, folder) -> None:
    path = put(folder, "rows.tsv", data)
    for want_caption in (True, False):
        end = line = 0
        with only(UserError):
            for row in read_rows(path, want_caption, max_line_bytes=1 << 12):
                assert row.line_no > line and row.next_offset > end and row.error in ROW_ERRORS
                where = row.image_offset
                assert bytes(row.image) == data[where : where + row.image_length] and b"\n" not in bytes(row.image)
                assert want_caption or row.caption is None
                line, end = row.line_no, row.next_offset
            assert end <= len(data)


def records(data: bytes, folder) -> None:
    from paddlemix.datasets.records import SampleError, parse_record

    path = put(folder, "train.json", data)
    bounds = scan_records(path)
    assert bounds.shape == (len(bounds), 2)
    last = 0
    for start, end in bounds.tolist():
        assert last <= start < end <= len(data)
        last = end
        with only(SampleError):
            record = parse_record(data[start:end], str(folder))
            assert record.turns and all(isinstance(text, str) for turn in record.turns for text in turn)


def lora_config(data: bytes, folder) -> None:
    put(folder, "lora_config.json", data)
    with only(WeightsError):
        config = read_lora_config(folder)
        assert config["r"] >= 1 and config["lora_alpha"] > 0


def json_object(data: bytes, folder) -> None:
    with only(WeightsError):
        assert type(read_json_object(put(folder, "some.json", data), constants=True)) is dict
