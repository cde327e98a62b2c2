"""Time and memory of the 7B on GPUs, counted on paper: `python tools/cost_7b.py [performance|scale]`

Prints the tables of docs/performance.md and docs/scale.md from counted floating-point operations and bytes, the cards'
published peaks, and the shares of them that FLOPS_SHARE and BANDWIDTH_SHARE assume. Nothing here was run on a GPU.
"""

from __future__ import annotations

import heapq
import math
import os
import random
import statistics
import sys
from typing import Any, Dict, List, Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.inference.captioner import rows_that_fit  # noqa: E402
from paddlemix.models.lora import adapter_shapes  # noqa: E402
from paddlemix.models.mgen_vl.parameters import count, parameter_shapes  # noqa: E402
from paddlemix.trainer import freeze, machine, memory, work  # noqa: E402
from paddlemix.utils import cli  # noqa: E402

CARDS = {name: machine.CARDS[name] for name in ("V100-32GB", "A100-80GB", "H100-80GB")}
# Assumed shares of the peaks.
FLOPS_SHARE, BANDWIDTH_SHARE = work.FLOPS_SHARE, 0.6
# Bytes/s for merging: reading and writing one disk at the same time.
DISK = 1.0e9
# All-reduce as a ring, bytes/s of its slowest link: NVLink inside a machine, 200 Gbit/s between machines, which a
# ring ordered by machines crosses once.
INSIDE, BETWEEN = 200e9, 200e9 / 8
# Measured on a core of an AMD EPYC (Python 3.11), 512 px JPEGs of the demo test set, inline base64: see docs/scale.md.
SAMPLES_PER_CORE, INDEXED_PER_SECOND, LENGTHS_PER_SECOND, BYTES_PER_SAMPLE = 110, 38_000, 9_500, 37_800
TOKENS, LABELS = 330, 50
TARGETS = (".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*")
GIB = 1 << 30


class Model:
    """A model (an MGenConfig; default: the 7B) with the notebook's LoRA (rank 64) and attn_pool."""

    def __init__(self, config: Any = None) -> None:
        if config is None:
            from paddlemix.models.mgen_vl.configuration import MGenConfig

            config = MGenConfig()
        self.config = config
        shapes = parameter_shapes(config)
        adapters = adapter_shapes(shapes, TARGETS, 64)
        pool = freeze.plan_freeze(list(shapes), ["*visual*"], ["*visual.attn_pool*"], lora=True)
        self.lora = memory.Trained({**shapes, **adapters}, [*pool, *adapters])
        trainable = freeze.plan_freeze(list(shapes))
        self.full = memory.Trained(shapes, trainable)
        self.adapters = count(adapters)
        self.parameters = count(shapes)
        self.layers = count({name: s for name, s in shapes.items() if ".h." in name and len(s) == 2})
        self.head = math.prod(shapes["lm_head.weight"])

    # ---- floating-point operations

    def prefill(self) -> float:
        """Operations of an image and a prompt of 300 tokens."""
        image = work.vit(self.config) + work.connector(self.config)
        return image + self.decoder(300, 300) + 2 * self.head

    def decoder(self, tokens: int, keys: int) -> float:
        """Operations of `tokens` tokens in the layers, each attending to `keys`, without lm_head."""
        return 2 * tokens * self.layers + work.attention(self.config, tokens, keys)

    def step(self, tokens: int, labels: int, recompute: bool = False, full: bool = False, image: bool = True) -> float:
        """Operations of the forward and backward pass of a sample, with LoRA or full fine-tuning."""
        return work.sample(self.config, self.full if full else self.lora, tokens, labels, recompute, image)

    # ---- bytes

    def decode_bytes(self, batch: int, context: int) -> float:
        """Bytes read from memory for a token of each of `batch` rows, in half precision."""
        return 2 * (self.layers + self.head) + batch * context * self.cache_per_token()

    def cache_per_token(self) -> int:
        return 2 * 2 * self.config.hidden_size * self.config.num_hidden_layers

    def decode_seconds(self, card: machine.Card, batch: int, context: int) -> float:
        """Seconds for a token of each of `batch` rows, bound by memory or by computation."""
        read = self.decode_bytes(batch, context) / card.bandwidth / BANDWIDTH_SHARE
        return max(read, batch * self.decoder(1, context) / card.flops / FLOPS_SHARE)

    def peak(self, trained: memory.Trained, rows: int, tokens: int, **setting: Any) -> float:
        """Peak memory with Paddle 2.6, the contest platform's; 3 keeps a little less (docs/memory.md)."""
        batch = memory.Batch(rows, tokens, rows, rows * LABELS)
        how = memory.Setting("O2", gpu=True, paddle_3=False, **setting)
        return memory.estimate(self.config, trained, batch, how).peak


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.2f} s" if value < 120 else f"{value / 3600:.1f} h" if value > 5400 else f"{value / 60:.1f} min"


