"""What differs between the Paddle versions we run on, each with its reason."""

from __future__ import annotations

import paddle.nn.functional as F

# silu(gate) × up in one kernel. Paddle 3.3 moved it out of `incubate` and warns at the old place.
if hasattr(F, "swiglu"):
    swiglu = F.swiglu
else:
    from paddle.incubate.nn.functional import swiglu  # noqa: F401
