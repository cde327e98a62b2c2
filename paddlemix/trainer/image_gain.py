"""The image gain of an evaluation (eval_image_gain): the loss with blank images minus the loss."""

from __future__ import annotations

from typing import Any, Dict, List

import paddle

from paddlemix.trainer.tuned_model import base_of


class ImageGain:
    """Collects the gain of each batch of one evaluation of a FinetuneTrainer."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._blank: Any = None
        self.gains: List[Any] = []  # on the device, where reading would wait for each batch

    def add(self, model, inputs: Dict[str, Any], loss) -> None:
        """Measure a batch with this loss. A collective call."""
        trainer, images, gain = self._trainer, inputs.get("images"), paddle.zeros_like(loss)
        if images is not None:
            with paddle.no_grad(), trainer.autocast_smart_context_manager():
                if self._blank is None:
                    blank = paddle.to_tensor(trainer.eval_dataset.image_processor.blank()[None])
                    self._blank = base_of(model).visual(blank)
                features = self._blank.expand([len(images), -1, -1])
                without = dict(trainer._prepare_inputs(inputs), images=None, image_features=features)
                gain = trainer.compute_loss(model, without) - loss
        rows = len(inputs["input_ids"])
        self.gains.append(trainer._nested_gather(paddle.tile(gain, [rows, 1])).flatten())

    def mean(self, samples: int) -> float:
        """The mean gain of this many samples per tensor-parallel process. Those that fill up the last batches of the
        processes come last, and are left out."""
        args = self._trainer.args
        copies = args.world_size // args.dataset_world_size
        return float(paddle.concat(self.gains)[: samples * copies].mean())
