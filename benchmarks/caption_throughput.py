"""Captions per second on config M, 40 new tokens each: `python benchmarks/caption_throughput.py`

Ours: 32 images from base64 to text through Captioner, in batches of its own choice. Baseline: one by one, logits of
all positions at prefill, PaddleNLP's layers over a concatenated cache; on fewer images (8 with --large), as its time
grows with their number. It runs once with the project's CPU settings and once as Paddle comes.
"""

from __future__ import annotations

import harness
import scratch
from baseline_model import STOCK, Baseline, Ours
from harness import Side


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "captions of 32 images, config M")
    many, few, tokens = {"quick": (3, 2, 4), "normal": (32, 2, 40), "large": (32, 8, 40)}[args.size]
    pictures = scratch.jpegs(many, 64 if args.size == "quick" else 512)
    with Side(args, Ours) as ours, Side(args, Baseline) as tuned, Side(args, Baseline, STOCK) as stock:
        mine, theirs = (side("caption", pictures[:2], tokens)["captions"] for side in (ours, tuned))
        if mine != theirs:
            raise SystemExit(f"error: the two sides' captions differ: {mine} {theirs}")
        stock("caption", pictures[:1], 2)
        took = {"ours": [], "tuned": [], "stock": []}
        for i in range(args.pairs):
            for name in list(took)[:: 1 if i % 2 == 0 else -1]:
                side, count = {"ours": (ours, many), "tuned": (tuned, few), "stock": (stock, few)}[name]
                done = side("caption", pictures[:count], tokens)
                took[name].append(done["seconds"] / count)
                if name == "ours":
                    batch = done["batch"]
        parts = ours("products", "caption", pictures, tokens)
    bench.ratio("one by one ÷ ours, per image", harness.Pairs(took["tuned"], took["ours"]))
    # How far Paddle's own settings are from the project's depends on the processor's maker.
    bench.ratio("one by one as Paddle comes ÷ ours, per image", harness.Pairs(took["stock"], took["ours"]))
    bench.value("all of it ÷ its matrix products", parts["all"] / parts["products"], "×", at_most=2)
    bench.value("images at a time, chosen", batch, "")
    bench.value("peak memory, ours", ours.peak / 1e6, "MB")
    bench.value("peak memory, one by one", tuned.peak / 1e6, "MB")
    bench.finish()


if __name__ == "__main__":
    main()
