"""Decoding in slots against static batches: `python benchmarks/decoding.py`

Config M, against commit c9537fc taken out of the repository: the same weights, images and settings, each side a process
of its own, in turns. Captions per second of 96 images, 16 rows at a time on both sides, whose answers have lengths of a
long-tailed distribution (log-normal: median 35 tokens, one in twenty above 150, cut at 256), and of 32 whose answers
have 40 tokens each. Lengths are forced: a row ends with its last token, and a batch of c9537fc with its longest row. So
are the steps that a row is decoded in, and how many slots had a row while others waited. Then a decoded token at
batch 8, by the difference of a long answer and a short one; the CPU time of Python and Paddle's calls for one, with as
many layers that have next to nothing to compute; and a single image up to its first token and through 40.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from typing import Dict, List

import baseline_model
import harness
import launch
import scratch

SLOTS = 16
EQUAL = 40
# Long enough for a median over what a busy machine does.
TOKENS = 32


def long_tailed(count: int, longest: int = 256, median: float = 35.0) -> List[int]:
    """Evenly spaced quantiles of a log-normal distribution with one in twenty above 150, in a fixed random order."""
    import numpy as np

    spread = math.log(150 / 35) / statistics.NormalDist().inv_cdf(0.95)
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [min(longest, max(1, round(median * math.exp(spread * z)))) for z in normal]
    return np.random.default_rng(0).permutation(lengths).tolist()


class Decoding:
    """One side's model; the project's code is what is first on sys.path."""

    def __init__(self, size: str = "normal"):
        self.way = baseline_model.Ours(size)
        self.few = launch.Model(self.way.config["num_hidden_layers"], 1, gpu=False)
        # No id ends an answer.
        self.way.model.stop_ids = lambda *_: [1 << 20]

    def captions(self, count: int, lengths: List[int]) -> Dict:
        """Caption images with answers of these lengths."""
        captioner = self.way.captioner(max(lengths))
        captioner.batch_size = SLOTS if self.way.size != "quick" else 2
        pictures = baseline_model.images(count, 512 if self.way.size != "quick" else 64)
        forced = Slots(lengths) if hasattr(captioner, "decoding") else Batches(captioner, lengths)
        with forced:
            start = time.perf_counter()
            answers = [answer.caption for answer in captioner.captions(pictures)]
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "captions": answers, "peak": harness.peak_bytes(), **forced.counts}

    def token(self) -> float:
        """Seconds of a decoded token of 8 rows."""
        import paddle

        ids, mask, _, pixels = self.way.batch(8, self.way.lengths["row"])
        with paddle.no_grad():
            # The images cost much more than the tokens.
            features = self.way.model.visual(pixels[:1]).expand([8, -1, -1])

        def took(tokens: int) -> float:
            return self._took(time.perf_counter, self.way, ids, tokens, image_features=features, attention_mask=mask)

        return (took(2 + TOKENS) - took(2)) / TOKENS

    def calls(self) -> float:
        """CPU seconds of this thread for a token of 8 rows that takes next to nothing to compute."""
        import numpy as np
        import paddle

        ids, pixels = paddle.to_tensor(np.repeat(self.few.ids, 8, 0)), paddle.rand([8, 3, 14, 14])

        def took(tokens: int) -> float:
            return min(self._took(time.thread_time, self.few, ids, tokens, images=pixels) for _ in range(8))

        return (took(2 + TOKENS) - took(2)) / TOKENS

    def single(self, tokens: int) -> float:
        """Seconds from the pixels of one image to its last token."""
        ids, mask, _, pixels = self.way.batch(1, self.way.lengths["row"])
        return self._took(time.perf_counter, self.way, ids, tokens, images=pixels, attention_mask=mask)

    @staticmethod
    def _took(clock, way, ids, tokens: int, **inputs) -> float:
        start = clock()
        # As many stop ids as a caption has, none of which can be said.
        way.model.generate(
            ids, max_new_tokens=tokens, decode_strategy="greedy_search", eos_token_id=[1 << 20, 1 << 21, 1 << 22],
            **inputs,
        )  # fmt: skip
        return clock() - start


class Batches:
    """c9537fc: each batch goes on for as long as its longest row needs."""

    def __init__(self, captioner, lengths: List[int]):
        self.counts = {"steps": 0}
        generate, rows = captioner.generate, iter(lengths)

        def forced(samples):
            captioner.max_new_tokens = max(next(rows) for _ in samples)
            self.counts["steps"] += captioner.max_new_tokens - 1
            return generate(samples)

        captioner.generate = forced

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


class Slots:
    """The engine, with a limit for each row."""

    def __init__(self, lengths: List[int]):
        from paddlemix.models.mgen_vl import engine

        self.lengths, self.module, self.counts = lengths, engine, {}
        self.kept = engine.Engine._ends, engine.Engine.run, engine._cycle

    def __enter__(self):
        ends, run, cycle = self.kept

        def forced(engine, row, token, broken, score):
            # A random model repeats itself: what looks for that looks, and is not heard.
            if len(row.tokens) + 1 < self.lengths[row.index]:
                return ends(engine, row, token, broken, score)
            row.tokens.append(token)
            engine._finish(row, row.tokens, None)
            return True

        def counted(engine, prompts):
            yield from run(engine, prompts)
            self.counts.update(
                steps=engine.steps, busy=engine.busy, filled=engine.filled, waited=engine.waited, slots=engine.slots
            )

        self.module.Engine._ends, self.module.Engine.run = forced, counted
        self.module._cycle = lambda *arguments: cycle(*arguments) * 0
        return self

    def __exit__(self, *exc_info):
        self.module.Engine._ends, self.module.Engine.run, self.module._cycle = self.kept


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "decoding in slots, config M, against commit " + launch.BASELINE)
    if args.size == "quick":
        made = Decoding("quick")
        lengths = long_tailed(5, 12, 4.0)
        sides = [made, made]
        measure(args, bench, [lambda method, *rest, side=side: getattr(side, method)(*rest) for side in sides], lengths)
        return
    with scratch.folder(64 << 20) as folder:
        launch.check_out(folder)
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        sides = [launch.Side(where, __file__, threads) for where in (folder, harness.ROOT)]
        measure(args, bench, sides, long_tailed(96))
        for side in sides:
            side.close()


def measure(args, bench: harness.Bench, sides, lengths: List[int]) -> None:
    """sides: c9537fc's and ours, called with a method and its arguments."""
    quick = args.size == "quick"

    def both(*call) -> harness.Pairs:
        for side in sides:
            side(*call)
        return harness.pairs(args, *(lambda side=side: side(*call) for side in sides))

    # The short ones first: memory that was used once stays with the process.
    equal = [EQUAL if not quick else 3] * (32 if not quick else 3)
    theirs, ours = ([], [])
    for number in range(min(args.pairs, 3)):
        for which, side in list(enumerate(sides))[:: 1 if number % 2 == 0 else -1]:
            (theirs, ours)[which].append(side("captions", len(equal), equal))
    if theirs[0]["captions"] != ours[0]["captions"]:
        raise SystemExit("error: the two sides' captions differ")
    seconds = harness.Pairs(*([done["seconds"] for done in side] for side in (theirs, ours)))
    long = [side("captions", len(lengths), lengths) for side in sides]
    tailed = harness.Pairs(*([done["seconds"]] for done in long))
    bench.ratio("96 captions, long-tailed lengths: c9537fc ÷ ours", tailed, at_least=1.6)
    for name, done in zip(("c9537fc", "ours"), long):
        bench.value(f"captions per second, {name}", len(lengths) / done["seconds"], "")
        bench.value(f"steps per caption, {name}", done["steps"] / len(lengths), "")
    counts = long[1]
    if counts.get("waited"):
        bench.value(
            "slots with a row while rows wait", 100 * counts["filled"] / (counts["waited"] * counts["slots"]), "%",
            at_least=95,
        )  # fmt: skip
    bench.value("peak memory, ours ÷ c9537fc", long[1]["peak"] / long[0]["peak"], "×", at_most=1)
    bench.ratio("32 captions of 40 tokens: ours ÷ c9537fc", seconds, at_most=1)
    bench.ratio("a decoded token at batch 8", both("token"), at_most=0.9)
    bench.ratio("Python and Paddle's calls of one", both("calls"), at_most=0.5)
    bench.ratio("one image, first token", both("single", 1), at_most=0.9)
    bench.ratio("one image, 40 tokens", both("single", EQUAL if not quick else 3), at_most=0.9)
    bench.finish()


if __name__ == "__main__":
    launch.serve(Decoding) if sys.argv[1:] == ["--serve"] else main()
