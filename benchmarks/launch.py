"""How long Python and Paddle take to launch a token and a LoRA micro-step of the 7B: `python benchmarks/launch.py`

A card waits for the thread that launches its kernels whenever they take less time than their launch. So this measures
the CPU time of that thread alone (time.thread_time) at the 7B's depth, 32 layers behind a ViT of 48, with next to
nothing to compute, and with the branches that a GPU takes: no operand spread, strided views, fused swiglu, and for the
fused RMSNorm one cheap call in its place (Paddle's CPU kernel of it takes ten times a launch; 2.6 has none). The
baseline is commit c9537fc, taken out of the repository into a scratch folder. Both sides are processes that answer in
turns. All tensors are float32, and the CPU casts none of them: the casts of half precision, which are launches too, are
in neither. "In half precision" is a step under autocast, with what Paddle and both sides do there but for the casts.
"""

from __future__ import annotations

import contextlib
import operator
import subprocess
import time
from typing import Any, Callable, Iterator, List

import harness
import scratch

BASELINE = "c9537fc"
LAYERS = 32, 48
TOKENS = 20
START, END = 90, 91


class Model:
    """The model of one side, whose paddlemix is first on sys.path."""

    def __init__(self, layers, vit_layers, gpu=True):
        import numpy as np
        import paddle

        import paddlemix  # noqa: F401
        from paddlemix.models.mgen_vl.configuration import MGenConfig
        from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel

        if gpu:
            take_gpu_branches()
        visual = {
            "heads": 1, "image_size": 14, "image_start_id": START, "layers": vit_layers, "mlp_ratio": 1.0,
            "n_queries": 1, "output_dim": 128, "patch_size": 14, "width": 8,
        }  # fmt: skip
        config = MGenConfig(
            hidden_size=128, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=1, kv_channels=128,
            vocab_size=128, seq_length=2048, visual=visual, no_bias=True, eos_token_id=0, pad_token_id=0,
            bos_token_id=0,
        )  # fmt: skip
        paddle.seed(0)
        self.model, self.tuned = MGenLMHeadModel(config), MGenLMHeadModel(config)
        self.ids = np.array([[START, 2, END, 3]])
        self.images = paddle.rand([1, 3, 14, 14])
        self.lora = None

    def generate(self, tokens: int) -> float:
        import paddle

        start = time.thread_time()
        # As many stop ids as a caption has, none of which can be said.
        self.model.generate(
            paddle.to_tensor(self.ids), images=self.images, max_new_tokens=tokens, eos_token_id=[1000, 1001, 1002],
            decode_strategy="greedy_search",
        )  # fmt: skip
        return time.thread_time() - start

    def token(self) -> List[float]:
        """Seconds of one decoded token, and of the prefill with its image."""
        self.generate(2)
        few, many = (min(self.generate(n) for _ in range(5)) for n in (4, 4 + TOKENS))
        token = (many - few) / TOKENS
        return [token, few - 3 * token]

    def step(self, half: bool = False, repeats: int = 20) -> List[float]:
        """Seconds of a LoRA micro-step: forward, backward. half: under autocast."""
        import numpy as np
        import paddle

        from paddlemix.models.lora import apply_lora

        if self.lora is None:
            # By hand: freeze's functions are others in the baseline.
            pool = [name for name, _ in self.tuned.named_parameters() if name.startswith("visual.attn_pool")]
            for name, parameter in self.tuned.named_parameters():
                parameter.stop_gradient = name not in pool
            targets = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
            self.lora = apply_lora(
                self.tuned, rank=4, alpha=4, dropout=0.05, target_modules=targets, trainable=pool
            )
            self.lora.train()
        labels = self.ids.copy()
        labels[:, :3] = -100
        batch = {"input_ids": self.ids, "attention_mask": np.ones_like(self.ids), "labels": labels}
        batch.update(self.collated(labels))
        taken = []
        for _ in range(repeats + 2):
            inputs = {name: paddle.to_tensor(array) for name, array in batch.items()}
            start = time.thread_time()
            with autocast() if half else contextlib.nullcontext():
                loss = self.lora(images=self.images, **inputs).loss
            middle = time.thread_time()
            loss.backward()
            taken.append((middle - start, time.thread_time() - middle))
        return [min(side) for side in zip(*taken)]

    def collated(self, labels):
        """What the collator of this side adds to a batch."""
        try:
            from paddlemix.processors.mgen_vl_processing import image_positions, label_positions
        except ImportError:
            return {}
        return {"image_positions": image_positions(self.ids, 1, START, 1), "label_positions": label_positions(labels)}


def take_gpu_branches():
    import paddle

    from paddlemix.models.mgen_vl import attention, language
    from paddlemix.utils import compat

    paddle.set_device("cpu")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    attention.spread = language.spread = lambda tensor, shape: tensor
    if compat._fused_swiglu is not None:
        language.swiglu = lambda gate, up: compat._fused_swiglu(gate, up)
    if hasattr(language, "norm_is_fused"):
        language.norm_is_fused = lambda x: not paddle.is_grad_enabled()
        language.fused_rms_norm = one_call


@contextlib.contextmanager
def autocast():
    """Level O2 as far as the CPU has it: paddle.amp.auto_cast refuses it there."""
    from paddle.base import core, framework

    tracer = framework._dygraph_tracer()
    tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O2, "float16"
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O0, "float32"


def one_call(x, weight, epsilon, added=None):
    """A launch in the place of fused_rms_norm's."""
    if added is None:
        return x * weight, x
    added = x + added
    return added, added


def check_out(folder: str) -> None:
    """The baseline's files, in `folder`."""
    archive = subprocess.run(["git", "archive", BASELINE, "paddlemix"], cwd=harness.ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"error: the baseline is commit {BASELINE}, which this checkout does not have")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)


def make(size: str) -> Model:
    return Model(1, 1, gpu=False) if size == "quick" else Model(*LAYERS)


@contextlib.contextmanager
def sides(args, make: Callable[[str], Any]) -> Iterator[List[harness.Side]]:
    """The baseline's side and ours, of one thread each; in a quick run both are ours."""
    with scratch.folder(64 << 20) as folder, contextlib.ExitStack() as stack:
        if args.size != "quick":
            check_out(folder)
        thread = {"OMP_NUM_THREADS": "1"}
        yield [stack.enter_context(harness.Side(args, make, thread, where)) for where in (folder, harness.ROOT)]


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "Launching at the 7B's depth, CPU time of the launching thread")
    token, step, half = ("token",), ("step",), ("step", True)
    taken = {call: ([], []) for call in (token, step, half)}
    with sides(args, make) as both:
        for number in range(args.pairs):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                for call, seconds in taken.items():
                    seconds[which].append(both[which](*call))
    first, second = operator.itemgetter(0), operator.itemgetter(1)
    for name, call, pick, bound in (
        ("a decoded token", token, first, 0.5), ("prefill with an image", token, second, 1),
        ("a LoRA micro-step", step, sum, 0.75), ("of it forward", step, first, 1), ("of it backward", step, second, 1),
        ("a LoRA micro-step in half precision", half, sum, 0.75),
    ):  # fmt: skip
        bench.ratio(name, harness.Pairs(*(list(map(pick, seconds)) for seconds in taken[call])), at_most=bound)
    bench.finish()


if __name__ == "__main__":
    main()
