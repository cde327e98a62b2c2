"""Paddle's four operations of tensor parallelism, which only GPUs have, out of what gloo can do on the CPU.

`install` puts them in their places, so that everything else of a run (fleet's groups, layers and optimizer, PaddleNLP's
adapters and Trainer, and all that is ours) is what a GPU would run. It also checks at each step that what the cards
hold whole has the same gradient on all of them, before the first card's is sent to the others.
"""

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed import collective
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.hybrid_parallel_optimizer import (
    HybridParallelOptimizer,
)

from paddlemix.trainer import parallel


def summed(tensor, group):
    total = tensor.detach().clone()
    paddle.distributed.all_reduce(total, group=group)
    return total


class Identity(PyLayer):
    """Forward nothing, backward the sum over the cards."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return summed(gradient, ctx.group)


class AllReduce(PyLayer):
    """Forward the sum over the cards, backward nothing."""

    @staticmethod
    def forward(ctx, tensor, group):
        return summed(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


def identity(tensor, group=None, skip_c_identity_dynamic=False):
    return Identity.apply(tensor, group)


def all_reduce(tensor, op=None, group=None, use_calc_stream=True, use_model_parallel=True, **kwargs):
    return AllReduce.apply(tensor, group)


def concat(tensor, group=None):
    """The columns of all cards. Where it is used, no gradient is asked for."""
    assert tensor.stop_gradient or not paddle.is_grad_enabled()
    parts = []
    paddle.distributed.all_gather(parts, tensor.detach(), group=group)
    return paddle.concat(parts, axis=-1)


def cross_entropy(logits, label, group=None, return_softmax=False, ignore_index=-100, **kwargs):
    """float32 [n, 1] of [n, V / cards] logits and int64 [n, 1] labels."""
    most = logits.detach().max(axis=-1, keepdim=True)
    paddle.distributed.all_reduce(most, paddle.distributed.ReduceOp.MAX, group=group)
    logits = logits - most
    local = label - group.rank * logits.shape[-1]
    inside = paddle.logical_and(local >= 0, local < logits.shape[-1]).astype(logits.dtype)
    chosen = F.one_hot((local * inside.astype("int64")).squeeze(-1), logits.shape[-1]) * inside
    target = AllReduce.apply((logits * chosen).sum(axis=-1, keepdim=True), group)
    return AllReduce.apply(logits.exp().sum(axis=-1, keepdim=True), group).log() - target


def checked(send):
    """The optimizer's way of sending the first card's gradient, after a look whether there was need for it."""

    def compare_and_send(self, gradient, src, group, mode):
        own = gradient.clone()
        send(self, gradient, src, group, mode)
        apart, size = (own - gradient).abs().max().item(), gradient.abs().max().item()
        assert apart <= 1e-5 * size + 1e-8, f"gradients of {list(gradient.shape)} are {apart} apart, of {size}"

    return compare_and_send


def install(patch):
    mp_ops._c_identity = collective._c_identity = identity
    mp_ops._c_concat = collective._c_concat = concat
    mp_ops._mp_allreduce = collective._mp_allreduce = all_reduce
    mp_ops._c_softmax_with_cross_entropy = cross_entropy
    parallel.check_device = lambda training, device: None
    HybridParallelOptimizer._insert_sync = checked(HybridParallelOptimizer._insert_sync)
