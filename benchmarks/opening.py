"""Opening a model folder against reading its bytes once: `python benchmarks/opening.py [--large]`

Baseline: reading the weights file into memory, in a new process. Ours: a model of bfloat16 parameters, as on a GPU,
filled from the folder, without the imports.
"""

from __future__ import annotations

import os
import time

import checkpoints
import harness
import scratch

BYTES = {"quick": 40_000_000, "normal": 1_500_000_000, "large": 4_600_000_000}


def read_once(folder: str) -> float:
    """Seconds to read the files, each in one piece."""
    start = time.perf_counter()
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            file.read()
    return time.perf_counter() - start


def open_model(folder: str) -> list:
    """[seconds, memory before, peak]"""
    import paddlemix  # noqa: F401 (the CPU settings)
    from paddlemix.checkpoint import open_weights
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel, check_weights
    from paddlemix.models.mgen_vl.parameters import parameter_shapes

    with open("/proc/self/status") as file:
        before = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
    start = time.perf_counter()
    config = MGenConfig.from_pretrained(folder)
    with open_weights(folder) as reader:
        check_weights(reader, parameter_shapes(config), folder)
        # What from_pretrained does where the device computes in bfloat16; a CPU's float32 would be another amount.
        model = MGenLMHeadModel.build_lazily(config, "bfloat16")
        model.fill(reader)
    seconds = time.perf_counter() - start
    del model
    return [seconds, before, harness.peak_bytes()]


def measure(args, bench: harness.Bench, base: str, format: str) -> None:
    total = checkpoints.write(base, args.size, format)
    opened = []

    def ours() -> float:
        opened.append(harness.in_child(args, open_model, base).result)
        return opened[-1][0]

    def theirs() -> float:
        return harness.in_child(args, read_once, base).result

    theirs()
    taken = harness.pairs(args, theirs, ours)
    bench.ratio(f"time against reading {total / 1e9:.2g} GB into memory, {format}", taken, at_most=1.3)
    memory = max(peak - before for _, before, peak in opened) / total
    bench.value(f"memory beyond the imports, {format}", memory, "× the weights", at_most=1.1)


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