def training(model: Model) -> List[str]:
    """Time and memory of an optimizer step of 16 samples."""
    rows = []
    for name, card in CARDS.items():
        for words, tokens, recompute in (("as it is here", 336, False), ("padded to 2048", 2048, True)):
            flops = 16 * model.step(tokens, LABELS if tokens < 2048 else tokens, recompute)
            peak = model.peak(model.lora, 1, tokens, recompute=recompute, lora_dropout=0.05)
            rows.append(
                (name, f"{words}, {tokens} tokens{', recompute' * recompute}", f"{flops / 1e12:,.0f}",
                 seconds(flops / card.flops), seconds(flops / card.flops / FLOPS_SHARE), f"{peak / GIB:.1f} GiB",
                 "yes" if peak < card.memory * GIB else "no")
            )  # fmt: skip
    head = ("card", "16 samples", "TFLOP", "at the peak", f"at {FLOPS_SHARE:.0%}", "memory", "fits")
    return table(head, rows)


# Tokens of the longest of ten real samples, which the README's table of cards is for.
ROW, MILLION = 376, 1_000_000


def epoch(model: Model) -> List[str]:
    """A million samples once over with LoRA, on one card."""
    rows = []
    for name, card in machine.CARDS.items():
        hours = [MILLION * model.step(ROW, LABELS, recompute) / card.flops / FLOPS_SHARE for recompute in (False, True)]
        rows.append((name, f"{card.flops / 1e12:.0f} TFLOP/s", *map(seconds, hours)))
    return table(("card", "published peak", "a million rows", "with recompute"), rows)


def generation(model: Model) -> List[str]:
    """Prefill of 300 tokens with an image, and one decoded token."""
    rows = []
    weights = 2 * model.parameters
    for name, card in CARDS.items():
        for batch in (1, 8, 32):
            prefill, read = batch * model.prefill(), model.decode_bytes(batch, 320)
            step = model.decode_seconds(card, batch, 320)
            first = prefill / card.flops / FLOPS_SHARE
            cache = batch * 340 * model.cache_per_token()
            rows.append(
                (name, str(batch), f"{prefill / 1e12:.1f}", seconds(first), f"{read / 1e9:.1f} GB",
                 seconds(read / card.bandwidth), seconds(step), seconds((first + 40 * step) / batch),
                 f"{cache / GIB:.2f} GiB", f"{(weights + cache) / GIB:.1f} GiB")
            )  # fmt: skip
    head = ("card", "batch", "prefill TFLOP", f"prefill at {FLOPS_SHARE:.0%}", "read a token", "at the peak",
            f"at {BANDWIDTH_SHARE:.0%}", "a caption of 40 tokens", "cache", "weights and cache")  # fmt: skip
    return table(head, rows)


def answer_lengths(rows: int) -> List[int]:
    """Lengths of answers in tokens: log-normal quantiles, median 35, one in twenty above 150, cut at 256, shuffled."""
    normal = statistics.NormalDist()
    spread = math.log(150 / 35) / normal.inv_cdf(0.95)
    lengths = [min(256, round(35 * math.exp(spread * normal.inv_cdf((i + 0.5) / rows)))) for i in range(rows)]
    random.Random(0).shuffle(lengths)
    return lengths


def slots(model: Model) -> List[str]:
    """Captions whose answers differ in length: batches that wait for their longest row, and slots."""
    rows, lengths = [], answer_lengths(4096)
    mean = sum(lengths) / len(lengths)
    for name, card in CARDS.items():
        # As free_memory and generates_fused have it, for answers of up to 512 tokens.
        free = int(0.9 * (card.memory * GIB - 2 * model.parameters))
        held = rows_that_fit(model.config, 300, 512, "float16", free, card.capability >= (8, 0))
        for batch in (8, min(32, held)):
            longest = [max(lengths[i : i + batch]) for i in range(0, len(lengths), batch)]
            static = sum(longest)
            # A slot takes the next answer when it is free.
            ends = [0] * batch
            for length in lengths:
                heapq.heapreplace(ends, ends[0] + length)
            filled = max(ends)
            step = model.decode_seconds(card, batch, 300 + round(mean))
            first = model.prefill() / card.flops / FLOPS_SHARE
            took = [first + step * steps / len(lengths) for steps in (static, filled)]
            rows.append(
                (name, f"{batch} of {held}", seconds(step), f"{static / len(lengths):.2f}",
                 f"{filled / len(lengths):.2f}", f"{mean * len(lengths) / batch / static:.0%}",
                 f"{mean * len(lengths) / batch / filled:.0%}", f"{1 / took[0]:.1f}", f"{1 / took[1]:.1f}",
                 f"{took[0] / took[1]:.2f} ×")
            )  # fmt: skip
    head = ("card", "rows at a time", "a step", "steps a caption, batches", "slots", "batches are busy", "slots",
            "captions/s, batches", "slots", "slots ÷ batches")  # fmt: skip
    return table(head, rows)


def merging(model: Model) -> List[str]:
    size = 2 * model.parameters
    largest = 2 * model.head
    rows = [
        (f"{size / 1e9:.1f} GB", f"{size / 1e9:.1f} GB", seconds(2 * size / DISK),
         f"{2 * model.adapters * 64 / 1e12:.2f} TFLOP", f"{2 * largest / 1e9:.1f} GB")
    ]  # fmt: skip
    return table(("read", "written", f"at {DISK / 1e9:.0f} GB/s together", "A·B", "two tensors in memory"), rows)


