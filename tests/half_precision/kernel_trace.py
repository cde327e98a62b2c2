"""Every kernel that the project's steps launch in half precision, on stderr: `python -m … DTYPE LEVEL FOLDER [only]`

Paddle logs each kernel that it chooses (GLOG_v=6); what is written in between says from where, by the line of the
project or of PaddleNLP that ran last. Everything runs in the simulator with the branches that a GPU takes: operands are
not spread, transposes are views, parameters are set and not adopted, attention and generation's norms are fused.
"""

import os
import sys
import types

import numpy as np
import paddle
import paddle.nn.functional as F

from paddlemix.auto import AutoConfigMIX, AutoModelMIX, AutoTokenizerMIX
from paddlemix.inference.loading import Loaded
from paddlemix.inference.scoring import Scorer, _Pair
from paddlemix.models.mgen_vl import language
from paddlemix.models.mgen_vl.engine import Decoding, Engine, Prompt
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.trainer.image_gain import ImageGain
from paddlemix.trainer.numerics import Numerics, gradient_norm
from paddlemix.trainer.trainer import FinetuneTrainer
from paddlemix.trainer.training_args import FinetuneArguments
from paddlemix.trainer.tuned_model import add_neftune
from paddlemix.utils import compat
from tests.half_precision import world
from tests.half_precision.simulator import HALF, Simulation

_TRACED = (os.sep + "paddlemix" + os.sep, os.sep + "paddlenlp" + os.sep)
_place = ""


def say(*words):
    os.write(2, (" ".join(map(str, words)) + "\n").encode())


def trace(frame, event, _):
    """Say when another line of a traced file runs, also the caller's after a return."""
    global _place
    name = frame.f_code.co_filename
    if not any(part in name for part in _TRACED):
        # Deeper calls may come back into traced files.
        return None
    if event == "return":
        frame = frame.f_back
        while frame is not None and not any(part in frame.f_code.co_filename for part in _TRACED):
            frame = frame.f_back
    if frame is not None:
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if place != _place:
            _place = place
            say("CALLER", place)
    return trace


