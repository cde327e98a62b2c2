"""tools/convert_labels.py against `cat IN > COPY`: `python benchmarks/convert.py [--large]`

Both read a cached file and write into the same file system, each as a command, start-up included. The input has 5 GB
with --large. Ours flushes its files to disk before renaming them (fsync), cat does not; in memory, where the folder is
if there is room, that costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import harness
import scratch

BYTES = {"quick": 300_000, "normal": 1_000_000_000, "large": 5_000_000_000}
DECODE_BYTES = {"quick": 100_000, "normal": 150_000_000, "large": 150_000_000}
TOOL = os.path.join(harness.ROOT, "tools", "convert_labels.py")


def convert(path: str, out: str, images: str, verify: str, workers: int) -> None:
    from paddlemix.datasets import labels

    labels.convert(path, out, labels.Options(images=images, verify=verify, workers=workers), disable_progress=True)


RECORD = {
    "id": "identity_1",
    "conversations": [["请描述图片内容", "一张广告图片，画面中央是一款产品，背景为渐变色，文字写着“限时优惠”。" * 2]],
    "image": {"file": "in.tsv", "offset": 123456789, "length": 65432, "check": 123456789},
}


def one_pass(path: str, checks: bool) -> None:
    """The least that Python can do: read all blocks, find all line ends, and check each character (`checks`) or write a
    line of JSON per row."""
    from paddlemix.datasets.labels import _ALPHABET

    with open(path, "rb", buffering=0) as file, open(os.devnull, "w", encoding="utf-8") as out:
        while True:
            block = file.read(1 << 20)
            if not block:
                return
            end = block.find(b"\n")
            while end >= 0:
                if not checks:
                    out.write(json.dumps(RECORD, ensure_ascii=False))
                end = block.find(b"\n", end + 1)
            if checks:
                block.translate(None, _ALPHABET)


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    size = BYTES[args.size]
    bench = harness.Bench(args, f"convert_labels on a TSV of {size / 1e9:g} GB")
    with scratch.folder(2 * size + size // 10) as folder:
        path, out = os.path.join(folder, "in.tsv"), os.path.join(folder, "out")
        images = scratch.jpegs(2 if args.size == "quick" else 48)
        scratch.write_tsv(path, size, images)

        def cleared(call):
            def run() -> float:
                os.makedirs(out)
                seconds = harness.timed(call)()
                shutil.rmtree(out)
                return seconds

            return run

        def cat() -> None:
            subprocess.run(f"cat '{path}' > '{out}/copy'", shell=True, check=True)

        def ours(images: str, verify: str = "none"):
            def call() -> None:
                options = ["--images", images, "--verify", verify, "--quiet"]
                if args.size == "quick":
                    convert(path, out, images, verify, 1)
                else:
                    command = [sys.executable, TOOL, path, out, *options]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

            return cleared(call)

        for _ in range(2):
            cleared(cat)()
        start = harness.timed(lambda: subprocess.run([sys.executable, TOOL, "--help"], stdout=subprocess.DEVNULL))
        for kind in ("inline", "reference"):
            taken = harness.pairs(args, cleared(cat), ours(kind))
            bench.ratio(f"rate against cat, --images {kind}", taken)
            scan = harness.timed(one_pass, path, kind == "inline")
            if kind == "inline":
                name, least = "cat and one core's check of the base64", [start() + scan() + s for s in taken.baseline]
            else:
                name, least = "one pass with a line of JSON per row", [start() + scan() for _ in taken.baseline]
            bench.ratio(f"--images {kind} against start-up, {name}", taken._replace(baseline=least), at_most=2)
        taken = harness.pairs(args, ours("reference"), ours("reference", "header"))
        bench.ratio("rate of --verify header against none (reference)", taken, at_least=0.5)
        for kind in ("inline", "reference"):
            os.makedirs(out)
            done = harness.in_child(args, convert, path, out, kind, "none", 1)
            shutil.rmtree(out)
            bench.value(f"peak memory, --images {kind}", done.peak_bytes / 1e6, "MB", at_most=300)
        os.truncate(path, 0)
        scratch.write_tsv(path, DECODE_BYTES[args.size], images)
        one, two = (
            cleared(lambda workers=workers: convert(path, out, "reference", "decode", workers)) for workers in (1, 2)
        )
        bench.ratio("--verify decode, two workers against one", harness.pairs(args, one, two))
    bench.finish()


if __name__ == "__main__":
    main()
