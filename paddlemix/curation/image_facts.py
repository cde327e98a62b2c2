"""Facts of one image (format, size, sharpness, hashes), and the facts of all images of a file, computed once.

`.train.tsv.facts` next to `train.tsv` has a header and a record (FACTS) per row. It is valid while the table's size and
modification time are unchanged; changes of image files that the table names are not detected. An interrupted process
leaves `.train.tsv.facts.partial`, with which the next one continues.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import struct
from contextlib import suppress
from itertools import islice
from typing import IO, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from paddlemix.datasets import rows, tsv
from paddlemix.datasets.blocks import FileState
from paddlemix.datasets.rows import Found, find_image_of, image_bytes, read_rows
from paddlemix.datasets.tsv import ImagePlace, check_input
from paddlemix.processors.images import FORMATS, open_image, read_header
from paddlemix.utils.errors import ImageError
from paddlemix.utils.files import open_plain
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import disk_errors
from paddlemix.utils.parallel import chunks_of, map_chunks
from paddlemix.utils.progress import Progress

# Below this spread a picture has one colour, apart from JPEG noise, and no near duplicates.
ONE_COLOUR = 2.0
# Sharpness is that of a picture whose longer side has at most so many pixels, the size of most ads and near to the
# model's 448; a JPEG is decoded no larger than that takes.
SHARP_SIDE = 512
_ENOUGH = SHARP_SIDE // 2
# Numbers of the lowest frequencies in a perceptual hash: of brightness, and of each of the two colours.
_SIDE, _BRIGHTNESS, _COLOUR = 32, 40, 12
_LOW = sorted(((u, v) for u in range(9) for v in range(9) if u + v), key=lambda at: (sum(at), at))[:_BRIGHTNESS]
_ROWS, _COLUMNS = zip(*_LOW)
_DCT = np.cos(np.pi / _SIDE * np.outer(np.arange(9), np.arange(_SIDE) + 0.5)) / _SIDE

# Reasons why a row has no image facts; "" if it has them.
PROBLEMS = (
    "", tsv.MISSING_COLUMN, tsv.NO_IMAGE, tsv.EMPTY_IMAGE, tsv.LINE_TOO_LONG, tsv.IMAGE_IS_URL, tsv.PATH_LEADS_OUT,
    rows.BAD_RECORD, rows.SEVERAL_IMAGES, "no such file", "cannot read the file", "changed file", "empty image",
    "bad base64", "not an image", "broken image", "too many pixels", "image too large", "other",
)  # fmt: skip

# next, line: of the row (TsvRow). content: a hash of the image file's bytes. perceptual, sharpness, spread, truncated:
# see ImageFacts. format: index in FORMATS. problem: index in PROBLEMS; the fields of the image are 0 then.
FACTS = np.dtype([
    ("next", "<u8"), ("line", "<u4"), ("bytes", "<u4"), ("content", "<u8"), ("perceptual", "<u8"), ("width", "<u2"),
    ("height", "<u2"), ("sharpness", "<f4"), ("spread", "<f4"), ("format", "u1"), ("problem", "u1"),
    ("truncated", "?"),
])  # fmt: skip
# Magic with the format's number, size and mtime_ns of the file.
_HEADER = struct.Struct("<8sqq")
_MAGIC = b"MGENFAC4"


class ImageFacts(NamedTuple):
    """format: of FORMATS. width, height: upright. bytes: of the file. content: 64 bits of a hash of them.

    perceptual: 64 bits that stay nearly the same when a picture is resized, recompressed, tinted or slightly cropped:
    see perceptual_hash. sharpness: variance of the Laplacian of the grey picture (0…255), its longer side at most
    SHARP_SIDE. spread: the largest standard deviation of a colour channel (0…255) over 32 × 32 pixels.
    truncated: whether the file ends early; all else is of what is there, as in training.
    """

    format: str
    width: int
    height: int
    bytes: int
    content: int
    perceptual: int
    sharpness: float
    spread: float
    truncated: bool


def hash64(data: bytes) -> int:
    """64 bits of an image file or text. Among 1,000,000 different ones, two agree with probability 1 in 30 million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _small(image):
    """A PIL image as one of 32 × 32 pixels; averaged to twice as many first, which takes a fifth of the time."""
    from PIL import Image

    return image.resize((_SIDE, _SIDE), Image.LANCZOS, reducing_gap=2.0)


