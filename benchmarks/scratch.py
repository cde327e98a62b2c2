"""Temporary folders and generated inputs for the benchmarks."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import tempfile
from typing import Iterator, List

MEMORY = "/dev/shm"


@contextlib.contextmanager
def folder(needed: int) -> Iterator[str]:
    """A temporary folder with room for `needed` bytes: in memory if 4 GB more would fit there, else on disk.

    In memory no disk distorts the figures, and flushing costs neither side anything.

    Raises:
        SystemExit: there is no room.
    """
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    fits = os.path.isdir(MEMORY) and min(available, shutil.disk_usage(MEMORY).free) > needed + (4 << 30)
    where = MEMORY if fits else tempfile.gettempdir()
    if where != MEMORY and shutil.disk_usage(where).free < needed + (1 << 30):
        raise SystemExit(f"error: {where} has no room for {needed / 1e9:.1f} GB: set TMPDIR to a folder with more")
    path = tempfile.mkdtemp(prefix="mgen-bench-", dir=where)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def jpegs(count: int, side: int = 512) -> List[bytes]:
    """JPEG files of side × side pixels in base64: soft shapes with some grain, as photographs have; 30 to 85 KB."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        grain = rng.normal(0, 3 + number % 4, (side, side, 3))
        file = io.BytesIO()
        Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        made.append(base64.b64encode(file.getvalue()))
    return made


def write_tsv(path: str, size: int, images: List[bytes]) -> int:
    """A TSV of `id \\t base64 \\t caption` rows with at least `size` bytes; the number of rows."""
    rows = written = 0
    with open(path, "wb", buffering=1 << 20) as file:
        while written < size:
            caption = f"第{rows}张广告图片，画面中央是一款产品，背景为渐变色，文字写着“限时优惠”。" * (1 + rows % 4)
            written += file.write(b"%d\t%s\t%s\n" % (rows, images[rows % len(images)], caption.encode()))
            rows += 1
    return rows
