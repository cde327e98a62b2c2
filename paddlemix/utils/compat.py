"""Differences between the supported versions (Paddle 2.6 with PaddleNLP 2.8; Paddle 3 with PaddleNLP 3.0.0b4).

No other module checks versions. Differences that are handled elsewhere by code that works on both:

- zlib must have been used before Paddle 2.6 is imported, whose own zlib symbols break it: utils/runtime.py, at import.
- `paddle.where(condition)` has shape [n, 1] on 2.6 and [n] on 3: models use `nonzero(…).flatten()`.
- `CrossEntropyLoss(ignore_index=…)` divides by the labelled tokens on 2.6, by all on 3: models choose the labelled
  positions first and take their mean.
- Paddle 2.6 does not restore a CPU generator from a checkpoint: utils/runtime.py seeds every training step.
- float32 → bfloat16 truncates on 2.6 and rounds on 3; safetensors hands 2.6 no bfloat16: checkpoint/ reads, casts and
  writes with numpy.
- LoRA is merged by `merge_weights=True` and `eval()` in PaddleNLP 2.8, by `merge()` in 3: checkpoint/lora_merge.py
  merges files.
- Tensors made in a loader's worker crash Paddle 2.6: datasets/collator.py makes numpy arrays.
- PaddleNLP 2.8 appends logs to `state.log_history`, 3 empties it: trainer/trainer.py sets it to a copy of its own.
- PaddleNLP 2.8 lets DataParallel wait for all gradients: trainer/parallel.py has it find those that a batch lacks.
- PaddleNLP 3 reads `output_signal_dir`, 2.8 has none: trainer/trainer.py always sets it.
- PaddleNLP 2.8 sets `use_flash_attention` back to its default: models' configuration sets it last.
- The current place has no `is_cpu_place()` on 2.6: loading asks for the device by name.
- The peak of host memory cannot be reset on 2.6: benchmarks/memory_estimate.py measures in a fresh process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import paddle
import paddle.nn.functional as F
from paddle import _C_ops
from paddle.base import core, framework
from paddle.incubate.nn.functional import fused_rms_norm as _fused_rms_norm

PADDLE_VERSION = tuple(int(part) for part in paddle.__version__.split(".")[:2] if part.isdigit())

# Development builds have version 0.0.
PADDLE_3 = PADDLE_VERSION >= (3, 0) or PADDLE_VERSION == (0, 0)

# scaled_dot_product_attention: on the CPU Paddle 2.6 has no kernel, and 3.2 only one with a mask.
FUSED_ATTENTION_ON_CPU = PADDLE_VERSION >= (3, 3) or PADDLE_VERSION == (0, 0)

# Paddle 3.3 moved the fused kernel out of `incubate` and warns at the old place; 2.6 has none.
if hasattr(F, "swiglu"):
    _fused_swiglu = F.swiglu
else:
    try:
        from paddle.incubate.nn.functional import swiglu as _fused_swiglu
    except ImportError:
        _fused_swiglu = None


def swiglu(gate, up):
    """silu(gate) × up. The fused kernel is used on GPUs; on the CPU it is two to three times slower."""
    if _fused_swiglu is None or gate.place.is_cpu_place():
        return F.silu(gate) * up
    return _fused_swiglu(gate, up)


def versions() -> str:
    """The versions of Paddle and PaddleNLP, for reports."""
    import paddlenlp

    return f"Paddle {paddle.__version__}, PaddleNLP {paddlenlp.__version__}"


# F.linear of Paddle 3 checks two flags at every call, and PaddleNLP wraps it: 5 µs before the operator. On a GPU the
# operator adds the bias in the same kernel.
_FUSED_BIAS = hasattr(_C_ops, "linear_v2") and paddle.is_compiled_with_cuda()


def linear(x, weight, bias=None):
    """x · weight + bias: [..., in] → [..., out]. F.linear without its overhead."""
    if bias is None:
        return paddle.matmul(x, weight)
    if not paddle.is_grad_enabled() and x.ndim == 3 and x.shape[1] > 1 and x.place.is_cpu_place():
        # Added by the matmul itself, for whose gradient Paddle would copy the output.
        N, P, _ = x.shape
        return paddle.addmm(bias, x.reshape([N * P, -1]), weight).reshape([N, P, -1])
    return _C_ops.linear_v2(x, weight, bias, False) if _FUSED_BIAS else _C_ops.linear(x, weight, bias)


def layer_norm(x, weight, bias, epsilon):
    """F.layer_norm over the last axis, without its overhead."""
    return _C_ops.layer_norm(x, weight, bias, epsilon, x.ndim - 1)


def cast(x, dtype):
    """x in `dtype`; x itself if it is already, where 2.6's astype makes a copy, and another for the gradient."""
    return x if x.dtype == dtype else x.astype(dtype)