class Steps:
    def __init__(self, simulation, level, folder):
        self.simulation, self.level, self.folder = simulation, level, folder
        self.values = world.tensors(world.batch(3, 5))

    def load(self):
        """As a GPU does: into parameters that have no storage yet, by set_value."""
        real, paddle.get_device = paddle.get_device, lambda: "gpu:0"
        try:
            return AutoModelMIX.from_pretrained(self.folder, dtype="float32")
        finally:
            paddle.get_device = real

    def fresh(self, fused=True):
        config = AutoConfigMIX.from_pretrained(self.folder, use_flash_attention=fused)
        model = AutoModelMIX.from_pretrained(self.folder, config=config, dtype="float32")
        for layer in model.sublayers(include_self=True):
            # Made within the simulation, where they are wider than `decorate` takes them.
            layer._buffers.update({name: buffer.astype(HALF) for name, buffer in layer._buffers.items()})
        return model

    def optimizer(self, model):
        arguments = FinetuneArguments(output_dir=self.folder, device="cpu", adam_beta2=0.95, weight_decay=0.1)
        owner = types.SimpleNamespace(optimizer=None, model=model, args=arguments, lr_scheduler=1e-3)
        return FinetuneTrainer.create_optimizer(owner)

    def train(self, model, values=None, steps=2):
        """Two batches accumulated, scaled back as GradScaler does, clipped, one optimizer step."""
        self.simulation.decorate(model, self.level)
        optimizer, numerics = self.optimizer(model), Numerics()
        model.train()
        for _ in range(steps):
            with self.simulation.autocast(self.level):
                loss = model(**(values or self.values)).loss
            (loss / steps).backward()
            numerics.watch(loss, scaled=True)
        found = [p.grad for p in model.parameters() if not p.stop_gradient and p.grad is not None]
        say("CALLER", "GradScaler")
        for dtype in {gradient.dtype for gradient in found}:
            same = [gradient for gradient in found if gradient.dtype == dtype]
            paddle._C_ops.check_finite_and_unscale_(same, paddle.full([1], 1.0, dtype))
        gradient_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.clear_grad()

    def lora(self):
        self.train(self.adapted(0.05))

    def adapted(self, dropout=0.0):
        return world.with_lora(self.fresh(), dropout)

    def full(self):
        model = self.fresh()
        for name, parameter in model.named_parameters():
            parameter.stop_gradient = name.endswith("pos_embed")
        self.train(model)

    def plain_attention(self):
        self.train(self.fresh(fused=False), steps=1)

    def recompute(self):
        model = self.fresh()
        model.apply(lambda layer: setattr(layer, "enable_recompute", True) if hasattr(layer, "enable_recompute") else 0)
        self.train(model, steps=1)

    def packing(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 200, [2, 64])
        values = {"input_ids": ids, "labels": ids, "attention_mask": np.ones_like(ids)}
        values["sample_lengths"] = np.array([[20, 30], [40, 0]])
        self.train(self.fresh(), world.tensors(values), steps=1)

    def neftune(self):
        model = self.fresh()
        add_neftune(model, 5.0)
        self.train(model, steps=1)

    def evaluation(self):
        model = self.fresh()
        self.simulation.decorate(model, self.level)
        with paddle.no_grad(), self.simulation.autocast(self.level):
            model(**self.values).logits.astype("float32")

    def image_gain(self):
        model = self.fresh()
        self.simulation.decorate(model, self.level)
        blank = np.zeros([3, world.SIDE, world.SIDE], np.float32)
        trainer = types.SimpleNamespace(
            autocast_smart_context_manager=lambda: self.simulation.autocast(self.level),
            eval_dataset=types.SimpleNamespace(image_processor=types.SimpleNamespace(blank=lambda: blank)),
            compute_loss=lambda model, inputs: model(**inputs).loss,
            _prepare_inputs=dict, _nested_gather=lambda tensor: tensor,
            args=types.SimpleNamespace(world_size=1, dataset_world_size=1),
        )  # fmt: skip
        gain = ImageGain(trainer)
        gain.add(model, self.values, paddle.zeros([], "float32"))
        gain.mean(3)

    def scores(self, model=None):
        """tools/score_rows.py: captions with their images, and continuing the cached question of a blank one."""
        model = model or self.fresh()
        self.simulation.decorate(model, "O2")
        size = types.SimpleNamespace(blank=lambda: np.zeros([3, world.SIDE, world.SIDE], np.float32))
        tokenizer = AutoTokenizerMIX.from_pretrained(self.folder)
        scorer = Scorer(Loaded(getattr(model, "model", model), tokenizer, size, ChatTemplate.default()))
        encoded = [scorer._encoded(None, caption) for caption in ("a", "bc")]
        begin = int(np.argmax(encoded[0]["labels"] >= 0)) - 1
        pairs = [_Pair(one["input_ids"], one["labels"], begin, size.blank(), None) for one in encoded]
        scorer._losses(pairs)

    def scores_unmerged(self):
        self.scores(self.adapted())

    def slots(self, model=None, **options):
        """More prompts than slots, with and without an image: places are taken again, the ring grows and shrinks."""
        model = model or self.fresh()
        self.simulation.decorate(model, "O2")
        model.eval()
        ids, pixels = world.batch(1, 5)["input_ids"][0, :24].tolist(), world.pictures(5, 5)[0]
        prompts = [Prompt(ids, pixels[i : i + 1]) if i % 2 else Prompt([9] * (60 * i + 3)) for i in range(5)]
        decoding = Decoding(max_new_tokens=70, stop_repeating=4, **options)
        list(Engine(getattr(model, "model", model), decoding, [478], 2, scores=True).run(prompts))

    def slots_sampling(self):
        options = {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
        self.slots(sample=True, samples=2, min_new_tokens=2, **options)

    def slots_unmerged(self):
        self.slots(self.adapted())

    def beams_of_captions(self):
        model = self.fresh()
        self.simulation.decorate(model, "O2")
        model.eval()
        ids, pixels = world.batch(1, 5)["input_ids"][0, :24].tolist(), world.pictures(2, 5)[0]
        options = {"min_new_tokens": 2, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "samples": 2}
        decoding = Decoding(max_new_tokens=4, num_beams=3, **options)
        list(model.beams([Prompt(ids, one[None]) for one in pixels], decoding, [478, 479], 2))

    def generate(self, model=None, **options):
        model = model or self.fresh()
        self.simulation.decorate(model, "O2")
        model = getattr(model, "model", model)
        ids = np.array(world.batch(3, 5)["input_ids"])[:, :24]
        mask = np.ones_like(ids)
        # One row is shorter, padded in front.
        ids[2, 2:], ids[2, :2], mask[2, :2] = ids[2, :-2].copy(), 0, 0
        options = {"eos_token_id": [478, 479], "max_new_tokens": 4, **options}
        model.config.seq_length = options.pop("seq_length", model.config.seq_length)
        model.generate(
            paddle.to_tensor(ids), images=self.values["images"], attention_mask=paddle.to_tensor(mask), **options
        )

    def greedy(self):
        self.generate(decode_strategy="greedy_search")

    def greedy_with_options(self):
        options = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 2, "seq_length": 20}
        self.generate(decode_strategy="greedy_search", **options)

    def sampling(self):
        self.generate(decode_strategy="sampling", top_k=20, top_p=0.9, temperature=0.8)

    def beams(self):
        self.generate(decode_strategy="beam_search", num_beams=3, eos_token_id=478)

    def beams_unmerged(self):
        self.generate(self.adapted(), decode_strategy="beam_search", num_beams=3, eos_token_id=478)

    def broken(self):
        """Not a step of the project: a loss that autocast's lists do not keep in float32."""
        logits = paddle.zeros([2, 8], HALF)
        say("CALLER", "a loss in half precision")
        F.cross_entropy(logits, paddle.zeros([2], "int64"))


