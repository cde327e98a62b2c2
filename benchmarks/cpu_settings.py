"""What the CPU settings of paddlemix.utils.runtime gain: `python benchmarks/cpu_settings.py`

Times a float32 matmul (2048³) and a softmax over [4, 1024, 1024] in fresh processes, five pairs, once as Paddle is by
itself and once with `import paddlemix` in front. Prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAIRS = 5

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

a, scores = paddle.rand([2048, 2048]), paddle.rand([4, 1024, 1024])
print(json.dumps([best(lambda: paddle.matmul(a, a)), best(lambda: F.softmax(scores, axis=-1))]))
"""


def measure(settings: str):
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, settings],
        env=dict(clean, PYTHONPATH=ROOT),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    pairs = [(measure("stock"), measure("ours")) for _ in range(PAIRS)]
    print(f"{'':24}{'stock ms':>10}{'ours ms':>10}{'ratio':>8}")
    for i, name in enumerate(("matmul 2048³ float32", "softmax 4 × 1024²")):
        stock, ours = (statistics.median(pair[side][i] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[0][i] / pair[1][i] for pair in pairs)
        print(f"{name:24}{stock * 1e3:10.1f}{ours * 1e3:10.1f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
