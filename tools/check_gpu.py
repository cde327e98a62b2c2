"""Test this project on a GPU in a few minutes, without weights: `python tools/check_gpu.py`

It uses two models with random weights: a complete tiny one, and one with the widths of the 7B and a single layer each
in ViT and decoder. For float16 and bfloat16, O1 and O2, with and without fused attention, it checks loss and gradients
against float32 on the CPU, ten LoRA steps, saving and resuming, the loss scale, batched captions, memory and time. Each
combination runs in its own process. Without a GPU, the same checks run in float32 on the CPU, with the tiny model only
and without memory; they say nothing about a GPU.

The exit status is 1 if a row fails. Please report what it prints, failed or not, together with the --json file.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402
from paddlemix.utils.texts import one_line  # noqa: E402

SIZES = {
    "tiny": "--image_size 56 --patch_size 14 --vit_width 64 --vit_heads 2 --n_queries 4 --hidden 128 --layers 2 "
    "--heads 4 --intermediate 256 --std 0.1",
    "wide": "--image_size 448 --patch_size 14 --vit_width 1664 --vit_layers 1 --vit_heads 16 --mlp_ratio 4.9231 "
    "--n_queries 256 --hidden 4096 --layers 1 --heads 32 --intermediate 22016 --std 0.02",
}
SAMPLES, BATCH, COMPARED, STEPS = 16, 4, 2, 10
LORA = {
    "lora": True, "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05,
    "freeze_include": ["*visual*"], "freeze_exclude": ["*visual.attn_pool*"],
}  # fmt: skip
# Largest relative difference of the loss, least cosine of all gradients, least share of equal captions.
LIMITS = {"float32": (1e-4, 0.9999, 1.0), "float16": (1e-2, 0.999, 0.85), "bfloat16": (1e-2, 0.999, 0.7)}
# Factor of the loss before the backward pass, so that float16 can represent small gradients.
SCALE = 1024.0
# Gradients of larger parameters are not compared.
LARGEST = 1 << 20
# A check yields its finding as text, whether it passed (None: a figure without a verdict), and the numbers.
Found = Tuple[str, Optional[bool], Dict[str, Any]]


class Run(NamedTuple):
    """A way to compute. device: "cpu" or "gpu:N"."""

    device: str
    dtype: str
    level: str
    fused: bool


# Of a row's columns but the last.
WIDTHS = (16, 5, 11, 9, 8)


def line(*cells: str) -> str:
    return "".join(f"| {cell:{width}} " for cell, width in zip(cells, WIDTHS)) + f"| {cells[-1]} |"


class Row(NamedTuple):
    check: str
    model: str
    run: Run
    found: str
    ok: Optional[bool]
    numbers: Dict[str, Any]

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAIL", None: "measured"}[self.ok]

    def line(self) -> str:
        precision = f"{self.run.dtype} {self.run.level}" if self.run.dtype != "float32" else self.run.dtype
        attention = "fused" if self.run.fused else "plain"
        return line(self.check, self.model, precision, attention, self.verdict, self.found)


def make_world(folder: str, models: List[str]) -> None:
    """The models, their samples, and loss and gradients of these in float32 on the CPU, one sample at a time."""
    import make_tiny_model
    import numpy as np
    from PIL import Image

    rng, records = np.random.default_rng(0), []
    captions = [f"第{i}张广告，价格{i * 7 + 9}元" + "，限时优惠" * (i % 4) for i in range(SAMPLES)]
    for i, caption in enumerate(captions):
        file = io.BytesIO()
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((64, 64), Image.NEAREST).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode()
        records.append({"id": f"identity_{i}", "conversations": [["请描述图片内容", caption]], "image": image})
    with atomic_write(os.path.join(folder, "train.json")) as file:
        json.dump(records, file, ensure_ascii=False, indent=0)
    for model in models:
        arguments = [os.path.join(folder, model), "--captions", "-", "--max_new_tokens", "16", *SIZES[model].split()]
        make_tiny_model.make_model(arguments[0], captions, make_tiny_model.parse_arguments(arguments)[0])
        checks = Checks(folder, Run("cpu", "float32", "O1", False))
        loss, gradients = checks.loss_and_gradients(model, together=False)
        np.savez(os.path.join(folder, f"{model}.npz"), loss=loss, **gradients)


class Checks:
    """The checks of one run. world: the folder of make_world."""

    def __init__(self, world: str, run: Run):
        self.world, self.run, self.fused = world, run, run.fused

    def rows(self, models: List[str]) -> Iterator[Row]:
        """All rows. A check that breaks is a row that failed."""
        tiny, last, half = models[0], models[-1], self.run.dtype == "float16"
        planned = [("a LoRA step", last, self.step)]  # first, while the peak of memory is its own
        planned += [("loss, gradients", model, self.gradients) for model in models]
        planned.append(("LoRA, resumed", tiny, self.training))
        planned += [("loss scale", tiny, self.overflow)] * half
        if not self.run.fused and (self.run.level == "O2" or self.run.dtype == "float32"):
            # Captioning chooses its attention itself, as its rows say, and knows no level.
            planned += [("batched captions", tiny, self.captions), ("a token", last, self.token)]
        for name, model, check in planned:
            try:
                for found in check(model):
                    yield Row(name, model, self.run._replace(fused=self.fused), *found)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"
                yield Row(name, model, self.run, one_line(text, 300), False, {})

    # ---- training

    def config(self, model: str, **changes: Any) -> Tuple[str, str]:
        """(configuration file, output folder) of a run."""
        out, run = tempfile.mkdtemp(dir=self.world), self.run
        values = {
            "model_name_or_path": os.path.join(self.world, model), "output_dir": os.path.join(out, "out"),
            "dataset": {"train": [{"name": "chatml_dataset", "data_files": os.path.join(self.world, "train.json")}]},
            "do_train": True, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 2e-3,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": ["none"],
            "device": run.device, "fp16": run.dtype == "float16", "bf16": run.dtype == "bfloat16",
            "fp16_opt_level": run.level, "use_flash_attention": run.fused, **changes,
        }  # fmt: skip
        with atomic_write(os.path.join(out, "config.json")) as file:
            json.dump(values, file)
        return os.path.join(out, "config.json"), values["output_dir"]

    @staticmethod
    def train(config: str, out: str) -> Tuple[List[dict], Dict[str, Any]]:
        """Supervised finetuning: (log lines with a loss, the adapters by name)."""
        from paddlemix.checkpoint import open_weights
        from paddlemix.trainer import command_line
        from paddlemix.trainer.finetune import finetune

        finetune(command_line.parse([config]))
        with open(os.path.join(out, "trainer_state.json"), encoding="utf-8") as file:
            history = [line for line in json.load(file)["log_history"] if "loss" in line]
        with open_weights(os.path.join(out, "lora_model_state.pdparams")) as reader:
            return history, {name: reader.read(name, "float32") for name in reader.keys()}

    def loss_and_gradients(self, model: str, together: bool = True) -> Tuple[float, Dict[str, Any]]:
        """Of COMPARED samples with all parameters trainable, as one padded batch or one by one, which must agree."""
        import paddle

        from paddlemix.trainer import command_line
        from paddlemix.trainer.finetune import build
        from paddlemix.trainer.run import resolve

        trainer = build(resolve(command_line.parse([self.config(model)[0]])))
        samples = [trainer.train_dataset[i] for i in range(COMPARED)]
        batches = [trainer.data_collator(part) for part in ([samples] if together else [[one] for one in samples])]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        total = 0.0
        trainer.model.train()
        for batch, share in zip(batches, (count / sum(counts) for count in counts)):
            with trainer.autocast_smart_context_manager():
                inputs = {name: paddle.to_tensor(array) for name, array in batch.items()}
                loss = trainer.compute_loss(trainer.model, inputs)
            (loss * (SCALE * share)).backward()
            total += float(loss) * share
        named = trainer.model.state_dict().items()
        small = {name: one.grad for name, one in named if one.grad is not None and one.size <= LARGEST}
        return total, {name: gradient.astype("float32").numpy() / SCALE for name, gradient in small.items()}

    def gradients(self, model: str) -> Iterator[Found]:
        import numpy as np

        loss, found = self.loss_and_gradients(model)
        with np.load(os.path.join(self.world, f"{model}.npz")) as file:
            expected = dict(file)
        off = abs(loss / float(expected.pop("loss")) - 1)

        def cosine(names) -> float:
            a, b = (np.concatenate([side[n].ravel() for n in names]).astype("float64") for side in (found, expected))
            return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))

        whole, worst = cosine(expected), min(expected, key=lambda name: cosine([name]))
        least, (limit, bound, _) = cosine([worst]), LIMITS[self.run.dtype]
        words = f"loss {loss:.4f}, {off:.1e} off; cosine of gradients {whole:.6f}, least {least:.4f} ({worst})"
        numbers = {"loss": loss, "off": off, "cosine": whole, "least": least}
        yield words, off <= limit and whole >= bound, numbers

    def training(self, model: str) -> Iterator[Found]:
        """LoRA steps with a checkpoint in the middle, then the second half again from there."""
        config, out = self.config(model, **LORA, save_strategy="steps", save_steps=STEPS // 2)
        history, adapters = self.train(config, out)
        losses = [line["loss"] for line in history]
        falls = all(0 < loss < 1e4 for loss in losses) and losses[-1] < losses[0]
        checkpoint = os.path.join(out, f"checkpoint-{STEPS // 2}")
        _, again = self.train(*self.config(model, **LORA, resume_from_checkpoint=checkpoint))
        apart = {name: float(abs(array - again[name]).max()) for name, array in adapters.items()}
        equal = sum(difference == 0 for difference in apart.values())
        words = f"loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} steps; "
        words += f"resumed: {equal} of {len(apart)} tensors equal bit for bit"
        words += f", at most {max(apart.values()):.1e} apart" * (equal < len(apart))
        yield words, falls and equal == len(apart), {"losses": losses, "equal": equal, "apart": apart}

    def overflow(self, model: str) -> Iterator[Found]:
        """A loss scale that is far too large must be detected, cost some steps, and leave the weights finite."""
        import numpy as np

        for master in [False] + [True] * (self.run.level == "O2"):
            changes = {"scale_loss": 2.0**26, "max_steps": 16, "amp_master_grad": master}
            history, adapters = self.train(*self.config(model, **LORA, **changes))
            skipped, scale = history[-1]["skipped_steps"], history[-1]["loss_scale"]
            finite = all(np.isfinite(array).all() for array in adapters.values())
            words = f"{skipped} of {len(history)} steps skipped, scale 2^26 → 2^{math.log2(scale):g}"
            words += ", float32 gradients" * master + ("" if finite else ", weights are NOT finite")
            yield words, finite and 0 < skipped < len(history), {"skipped": skipped, "scale": scale}

    def step(self, model: str) -> Iterator[Found]:
        """Time of a LoRA step; on a GPU also its peak memory, compared with the estimate."""
        import cost_7b
        import paddle

        from paddlemix.trainer.forecast import foresee

        config, out = self.config(model, **LORA)
        planned = foresee([config])
        estimate, batch = planned.estimate(), planned.batch
        history, _ = self.train(config, out)
        if self.run.device != "cpu":
            peak, expected = paddle.device.cuda.max_memory_allocated(), estimate.peak - estimate.allowance
            words = f"peak memory {peak / 2**30:.2f} GiB, {peak / expected:.2f} × the estimate"
            yield words, 0.75 < peak / expected < 1.15, {"peak": peak, "estimate": expected}
        seconds = statistics.median(BATCH / line["interval_samples_per_second"] for line in history[-5:])
        flops = BATCH * cost_7b.Model(planned.run.config).step(batch.tokens, batch.labels / batch.rows)
        words = f"{seconds * 1e3:.1f} ms for {batch.rows} × {batch.tokens} tokens, {flops / seconds / 1e12:.2f} TFLOP/s"
        yield words, None, {"seconds": seconds, "flops": flops}

    # ---- captions

    def captioner(self, model: str) -> Tuple[Any, List[str]]:
        from paddlemix.inference.captioner import Captioner
        from paddlemix.inference.loading import load_model

        loaded = load_model(os.path.join(self.world, model), dtype=self.run.dtype, device=self.run.device)
        self.fused = loaded.model.generates_fused()
        with open(os.path.join(self.world, "train.json"), encoding="utf-8") as file:
            images = [record["image"] for record in json.load(file)]
        return Captioner(loaded.model, loaded.tokenizer, loaded.image_processor, batch_size=8), images

    def captions(self, model: str) -> Iterator[Found]:
        """Prompts of different lengths, so that batches are padded."""
        from paddlemix.inference.captioner import caption_prompt_ids
        from paddlemix.models.mgen_vl.captioning import generate_captions
        from paddlemix.models.mgen_vl.engine import Prompt
        from paddlemix.processors.images import decode_base64, open_image

        captioner, images = self.captioner(model)
        prompts, window = [], captioner.model.generation_config.max_window_size
        for i, image in enumerate(images):
            ids = caption_prompt_ids(captioner.tokenizer, "请描述图片" + "内容" * (i % 5), None, window)
            prompts.append(Prompt(ids, captioner.image_processor(open_image(decode_base64(image)))[None]))

        def answers(*prompts: Prompt) -> List[str]:
            model, tokenizer = captioner.model, captioner.tokenizer
            found = dict(generate_captions(model, tokenizer, prompts, captioner.decoding, captioner.batch_size))
            return [found[i][0].text for i in range(len(prompts))]

        single = [answers(prompt)[0] for prompt in prompts]
        equal = sum(a == b for a, b in zip(single, answers(*prompts)))
        ok = equal >= LIMITS[self.run.dtype][2] * len(prompts) and len(set(single)) > 1
        words = f"{equal} of {len(prompts)} as one by one, {len(set(single))} different"
        yield words, ok, {"equal": equal, "different": len(set(single))}

    def token(self, model: str) -> Iterator[Found]:
        import cost_7b

        from paddlemix.models.mgen_vl.engine import Decoding

        captioner, images = self.captioner(model)
        images, least = images[: captioner.batch_size], {}
        for tokens in (4, 36, 4, 36):
            captioner.decoding = Decoding(tokens, min_new_tokens=tokens)
            start = time.perf_counter()
            list(captioner.captions(images))
            least[tokens] = min(least.get(tokens, math.inf), time.perf_counter() - start)
        seconds = (least[36] - least[4]) / 32
        read = cost_7b.Model(captioner.model.config).decode_bytes(len(images), len(captioner.prompt_ids) + 20)
        read *= 2 if self.run.dtype == "float32" else 1
        words = f"{seconds * 1e3:.2f} ms for {len(images)} rows, {read / seconds / 1e9:.0f} GB/s"
        yield words, None, {"seconds": seconds, "bytes": read}


def in_child(world: str, run: Run, models: List[str]) -> Iterator[Row]:
    """The rows of a run in its own process: after a CUDA error nothing else works, and peaks cannot be reset."""
    command = [sys.executable, os.path.abspath(__file__), "--child", json.dumps([world, run, models])]
    done = subprocess.run(command, capture_output=True, text=True)
    for text in done.stdout.splitlines():
        if text.startswith("ROW "):
            check, model, done_as, *found = json.loads(text[4:])
            yield Row(check, model, Run(*done_as), *found)
    if done.returncode:
        words = f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
        yield Row("its process", "", run, one_line(words, 300), False, {})


def choose_runs(device: str) -> Tuple[List[Run], List[str]]:
    """(the runs that this device can do, why others are left out)."""
    from paddlemix.utils.runtime import resolve_dtype, resolve_flash

    runs, reasons = [], []
    for dtype in ["float32"] if device == "cpu" else ["float32", "float16", "bfloat16"]:
        found = resolve_dtype(dtype, device)
        fused, reason = resolve_flash(True, dtype, device)
        reasons += [one for one in (found.reason, reason) if one and one not in reasons]
        if found.value == dtype:
            levels = ["O1"] if dtype == "float32" else ["O1", "O2"]
            runs += [Run(device, dtype, level, way) for level in levels for way in (False, True)[: 1 + fused]]
    return runs, reasons


def machine(device: str) -> str:
    import paddle

    from paddlemix.utils.compat import versions

    words = f"{versions()}, Python {sys.version.split()[0]}"
    if device == "cpu":
        return f"{words}, CPU"
    card = paddle.device.cuda.get_device_properties(int(device.split(":")[1]))
    cuda = f"CUDA {paddle.version.cuda()}, cuDNN {paddle.device.get_cudnn_version()}"
    return f"{words}, {cuda}, {card.name}, {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"


def main(argv: Optional[List[str]] = None) -> int:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write all rows and figures as JSON")
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path.insert(0, os.path.join(ROOT, "tools"))
    # Otherwise some kernels add up in any order, and a resumed run could not be compared bit for bit.
    os.environ.setdefault("FLAGS_cudnn_deterministic", "1")
    os.environ.setdefault("FLAGS_embedding_deterministic", "1")

    from paddlenlp.utils.log import logger as paddlenlp_logger

    from paddlemix.utils.errors import UserError
    from paddlemix.utils.log import logger, print_like_ours
    from paddlemix.utils.outputs import check_kind
    from paddlemix.utils.runtime import resolve_device

    logger.setLevel("ERROR")
    print_like_ours(paddlenlp_logger.logger)
    if args.child:
        world, run, models = json.loads(args.child)
        for row in Checks(world, Run(*run)).rows(models):
            print("ROW " + json.dumps(row), flush=True)
        return 0
    if args.json:
        check_kind(args.json, "a JSON report")
    start, device = time.time(), resolve_device(args.device)
    if device.value == "cpu" and (args.device or "").startswith("gpu"):
        raise UserError(f"--device {args.device}: {device.reason.split('; ')[0]}", "device")
    print(machine(device.value))
    models = ["tiny"] if device.value == "cpu" else ["tiny", "wide"]
    if device.value == "cpu":
        print(f"{device.reason or 'no card that this Paddle can use'}: these rows say nothing about a GPU")
    runs, reasons = choose_runs(device.value)
    rows: List[Row] = []
    print(line("check", "model", "precision", "attention", "verdict", "found"))
    print(line(*("-" * width for width in WIDTHS), "-----"))
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as world:
        resolve_device("cpu")  # the card's memory is for the processes that are measured
        make_world(world, models)
        for run in runs:
            for row in Checks(world, run).rows(models) if run.device == "cpu" else in_child(world, run, models):
                rows.append(row)
                print(row.line(), flush=True)
    for reason in reasons:
        print(f"left out: {reason}")
    failed = sum(row.ok is False for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {time.time() - start:.0f} s")
    if args.json:
        values = [{**row._asdict(), "run": row.run._asdict(), "verdict": row.verdict} for row in rows]
        with atomic_write(args.json) as file:
            json.dump({"machine": machine(device.value), "left out": reasons, "rows": values}, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
