"""The dry run's memory estimate against the measured peak of a training step: `python benchmarks/memory_estimate.py`

Runs two steps of the real trainer on small models in float32 on the CPU, large enough that activations outweigh the
rest, and reads the peak of Paddle's allocator, minus what was allocated before the model was built. Each row is
estimated ÷ measured, with a bound of 15 %. docs/memory.md has the formula.
"""

from __future__ import annotations

import gc
import tempfile
from typing import Any, Dict, NamedTuple

import harness
import numpy as np


class Case(NamedTuple):
    """keys: of the run. model: changes to MODEL. tokens, labels: per sample. packed: samples per packed row, or 0."""

    keys: Dict[str, Any]
    model: Dict[str, Any] = {}
    tokens: int = 192
    labels: int = 32
    packed: int = 0


MODEL = {
    "hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64, "intermediate_size": 1280, "num_hidden_layers": 4,
    "vocab_size": 2000, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VISUAL = {
    "image_size": 112, "patch_size": 14, "width": 128, "layers": 4, "heads": 4, "output_dim": 256, "n_queries": 16,
    "image_start_id": 1990,
}  # fmt: skip
LORA = {"lora": True, "lora_rank": 16, "per_device_train_batch_size": 4}
CONNECTOR = {"freeze_include": ["*visual*"], "freeze_exclude": ["*visual.attn_pool*"]}
FULL = {"per_device_train_batch_size": 4}
UPPER = {"freeze_include": ["*"], "freeze_exclude": ["transformer.llm.h.2.*", "transformer.llm.h.3.*"]}
CASES = {
    "LoRA": Case(LORA),
    "LoRA, without dropout": Case(dict(LORA, lora_dropout=0.0)),
    "LoRA and attn_pool": Case({**LORA, **CONNECTOR}),
    "LoRA, recompute": Case(dict(LORA, recompute=True)),
    "LoRA and attn_pool, recompute": Case({**LORA, **CONNECTOR, "recompute": True}),
    "LoRA, one row of 512": Case(dict(LORA, per_device_train_batch_size=1), tokens=512),
    "LoRA, vocabulary of 20,000": Case(LORA, {"vocab_size": 20_000}, tokens=64, labels=60),
    "full": Case(FULL),
    "full, recompute": Case(dict(FULL, recompute=True)),
    "full but the ViT": Case({**FULL, **CONNECTOR}),
    "the two upper layers": Case({**FULL, **UPPER}),
    "LoRA, two rows of six packed": Case(dict(LORA, per_device_train_batch_size=2), tokens=96, packed=6),
    "full, recompute, two rows of six packed": Case(
        dict(FULL, per_device_train_batch_size=2, recompute=True), tokens=96, packed=6
    ),
    "full, unclipped, accumulation 2": Case(dict(FULL, max_grad_norm=0.0, gradient_accumulation_steps=2)),
}
QUICK = ("LoRA and attn_pool, recompute",)


class _Samples:
    """Random samples of one shape, an image each."""

    n_skipped = n_shortened = 0

    def __init__(self, config: Any, case: Case):
        self.config, self.case = config, case

    def attempt(self, index: int, consequence: str) -> Any:
        """No sample fails."""
        return self[index]

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: Any) -> Any:
        start, side = self.config.image_start_id, self.config.visual["image_size"]
        span = [start] + [start + 2] * self.config.n_queries + [start + 1]
        ids = np.array(span + [5] * (self.case.tokens - len(span)), dtype=np.int64)
        labels = np.where(np.arange(len(ids)) >= len(ids) - self.case.labels, ids, -100)
        pixels = np.random.default_rng(index).random((1, 3, side, side), dtype=np.float32)
        return {"input_ids": ids, "labels": labels, "images": pixels}


def _packs(case: Case):
    from paddlemix.datasets.packing import Packs

    return Packs(np.arange(96), np.arange(0, 97, case.packed), case.packed * case.tokens)


