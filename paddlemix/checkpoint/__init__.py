"""Weights files: opened without executing anything, read and written a tensor at a time, merged, converted.

Nothing here imports Paddle or PyTorch.
"""

from paddlemix.checkpoint.pdparams import load_pdparams_object, read_pdparams
from paddlemix.checkpoint.shards import (
    LORA_WEIGHTS_NAME,
    PARTIAL_WEIGHTS_NAME,
    PDPARAMS_NAME,
    WeightsReader,
    find_weights,
    open_weights,
    write_pdparams,
    write_sharded,
)
from paddlemix.checkpoint.tensors import TensorInfo, convert_dtype

__all__ = [
    "LORA_WEIGHTS_NAME",
    "PARTIAL_WEIGHTS_NAME",
    "PDPARAMS_NAME",
    "TensorInfo",
    "WeightsReader",
    "convert_dtype",
    "find_weights",
    "load_pdparams_object",
    "open_weights",
    "read_pdparams",
    "write_pdparams",
    "write_sharded",
]
