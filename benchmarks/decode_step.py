"""One decoded token at batch 8 after 300 tokens, config M: `python benchmarks/decode_step.py`

Ours is a step of `generate`, its loop included; the baseline is PaddleNLP's layers over a concatenated cache. Ours is
also compared with the time to read the weights and the cache at the memory bandwidth of the same run. decoding.py
measures how much of a token is Python and Paddle's calls.
"""

from __future__ import annotations

import statistics

import harness
from baseline_model import Baseline, Ours
from harness import Side

BATCH = 8


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "one decoded token at batch 8, config M")
    steps, few = (2, 2) if args.size == "quick" else (30, 5)
    with Side(args, Ours) as ours, Side(args, Baseline) as baseline:
        taken = harness.pairs(
            args,
            lambda: statistics.median(baseline("decode", BATCH, few)),
            lambda: statistics.median(ours("decode", BATCH, steps)),
        )
        needed, bandwidth = ours("step_bytes", BATCH), ours("bandwidth")
    token = statistics.median(taken.ours)
    bench.value("one token for 8 rows", token * 1e3, "ms")
    bench.ratio("PaddleNLP's layers ÷ ours", taken)
    bench.value("memory bandwidth", bandwidth / 1e9, "GB/s")
    bench.value("weights and cache that a step reads", needed / 1e6, "MB")
    bench.value("time to read them", needed / bandwidth * 1e3, "ms")
    bench.value("a token ÷ the time to read them", token * bandwidth / needed, "×", at_most=2.5)
    bench.finish()


if __name__ == "__main__":
    main()
