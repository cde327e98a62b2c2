"""One LoRA step (rank 64, config M) per sample of 300 tokens and one image: `python benchmarks/lora_step.py`

Ours takes four rows at a time; the baseline one, with PaddleNLP's layers and logits of all positions, once as it is
and once padded to 2048 tokens as the notebook does. Peak memory is that of each process, Python and weights included;
both hold the same weights, so what a step adds to them is compared as well.
"""

from __future__ import annotations

import argparse
import math

import baseline_model
import harness
from baseline_model import Baseline, Ours
from harness import Side

BATCH = 4


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "LoRA step, config M")
    with Side(args, Ours) as ours, Side(args, Ours) as lean, Side(args, Baseline) as baseline, \
            Side(args, Baseline) as padded:  # fmt: skip
        for side in (ours, baseline, padded):
            side("prepare_training")
        lean("prepare_training", baseline_model.LORA["dropout"], True)
        loaded = {side: side("peak_bytes") for side in (ours, padded)}
        # Adapters begin at zero, so dropout on their inputs changes nothing yet.
        losses = ours("first_loss"), baseline("first_loss")
        if not math.isclose(*losses, rel_tol=1e-4):
            raise SystemExit(f"error: the losses of the two sides differ: {losses}")
        per_sample = lambda: ours("lora_step", BATCH) / BATCH  # noqa: E731
        for side in (ours, lean):
            side("lora_step", BATCH)
        baseline("lora_step", 1)
        taken = harness.pairs(args, lambda: baseline("lora_step", 1), per_sample)
        again = harness.Pairs(taken.ours[-2:], [lean("lora_step", BATCH) / BATCH for _ in taken.ours[-2:]])
        # A padded step is some 35 s.
        rarely = argparse.Namespace(pairs=args.pairs if args.size == "large" else 1)
        far = harness.pairs(rarely, lambda: padded("lora_step", 1, True), per_sample)
    bench.ratio("300 tokens, one at a time ÷ ours, per sample", taken, at_least=2.5)
    bench.ratio(f"padded to 2048 ÷ ours, per sample (pairs: {rarely.pairs})", far, at_least=20)
    bench.value("peak memory, batch of 4", ours.peak / 1e6, "MB")
    bench.value("peak memory, batch of 4, recompute", lean.peak / 1e6, "MB")
    bench.value("peak memory, padded, batch of 1", padded.peak / 1e6, "MB")
    bench.value("ours ÷ padded, peak memory", ours.peak / padded.peak, "×")
    # In a quick run, where the sides share a process, the difference may be 0.
    step = [max(side.peak - loaded[side], 1) for side in (ours, padded)]
    bench.value("ours ÷ padded, what a step adds to weights and code", step[0] / step[1], "×", at_most=1 / 3)
    bench.value("ours with recompute ÷ padded, peak memory", lean.peak / padded.peak, "×", at_most=1 / 3)
    bench.value("seconds with recompute ÷ without", 1 / again.ratio, "×")
    bench.finish()


if __name__ == "__main__":
    main()
