"""Shared by the model's benchmarks: config M, the baseline's captioning and tuning, and ours.

The baseline follows the public reference and the contest's notebook, on the same weights: PaddleNLP's unmodified QWen
layers (attention over a cache that grows by concatenation and is transposed at every step), logits of all positions,
one row at a time, training rows padded to max_length. Its vision tower is ours, which favours it. Captions and losses
of both sides are compared before they are timed.

Shapes: B rows, T tokens, S image side.
"""

from __future__ import annotations

import base64
import contextlib
import tempfile
import time
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import harness

# Paddle's own defaults: one thread, MKL's slow path on AMD, freed memory returned. paddlemix leaves a variable that is
# set to an empty value alone, and the libraries treat it as unset.
STOCK = {"OMP_NUM_THREADS": "1", "MKL_DEBUG_CPU_TYPE": "", "GLIBC_TUNABLES": ""}

# Tokens of a training row and of a prompt, of a padded row; labelled tokens at the row's end.
ROW_TOKENS = 300
PADDED_TOKENS = 2048
LABELLED = 36
LORA = {
    "rank": 64,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"],
}


def sizes(size: str) -> Dict[str, int]:
    """Row lengths that fit the model of a size."""
    if size == "quick":
        return {"row": 40, "padded": 64, "labelled": 6}
    return {"row": ROW_TOKENS, "padded": PADDED_TOKENS, "labelled": LABELLED}


def model_config(size: str) -> dict:
    """Config M (190 M parameters), or a tiny one of the same structure."""
    if size == "quick":
        visual = {"image_size": 56, "width": 32, "layers": 2, "heads": 2, "output_dim": 128, "n_queries": 4}
        hidden, inner, layers, heads, ranks, vocab = 128, 256, 2, 4, 256, 480
    else:
        visual = {"image_size": 448, "width": 256, "layers": 8, "heads": 4, "output_dim": 512, "n_queries": 256}
        hidden, inner, layers, heads, ranks, vocab = 512, 1376, 8, 4, 151643, 151936
    visual.update(patch_size=14, image_start_id=ranks + 214)
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "kv_channels": hidden // heads, "visual": visual,
        "pad_token_id": ranks, "bos_token_id": ranks, "eos_token_id": ranks,
    }  # fmt: skip


def made_values(shapes):
    """(name, float32 array) for each name: the same random weights in every process."""
    import numpy as np

    from paddlemix.models.mgen_vl.connector import sincos_positions

    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name.endswith("pos_embed"):
            yield name, sincos_positions(shape[1], int(shape[0] ** 0.5))
        elif len(shape) == 1:
            yield name, np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        else:
            spread = (3.0 / (shape[1] if "wte" in name or "embed" in name else shape[0])) ** 0.5
            values = rng.random(shape, np.float32)
            values -= 0.5
            values *= 2 * spread
            yield name, values


def tokenizer(size: str):
    """A tokenizer with config M's special ids; its tokens are bytes, pairs and triples of bytes."""
    from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer

    config = model_config(size)
    lines = []
    for rank in range(config["pad_token_id"]):
        token = bytes([rank]) if rank < 256 else (rank - 256).to_bytes(2 if rank < 65792 else 3, "big")
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        file.writelines(lines)
        file.flush()
        return MGenVLTokenizer(file.name, n_queries=config["visual"]["n_queries"])


@contextlib.contextmanager
def around(owner, name: str, measured: Callable[..., Any]):
    """Replaces owner.name(…) by measured(the original, …) for the block."""
    call, own = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, lambda *args, **kwargs: measured(call, *args, **kwargs))
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


def products(call: Callable[[], Any], size: str) -> Dict[str, float]:
    """Seconds of `call` (all), of the matrix products and the convolution in it (products), and of as many operations
    at the speed of a large matmul (limit)."""
    import paddle

    found = {"seconds": 0.0, "operations": 0.0}

    def measured(product, *tensors, **kwargs):
        start = time.perf_counter()
        out = product(*tensors, **kwargs)
        found["seconds"] += time.perf_counter() - start
        # addmm has what it adds in front.
        x, y = tensors[1:3] if tensors[0].ndim == 1 else tensors[:2]
        found["operations"] += 2 * out.size * (x.shape[-1] if y.ndim < 4 or x.shape[-1] in y.shape[-2:] else y[0].size)
        return out

    owners = (paddle, "matmul"), (paddle, "addmm"), (paddle._C_ops, "linear"), (paddle._C_ops, "conv2d")
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(around(*owner, measured))
        start = time.perf_counter()
        call()
        whole = time.perf_counter() - start
    limit = found["operations"] / harness.matmul_peak(64 if size == "quick" else 1024)
    return {"all": whole, "products": found["seconds"], "limit": limit}


