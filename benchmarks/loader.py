"""From base64 JPEG to pixel values on one core: `python benchmarks/loader.py`

Baseline: Pillow decodes and resizes, numpy divides, subtracts the mean and divides by the deviation in float32, and
turns channels first. Ours: processors.images, with its checks of what strangers send. Images of 512 px become 448 px;
both fill a batch of 8. Resizing is Pillow's on both sides and two fifths or more of the baseline's time.
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
    import numpy as np
    from PIL import Image

    from paddlemix.processors.images import MEAN, STD, MGenVLImageProcessor, decode_base64, open_image

    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    processor = MGenVLImageProcessor(448)

    def theirs(text: bytes):
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").resize((448, 448), Image.BICUBIC)
        return ((np.asarray(image).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def ours(text: bytes):
        return processor(open_image(decode_base64(text)))

    texts = scratch.jpegs(2 if args.size == "quick" else 48)

    def epoch(one):
        def run() -> None:
            for begin in range(0, len(texts), 8):
                np.stack([one(text) for text in texts[begin : begin + 8]])

        return harness.timed(run)

    bench = harness.Bench(args, "base64 JPEG 512 px to float32 [3, 448, 448], one core")
    baseline, mine = epoch(theirs), epoch(ours)
    baseline(), mine()
    taken = harness.pairs(args, baseline, mine)
    bench.ratio(f"images/s against Pillow and numpy ({len(texts)} images)", taken, at_least=1.5)
    bench.value("images/s", len(texts) / sorted(taken.ours)[len(taken.ours) // 2], "/s")
    scale = 255 * std.reshape(3, 1, 1)
    apart = max(float((abs(theirs(text) - ours(text)) * scale).max()) for text in texts)
    bench.value("largest difference of a pixel, in 1/255", max(apart, 1e-9), "", at_most=1)
    bench.finish()


if __name__ == "__main__":
    main()
