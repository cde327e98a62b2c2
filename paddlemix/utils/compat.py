"""What differs between the versions we run on (Paddle 2.6 with PaddleNLP 2.8; Paddle 3 with PaddleNLP 3.0.0b4).

One thing must come before Paddle is imported and so stands in utils/runtime.py: the use of zlib.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle.base import core, framework

PADDLE_VERSION = tuple(int(part) for part in paddle.__version__.split(".")[:2] if part.isdigit())

# scaled_dot_product_attention: on the CPU Paddle 2.6 has no kernel at all, and 3.2 only one that takes a mask.
# A development build calls itself 0.0.
FUSED_ATTENTION_ON_CPU = PADDLE_VERSION >= (3, 3) or PADDLE_VERSION == (0, 0)

# The fused kernel: Paddle 3.3 moved it out of `incubate` and warns at the old place; 2.6 has none.
if hasattr(F, "swiglu"):
    _fused_swiglu = F.swiglu
else:
    try:
        from paddle.incubate.nn.functional import swiglu as _fused_swiglu
    except ImportError:
        _fused_swiglu = None


def swiglu(gate, up):
    """silu(gate) × up. The fused kernel is for GPUs: on the CPU it takes twice to three times as long, both ways."""
    if _fused_swiglu is None or gate.place.is_cpu_place():
        return F.silu(gate) * up
    return _fused_swiglu(gate, up)


def autocast_is_on() -> bool:
    """Whether automatic mixed precision is casting. Paddle 2.6 has no public question for it."""
    tracer = framework._dygraph_tracer()
    return tracer is not None and tracer._amp_level != core.AmpLevel.O0


def overflowed(scaler) -> bool:
    """Whether a GradScaler skipped its last step. Paddle 2.6 spells the attribute otherwise."""
    found = scaler._cache_founf_inf if hasattr(scaler, "_cache_founf_inf") else scaler._cache_found_inf
    return bool(found)
