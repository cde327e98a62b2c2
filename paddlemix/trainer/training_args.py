"""A run's Training keys as PaddleNLP's TrainingArguments, and how a block of arguments is printed."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import Any, Optional

import paddle
import paddlenlp
from paddlenlp.trainer import TrainingArguments

from paddlemix.trainer.keys import TrainingKeys
from paddlemix.trainer.order import Order
from paddlemix.trainer.reports import choose_reports
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import Precision


@dataclass
class FinetuneArguments(TrainingArguments):
    """PaddleNLP's TrainingArguments and the keys that PaddleMIX added to them."""

    benchmark: bool = False
    group_by_modality_length: bool = False
    mm_projector_lr: Optional[float] = None
    # Not a key: the optimizer keeps float32 copies of half-precision weights.
    master_weights: bool = False


def paddlenlp_arguments(
    training: TrainingKeys, precision: Precision, order: Optional[Order] = None
) -> FinetuneArguments:
    """The keys as PaddleNLP's arguments, with the resolved precision and the batches per step of `order`.

    Raises:
        ConfigError: the installed PaddleNLP rejects a value, such as an unknown sharding option.
    """
    known = {field.name for field in dataclasses.fields(FinetuneArguments)}
    names = [field.name for field in dataclasses.fields(TrainingKeys) if field.name in known]
    values = {name: getattr(training, name) for name in names}
    values.update(
        fp16=precision.compute == "float16",
        bf16=precision.compute == "bfloat16",
        master_weights=precision.master_weights,
        device=paddle.get_device().split(":")[0],
        report_to=choose_reports(training.report_to),
        # The device is set already; the flag would only repeat it.
        no_cuda=False,
        # Resuming and evaluating once at the end are handled in finetune.py.
        do_eval=training.evaluation_strategy != "no",
        resume_from_checkpoint=None,
    )
    if order is not None:
        values["gradient_accumulation_steps"] = order.batches_per_step
    if training.benchmark:
        values["save_strategy"] = "no"
    try:
        return FinetuneArguments(**values)
    except (ValueError, AssertionError) as error:
        raise ConfigError(str(error)) from None


def print_block(title: str, block: Any) -> None:
    """One block of arguments, as the notebook shows it: sorted names, padded to 30. Of PaddleNLP's, only the keys that
    can be set here."""
    keys = {field.name for field in dataclasses.fields(TrainingKeys)} if isinstance(block, TrainingArguments) else None
    logger.info("=" * 60)
    logger.info("{:^40}".format(f"{title} Configuration Arguments"))
    logger.info("{:30}: {}".format("paddle commit id", paddle.version.commit))
    logger.info("{:30}: {}".format("paddlenlp commit id", paddlenlp.version.commit))
    for name in dir(block):
        if not name.startswith("__") and (keys is None or name in keys):
            value = getattr(block, name)
            if not isinstance(value, types.MethodType):
                logger.info(f"{name:30}: {value}")
    logger.info("")