class Way:
    """A model with methods to time; see Baseline and Ours."""

    def __init__(self, size: str):
        import paddle

        self.size = size
        self.config = model_config(size)
        self.lengths = sizes(size)
        paddle.seed(0)

    def batch(self, B: int, T: int, fill: int = 0):
        """ids, mask, labels int64 [B, T + fill], images [B, 3, S, S]: image, question, labelled tokens, padding."""
        import numpy as np
        import paddle

        start, queries = self.config["visual"]["image_start_id"], self.config["visual"]["n_queries"]
        rng = np.random.default_rng(1)
        ids = np.full((B, T + fill), self.config["pad_token_id"], np.int64)
        ids[:, :T] = rng.integers(0, 256, (B, T))
        ids[:, : queries + 2] = [start] + [start + 2] * queries + [start + 1]
        mask = np.zeros_like(ids)
        mask[:, :T] = 1
        labels = np.full_like(ids, -100)
        labels[:, T - self.lengths["labelled"] : T] = ids[:, T - self.lengths["labelled"] : T]
        side = self.config["visual"]["image_size"]
        pixels = rng.standard_normal((B, 3, side, side), np.float32)
        return tuple(paddle.to_tensor(array) for array in (ids, mask, labels, pixels))

    def prepare_training(self, dropout: float = LORA["dropout"], recompute: bool = False) -> None:
        """Put adapters on; from here on the model trains. recompute: the layers' activations are computed twice."""
        import paddle

        from paddlemix.models.lora import apply_lora

        self.tuned = apply_lora(self.model, **dict(LORA, dropout=dropout))
        self.tuned.train()
        if recompute:
            self.model.recompute_enable()
        parameters = [p for p in self.tuned.parameters() if not p.stop_gradient]
        self.optimizer = paddle.optimizer.AdamW(1e-4, parameters=parameters)

    def lora_step(self, B: int, padded: bool = False) -> float:
        """Seconds of one optimizer step."""
        T = self.lengths["row"]
        batch = self.batch(B, T, self.lengths["padded"] - T if padded else 0)
        start = time.perf_counter()
        loss = self.loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        float(loss)
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """The most memory that this process has held so far."""
        return harness.peak_bytes()

    def first_loss(self) -> float:
        """The loss of one row, for comparison; call it before any step."""
        import paddle

        with paddle.no_grad():
            return float(self.loss(*self.batch(1, self.lengths["row"])))


class Ours(Way):
    """The project's own code."""

    def __init__(self, size: str):
        import paddle

        from paddlemix.models.mgen_vl.configuration import MGenConfig
        from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
        from paddlemix.models.mgen_vl.parameters import parameter_shapes
        from paddlemix.utils.runtime import resolve_device

        resolve_device("cpu")
        super().__init__(size)
        config = MGenConfig(**self.config)
        self.model = MGenLMHeadModel.build_lazily(config)
        tensors = self.model.state_dict()
        for name, value in made_values(parameter_shapes(config)):
            # Without a copy, as when weights are loaded: freed memory would count towards later measurements.
            tensors[name].get_tensor().set(value, paddle.CPUPlace(), True)
        self.model.eval()

    def loss(self, ids, mask, labels, pixels):
        return self.model(ids, images=pixels, attention_mask=mask, labels=labels).loss

    def prefill(self) -> float:
        """Seconds from the pixels of one image to the logits of its prompt."""
        import paddle

        ids, mask, _, pixels = self.batch(1, self.lengths["row"])
        start = time.perf_counter()
        with paddle.no_grad():
            self.model(ids, images=pixels, attention_mask=mask, use_cache=True, last_logits_only=True)
        return time.perf_counter() - start

    def captioner(self, new_tokens: int, **options: Any):
        from paddlemix.inference.captioner import Captioner
        from paddlemix.processors.images import MGenVLImageProcessor

        return Captioner(
            self.model, tokenizer(self.size), MGenVLImageProcessor.from_config(self.model.config),
            max_new_tokens=new_tokens, **options,
        )  # fmt: skip

    def products(self, method: str, *arguments: Any) -> Dict[str, float]:
        """products of one of these methods."""
        return products(lambda: getattr(self, method)(*arguments), self.size)

    def caption(self, pictures: List[bytes], new_tokens: int) -> Dict[str, Any]:
        """Caption base64 images in batches of the program's choice."""
        # Random weights repeat themselves.
        captioner = self.captioner(new_tokens, decoding={"stop_repeating": 0})
        start = time.perf_counter()
        answers = list(captioner.captions(pictures))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "captions": [answer.caption for answer in answers], "batch": captioner.batch_size}

    def decode(self, B: int, tokens: int) -> List[float]:
        """Seconds of each of `tokens` cached steps of `generate`, including its loop."""
        import paddle

        ids, mask, _, pixels = self.batch(B, self.lengths["row"])
        with paddle.no_grad():
            features = self.model.visual(pixels[:1]).expand([B, -1, -1])
        ticks: List[float] = []
        clock = SimpleNamespace(put=lambda value: ticks.append(time.perf_counter()), end=lambda: None)
        self.model.generate(
            ids, image_features=features, attention_mask=mask, max_new_tokens=tokens + 1, streamer=clock,
            decode_strategy="greedy_search", eos_token_id=[self.config["eos_token_id"]],
        )  # fmt: skip
        # A step puts a token for each row.
        ends = ticks[B - 1 :: B]
        return [after - before for before, after in zip(ends[-tokens - 1 :], ends[-tokens:])]

    def step_bytes(self, B: int) -> int:
        """Bytes that one cached step must read: the decoder's weights, lm_head, the cached keys and values."""
        cached = 2 * self.config["num_hidden_layers"] * B * self.lengths["row"] * self.config["hidden_size"]
        layers = sum(p.size for p in self.model.transformer.llm.h.parameters())
        return 4 * int(cached + layers + self.model.lm_head.weight.size)

    def bandwidth(self) -> float:
        return harness.memory_bandwidth((16 if self.size == "quick" else 512) << 20)


