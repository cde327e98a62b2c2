"""The gain of the CPU settings of paddlemix.utils.runtime: `python benchmarks/cpu_settings.py`

Times a float32 matmul (2048³) and a softmax over [4, 1024, 1024] in fresh processes, once with Paddle alone
and once after `import paddlemix`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import harness

MEASURE = """
import json, sys, time
if sys.argv[1] == "ours":
    import paddlemix
import paddle
import paddle.nn.functional as F

def best(call):
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)

side = int(sys.argv[2])
a, scores = paddle.rand([side, side]), paddle.rand([4, side // 2, side // 2])
print(json.dumps([best(lambda: paddle.matmul(a, a)), best(lambda: F.softmax(scores, axis=-1))]))
"""


def measure(settings: str, side: int):
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, settings, str(side)],
        env=dict(clean, PYTHONPATH=harness.ROOT),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "Paddle by itself against `import paddlemix` before it")
    side = 256 if args.size == "quick" else 2048
    taken = [(measure("stock", side), measure("ours", side)) for _ in range(args.pairs)]
    for i, name in enumerate((f"matmul {side}³ float32", f"softmax 4 × {side // 2}²")):
        bench.ratio(name, harness.Pairs(*([pair[way][i] for pair in taken] for way in (0, 1))))
    bench.finish()


if __name__ == "__main__":
    main()
