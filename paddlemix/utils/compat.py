"""What differs between the Paddle versions we run on, each with its reason."""

from __future__ import annotations

import paddle.nn.functional as F

# silu(gate) × up in one kernel. Paddle 3.3 moved it out of `incubate` and warns at the old place.
if hasattr(F, "swiglu"):
    _fused_swiglu = F.swiglu
else:
    from paddle.incubate.nn.functional import swiglu as _fused_swiglu


def swiglu(gate, up):
    """silu(gate) × up. The fused kernel is for GPUs: on the CPU it takes twice to three times as long, both ways."""
    return F.silu(gate) * up if gate.place.is_cpu_place() else _fused_swiglu(gate, up)