class _Tokenizer:
    pad_token_id = 0


def measure(case: Case) -> Dict[str, int]:
    """Bytes {"measured": …, "estimated": …} of two steps, the second with the optimizer's states in place."""
    import paddle
    from paddle.base import core

    from paddlemix.datasets.collator import MGenVLCollator
    from paddlemix.datasets.packing import PackedDataset
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
    from paddlemix.processors.mgen_vl_processing import ChatTemplate
    from paddlemix.trainer import freeze, keys, memory, order, training_args, tuned_model
    from paddlemix.trainer import trainer as trainer_module
    from paddlemix.utils.log import logger
    from paddlemix.utils.runtime import decide_precision, resolve_device

    resolve_device("cpu")
    logger.setLevel("ERROR")
    config = MGenConfig(**{**MODEL, **case.model}, visual=VISUAL)
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "output_dir": folder, "do_train": True, "max_steps": 2, "logging_steps": 100, "save_strategy": "no",
            "disable_tqdm": True, "report_to": ["none"], **case.keys,
        }  # fmt: skip
        model_keys, _, _, training = keys.blocks_of(values)[:4]
        gc.collect()
        before = core.host_memory_stat_current_value("Allocated", 0)
        with paddle.utils.unique_name.guard():
            model = MGenLMHeadModel(config)
            model.train()
            trainable = freeze.plan_freeze(
                list(model.state_dict()), model_keys.freeze_include, model_keys.freeze_exclude, lora=model_keys.lora
            )
            model = tuned_model.choose_trainable(model, model_keys, trainable)
        samples = _Samples(config, case)
        trainer = trainer_module.FinetuneTrainer(
            model=model,
            args=training_args.paddlenlp_arguments(training, decide_precision("float32", "O1")),
            train_dataset=PackedDataset(samples, _packs(case)) if case.packed else samples,
            data_collator=MGenVLCollator(0),
            tokenizer=_Tokenizer(),
            chat_template=ChatTemplate.default(),
            origin=tuned_model.Origin(folder),
            guard=None,  # nothing is saved
            order=order.Order(
                len(samples),
                training.per_device_train_batch_size,
                max_steps=2,
                packs=_packs(case) if case.packed else None,
            ),
        )
        tensors = tuned_model.base_of(model).state_dict()
        trained = memory.Trained(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            [name for name, tensor in tensors.items() if not tensor.stop_gradient],
        )
        del tensors
        gc.collect()
        if hasattr(core, "host_memory_stat_reset_peak_value"):  # Paddle 2.6 has none: there the child is fresh
            core.host_memory_stat_reset_peak_value("Allocated", 0)
        trainer.train()
        measured = core.host_memory_stat_peak_value("Allocated", 0) - before
    setting = memory.Setting(
        recompute=training.recompute,
        lora_dropout=model_keys.lora_dropout if model_keys.lora else 0.0,
        clip=training.max_grad_norm > 0,
    )
    rows = training.per_device_train_batch_size
    held = rows * max(case.packed, 1)
    squares = (held * case.tokens**2, case.tokens) if case.packed else None
    batch = memory.Batch(rows, case.tokens * max(case.packed, 1), held, held * case.labels, squares)
    return {"measured": measured, "estimated": memory.estimate(config, trained, batch, setting).peak}


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    bench = harness.Bench(args, "estimated ÷ measured peak memory of a training step")
    for name in QUICK if args.size == "quick" else CASES:
        bytes_ = harness.in_child(args, measure, CASES[name]).result
        ratio = bytes_["estimated"] / bytes_["measured"]
        shown = f"{name}: {bytes_['estimated'] / 1e6:.0f} of {bytes_['measured'] / 1e6:.0f} MB"
        bound = {"at_most": 1.15} if ratio > 1 else {"at_least": 0.85}
        bench.value(shown, ratio, "×", **bound, **bytes_)
    bench.finish()


if __name__ == "__main__":
    main()
