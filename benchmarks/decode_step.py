"""One decoded token at batch 8 after 300 tokens, config M, and where its time goes: `python benchmarks/decode_step.py`

Ours is a step of `generate`, PaddleNLP's loop included; the baseline PaddleNLP's layers over a concatenated cache. The
time is split into attention (cache and rotary included), the layers' matmuls, lm_head and the rest; the overhead of
Python and Paddle's calls is measured with as many tiny layers. The total is compared with the time to read the weights
and the cache at the memory bandwidth of the same run.
"""

from __future__ import annotations

import statistics

import harness
from baseline_model import Baseline, Dispatch, Ours, Side

BATCH = 8


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "one decoded token at batch 8, config M")
    steps, few = (2, 2) if args.size == "quick" else (30, 5)
    with Side(args, Ours) as ours, Side(args, Baseline) as baseline, Side(args, Dispatch) as dispatch:
        taken = harness.pairs(
            args,
            lambda: statistics.median(baseline("decode", BATCH, few)),
            lambda: statistics.median(ours("decode", BATCH, steps)),
        )
        parts = [ours("decode_parts", BATCH, steps) for _ in range(args.pairs)]
        calls = statistics.median(statistics.median(dispatch("decode", BATCH, steps)) for _ in range(args.pairs))
        needed, bandwidth = ours("step_bytes", BATCH), ours("bandwidth")
    token = statistics.median(taken.ours)
    bench.value("one token for 8 rows", token * 1e3, "ms")
    bench.ratio("PaddleNLP's layers ÷ ours", taken)
    split = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    rest = split["all"] - split["attention"] - split["matmul"] - split["lm_head"]
    for name, seconds in (
        ("attention", split["attention"]), ("matmuls of the layers", split["matmul"]), ("lm_head", split["lm_head"]),
        ("norms, masks, the loop", rest), ("Python and Paddle's calls, in all of these", calls),
    ):  # fmt: skip
        bench.value("of it " + name, seconds * 1e3, "ms")
    bench.value("memory bandwidth", bandwidth / 1e9, "GB/s")
    bench.value("weights and cache that a step reads", needed / 1e6, "MB")
    bench.value("time to read them", needed / bandwidth * 1e3, "ms")
    bench.value("a token ÷ the time to read them", token * bandwidth / needed, "×", at_most=2.5)
    bench.finish()


if __name__ == "__main__":
    main()
