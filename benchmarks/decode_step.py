"""One decoded token at batch 8 after 300 tokens, config M: `python benchmarks/decode_step.py`

A step of `generate`, its loop included, against the time to read the weights and the cache at the memory bandwidth of
the same run. decoding.py measures how much of a token is Python and Paddle's calls.
"""

from __future__ import annotations

import statistics

import harness
from baseline_model import Ours
from harness import Side

BATCH = 8


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "one decoded token at batch 8, config M")
    steps = 2 if args.size == "quick" else 30
    with Side(args, Ours) as ours:
        token = statistics.median(statistics.median(ours("decode", BATCH, steps)) for _ in range(args.pairs))
        needed, bandwidth = ours("step_bytes", BATCH), ours("bandwidth")
    bench.value("one token for 8 rows", token * 1e3, "ms")
    bench.value("memory bandwidth", bandwidth / 1e9, "GB/s")
    bench.value("weights and cache that a step reads", needed / 1e6, "MB")
    bench.value("time to read them", needed / bandwidth * 1e3, "ms")
    bench.value("a token ÷ the time to read them", token * bandwidth / needed, "×", at_most=2.5)
    bench.finish()


if __name__ == "__main__":
    main()
