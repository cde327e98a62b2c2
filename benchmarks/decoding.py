"""Decoding in slots against static batches: `python benchmarks/decoding.py [--only longtail equal token calls single]`

Config M, against commit c9537fc, which is read from the repository: same weights, images and settings, each side a
process with one thread, in turns. Seconds are CPU time, so that a busy machine gives the same figures as a quiet one.

- longtail: 96 images, 16 rows at a time on both sides, with answers of long-tailed lengths (log-normal: median 35
  tokens, one in twenty above 150, at most 256). Lengths are forced: ours ends a row at its own, c9537fc a batch at its
  longest row. Also steps per caption, and the share of slots in use while rows wait.
- equal: 32 images with answers of 40 tokens each; the captions are compared.
- token: one decoded token at batch 8: the difference between a long answer and a short one.
- calls: the part of it that Python and Paddle's calls take, measured with as many tiny layers.
- single: one image from its file to the first token and to 40 tokens; prefill.py has the share of matrix products.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import Dict, List

import baseline_model
import harness
import launch
import scratch

SLOTS = 16
EQUAL = 40
TOKENS = 32
PARTS = ("longtail", "equal", "token", "calls", "single")


def long_tailed(count: int, longest: int = 256, median: float = 35.0) -> List[int]:
    """Evenly spaced quantiles of a log-normal distribution with one in twenty above 150, in a fixed random order."""
    import numpy as np

    spread = math.log(150 / 35) / statistics.NormalDist().inv_cdf(0.95)
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [min(longest, max(1, round(median * math.exp(spread * z)))) for z in normal]
    return np.random.default_rng(0).permutation(lengths).tolist()


class Decoding:
    """One side's model, of the paddlemix that is first on sys.path."""

    def __init__(self, size: str):
        self.way = baseline_model.Ours(size)
        self.few = launch.Model(self.way.config["num_hidden_layers"], 1, gpu=False)
        self.picture = scratch.jpegs(1, 512 if size != "quick" else 64)[0]
        # No id ends an answer.
        self.way.model.stop_ids = lambda *_: [1 << 20]

    def captions(self, count: int, lengths: List[int]) -> Dict:
        """Caption images with answers of these lengths."""
        captioner = self.way.captioner(max(lengths))
        captioner.batch_size = SLOTS if self.way.size != "quick" else 2
        pictures = scratch.jpegs(count, 512 if self.way.size != "quick" else 64)
        with slots(lengths) if hasattr(captioner, "decoding") else batches(captioner, lengths) as counts:
            start = time.process_time()
            answers = [answer.caption for answer in captioner.captions(pictures)]
            seconds = time.process_time() - start
        return {"seconds": seconds, "captions": answers, "peak": harness.peak_bytes(), **counts}

    def token(self) -> float:
        """Seconds of a decoded token of 8 rows."""
        import paddle

        ids, mask, _, pixels = self.way.batch(8, self.way.lengths["row"])
        with paddle.no_grad():
            # The images cost much more than the tokens.
            features = self.way.model.visual(pixels[:1]).expand([8, -1, -1])

        return self._token(self.way, ids, 1, image_features=features, attention_mask=mask)

    def calls(self) -> float:
        """Seconds of a token of 8 rows with tiny layers."""
        import numpy as np
        import paddle

        ids = paddle.to_tensor(np.repeat(self.few.ids, 8, 0))
        return self._token(self.few, ids, 8, images=paddle.rand([8, 3, 14, 14]))

    def single(self, tokens: int) -> float:
        """Seconds from an image's file to the last token of its answer."""
        import paddle

        from paddlemix.processors.images import MGenVLImageProcessor, decode_base64, open_image

        start = time.process_time()
        ids, mask, *_ = self.way.batch(1, self.way.lengths["row"])
        pixels = MGenVLImageProcessor(self.way.config["visual"]["image_size"])(open_image(decode_base64(self.picture)))
        self._generate(self.way, ids, tokens, images=paddle.to_tensor(pixels).unsqueeze(0), attention_mask=mask)
        return time.process_time() - start

    def _token(self, way, ids, repeats: int, **inputs) -> float:
        """Seconds of one token, by a long answer and a short one."""

        def took(tokens: int) -> float:
            start = time.process_time()
            self._generate(way, ids, tokens, **inputs)
            return time.process_time() - start

        few, many = (min(took(tokens) for _ in range(repeats)) for tokens in (2, 2 + TOKENS))
        return (many - few) / TOKENS

    @staticmethod
    def _generate(way, ids, tokens: int, **inputs) -> None:
        # As many stop ids as a caption has, none of which can occur.
        way.model.generate(
            ids, max_new_tokens=tokens, decode_strategy="greedy_search", eos_token_id=[1 << 20, 1 << 21, 1 << 22],
            **inputs,
        )  # fmt: skip


