"""Packed sequences against batches padded to their longest sample: `python benchmarks/packing.py`

Half of the samples are captioned images (289 tokens and the caption), half the same texts without the image (25 and
the caption); captions are as long as those of the public demo rows. A LoRA step (forward and backward, r = 64, vision
frozen) over the same 8 samples: one batch padded to the longest, against one sequence of up to 2048 tokens. Both have
the same real tokens, so the ratio of the times is that of effective tokens/s.

Model: config M (hidden 512, 8 layers; ViT 448/14, width 256, 8 layers), but a vocabulary of 4,864 in place of 151,936,
so that lm_head has the share of the decoder that it has in the 7B (a tenth; M's own is three times the decoder). Rows:
the step on given image features, and with the vision tower, which costs the same on both sides.
"""

from __future__ import annotations

import baseline_model
import harness

# Tokens of the twenty public captions of the ten demo rows.
CAPTIONS = (43, 39, 22, 42, 12, 32, 37, 25, 22, 39, 39, 46, 26, 33, 20, 31, 24, 37, 34, 35)
# Tokens of a sample without its caption, of an image's features, and of the text around those.
TEXT, QUERIES, PICTURE = 25, 256, 6
MAX_LENGTH, BATCH = 2048, 8
VOCABULARY = 4864
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def make_model(size: str):
    import paddle

    from paddlemix.models.lora import apply_lora
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    values = baseline_model.model_config(size)
    values.update(vocab_size=VOCABULARY, seq_length=MAX_LENGTH, **dict.fromkeys(TOKEN_IDS, 0))
    values["visual"].update(n_queries=QUERIES, image_start_id=VOCABULARY - 4)
    paddle.seed(0)
    model = apply_lora(MGenLMHeadModel(MGenConfig(**values)), **{**baseline_model.LORA, "dropout": 0.0})
    model.train()
    return model


def make_samples(count: int, image_size: int) -> list:
    """Samples as a dataset gives them, every second with an image, in random order."""
    import numpy as np

    rng = np.random.default_rng(0)
    samples = []
    for number in rng.permutation(count):
        caption = CAPTIONS[number // 2 % len(CAPTIONS)]
        span = [VOCABULARY - 4, *[VOCABULARY - 2] * QUERIES, VOCABULARY - 3] if number % 2 == 0 else []
        text = rng.integers(0, VOCABULARY - 4, TEXT + caption + (PICTURE if span else 0))
        ids = np.concatenate([text[:12], span, text[12:]]).astype(np.int64)
        labels = np.full_like(ids, -100)
        labels[-caption - 2 :] = ids[-caption - 2 :]
        images = rng.standard_normal((int(number % 2 == 0), 3, image_size, image_size)).astype(np.float32)
        samples.append({"input_ids": ids, "labels": labels, "images": images})
    return samples


def padding(samples_of_rows: list) -> float:
    """Padded places per real token, when the rows of a batch are padded to the longest of them."""
    real = sum(sum(rows) for rows in samples_of_rows)
    return sum(max(rows) * len(rows) for rows in samples_of_rows) / real - 1


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    import numpy as np
    import paddle

    import paddlemix  # noqa: F401 - its CPU settings
    from paddlemix.datasets.collator import MGenVLCollator
    from paddlemix.datasets.packing import SampleLengths, group_by_length, plan_packs

    model = make_model(args.size)
    config = model.model.config
    samples = make_samples(BATCH, config.visual["image_size"])
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    packs = plan_packs(lengths, MAX_LENGTH, seed=0)
    collate = MGenVLCollator(0)
    padded = [collate(samples)]
    packed = [collate([[samples[i] for i in packs.samples(number)]]) for number in range(packs.count)]

    def epoch(batches, with_vision):
        def run():
            for batch in batches:
                inputs = {name: paddle.to_tensor(array) for name, array in batch.items()}
                if not with_vision:
                    count = len(inputs.pop("images"))
                    inputs["image_features"] = paddle.zeros([count, QUERIES, config.hidden_size])
                model(**inputs).loss.backward()
            model.clear_gradients()

        return harness.timed(run)

    bench = harness.Bench(args, "packed sequences against padded batches, effective tokens/s")
    for batches in (padded, packed):  # the first time is slower
        epoch(batches, True)()
    rows = ("LoRA step on given image features", False, 1.5), ("the same with the vision tower", True, None)
    for name, with_vision, bound in rows:
        sides = epoch(padded, with_vision), epoch(packed, with_vision)
        bench.ratio(name, harness.pairs(args, *sides), at_least=bound)

    # Padding alone, with more samples than could be run.
    rng = np.random.default_rng(1)
    captions, has_image = rng.choice(CAPTIONS, 8000), rng.random(8000) < 0.5
    many = SampleLengths(TEXT + captions + has_image * (QUERIES + 2 + PICTURE), has_image)
    packs = plan_packs(many.tokens, MAX_LENGTH, seed=0)
    orders = rng.permutation(len(many.tokens)), group_by_length(many, BATCH, 1, rng)
    for name, order in zip(("padded as they come", "group_by_modality_length"), orders):
        bench.value(f"padding, {name}", padding(many.tokens[order].reshape(-1, BATCH).tolist()) * 100, "%")
    room = packs.count * MAX_LENGTH / many.tokens.sum() - 1
    bench.value("room left in packed sequences", room * 100, "%")
    bench.finish()


if __name__ == "__main__":
    main()
