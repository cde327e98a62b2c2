"""merge_lora_params.py against copying the files, and against the whole model: `python benchmarks/merge.py [--large]`

The base has the 7B's shapes with one decoder and one vision layer, with --large four of each and the whole vocabulary
(about 4 GB in bfloat16). Baselines: `cat` of each weights file; and the whole-model route, all tensors in memory, each
adapter added in float32, everything saved at once with paddle.save (.pdparams only). cat flushes nothing to disk; the
merge does, which costs nothing where the folder is in memory.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess

import checkpoints
import harness
import scratch

BYTES = {"quick": 20_000_000, "normal": 1_500_000_000, "large": 4_600_000_000}


def merge(base: str, lora: str, out: str) -> None:
    import paddlemix  # noqa: F401 (the CPU settings)
    from paddlemix.checkpoint.lora_merge import merge

    merge(base, lora, out, progress=False)


def arithmetic(base: str, lora: str, out: str) -> None:
    """The matmuls, additions and rounding of a merge on all cores; nothing is written."""
    from concurrent.futures import ThreadPoolExecutor

    from paddlemix.checkpoint import LORA_WEIGHTS_NAME, open_weights
    from paddlemix.checkpoint.lora_merge import adapted_rows

    scaling = checkpoints.ALPHA / checkpoints.RANK
    os.makedirs(out)
    with open_weights(base) as before, open_weights(os.path.join(lora, LORA_WEIGHTS_NAME)) as adapters, \
            ThreadPoolExecutor(os.cpu_count()) as pool:  # fmt: skip
        for key in adapters.keys():
            if key.endswith(".lora_A"):
                name = key[: -len("lora_A")] + "weight"
                step, block = adapted_rows(before, adapters, name, scaling, "bfloat16")
                height = before.info(name).shape[0]
                starts = range(0, height, step)
                list(pool.map(lambda a, b: block(a, b).size, starts, [min(a + step, height) for a in starts]))  # noqa: B023


def merge_whole(base: str, lora: str, out: str) -> None:
    # isort: off
    import paddlemix  # noqa: F401 (the CPU settings)
    import paddle

    # isort: on
    os.makedirs(out)
    tensors = paddle.load(os.path.join(base, "model_state.pdparams"))
    adapters = paddle.load(os.path.join(lora, "lora_model_state.pdparams"))
    for name in tensors:
        module = name[: -len(".weight")]
        if module + ".lora_A" in adapters:
            a, b = (paddle.to_tensor(adapters[f"{module}.{part}"]) for part in ("lora_A", "lora_B"))
            scaling = checkpoints.ALPHA / checkpoints.RANK
            merged = paddle.to_tensor(tensors[name]).astype("float32") + paddle.matmul(a, b) * scaling
            tensors[name] = merged.astype("bfloat16")
    paddle.save(tensors, os.path.join(out, "model_state.pdparams"))


def roundings_apart(base: str, lora: str, out: str) -> int:
    """The largest difference between merged weights and W + scaling · A @ B in float32, in steps of bfloat16."""
    import numpy as np

    from paddlemix.checkpoint import LORA_WEIGHTS_NAME, open_weights
    from paddlemix.checkpoint.tensors import convert_dtype

    apart = 0
    lora_file = os.path.join(lora, LORA_WEIGHTS_NAME)
    with open_weights(base) as before, open_weights(lora_file) as adapters, open_weights(out) as after:
        for key in adapters.keys():
            module, _, part = key.rpartition(".")
            if part == "lora_A":
                a, b = (np.array(adapters.read(f"{module}.{part}")) for part in ("lora_A", "lora_B"))
                scaling = np.float32(checkpoints.ALPHA / checkpoints.RANK)
                right = before.read(module + ".weight", "float32") + a @ b * scaling
                right = convert_dtype(right, "float32", "bfloat16").view(np.int16).astype(np.int32)
                found = after.read(module + ".weight").view(np.int16).astype(np.int32)
                # Sign and size to whole numbers in the order of the values.
                right, found = (np.where(bits < 0, -(bits & 0x7FFF), bits) for bits in (right, found))
                apart = max(apart, int(abs(right - found).max()))
    return apart


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "Merging a LoRA checkpoint into a base with the 7B's shapes")
    with scratch.folder(2 * BYTES[args.size]) as folder:
        lora, out, base = (os.path.join(folder, name) for name in ("lora", "out", "base"))
        checkpoints.write_lora(lora, args.size)

        def cat() -> float:
            os.makedirs(out)
            names = [name for name in os.listdir(base) if name.endswith((".pdparams", ".safetensors"))]
            command = "; ".join(f"cat '{base}/{name}' > '{out}/{name}'" for name in names)
            seconds = harness.timed(lambda: subprocess.run(command, shell=True, check=True))()
            shutil.rmtree(out)
            return seconds

        peaks = {}

        def run(call) -> float:
            done = harness.in_child(args, call, base, lora, out)
            shutil.rmtree(out)
            peaks[call] = max(done.peak_bytes, peaks.get(call, 0))
            return done.seconds

        for format in ("safetensors", "pdparams"):
            shutil.rmtree(base, ignore_errors=True)
            total = checkpoints.write(base, args.size, format)
            cat()
            taken = harness.pairs(args, cat, lambda: run(merge))
            bench.ratio(f"time against cat of {total / 1e9:.2g} GB, {format}", taken)
            alone = statistics.median(run(arithmetic) for _ in range(args.pairs))
            limit = taken._replace(baseline=[seconds + alone for seconds in taken.baseline])
            bench.ratio(f"time against cat and the arithmetic alone, {format}", limit, at_most=1.5)
            values = checkpoints.config(args.size)
            largest = values["hidden_size"] * values["intermediate_size"] // 2 * 4
            bound = max(2 * largest, 2 * values["vocab_size"] * values["hidden_size"] * 2) / 1e6 + 400
            bench.value(f"peak memory, {format}", peaks[merge] / 1e6, "MB", at_most=round(bound))
        taken = harness.pairs(args, lambda: run(merge_whole), lambda: run(merge))
        # With one layer of each kind the imports are a third of ours.
        bench.ratio("whole-model route ÷ ours, pdparams", taken, at_least=5 if args.size == "large" else None)
        bench.value("peak memory of the whole-model route", peaks[merge_whole] / 1e6, "MB")
        merge(base, lora, out)
        apart = roundings_apart(base, lora, out)
        bench.value("roundings apart from float32, plus 1", apart + 1, "", at_most=2)
    bench.finish()


if __name__ == "__main__":
    main()
