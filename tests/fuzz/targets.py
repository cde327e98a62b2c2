"""What fuzzing calls with a stranger's bytes: each function returns, or raises because a promise is broken.

The promise: a result within the limits, or one of the project's errors in one line; never another exception. Used by
test_fuzz.py (hypothesis) and coverage_guided.py (atheris).
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import os
import tarfile
from typing import List
from unittest import mock

from paddlemix.checkpoint import load_pdparams_object, open_weights
from paddlemix.checkpoint.lora_config import read_lora_config
from paddlemix.checkpoint.tensors import MAX_SHARING
from paddlemix.datasets import caption_files, labels, rows, tsv
from paddlemix.datasets.json_index import index_path, scan_records
from paddlemix.models.mgen_vl.config_values import plain_config
from paddlemix.models.mgen_vl.parameters import parameter_shapes
from paddlemix.processors import images
from paddlemix.utils.errors import ConfigError, ImageError, UserError, WeightsError
from paddlemix.utils.json_files import read_json_object
from tests.helpers import image_bytes, tiny_config

SUFFIXES = (".pdparams", ".bin", ".safetensors")
REASONS = ("empty image", "bad base64", "not an image", "broken image", "too many pixels", "image too large")
ROW_ERRORS = (
    None, "missing column", "no image", "empty image", "no caption", "empty caption", "caption is not UTF-8",
    "line too long", "image is a URL", "image path leads out of the folder",
)  # fmt: skip
TABLE_ERRORS = (*ROW_ERRORS, rows.BAD_RECORD, rows.SEVERAL_IMAGES)
# Images of more are decoded as surely, and take the time that other cases need.
FEW_PIXELS = 1 << 22

# What is right, by target; values of a JSON object where it is one.
IMAGE = base64.b64encode(image_bytes(size=(12, 9)))
RECORD = {"id": "1", "image": IMAGE.decode(), "conversations": [["<img></img>\n描述", "好"]]}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": [".*attn.*"], "scaling": 2.0}
GENERATION = {"max_new_tokens": 5, "top_k": 0, "top_p": 0.8, "eos_token_id": 3, "chat_format": "chatml"}
TEMPLATE = {"conversation": ["\n{{user}}", "{{bot}}"], "system": "hello"}
VOCABULARY = b"".join(base64.b64encode(bytes([rank])) + b" %d\n" % rank for rank in range(256)) + b"YWI= 256\n"
RUN = {
    "model_name_or_path": "model", "output_dir": "out", "do_train": True, "learning_rate": 1e-5, "lora": True,
    "dataset": {"train": [{"name": "chatml_dataset", "data_files": "train.json"}]},
}  # fmt: skip


@contextlib.contextmanager
def only(*kinds):
    """Let these errors pass, if they are one line."""
    try:
        yield
    except kinds as error:
        assert "\n" not in str(error) and len(str(error)) < 10_000, error


def put(folder, name: str, data: bytes) -> str:
    path = os.path.join(folder, name)
    # Believed by size and time, and these files are made within a tick of the clock.
    if os.path.exists(index_path(path)):
        os.unlink(index_path(path))
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
        with mock.patch.object(images, "MAX_PIXELS", FEW_PIXELS):
            images.read_header(data)
            picture = images.open_image(data)
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


def tsv_rows(data: bytes, folder) -> None:
    path = put(folder, "rows.tsv", data)
    for want_caption in (True, False):
        end = line = 0
        with only(UserError), mock.patch.object(tsv, "MAX_ROW_BYTES", 1 << 12):
            for row in tsv.read_rows(path, want_caption):
                assert row.line_no > line and row.next_offset > end and row.error in ROW_ERRORS
                where = row.image_offset
                assert bytes(row.image) == data[where : where + row.image_length] and b"\n" not in bytes(row.image)
                assert want_caption or row.caption is None
                line, end = row.line_no, row.next_offset
            assert end <= len(data)


def table(data: bytes, folder) -> None:
    """Rows of any kind (TSV, CSV, JSON), which may name the image files beside them, through conversion's checks."""
    path = put(folder, "table.csv", data)
    for options in (labels.Options(clean=True, verify="header"), labels.Options(images="reference")):
        end = line = 0
        with only(UserError):
            for row in rows.read_rows(path, options.verify == "header"):
                assert row.line_no > line and end < row.next_offset <= len(data)
                assert row.error in TABLE_ERRORS
                line, end = row.line_no, row.next_offset
                if not rows.is_json(path):
                    assert "\n" not in (row.caption or "")
                    assert row.place is None or os.path.realpath(row.place.file).startswith(folder + os.sep)
                with only(ImageError):
                    rows.image_text(row)
                checked = labels.check_row(row, options)
                assert checked.reason is None or "\n" not in checked.reason
                if checked.reason is None and options.verify == "header":
                    assert images.decode_base64(bytes(checked.image)) and checked.caption
    for reader in (caption_files.read_captions, caption_files.read_references):
        with only(UserError):
            reader(path)


def archives() -> List[bytes]:
    """A table as .gz, .tar and .tar.gz, hardly compressed: what is changed in them reaches the table."""
    row, file = b"1\t" + IMAGE + b"\tgood\n", io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.tsv", row), ("\u56fe/" + "b" * 120 + ".csv", b"image,caption\na.png,good\n")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return [gzip.compress(row, 0), file.getvalue(), gzip.compress(file.getvalue(), 0)]


def archive(data: bytes, folder) -> None:
    path = put(folder, "table.tar.gz", data)
    with only(UserError):
        for row in rows.read_rows(path, True, archives=True):
            assert row.error in TABLE_ERRORS and "\n" not in row.member and row.next_offset <= len(data)
            assert labels.check_row(row, labels.Options()).reason is not None or row.caption


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


def model_config(data: bytes, folder) -> None:
    put(folder, "config.json", data)
    with only(ConfigError):
        assert len(parameter_shapes(plain_config(folder))) < 50_000


def model(data: bytes, folder) -> None:
    """model_config, as Paddle's class reads it."""
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    put(folder, "config.json", data)
    with only(ConfigError):
        assert len(parameter_shapes(MGenConfig.from_pretrained(folder))) < 50_000


def generation_config(data: bytes, folder) -> None:
    from paddlemix.models.mgen_vl.generation import load_generation_config

    put(folder, "generation_config.json", data)
    with only(ConfigError):
        load_generation_config(folder, tiny_config())


def chat_template(data: bytes, folder) -> None:
    from paddlemix.processors.mgen_vl_processing import ChatTemplate

    with only(ConfigError):
        ChatTemplate.from_file(put(folder, "chat_template.json", data))


def vocabulary(data: bytes, folder) -> None:
    from paddlemix.models.mgen_vl.tokenizer import read_vocabulary

    with only(UserError):
        read_vocabulary(put(folder, "mgen.tiktoken", data))


def run_config(data: bytes, folder) -> None:
    from paddlemix.trainer import command_line

    with only(ConfigError):
        command_line.parse([put(folder, "run.json", data)])


def json_object(data: bytes, folder) -> None:
    with only(WeightsError):
        assert type(read_json_object(put(folder, "some.json", data), constants=True)) is dict
