"""From base64 JPEG to pixel values on one core: `python benchmarks/loader.py`

Baseline: Pillow decodes and resizes, numpy divides by 255, which makes float64 of it, and paddle.vision's Normalize and
to_tensor do the rest, as in PaddleMIX's processor for this architecture; for comparison, the same in float32 by numpy
alone. Ours: processors.images, with its checks of untrusted images. Images of 512 px become 448 px; all fill batches
of 8 on the device. Decoding and resizing are Pillow's on all sides: they are the limit, measured alone.
"""

from __future__ import annotations

import base64
import io
import os

import harness
import scratch


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # isort: off
    import paddlemix  # noqa: F401 (the CPU settings)
    import numpy as np
    import paddle
    from PIL import Image

    # isort: on
    from paddlemix.processors.images import MEAN, STD, MGenVLImageProcessor, decode_base64, open_image

    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    normalize = paddle.vision.transforms.Normalize(MEAN, STD, data_format="HWC")
    processor = MGenVLImageProcessor(448)

    def resized(text: bytes):
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        return image.resize((448, 448), Image.BICUBIC)

    def theirs(text: bytes):
        return paddle.vision.transforms.to_tensor(normalize(np.array(resized(text)) / 255.0))

    def plain(text: bytes):
        return ((np.asarray(resized(text)).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def ours(text: bytes):
        return processor(open_image(decode_base64(text)))

    texts = scratch.jpegs(2 if args.size == "quick" else 48)

    def limit() -> None:
        for text in texts:
            resized(text)

    def epoch(one):
        def run() -> None:
            for begin in range(0, len(texts), 8):
                batch = [one(text) for text in texts[begin : begin + 8]]
                paddle.stack(batch) if one is theirs else paddle.to_tensor(np.stack(batch))

        return harness.timed(run)

    bench = harness.Bench(args, "base64 JPEG 512 px to float32 [3, 448, 448], one core")
    baseline, floats, mine = epoch(theirs), epoch(plain), epoch(ours)
    baseline(), floats(), mine()
    taken = harness.pairs(args, baseline, mine)
    bench.ratio(f"images/s against Pillow and paddle.vision ({len(texts)} images)", taken)
    bench.ratio("images/s against Pillow and numpy in float32", harness.pairs(args, floats, mine))
    bench.ratio("all of it ÷ decoding and resizing", harness.pairs(args, harness.timed(limit), mine), at_most=1.4)
    bench.value("images/s", len(texts) / sorted(taken.ours)[len(taken.ours) // 2], "/s")
    scale = 255 * std.reshape(3, 1, 1)
    apart = max(float((abs(theirs(text).numpy() - ours(text)) * scale).max()) for text in texts)
    bench.value("largest difference of a pixel, in 1/255", max(apart, 1e-9), "", at_most=1)
    bench.finish()


if __name__ == "__main__":
    main()