@contextlib.contextmanager
def batches(captioner, lengths: List[int]):
    """c9537fc: each batch runs until its longest row ends. Yields what is counted."""
    counts, generate, rows = {"steps": 0}, captioner.generate, iter(lengths)

    def forced(samples):
        captioner.max_new_tokens = max(next(rows) for _ in samples)
        counts["steps"] += captioner.max_new_tokens - 1
        return generate(samples)

    captioner.generate = forced
    yield counts


@contextlib.contextmanager
def slots(lengths: List[int]):
    """The engine, with a limit for each row. Yields what is counted."""
    from paddlemix.models.mgen_vl import engine as module
    from paddlemix.models.mgen_vl.engine import Engine

    counts, ends, run, cycle = {}, Engine._ends, Engine.run, module._cycle

    def forced(engine, row, token, broken, score):
        # A random model repeats itself: the check for repetition runs, but is ignored.
        if len(row.tokens) + 1 < lengths[row.index]:
            return ends(engine, row, token, broken, score)
        row.tokens.append(token)
        engine._finish(row, row.tokens, None)
        return True

    def counted(engine, prompts):
        yield from run(engine, prompts)
        counts.update((name, getattr(engine, name)) for name in ("steps", "busy", "filled", "waited", "slots"))

    Engine._ends, Engine.run, module._cycle = forced, counted, lambda *arguments: cycle(*arguments) * 0
    try:
        yield counts
    finally:
        Engine._ends, Engine.run, module._cycle = ends, run, cycle


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__, PARTS)
    bench = harness.Bench(args, "decoding in slots, config M, against commit " + launch.BASELINE)
    quick = args.size == "quick"
    lengths, equal = (long_tailed(5, 12, 4.0), [3] * 3) if quick else (long_tailed(96), [EQUAL] * 32)
    with launch.sides(args, Decoding) as sides:
        measure(args, bench, sides, lengths, equal)
    bench.finish()


def measure(args, bench: harness.Bench, sides, lengths: List[int], equal: List[int]) -> None:
    """sides: c9537fc's and ours; called with the name of a method and its arguments."""

    def both(*call, repeats: int = 1) -> harness.Pairs:
        for side in sides:
            side(*call)
        return harness.pairs(args, *(lambda side=side: min(side(*call) for _ in range(repeats)) for side in sides))

    # The short ones first: a process keeps the memory it once used.
    if "single" in args.only:
        bench.ratio("one image, first token", both("single", 1, repeats=4), at_most=0.9)
        bench.ratio(f"one image, {equal[0]} tokens", both("single", equal[0]), at_most=0.9)
    if "calls" in args.only:
        bench.ratio("Python and Paddle's calls of a token", both("calls"), at_most=0.5)
    if "token" in args.only:
        bench.ratio("a decoded token at batch 8", both("token"), at_most=0.9)
    for part, taken in (("equal", equal), ("longtail", lengths)):
        if part in args.only:
            done = [side("captions", len(taken), taken) for side in sides]
            if part == "equal" and done[0]["captions"] != done[1]["captions"]:
                raise SystemExit("error: the two sides' captions differ")
            report(bench, part, taken, *done)


def report(bench: harness.Bench, part: str, lengths: List[int], theirs: Dict, ours: Dict) -> None:
    seconds = harness.Pairs([theirs["seconds"]], [ours["seconds"]])
    if part == "equal":
        bench.ratio(f"{len(lengths)} captions of {lengths[0]} tokens", seconds, at_most=1)
    else:
        bench.ratio(f"{len(lengths)} captions, long-tailed lengths", seconds, at_least=1.6)
    for name, done in (("c9537fc", theirs), ("ours", ours)):
        bench.value(f"of them a second, {name}", len(lengths) / done["seconds"], "")
        bench.value(f"steps per caption, {name}", done["steps"] / len(lengths), "")
    if ours.get("waited"):
        share = 100 * ours["filled"] / (ours["waited"] * ours["slots"])
        bench.value("slots with a row while rows wait", share, "%", at_least=95)
    bench.value("peak memory, ours ÷ c9537fc", ours["peak"] / theirs["peak"], "×", at_most=1)


if __name__ == "__main__":
    main()