TRAINING = ("load", "lora", "full", "plain_attention", "recompute", "packing", "neftune", "evaluation", "image_gain")
GENERATION = (
    "greedy", "greedy_with_options", "sampling", "beams", "beams_unmerged", "beams_of_captions", "slots",
    "slots_sampling", "slots_unmerged", "scores", "scores_unmerged",
)  # fmt: skip


def stand_in(simulation):
    """Let what has no kernel on a CPU say the one that it launches on a GPU, and compute by others."""

    def launch(kernels, inputs):
        inputs = simulation._cast(kernels[0], [tensor for tensor in inputs if tensor is not None])
        stored = "float64" if {tensor.dtype for tensor in inputs} - {HALF} else "float32"
        for kernel in kernels:
            say(f"{kernel} API kernel key: [CPU, NCHW, {stored}]")

    attention, auto_cast = F.scaled_dot_product_attention, paddle.amp.auto_cast

    def fused_attention(query, key, value, attn_mask=None, **options):
        launch(("flash_attn", "flash_attn_grad"), [query, key, value, attn_mask])
        return attention(query, key, value, attn_mask, **options)

    def fused_rms_norm(x, weight, bias, epsilon, axis, residual=None):
        launch(("rms_norm",), [x, weight, residual])
        total = x if residual is None else x + residual
        wide = total.astype("float32")
        return (wide * paddle.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)).astype(x.dtype) * weight, total

    def open_autocast(on=True, level="O1", **options):
        # Recomputing opens it anew; on a CPU it does nothing.
        return simulation.autocast(level) if options.get("enable", on) else auto_cast(False)

    F.scaled_dot_product_attention, paddle.amp.auto_cast = fused_attention, open_autocast
    compat._fused_rms_norm = fused_rms_norm
    language.norm_is_fused = lambda x: not paddle.is_grad_enabled()


def main(dtype, level, folder, *only):
    paddle.set_device("cpu")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    with Simulation(dtype) as simulation:
        stand_in(simulation)
        steps = Steps(simulation, level, folder)
        # Generation has no autocast, and no level.
        for name in only or TRAINING + (GENERATION if level == "O2" else ()):
            say("STEP", name)
            sys.settrace(trace)
            getattr(steps, name)()
            sys.settrace(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
