"""Weights files: opened without executing anything, read and written a tensor at a time, merged, converted.

Imports neither Paddle nor PyTorch.
"""

from paddlemix.checkpoint.model_folder import LORA_WEIGHTS_NAME, PARTIAL_WEIGHTS_NAME, find_weights
from paddlemix.checkpoint.pdparams import load_pdparams_object
from paddlemix.checkpoint.shards import WeightsReader, open_weights, write_items, write_pdparams, write_sharded
from paddlemix.checkpoint.tensors import TensorInfo, convert_dtype

__all__ = [
    "LORA_WEIGHTS_NAME",
    "PARTIAL_WEIGHTS_NAME",
    "TensorInfo",
    "WeightsReader",
    "convert_dtype",
    "find_weights",
    "load_pdparams_object",
    "open_weights",
    "write_items",
    "write_pdparams",
    "write_sharded",
]
