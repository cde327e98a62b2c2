"""The optimizer of a run."""

from __future__ import annotations

from typing import Any, Iterable

import paddle
from paddlenlp.trainer import Trainer

from paddlemix.models.mgen_vl.parameters import group_of
from paddlemix.trainer.numerics import clip_by_float32_norm

# The connector, whose learning rate is mm_projector_lr.
_PROJECTOR_GROUPS = ("attn_pool", "ln_post and proj")


def build_optimizer(args, model, learning_rate: Any):
    """AdamW over the parameters that train; weight decay on matrices only. learning_rate: a number or a schedule."""
    named = [(name, p) for name, p in model.state_dict().items() if not p.stop_gradient]
    decayed = {p.name for _, p in named if p.ndim > 1}
    if args.mm_projector_lr is not None:
        for name, parameter in named:
            if group_of(name) in _PROJECTOR_GROUPS:
                parameter.optimize_attr["learning_rate"] = args.mm_projector_lr / args.learning_rate
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(
        learning_rate=learning_rate,
        apply_decay_param_fun=lambda name: name in decayed,
        parameters=[parameter for _, parameter in named],
        weight_decay=args.weight_decay,
        grad_clip=clip_by_float32_norm(args.max_grad_norm),
        multi_precision=args.master_weights,
        **options,
    )


def begin_with_zeros(parameters: Iterable[Any]) -> None:
    """Give each of these parameters that trains a gradient of zeros, as after every step.

    A batch of texts alone makes none for the connector. AdamW leaves out a parameter until its first gradient, so that
    a resumed run would differ; Paddle 2.6 shards gradients only if all processes have them.
    """
    for parameter in parameters:
        if parameter.stop_gradient:
            continue
        if not hasattr(parameter, "main_grad"):
            parameter.grad = paddle.zeros_like(parameter)
        elif parameter.main_grad is None:
            parameter.main_grad = paddle.zeros(parameter.shape, "float32")
