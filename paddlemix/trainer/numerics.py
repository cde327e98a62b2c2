"""Numerical failures: float16 overflow, and NaN or infinite losses; and the gradient norm.

The host synchronises with the device once per optimizer step, after its last micro-batch: more often would leave a GPU
with small batches idle (docs/performance.md has the list).

Under float16 the loss is scaled up to keep small gradients; on an overflow the step is skipped and the scale halved
(Micikevicius et al. 2018, §3.2). A few skipped steps are normal. If a lower scale cannot help any more, the run stops
and says what to change.
"""

from __future__ import annotations

import math
import types
from typing import Any, Dict, Iterable

import paddle
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_utils import GroupShardedClipGrad
from paddlenlp.trainer import TrainerCallback

from paddlemix.utils.compat import overflowed
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.log import logger

# Consecutive skipped steps that no lower loss scale could have saved.
HOPELESS_STEPS = 5

_INTACT = "the last checkpoint is intact"


def gradient_norm(parameters: Iterable, scale: float = 1.0):
    """Global norm of the gradients, a float32 scalar tensor; None without gradients. scale: the loss scale in them."""
    squares = []
    for parameter in parameters:
        gradient = getattr(parameter, "main_grad", None)
        gradient = parameter.grad if gradient is None else gradient
        if gradient is not None:
            squares.append(gradient.astype("float32").square().sum())
    return paddle.add_n(squares).sqrt() / scale if squares else None


def clip_by_float32_norm(most: float):
    """Paddle's clipping by global norm, computed in float32; None for 0.

    Paddle squares half-precision gradients in their own dtype, and 2.6 sums them in it too: a norm above 255 becomes
    infinite and the step 0, a small one becomes 0. Here they are cast first, on one card and under fleet.
    """
    paddle.nn.clip._clip_by_global_norm_using_mp_type(True)
    GroupShardedClipGrad._dygraph_clip = _clip_shards
    return paddle.nn.ClipGradByGlobalNorm(most) if most > 0 else None


@paddle.no_grad()
def _clip_shards(self, params_grads):
    """The same for sharding stage 2, whose GroupShardedClipGrad ignores that switch. params_grads: of this card."""
    gradients = [g for p, g in params_grads if g is not None and getattr(p, "need_clip", True)]
    total = paddle.zeros([], "float32")
    for gradient in gradients:
        total = total + gradient.astype("float32").square().sum()
    paddle.distributed.all_reduce(total, group=self._group)
    factor = self.clip_norm / total.sqrt().clip(min=self.clip_norm)
    for gradient in gradients:
        gradient.multiply_(factor.astype(gradient.dtype))
    return params_grads


def unscale_main_gradients(scaler) -> None:
    """Let a GradScaler unscale the float32 gradients of amp_master_grad and detect their overflow, without fleet.

    They are in `main_grad`; Paddle's scaler reads the empty `grad`, and its MixPrecisionScaler needs fleet's groups.
    """

    def unscale(self, optimizer):
        gradients = [p.main_grad for p in optimizer._parameter_list if p.main_grad is not None]
        self._found_inf = paddle.zeros([1], "bool")
        if self._enable and gradients:
            paddle._legacy_C_ops.check_finite_and_unscale(gradients, self._scale, gradients, self._found_inf)

    scaler._unscale = types.MethodType(unscale, scaler)


class OverflowCount:
    """Counts skipped steps and decides when to give up.

    skipped: steps skipped so far. hopeless: consecutive steps that no lower scale could have saved, because the loss
    itself was not finite or the scale was already 1.
    """

    def __init__(self, skipped: int = 0):
        self.skipped = skipped
        self.hopeless = 0

    def step(self, number: int, skipped: bool, loss_is_finite: bool, scale: float) -> None:
        """Record optimizer step `number`, which had this loss scale.

        Raises:
            JobFailed: HOPELESS_STEPS hopeless steps in a row; with advice.
        """
        if not skipped:
            self.hopeless = 0
            return
        self.skipped += 1
        self.hopeless = self.hopeless + 1 if not loss_is_finite or scale <= 1 else 0
        if self.hopeless < HOPELESS_STEPS:
            return
        if loss_is_finite:
            what = "gradients overflow float16 even at loss scale 1"
        else:
            what = "the loss is not finite: activations overflow float16, or the weights have diverged"
        raise JobFailed(
            f"{self.hopeless} steps in a row were skipped, the last one step {number}: {what}. Try fp16_opt_level=O1 "
            "(float32 weights; on a V100 the first thing to change), a lower learning_rate or more warmup_steps, or "
            f"bf16 on an A100; {_INTACT}",
            "loss" if not loss_is_finite else "gradients",
        )


