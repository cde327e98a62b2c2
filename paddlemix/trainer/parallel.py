"""Several cards. Data parallel and sharding stage 1 run on GPUs and CPUs; stage 2 and tensor parallel need GPUs."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator, List

import paddle

from paddlemix.trainer.keys import TrainingKeys
from paddlemix.utils.errors import ConfigError


def check_device(training: TrainingKeys, device: str) -> None:
    """Raise ConfigError for a kind of parallelism that Paddle has no kernels for on this device ("cpu" or "gpu:0")."""
    if not device.startswith("cpu"):
        return
    if training.tensor_parallel_degree > 1:
        raise ConfigError(
            f"tensor_parallel_degree={training.tensor_parallel_degree} needs GPUs (Paddle's c_identity, c_concat and "
            "all-reduce on the computing stream have no CPU form)",
            "tensor_parallel_degree",
        )
    if training.sharding == "stage2":
        raise ConfigError(
            "sharding=stage2 needs GPUs (Paddle's group_sharded_parallel has no CPU form); use stage1", "sharding"
        )


def sum_over_processes(args, *counts: Any) -> List[int]:
    """Counts (integers or scalar tensors) summed over the processes with different samples. A collective call."""
    summed = paddle.to_tensor(list(map(int, counts)), dtype="int64")
    if args.world_size > 1:
        paddle.distributed.all_reduce(summed)
    # Tensor-parallel processes work on the same samples.
    return [count // (args.world_size // args.dataset_world_size) for count in summed.tolist()]


@contextlib.contextmanager
def unused_parameters_found() -> Iterator[None]:
    """Within, DataParallel takes batches that give a parameter no gradient, such as texts alone and the connector.

    PaddleNLP 3 asks for it; with 2.8 processes would sum gradients of different parameters.
    """
    stock = paddle.DataParallel.__init__
    paddle.DataParallel.__init__ = functools.partialmethod(stock, find_unused_parameters=True)
    try:
        yield
    finally:
        paddle.DataParallel.__init__ = stock


def keep_cards_alike(wrapped) -> None:
    """Configure a model wrapped by fleet for tensor parallelism.

    Replicated parameters (norms, vision tower, half of the adapters) get the first card's gradients, so that rounding
    cannot make them drift apart. Batches are not broadcast: each card reads the same samples itself.
    """
    from paddle.distributed import fleet
    from paddle.distributed.fleet.meta_parallel.meta_parallel_base import MetaParallelBase

    strategy = fleet.fleet._user_defined_strategy
    strategy.sync_param_name = [""]  # part of a name: all
    mp_configs = strategy.hybrid_configs["mp_configs"]
    mp_configs.sync_grad, mp_configs.sync_param = True, False
    while isinstance(wrapped, MetaParallelBase):
        wrapped._pre_forward = lambda *inputs, **kwargs: None
        wrapped = wrapped._layers