def perceptual_hash(image) -> int:
    """64 bits of a picture, from the DCT of its 32 × 32 pixels, without the mean: of the 40 lowest frequencies of its
    brightness, which are above their median, and of the 12 lowest of each colour difference (Cb, Cr), which are above
    one level of 255, so that the noise of a grey picture sets none. Colour tells ads of the same layout apart.

    image: a PIL image in mode RGB.
    """
    pixels = np.asarray(_small(image).convert("YCbCr"), np.float64)
    brightness, *colours = ((_DCT @ pixels[:, :, channel] @ _DCT.T)[_ROWS, _COLUMNS] for channel in range(3))
    bits = [brightness > np.median(brightness), *(colour[:_COLOUR] > 1 for colour in colours)]
    return int.from_bytes(np.packbits(np.concatenate(bits)).tobytes(), "big")


def header_facts(data: bytes) -> ImageFacts:
    """The facts that need no decoding; perceptual and spread are 0, sharpness is NaN, and the size is not yet upright.

    Raises:
        ImageError: no image, or one of too many pixels.
    """
    kind, size = read_header(data)
    return ImageFacts(kind, *size, len(data), hash64(data), 0, float("nan"), 0.0, False)


def image_facts(data: bytes) -> ImageFacts:
    """The facts of an image file.

    Raises:
        ImageError: it cannot be decoded.
    """
    from PIL import Image

    facts = header_facts(data)
    image = open_image(data, enough=_ENOUGH)
    truncated = image.info["truncated"]
    sides = facts.width, facts.height
    width, height = sides if (sides[0] > sides[1]) == (image.width > image.height) else sides[::-1]
    image.thumbnail((SHARP_SIDE, SHARP_SIDE), Image.BICUBIC)
    small = _small(image)
    # In 16 bits, which hold a Laplacian of 8-bit values.
    grey = np.asarray(image.convert("L"), np.int16)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    sharpness = float(laplacian.var(dtype=np.float32)) if laplacian.size else 0.0
    spread = float(np.asarray(small, np.float64).std(axis=(0, 1)).max())
    return facts._replace(
        width=width, height=height, perceptual=perceptual_hash(small), sharpness=sharpness, spread=spread,
        truncated=truncated,
    )  # fmt: skip


# ---- of all rows of a file

def held_bytes(found: Optional[Found]) -> int:
    """The approximate cost of processing such an image."""
    return 0 if found is None else found.length if isinstance(found, ImagePlace) else len(found)


def facts_record(found: Found, pixels: bool = True) -> np.ndarray:
    """FACTS [] of an image, with 0 for line and next. Without pixels: from the header, with sharpness NaN."""
    record = np.zeros((), FACTS)
    try:
        data = image_bytes(found)
        facts = image_facts(data) if pixels else header_facts(data)
        for name, value in facts._asdict().items():
            record[name] = FORMATS.index(value if value in FORMATS else "JPEG") if name == "format" else value
    except ImageError as error:
        record["problem"] = PROBLEMS.index(error.reason if error.reason in PROBLEMS else "other")
    return record


def usable(facts: np.ndarray) -> np.ndarray:
    """bool [rows]: rows whose perceptual hash means something: decoded pictures of more than one colour."""
    return (facts["problem"] == 0) & (facts["spread"] >= ONE_COLOUR)