class Numerics(TrainerCallback):
    """Watches each step. The trainer passes it each loss and gets the scalars of a log line from it."""

    def __init__(self):
        self.overflow = OverflowCount()
        # Of the current step, on the device: the sum of its losses, and the loss scale.
        self._losses: Any = None
        self._scale: Any = None
        self._norm: Any = None
        self._last_loss: Any = None

    def watch(self, loss, scaled: bool):
        """Record a micro-batch's loss; returns the loss to accumulate for the log.

        With a loss scale, the last finite loss replaces one that is not: a NaN of a skipped step would spoil the mean.
        """
        self._losses = loss if self._losses is None else self._losses + loss
        if not scaled:
            return loss
        before = paddle.zeros_like(loss) if self._last_loss is None else self._last_loss
        self._last_loss = paddle.where(paddle.isfinite(loss), loss, before)
        return self._last_loss

    def _take_losses(self) -> float:
        """The sum of the step's losses. Synchronises with the device."""
        losses, self._losses = self._losses, None
        return 0.0 if losses is None else float(losses)

    def on_optimizer_begin(self, args, state, control, scaler=None, model=None, **kwargs):
        if scaler is None:
            # Without a loss scale no step is skipped: stop before the weights are spoiled.
            loss = self._take_losses()
            if not math.isfinite(loss):
                step = state.global_step + 1
                raise JobFailed(
                    f"the loss became {loss} in step {step}: lower learning_rate, or add warmup_steps; {_INTACT}",
                    "loss",
                )
        else:
            self._scale = scaler._scale
        # With tensor parallelism or sharding no process has all gradients.
        unsplit = args.tensor_parallel_degree <= 1 and args.sharding_parallel_degree <= 1
        if unsplit and ends_in_a_log(args, state.global_step + 1):
            self._norm = gradient_norm(model.parameters(), 1.0 if scaler is None else self._scale)

    def on_optimizer_end(self, args, state, control, scaler=None, **kwargs):
        if scaler is None:
            return
        # The optimizer has already synchronised for this flag; only a skipped step does so again.
        skipped = overflowed(scaler)
        if not skipped:
            self._losses = None
            self.overflow.step(state.global_step + 1, False, True, 0.0)
            return
        scale = float(self._scale)
        if self.overflow.skipped == 0:
            logger.warning(
                f"step {state.global_step + 1} overflowed float16 and was skipped; the loss scale falls from "
                f"{scale:g} to {float(scaler._scale):g}. A few such steps are normal: the log counts them"
            )
        self.overflow.step(state.global_step + 1, True, math.isfinite(self._take_losses()), scale)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Check, before a save, that what was trained is finite: the last step can spoil it after a finite loss."""
        if not (control.should_save or control.should_training_stop):
            return
        for name, parameter in model.named_parameters():
            if not parameter.stop_gradient and not bool(paddle.isfinite(parameter).all()):
                raise JobFailed(
                    f"step {state.global_step} made {name} infinite or NaN: lower learning_rate, or add warmup_steps; "
                    f"{_INTACT}",
                    "loss",
                )

    on_epoch_end = on_step_end

    def scalars(self) -> Dict[str, float]:
        """For a log line: grad_norm (before clipping), and with a loss scale loss_scale and skipped_steps."""
        found: Dict[str, float] = {}
        if self._norm is not None:
            found["grad_norm"] = round(float(self._norm), 6)
            self._norm = None
        if self._scale is not None:
            found["loss_scale"] = float(self._scale)
            found["skipped_steps"] = self.overflow.skipped
        return found


def ends_in_a_log(args, step: int) -> bool:
    """Whether optimizer step `step` (from 1) may end in a log line."""
    if args.logging_strategy.value == "no":
        return False
    if args.logging_strategy.value == "epoch":
        return True
    return step % args.logging_steps == 0 or (step == 1 and args.logging_first_step)
