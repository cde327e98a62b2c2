"""LoRA adapters under tensor parallelism (Megatron-LM, Shoeybi et al. 2019).

fleet's layers split the decoder: columns of c_attn (by heads: a third of a card's columns are queries), w1, w2 and
lm_head, rows of c_proj and of the embeddings. Norms and the vision part are replicated. The adapters are PaddleNLP's
layers, with corrected initial values and dropout.
"""

from __future__ import annotations

import math

import paddle
from paddle import nn
from paddle.distributed.fleet.meta_parallel import RowParallelLinear, get_rng_state_tracker
from paddlenlp.peft import LoRAModel
from paddlenlp.peft.lora.lora_layers import LoRALinear

from paddlemix.utils.compat import dropout, linear


class PartDropout(nn.Dropout):
    """Dropout on columns that only this card holds, with random numbers of its own."""

    def forward(self, x):
        if not self.training:
            return x
        with get_rng_state_tracker().rng_state("local_seed"):
            return super().forward(x)


class DirectLoRALinear(LoRALinear):
    """PaddleNLP's layer with fewer operator calls, whose launches take longer than the small products."""

    def forward(self, x):
        parameters = self._parameters
        out = linear(x, parameters["weight"], parameters.get("bias"))
        # PaddleNLP 2.8 merges for evaluation; 3 can disable adapters.
        if self.merged or self.__dict__.get("disable_lora"):
            return out
        drop = self._sub_layers.get("lora_dropout")
        if self.training and drop is not None:
            x = dropout(x, drop.p)
        # Scaling the narrow product is cheaper.
        low = paddle.matmul(x, parameters["lora_A"]) * self.scaling
        return out + paddle.matmul(low, parameters["lora_B"])


class MGenLoRAModel(LoRAModel):
    """PaddleNLP's LoRAModel around a MGenLMHeadModel, with or without tensor parallelism."""

    def __init__(self, model, lora_config):
        super().__init__(model, lora_config)
        for name, layer in model.named_sublayers():
            if type(layer) is LoRALinear:
                # apply_lora's options use no other branch of its forward.
                layer.__class__ = DirectLoRALinear
            if isinstance(layer, RowParallelLinear) and hasattr(layer, "lora_A"):
                # PaddleNLP initialises a card's rows like a separate matrix, with too wide a range.
                bound = 1 / math.sqrt(layer.in_features)
                drawn = paddle.uniform([layer.in_features, layer.r], "float32", -bound, bound)
                part = model._cuts()[name + ".lora_A"](drawn.numpy())
                layer.lora_A.set_value(paddle.to_tensor(part).astype(layer.lora_A.dtype))
                if lora_config.lora_dropout:
                    layer.lora_dropout = PartDropout(lora_config.lora_dropout)

    def _merge_trainable_tensor_parallel(self, trainable_state_dict):
        """Full tensors by name, as numpy arrays."""
        return {name: read() for name, _, _, read in self.model.whole_items(trainable_state_dict)}