def facts_path(path: str) -> str:
    """The facts' file of a file of rows: hidden, beside it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.facts")


def has_captions(path: str) -> bool:
    """Whether one of the first 1,000 rows of a file has a caption; those of a test set have none."""
    return any(row.caption is not None for row in islice(read_rows(path, want_caption=True), 1000))


def _facts_of_rows(chunk: List[Tuple[int, int, Found]]) -> bytes:
    records = np.zeros(len(chunk), FACTS)
    for at, (line, following, found) in enumerate(chunk):
        records[at] = facts_record(found)
        records[at]["line"], records[at]["next"] = line, following
    return records.tobytes()


def stored_facts(path: str) -> Optional[np.ndarray]:
    """The result of all_image_facts if it was computed before, else None."""
    path = os.path.realpath(path)
    return _load(facts_path(path), _header(path))


def all_image_facts(path: str, workers: int = 0, quiet: bool = False) -> np.ndarray:
    """FACTS [rows] of all rows of a file (rows.py), in order: from the file beside it, which is made if need be.

    workers: processes that decode, 0 for this one.

    Raises:
        UserError: the file cannot be read.
        JobFailed: it changed meanwhile, a worker was killed, or the disk is full.
    """
    path = os.path.realpath(path)
    size, state = check_input(path), FileState.of(path)
    header, final = _header(path), facts_path(path)
    stored = _load(final, header)
    if stored is not None:
        return stored
    partial = final + ".partial"
    try:
        if os.path.isdir(final):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), final)
        file = _open_partial(partial)
    except OSError as error:
        logger.info(f"the facts of {path} are kept in memory only: cannot write next to it ({error.strerror})")
        return np.frombuffer(b"".join(_compute(path, size, state, 0, 1, workers, quiet)), FACTS)
    with file:
        # One of several processes computes the facts; the others wait and use its file.
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"waiting for another process that looks at the images of {path}")
                fcntl.flock(file, fcntl.LOCK_EX)
        stored = _load(final, header)
        if stored is not None:
            return stored
        with disk_errors(partial):
            offset, line = _resume(file, header)
        for piece in _compute(path, size, state, offset, line, workers, quiet):
            with disk_errors(partial):
                if file.write(piece) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
        os.replace(partial, final)
    return _load(final, header)


def _header(path: str) -> bytes:
    state = FileState.of(path)
    return _HEADER.pack(_MAGIC, state.size, state.mtime_ns)


def _open_partial(path: str) -> IO[bytes]:
    """Open to read and append, unbuffered; only a plain file, no link: the folder may be a stranger's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = open(os.open(path, flags, 0o666), "a+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def _load(final: str, header: bytes) -> Optional[np.ndarray]:
    try:
        with open_plain(final) as file:
            return _records(file, header)
    except OSError:
        return None


def _records(file: IO[bytes], header: bytes) -> Optional[np.ndarray]:
    """The complete records of an open file; None if its header is another, or a record is invalid."""
    file.seek(0)
    if file.read(_HEADER.size) != header:
        return None
    data = file.read()
    records = np.frombuffer(data[: len(data) // FACTS.itemsize * FACTS.itemsize], FACTS)
    good = (records["format"] < len(FORMATS)) & (records["problem"] < len(PROBLEMS))
    return records if good.all() and (np.diff(records["next"].astype(np.int64)) > 0).all() else None


def _resume(file: IO[bytes], header: bytes) -> Tuple[int, int]:
    """Where to continue (offset, line number) after an open partial file, whose complete records are kept."""
    records = _records(file, header)
    if records is None:
        file.truncate(0)
        file.write(header)
        return 0, 1
    file.truncate(_HEADER.size + records.nbytes)
    return (int(records[-1]["next"]), int(records[-1]["line"]) + 1) if len(records) else (0, 1)


def _compute(
    path: str, size: int, state: FileState, offset: int, line: int, workers: int, quiet: bool
) -> Iterator[bytes]:
    """Records of the rows from `offset` on, in pieces."""
    # A path is only known as one where captions are expected.
    captions = has_captions(path)
    found = (
        (row.line_no, row.next_offset, find_image_of(row, path))
        for row in read_rows(path, captions, offset=offset, first_line=line, state=state)
    )
    chunks = chunks_of(found, lambda item: held_bytes(item[2]))
    with Progress(size, f"images of {os.path.basename(path)}", "B", quiet, initial=offset) as bar:
        for piece in map_chunks(_facts_of_rows, chunks, workers):
            yield piece
            bar.reach(int(np.frombuffer(piece, FACTS)[-1]["next"]))
