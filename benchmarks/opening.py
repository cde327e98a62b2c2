"""Opening a model folder against reading its bytes once: `python benchmarks/opening.py [--large]`

Baseline: the weights file read through a buffer of 1 MB. Ours: MGenLMHeadModel.from_pretrained, without its imports.
A CPU computes in float32 only, so the folder here holds float32 and the dtype is kept.
"""

from __future__ import annotations

import os
import time

import checkpoints
import harness
import scratch

SIZES = {"quick": "quick", "normal": "normal", "large": "float32"}
BYTES = {"quick": 40_000_000, "normal": 2_500_000_000, "large": 5_500_000_000}


def read_once(folder: str) -> float:
    buffer = bytearray(1 << 20)
    start = time.perf_counter()
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def open_model(folder: str) -> list:
    """[seconds, memory before, peak]"""
    import paddlemix  # noqa: F401 (the CPU settings)
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    with open("/proc/self/status") as file:
        before = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
    start = time.perf_counter()
    model = MGenLMHeadModel.from_pretrained(folder)
    seconds = time.perf_counter() - start
    del model
    return [seconds, before, harness.peak_bytes()]


def lazily(folder: str) -> list:
    """[seconds, memory before, peak] of opening the file and reading one tensor."""
    from paddlemix.checkpoint.shards import open_weights

    before = harness.peak_bytes()
    start = time.perf_counter()
    with open_weights(folder) as reader:
        reader.read("transformer.llm.h.0.attn.c_proj.weight").sum()
        return [time.perf_counter() - start, before, harness.peak_bytes()]


def measure(args, bench: harness.Bench, base: str, format: str) -> None:
    total = checkpoints.write(base, SIZES[args.size], format, dtype="float32")
    opened = []

    def ours() -> float:
        opened.append(harness.in_child(args, open_model, base).result)
        return opened[-1][0]

    read_once(base)
    taken = harness.pairs(args, lambda: read_once(base), ours)
    bench.ratio(f"time against reading {total / 1e9:.2g} GB once, {format}", taken, at_most=1.3)
    memory = max(peak - before for _, before, peak in opened) / total
    bench.value(f"memory beyond the imports, {format}", memory, "× the weights", at_most=1.1)
    seconds, before, peak = harness.in_child(args, lazily, base).result
    bench.value(f"one tensor of the file, {format}", seconds * 1e3, "ms")
    bench.value(f"memory of that, {format}", (peak - before) / 1e6 + 0.001, "MB")


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "Opening weights into a model, dtype kept")
    for format in ("pdparams", "safetensors"):
        # Room for the file and, where it is in memory, for the model.
        with scratch.folder(2 * BYTES[args.size]) as folder:
            measure(args, bench, folder, format)
    bench.finish()


if __name__ == "__main__":
    main()
