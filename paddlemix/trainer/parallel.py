"""Several cards: what runs where, and why the rest is refused before anything is loaded.

Data parallel and sharding stage 1 run on GPUs and on the CPU; sharding stage 2 needs GPUs.
"""

from __future__ import annotations

from paddlemix.trainer.arguments import TrainingKeys
from paddlemix.utils.errors import ConfigError


def check_device(training: TrainingKeys, device: str) -> None:
    """Refuse a way of sharing the work that Paddle has no kernels for on this device ("cpu" or "gpu:0").

    Raises:
        ConfigError: with the reason.
    """
    if device.startswith("cpu") and training.sharding == "stage2":
        raise ConfigError("sharding=stage2 needs GPUs (Paddle's group_sharded_parallel has no CPU form); use stage1")