def public(model: Model) -> List[str]:
    """What the figures of others say about the share of the peak they reach."""
    qwen = 8 * model.step(512, 512, recompute=True)
    notebook = 16 * model.step(2048, 2048, image=False)
    peak = model.peak(model.lora, 1, 512, recompute=True, flash=True)
    token = model.decode_bytes(1, 1024)
    rows = [
        ("Qwen-VL README: LoRA, 8 samples of 512 tokens, A100-80GB", "2.3 s",
         f"{qwen / 1e12:,.0f} TFLOP with recompute",
         f"{qwen / 2.3 / CARDS['A100-80GB'].flops:.0%} of the peak"),
        ("the same, memory", "23.6 GB", f"{peak / 1e9:.1f} GB by the formula of memory.md", f"{peak / 23.6e9:.2f} ×"),
        ("Qwen-VL README: BF16, one token, A100-80GB", f"{1e3 / 28.87:.1f} ms",
         f"{token / 1e9:.1f} GB", f"{token * 28.87 / CARDS['A100-80GB'].bandwidth:.0%} of the bandwidth"),
        ("notebook: 16 samples padded to 2048, card not named", "32.7 s", f"{notebook / 1e12:,.0f} TFLOP, no images",
         f"{notebook / 32.7 / 1e12:.0f} TFLOP/s"),
        ("notebook: merge", "4.5 min", f"{4 * model.parameters / 1e9:.0f} GB read and written",
         f"{4 * model.parameters / 270 / 1e6:.0f} MB/s"),
    ]  # fmt: skip
    return table(("published", "", "counted here", "so"), rows)


def scale(model: Model) -> List[str]:
    """One million images once over, on 8 and on 64 A100."""
    card = CARDS["A100-80GB"]
    rows: Dict[str, List[str]] = {}
    for cards in (8, 64):
        for full in (False, True):
            mode, trained = ("full, sharding stage 2", model.full) if full else ("LoRA + attn_pool", model.lora)
            sharing = {"sharding": cards, "stage": 2} if full else {}
            batch = 4
            sample = model.step(336, LABELS, recompute=full, full=full)
            compute = sample / card.flops / FLOPS_SHARE
            epoch = MILLION * compute / cards
            peak = model.peak(trained, batch, 336, recompute=full, **sharing)
            gradients = 2 * memory.elements(trained.shapes, trained.trainable)
            # A ring moves every byte twice, less one share; between machines at the slower rate.
            speed = INSIDE if cards <= 8 else BETWEEN
            reduce = 2 * (cards - 1) / cards * gradients / speed
            per_step = 4 * batch * compute
            workers = math.ceil(1 / compute / SAMPLES_PER_CORE)
            saved = trained.trainable if not full else list(trained.shapes)
            weights, states = memory.checkpoint_bytes(trained, memory.Setting("O2", True), saved)
            rows[f"{cards} × A100, {mode}"] = [
                f"{sample / 1e12:.1f}", seconds(epoch), f"{cards / compute:,.0f}", f"{peak / GIB:.0f} GiB",
                seconds(per_step), seconds(reduce), f"{reduce / per_step:.0%}", f"{workers}", f"{cards * workers}",
                f"{(weights + states) / 1e9:.1f} GB",
            ]  # fmt: skip
    head = ("run", "TFLOP a sample", "an epoch", "samples/s", "memory", "step of 16 a card", "all-reduce", "of it",
            "workers a card", "in all", "checkpoint")  # fmt: skip
    return table(head, [[name, *cells] for name, cells in rows.items()])


def data(model: Model) -> List[str]:
    """Files and counts of a million samples."""
    rows = [
        ("TSV, and as much again for train.json with inline images", f"{2 * MILLION * BYTES_PER_SAMPLE / 1e9:.0f} GB"),
        ("the same with references into the TSV", f"{MILLION * (BYTES_PER_SAMPLE + 400) / 1e9:.0f} GB"),
        ("index of the records (16 bytes each)", f"{16 * MILLION / 1e6:.0f} MB"),
        ("building it, one core", seconds(MILLION / INDEXED_PER_SECOND)),
        ("counting lengths for mixtoken, one core, once", seconds(MILLION / LENGTHS_PER_SECOND)),
        ("decoding all images, one core", seconds(MILLION / SAMPLES_PER_CORE)),
        ("reading them in an hour", f"{MILLION * BYTES_PER_SAMPLE / 3600 / 1e6:.1f} MB/s"),
    ]
    return table(("", "one million images"), rows)


TABLES = {"performance": (training, epoch, generation, slots, merging, public), "scale": (scale, data)}


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("document", nargs="?", choices=sorted(TABLES), help="the tables of one document (default: all)")
    args = parser.parse_args()
    model = Model()
    for document, tables in TABLES.items():
        if args.document in (None, document):
            for build in tables:
                print("\n".join([f"{document}: {build.__name__}", "", *build(model), ""]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
