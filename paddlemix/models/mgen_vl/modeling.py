"""MGenLMHeadModel: vision and language combined, the loss, loading and saving.

Shapes: B batch, T tokens, N images in the whole batch, S image side, Q queries, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed import fleet
from paddlenlp.transformers.model_outputs import ModelOutput
from paddlenlp.transformers.qwen.modeling import QWenLMHead, parallel_matmul

from paddlemix.checkpoint import open_weights, write_sharded
from paddlemix.models.mgen_vl.generation import CaptionGeneration, generation_values, load_generation_config
from paddlemix.models.mgen_vl.language import KVCache, MGenDecoder, MGenPretrainedModel
from paddlemix.models.mgen_vl.parameters import check_weights, parameter_shapes
from paddlemix.models.mgen_vl.vision import Vision
from paddlemix.processors.mgen_vl_processing import IGNORE_INDEX, image_positions
from paddlemix.utils.compat import full_precision
from paddlemix.utils.files import atomic_write
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress
from paddlemix.utils.runtime import resolve_dtype

# Smaller weights are loaded without a progress bar.
_BAR_BYTES = 256 << 20


@dataclass
class MGenOutput(ModelOutput):
    """The output of a forward.

    loss: float32 scalar, the mean over labelled positions, or None without labels.
    past_key_values: the KVCache with `use_cache`.
    logits: [B, T, V] (only the last position with `last_logits_only`). With labels they are computed on first access:
    training needs only labelled positions, and a 7B's full logits take gigabytes.
    """

    loss: Optional[paddle.Tensor] = None
    past_key_values: Any = None

    def __post_init__(self):
        super().__post_init__()
        # Plain attributes, which ModelOutput does not count among its items.
        object.__setattr__(self, "_logits", None)
        object.__setattr__(self, "_compute", None)

    @property
    def logits(self):
        if self._compute is not None:
            self.set_logits(self._compute())
        return self._logits

    def set_logits(self, logits=None, compute=None):
        """Attach logits, or a function that computes them on first access. Returns self."""
        object.__setattr__(self, "_logits", logits)
        object.__setattr__(self, "_compute", compute)
        return self


class MGen(nn.Layer):
    """Exists only so that parameters are named transformer.llm.*."""

    def __init__(self, config):
        super().__init__()
        self.llm = MGenDecoder(config)


class MGenLMHeadModel(CaptionGeneration, MGenPretrainedModel):
    """MGen-VL (the Qwen-VL architecture, arXiv 2308.12966): image features replace the embeddings between `<img>` and
    `</img>`.

    `MGenLMHeadModel(config)` initialises random weights; `from_pretrained` reads a folder without doing so.
    """

    def __init__(self, config):
        super().__init__(config)
        self.visual = Vision(config.visual, config.use_flash_attention)
        self.transformer = MGen(config)
        self.lm_head = QWenLMHead(config)
        if self.lm_head.weight._is_initialized():  # not under LazyGuard
            self._init_language()
        self.generation_config = load_generation_config(None, config)

    def _init_language(self):
        """Normal(0, initializer_range), residual projections scaled down by depth (GPT-2, §2.3)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.startswith("visual.") or parameter.ndim < 2:
                continue
            scale = math.sqrt(2 * self.config.num_hidden_layers) if "c_proj" in name else 1.0
            parameter.set_value(paddle.normal(0.0, std / scale, parameter.shape).astype(parameter.dtype))

    def get_input_embeddings(self):
        return self.transformer.llm.wte

    def get_output_embeddings(self):
        return self.lm_head

    # ---- forward

    def embed(self, input_ids, images=None, image_features=None, places=None):
        """Token embeddings with image features inserted: [B, T, D].

        input_ids: int64 [B, T]; images: [N, 3, S, S] pixel values, or image_features: [N, Q, D]; places: an array or
        tensor from processors' image_positions.
        """
        given = images if image_features is None else image_features
        n_images = 0 if given is None else given.shape[0]
        # Before the ViT: reading ids on the host, or copying places to the card, would wait for it.
        if places is None:
            places = image_positions(input_ids.numpy(), n_images, self.config.image_start_id, self.config.n_queries)
        embeds = self.transformer.llm.wte(input_ids)
        if n_images == 0:
            return embeds
        places = places if isinstance(places, paddle.Tensor) else paddle.to_tensor(places)
        if image_features is None:
            image_features = self.visual(images)
        B, T, D = embeds.shape
        features = image_features.reshape([-1, D]).astype(embeds.dtype)
        # Autocast would run this in float32, and with it the residual stream of all blocks.
        with full_precision():
            filled = paddle.scatter(embeds.reshape([B * T, D]), places, features)
        return filled.reshape([B, T, D])

    def _logits(self, hidden):
        """[…, D] → […, V]."""
        return parallel_matmul(hidden, self.lm_head.weight, tensor_parallel_output=False)

    def _loss(self, hidden, labels, chosen=None):
        """Mean cross-entropy over labelled positions; position t predicts label t + 1. float32 scalar.

        Only the labelled positions go through lm_head: `chosen`, from label_positions; None computes them here, which
        synchronises with the device. A batch without labels has loss 0.
        """
        if chosen is None:
            chosen = paddle.nonzero((labels[:, 1:] != IGNORE_INDEX).reshape([-1])).flatten()
            chosen = chosen + chosen // max(labels.shape[1] - 1, 1)
        if len(chosen) == 0:
            return hidden.astype("float32").sum() * 0.0
        return self.token_losses(hidden, labels, chosen).mean()

    def token_losses(self, hidden, labels, chosen):
        """Cross-entropy at each of the M `chosen` positions: float32 [M]. hidden: [B, T, D]; labels: int64 [B, T]."""
        states = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), chosen)
        targets = paddle.gather(labels.flatten(), chosen + 1)
        if self.config.tensor_parallel_degree > 1:
            # Each card has its columns of the vocabulary.
            logits = parallel_matmul(states, self.lm_head.weight, tensor_parallel_output=True).astype("float32")
            with full_precision():
                return fleet.meta_parallel.ParallelCrossEntropy()(logits, targets.unsqueeze(-1)).flatten()
        logits = self._logits(states).astype("float32")
        with full_precision():
            # Its own mean would synchronise to check for ignored labels.
            return F.cross_entropy(logits, targets, reduction="none")

    def forward(
        self,
        input_ids,
        images=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        return_dict=True,
        image_features=None,
        past_key_values=None,
        use_cache=False,
        last_logits_only=False,
        sample_lengths=None,
        image_positions=None,
        label_positions=None,
    ):
        """input_ids: int64 [B, T], including image spans. images: [N, 3, S, S], in row-major order of their spans
        (image_features [N, Q, D] skip the vision tower). attention_mask: 0/1 [B, T] (with a cache [B, past + T]), or a
        custom pattern [B, 1, T, T]. position_ids: int64 [B, T]. labels: int64 [B, T], not shifted, -100 without a loss.
        sample_lengths: [B, K] of packed samples, see MGenDecoder.packed; the first label of a sample must be -100
        then. image_positions, label_positions: int64, flat, from the processors' functions of these names; computing
        them here synchronises with the device. Returns MGenOutput, or a tuple (loss, logits) / (logits,).

        Raises:
            UserError: the spans in the text do not match the images.
        """
        past = past_key_values.length if past_key_values is not None else 0
        # Before the ViT, as in embed.
        packed = None if sample_lengths is None else self.transformer.llm.packed(sample_lengths, input_ids.shape[1])
        if past:
            embeds = self.transformer.llm.wte(input_ids)
        else:
            embeds = self.embed(input_ids, images, image_features, image_positions)
        cache = KVCache() if use_cache and past_key_values is None else past_key_values
        last_only = last_logits_only and labels is None and return_dict
        hidden = self.transformer.llm(embeds, attention_mask, position_ids, cache, packed, last_only)
        loss = self._loss(hidden, labels, label_positions) if labels is not None else None
        if not return_dict:
            logits = self._logits(hidden)
            return (loss, logits) if labels is not None else (logits,)
        output = MGenOutput(loss=loss, past_key_values=cache)
        if last_logits_only:
            return output.set_logits(self._logits(hidden[:, -1:]))
        if labels is not None:
            return output.set_logits(compute=lambda: self._logits(hidden))
        return output.set_logits(self._logits(hidden))

    # ---- loading and saving

    @classmethod
    def from_pretrained(cls, folder, config=None, dtype=None):
        """Read a model folder (docs/formats.md: .pdparams or safetensors, single or sharded).

        config: an MGenConfig to use instead of the folder's. dtype: "float32", "float16" or "bfloat16"; by default the
        configuration's, else that of most tensors; replaced if the device does not support it. Tensors are converted
        one at a time, without initialising any first.

        Raises:
            ConfigError: config.json is invalid. WeightsError: the files are broken, or their keys or shapes are not the
            model's; the message lists them.
        """
        config = config if config is not None else cls.config_class.from_pretrained(folder)
        with open_weights(folder) as reader:
            check_weights(reader, parameter_shapes(config), folder)
            if dtype is None:
                dtype = config.dtype or Counter(reader.info(key).dtype for key in reader.keys()).most_common(1)[0][0]
            dtype, reason = resolve_dtype(str(dtype).replace("paddle.", ""))
            if reason:
                logger.warning(reason)
            model = cls.build_lazily(config, dtype)
            model.fill(reader)
        model.generation_config = load_generation_config(folder, config)
        model.eval()
        return model

    def fill(self, reader, names=None) -> None:
        """Load parameters, all or those in `names`, from an open_weights reader that has been checked.

        Tensors are read one at a time, converted to the parameter's dtype and split for this card. On the CPU, the
        loaded array becomes the storage of a parameter that has none yet.
        """
        began = time.monotonic()
        split, parameters = self._cuts(), self.state_dict()
        on_cpu = paddle.get_device() == "cpu"
        stored = {name: reader.info(name) for name in parameters if names is None or name in names}
        size = sum(info.nbytes for info in stored.values())
        with Progress(size, "loading", unit="B", disable=size < _BAR_BYTES) as bar:
            for name, info in stored.items():
                tensor = parameters[name]
                dtype = str(tensor.dtype).replace("paddle.", "")
                if name in split:
                    # A copy: a part may be a read-only view of the file.
                    array = np.array(split[name](reader.read(name, dtype)), order="C")
                else:
                    array = reader.load(name, dtype)
                if tensor._is_initialized() or not on_cpu:
                    tensor.set_value(array)
                else:
                    tensor.get_tensor().set(array, paddle.CPUPlace(), True)
                bar.update(info.nbytes)
        kinds = [info.dtype for info in stored.values()], [str(parameters[name].dtype) for name in stored]
        before, after = (", ".join(sorted({kind.replace("paddle.", "") for kind in one})) for one in kinds)
        dtypes = before if before == after else f"{before} → {after}"
        files = len({info.file for info in stored.values()})
        logger.info(
            f"weights: {len(stored)} of {len(parameters)} tensors, {files} file{'s' * (files != 1)}, "
            f"{size / 1e9:,.3g} GB, {dtypes}, {time.monotonic() - began:.0f} s"
        )

    def _cuts(self, is_split=True):
        """Split or merge action of each parameter that tensor parallelism splits."""
        if self.config.tensor_parallel_degree <= 1:
            return {}
        return self._get_tensor_parallel_mappings(self.config, is_split)

    def whole_shapes(self):
        """Full shapes of state_dict()'s tensors, also where cards hold parts of them."""
        shapes, cuts = {}, self._cuts()
        for name, tensor in self.state_dict().items():
            shape = list(tensor.shape)
            if name in cuts:
                shape[-1 if cuts[name].keywords["is_column"] else 0] *= self.config.tensor_parallel_degree
            shapes[name] = tuple(shape)
        return shapes

    def whole_items(self, names):
        """(name, dtype, shape, read) of full tensors, for write_sharded; read() returns a numpy array.

        With tensor parallelism, read() is a collective call: all cards must read all items in this order.
        """
        tensors, shapes, merge = self.state_dict(), self.whole_shapes(), self._cuts(is_split=False)

        def read(name):
            if name not in merge:
                return tensors[name].numpy()
            parts = []
            group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
            paddle.distributed.all_gather(parts, tensors[name].detach(), group=group)
            return merge[name]([part.numpy() for part in parts])

        for name in names:
            dtype = str(tensors[name].dtype).replace("paddle.", "")
            yield name, dtype, shapes[name], functools.partial(read, name)

    @classmethod
    def build_lazily(cls, config, dtype="float32"):
        """The model with names, shapes and dtypes but no storage, which each parameter gets with its first value."""
        previous = paddle.get_default_dtype()
        paddle.set_default_dtype(dtype)
        try:
            with paddle.LazyGuard():
                model = cls(config)
        finally:
            paddle.set_default_dtype(previous)
        config.dtype = dtype
        return model

    def save_pretrained(self, folder, max_shard_size="10GB", format="pdparams", is_main_process=True):
        """Write config.json, generation_config.json and the weights, a tensor at a time.

        format: "pdparams" or "safetensors". is_main_process: whether this process writes; the others only take part in
        gathering tensors.
        """
        items = self.whole_items(parameter_shapes(self.config))
        if not is_main_process:
            for *_, read in items:
                read()
            return
        os.makedirs(folder, exist_ok=True)
        write_sharded(folder, items, format=format, max_shard_size=max_shard_size)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        with atomic_write(os.path.join(folder, "generation_config.json")) as file:
            json.dump(generation_values(self.generation_config), file, ensure_ascii=False, indent=2)
            file.write("\n")