def widened(x):
    """x in float32; x itself if it is already (see cast)."""
    return x if x.dtype == paddle.float32 else x.astype("float32")


def over_rms(x, epsilon):
    """x / sqrt(mean(x²) + epsilon) over the last axis in one kernel, and one for the gradient; x: float32."""
    width = x.shape[-1]
    return _C_ops.norm(x, -1, width * epsilon, False)[0] * width**0.5


def dropout(x, p):
    """F.dropout in training, without its overhead: zero with probability p, else x / (1 - p)."""
    return _C_ops.dropout(x, None, p, False, "upscale_in_train", 0, False)


def softmax_(scores):
    """softmax over the last axis, in place. The F.softmax_ of 2.6 binds its arguments by `inspect`: 25 µs a call."""
    return _C_ops.softmax_(scores, -1)


def norm_is_fused(x) -> bool:
    """Whether fused_rms_norm applies to tensors like `x`: without gradients, for which 2.6 has no kernel; on the CPU if
    scaled_dot_product_attention is fused there."""
    return not paddle.is_grad_enabled() and (FUSED_ATTENTION_ON_CPU or x.place.is_gpu_place())


def fused_rms_norm(x, weight, epsilon, added=None):
    """(RMSNorm of x + added, x + added) in one kernel: [..., D], in x's dtype, the mean square in float32."""
    done = _fused_rms_norm(x, weight, None, epsilon, x.ndim - 1, residual=added)
    return done[0], x if added is None else done[1]


def autocast_dtype():
    """The half dtype that automatic mixed precision casts to ("float16" or "bfloat16"); None while it is off.

    Paddle 2.6 has no public function for it.
    """
    tracer = framework._dygraph_tracer()
    # Comparing its level, an enumeration, would take three times as long.
    dtype = "float32" if tracer is None else tracer._amp_dtype
    return None if dtype == "float32" else dtype


# Entered hundreds of times a step and a hundred times a token: a new nullcontext takes 0.5 µs.
_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _autocast_off():
    """paddle.amp.auto_cast(False) in 2 µs instead of 10 (Paddle 3) or 23 (2.6): it also sets the lists of operators."""
    tracer = framework._dygraph_tracer()
    before = tracer._amp_level, tracer._amp_dtype
    tracer._amp_level, tracer._amp_dtype = core.AmpLevel.O0, "float32"
    try:
        yield
    finally:
        tracer._amp_level, tracer._amp_dtype = before


def full_precision():
    """A context without autocast: every operator computes in the dtype of its inputs.

    Autocast decides by operator. At O2 those on its half list (matmul, convolution) compute in half precision, those on
    its float32 list (scatter, interpolation) in float32, and the others in float32 if an input is (promotion); at O1
    the float32 list is longer. A Paddle without promotion casts all others to half at O2. So operators that must be
    float32 (softmax, the mean square of a norm, the loss) or half (embeddings, and with them the residual stream) run
    in this context.
    """
    return _AS_IT_IS if autocast_dtype() is None else _autocast_off()


def keep_from_decorate(layer) -> None:
    """Exempt a layer's own parameters and buffers from the casts of paddle.amp.decorate. 2.6 misspells the flag."""
    layer._cast_to_low_precision = layer._cast_to_low_precison = False


def overflowed(scaler) -> bool:
    """Whether a GradScaler skipped its last step. Paddle 2.6 misspells the attribute."""
    found = scaler._cache_founf_inf if hasattr(scaler, "_cache_founf_inf") else scaler._cache_found_inf
    return bool(found)


def trainer_state(values: dict):
    """PaddleNLP's TrainerState with these values. 2.8 lacks `consumed_samples`, which 3 writes and nothing reads."""
    from paddlenlp.trainer import TrainerState

    known = {field.name for field in dataclasses.fields(TrainerState)}
    return TrainerState(**{name: value for name, value in values.items() if name in known})


@contextlib.contextmanager
def handed_over(state):
    """Let PaddleNLP's trainer use this TrainerState instead of reading a file; 2.8 cannot read those of 3."""
    from paddlenlp.trainer import TrainerState

    read = vars(TrainerState)["load_from_json"]
    TrainerState.load_from_json = staticmethod(lambda path: copy.deepcopy(state))
    try:
        yield
    finally:
        TrainerState.load_from_json = read


def name_the_epoch(logs: dict) -> None:
    """Rename `progress_or_epoch` of PaddleNLP 3 to `epoch`, as in 2.8."""
    if "progress_or_epoch" in logs:
        logs["epoch"] = logs.pop("progress_or_epoch")
