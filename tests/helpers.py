"""Small models of the real architecture, made on the spot by seed, and what several files of tests ask."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from typing import Any, Dict, Iterator, Optional

import numpy as np

# One token per byte, then the 217 special ids, padded to a round size.
RANKS = 256
VOCAB_SIZE = 480
IMAGE_START_ID = RANKS + 214


def tiny_config(**overrides):
    """A MGen-VL of 0.5 M parameters: 56 px images, 16 patches, 4 queries, 2 + 2 layers."""
    from paddlemix.models.mgen_vl.configuration import MGenConfig

    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "seq_length": 512,
        "max_position_embeddings": 512,
        "pad_token_id": RANKS,
        "bos_token_id": RANKS,
        "eos_token_id": RANKS,
        "visual": {
            "image_size": 56,
            "patch_size": 14,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "output_dim": 128,
            "image_start_id": IMAGE_START_ID,
            "n_queries": 4,
        },
    }
    visual = dict(values["visual"], **overrides.pop("visual", {}))
    values.update(overrides, visual=visual)
    return MGenConfig(**values)


def write_byte_vocabulary(folder) -> str:
    """mgen.tiktoken with the 256 single bytes."""
    path = os.path.join(folder, "mgen.tiktoken")
    with open(path, "wb") as file:
        for rank in range(RANKS):
            file.write(base64.b64encode(bytes([rank])) + b" %d\n" % rank)
    return path


def byte_vocab_tokenizer(folder, n_queries=4):
    """A tokenizer over the byte vocabulary, saved in `folder`."""
    from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer

    tokenizer = MGenVLTokenizer(write_byte_vocabulary(folder), n_queries=n_queries)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_model(seed=0, **overrides):
    """A random model in eval mode. Weights are large enough that images and texts change its answers."""
    import paddle

    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

    paddle.seed(seed)
    model = MGenLMHeadModel(tiny_config(initializer_range=0.1, **overrides))
    model.eval()
    return model


def save_tiny_model(folder, seed=0, **overrides) -> str:
    """A whole model folder: weights, configurations, tokenizer. Returns its path."""
    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    model = make_tiny_model(seed, **overrides)
    model.save_pretrained(folder)
    byte_vocab_tokenizer(folder, n_queries=model.config.n_queries)
    return folder


def image_bytes(seed=0, size=(64, 48), format="JPEG") -> bytes:
    """A small picture of coloured blocks, different for each seed."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.NEAREST).save(file, format, quality=95)
    return file.getvalue()


def image_base64(seed=0, **kwargs) -> str:
    return base64.b64encode(image_bytes(seed, **kwargs)).decode()


def prompt_ids(text_ids, n_queries=4, images=1):
    """Ids of a sequence with `images` spans in front of some text ids."""
    span = [IMAGE_START_ID] + [IMAGE_START_ID + 2] * n_queries + [IMAGE_START_ID + 1]
    return span * images + list(text_ids)


@contextlib.contextmanager
def refused(kind: type, *about: str, match: Optional[str] = None) -> Iterator[Any]:
    """The block must raise `kind`, about these keys or codes (UserError.about)."""
    # benchmarks/ takes its models from here, and needs no pytest.
    import pytest

    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert set(about) <= set(caught.value.about), caught.value


def without_coverage() -> Dict[str, str]:
    """The environment for a process that is not measured: an interrupt between taking and releasing coverage's lock
    makes it wait forever, and a limit on files makes its own file fail."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS_")}


def scene(seed, size=(512, 340)):
    """A picture of boxes and circles."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(60, 250, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for kind in range(14):
        x, y, w, h = (rng.random(4) * [size[0], size[1], size[0] / 2, size[1] / 2]).tolist()
        shape = draw.ellipse if kind % 2 else draw.rectangle
        shape((x - 30, y - 30, x + w, y + h), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encoded(image, kind="JPEG", **options) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scripted(model, monkeypatch, said):
    """Let the model say these ids, one a step, later ones more probable. Returns a list with an item a step."""
    import paddle

    steps = []

    def logits(self, hidden):
        made = np.zeros([hidden.shape[0], 1, model.config.vocab_size], "float32")
        made[:, 0, said[len(steps)]] = 9 + len(steps)
        steps.append(1)
        return paddle.to_tensor(made)

    monkeypatch.setattr(type(model), "_logits", logits)
    return steps