class Baseline(Way):
    """PaddleNLP's unmodified QWen layers, full logits, concatenated cache, one row at a time."""

    def __init__(self, size: str):
        from paddlenlp.transformers import QWenConfig, QWenForCausalLM

        from paddlemix.models.mgen_vl.configuration import MGenConfig
        from paddlemix.models.mgen_vl.parameters import parameter_shapes
        from paddlemix.models.mgen_vl.vision import Vision

        super().__init__(size)
        config = MGenConfig(**self.config)
        stock = {key: value for key, value in self.config.items() if key != "visual"}
        self.model = QWenForCausalLM(QWenConfig(seq_length=2048, use_flash_attention=False, **stock))
        self.model.visual = Vision(config.visual)
        tensors = self.model.state_dict()
        # apply_lora asks for them.
        self.model.whole_shapes = lambda: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, value in made_values(parameter_shapes(config)):
            tensors[name.replace("transformer.llm.", "qwen.")].set_value(value)
        self.model.eval()

    def hidden(self, ids, mask, pixels=None, past=None, position=None):
        """Hidden states of all positions, and the cache."""
        import paddle

        stock = self.model.qwen
        embeds = stock.wte(ids)
        if pixels is not None:
            features = self.model.visual(pixels)
            start = int((ids[0] == self.config["visual"]["image_start_id"]).nonzero()[0]) + 1
            end = start + self.config["visual"]["n_queries"]
            rows = [paddle.concat([e[:start], f, e[end:]]) for e, f in zip(embeds, features)]
            embeds = paddle.stack(rows)
        if position is None:
            position = (mask.cumsum(-1) - 1).clip(min=0)
        out = stock(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=past,
            use_cache=not self.model.training, return_dict=True,
        )  # fmt: skip
        return out.last_hidden_state, out.past_key_values

    def loss(self, ids, mask, labels, pixels):
        import paddle.nn.functional as F

        hidden, _ = self.hidden(ids, mask, pixels)
        logits = self.model.lm_head(hidden)[:, :-1].astype("float32")
        targets = labels[:, 1:].reshape([-1])
        losses = F.cross_entropy(logits.reshape([-1, logits.shape[-1]]), targets, ignore_index=-100, reduction="none")
        return losses.sum() / (targets != -100).sum().astype("float32")

    def _greedy(self, ids, mask, pixels, new_tokens: int):
        """The new ids of rows of equal length."""
        import paddle

        new = []
        with paddle.no_grad():
            hidden, past = self.hidden(ids, mask, pixels)
            while True:
                new.append(self.model.lm_head(hidden)[:, -1].argmax(-1, keepdim=True))
                if len(new) == new_tokens:
                    return paddle.concat(new, axis=1)
                mask = paddle.concat([mask, paddle.ones([mask.shape[0], 1], mask.dtype)], axis=1)
                position = mask.sum(axis=1, keepdim=True) - 1
                hidden, past = self.hidden(new[-1], mask, past=past, position=position)

    def caption(self, pictures: List[bytes], new_tokens: int) -> Dict[str, Any]:
        """Caption base64 images one by one."""
        import paddle

        from paddlemix.inference.captioner import caption_prompt_ids
        from paddlemix.models.mgen_vl.generation import decode_response
        from paddlemix.processors.images import MGenVLImageProcessor, decode_base64, open_image
        from paddlemix.processors.postprocess import single_line

        words = tokenizer(self.size)
        processor = MGenVLImageProcessor(self.config["visual"]["image_size"])
        ids = paddle.to_tensor([caption_prompt_ids(words, None, None, 6144)])
        stop = [words.eod_id, words.im_end_id, words.im_start_id]
        captions = []
        start = time.perf_counter()
        for picture in pictures:
            pixels = paddle.to_tensor(processor(open_image(decode_base64(picture)))).unsqueeze(0)
            new = self._greedy(ids, paddle.ones_like(ids), pixels, new_tokens)
            captions.append(single_line(decode_response(words, new[0].tolist(), stop)))
        return {"seconds": time.perf_counter() - start, "captions": captions, "batch": 1}
