"""Pixels of one image to the first logits of its prompt of 300 tokens, config M: `python benchmarks/prefill.py`

The limit is the time in which this process does as many floating-point operations in a large matmul.
"""

from __future__ import annotations

import statistics

import harness
from baseline_model import Ours
from harness import Side


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "prefill of one image and its prompt")
    with Side(args, Ours) as ours:
        ours("prefill")
        seconds = [ours("prefill") for _ in range(args.pairs)]
        parts = [ours("products", "prefill") for _ in range(args.pairs)]
    bench.value("prefill per image, vision included", statistics.median(seconds), "s")
    share, limit = (statistics.median(part[name] / part["all"] for part in parts) for name in ("products", "limit"))
    bench.value("of it matrix products", 100 * share, "%")
    bench.value("all of it ÷ its operations at the speed of a large matmul", 1 / limit, "×", at_most=2.5)
    bench.finish()


if __name__ == "__main__":
    main()
