"""Supervised finetuning: model, frozen parts, adapters, data and the trainer put together, then saved."""

from __future__ import annotations

import os
from typing import Dict, Optional, Tuple

import paddle
from paddlenlp.utils.log import logger as paddlenlp_logger

from paddlemix.auto import AutoTokenizerMIX
from paddlemix.datasets.chatml import build_dataset
from paddlemix.datasets.collator import MGenVLCollator
from paddlemix.datasets.entries import read_entries
from paddlemix.datasets.packing import PackedDataset, plan_packs
from paddlemix.processors.images import MGenVLImageProcessor
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.trainer import checkpoints, freeze, parallel
from paddlemix.trainer.captions import CaptionEvaluator
from paddlemix.trainer.guard import LanguageGuard, check_vocabulary
from paddlemix.trainer.keys import DataArguments, GenerationArguments, ModelArguments, TrainingKeys
from paddlemix.trainer.order import TOO_FEW_EPOCHS
from paddlemix.trainer.reports import CURVE_NAME, draw_loss
from paddlemix.trainer.trainer import FinetuneTrainer, disk_errors, paddlenlp_arguments, print_block
from paddlemix.trainer.tuned_model import Origin, base_of, choose_trainable, load_model
from paddlemix.utils.errors import ConfigError
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import (
    decide_precision,
    describe_threads,
    resolve_device,
    resolve_dtype,
    resolve_flash,
    seed_everything,
)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, generate_args: GenerationArguments, training: TrainingKeys
) -> Tuple[FinetuneTrainer, Optional[str]]:
    """Everything up to the first step: (the trainer, the checkpoint to resume from or None)."""
    # One form of line for the whole run, without PaddleNLP's colours and debug lines.
    paddlenlp_logger.logger.handlers = logger.handlers[:1]
    paddlenlp_logger.logger.setLevel("INFO")
    for title, block in (("Model", model_args), ("Data", data_args), ("Generation", generate_args)):
        print_block(title, block)
    device = resolve_device("cpu" if training.no_cuda else training.device)
    if device.reason:
        logger.warning(device.reason)
    parallel.check_device(training, device.value)
    asked = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
    dtype = resolve_dtype(asked, device.value)
    if dtype.reason:
        logger.warning(dtype.reason)
    resume_from, old_files = None, []
    if training.do_train:
        resume_from, old_files = checkpoints.check_output(
            training.output_dir,
            overwrite=training.overwrite_output_dir,
            resume=training.resume,
            resume_from=training.resume_from_checkpoint,
        )
    precision = decide_precision(dtype.value, training.fp16_opt_level)
    flash, reason = resolve_flash(model_args.use_flash_attention, precision.compute, device.value)
    if reason:
        logger.warning(reason)
    training_args = paddlenlp_arguments(training, precision)
    logger.warning(
        f"Process rank: {training_args.local_rank}, device: {device.value}, "
        f"world_size: {training_args.world_size}, distributed training: {training_args.world_size > 1}, "
        f"16-bits training: {dtype.value != 'float32'}"
    )
    if device.value == "cpu":
        logger.info(describe_threads())
    seed_everything(training.seed)
    # Optimizer states are stored under Paddle's running names; count those from 0, whatever was built before.
    guard = LanguageGuard(model_args.model_name_or_path)
    with paddle.utils.unique_name.guard():
        cards, card = max(training_args.tensor_parallel_degree, 1), max(training_args.tensor_parallel_rank, 0)
        model = load_model(model_args, precision.weights, flash, cards, card)
        guard.check(model)
        model = choose_trainable(model, model_args)
    counts = freeze.model_counts(base_of(model))
    logger.info(freeze.summary_line(counts))
    for line in freeze.table_lines(counts):
        logger.info(line)

    tokenizer = AutoTokenizerMIX.from_pretrained(model_args.model_name_or_path)
    check_vocabulary(tokenizer, base_of(model).config)
    image_processor = MGenVLImageProcessor.from_config(base_of(model).config)
    entries, _ = read_entries(data_args.dataset, data_args.chat_template)
    datasets = {part: build_dataset(found, tokenizer, image_processor, data_args) for part, found in entries.items()}
    packs = lengths = None
    if training.do_train and (data_args.mixtoken or training.group_by_modality_length):
        # The first process counts and keeps the lengths; the others find them.
        with training_args.main_process_first(desc="lengths of the training samples"):
            lengths = datasets["train"].lengths()
        if data_args.mixtoken:
            packs = plan_packs(lengths.tokens, data_args.max_length, training.seed)
            filled = lengths.tokens.sum() / (packs.count * data_args.max_length)
            logger.info(
                f"packed {len(lengths.tokens)} samples into {packs.count} sequences of at most "
                f"{data_args.max_length} tokens, {filled:.1%} filled"
            )
            lengths = None
    template = entries["train" if "train" in datasets else "eval"][0].chat_template
    trainer = FinetuneTrainer(
        model=model,
        args=training_args,
        train_dataset=datasets.get("train") if packs is None else PackedDataset(datasets["train"], packs),
        eval_dataset=datasets.get("eval"),
        data_collator=MGenVLCollator(tokenizer.pad_token_id),
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_file(template) if template else ChatTemplate.default(),
        packs=packs,
        lengths=lengths,
        origin=Origin.of(model_args.model_name_or_path, model_args.text_model_name_or_path),
        guard=guard,
    )
    shown = 0 if training.benchmark else data_args.shown_captions
    if training.evaluates and (data_args.eval_with_do_generation or shown):
        size, most = training.per_device_eval_batch_size, training.max_evaluate_steps
        limit = size * most if most > 0 else None
        if not data_args.eval_with_do_generation:
            limit = data_args.shown_captions
        trainer.captions = CaptionEvaluator(datasets["eval"], tokenizer, generate_args, size, limit)
        trainer.score_captions = data_args.eval_with_do_generation
        trainer.save_captions = data_args.save_generation_output
        trainer.shown_captions = data_args.shown_captions
    if training.do_train and trainer.planned_steps() == 0:
        raise ConfigError(TOO_FEW_EPOCHS.format(training.num_train_epochs))
    # Only now, when everything a wrong config could break has been read, and every process has seen the folder.
    if training_args.world_size > 1:
        paddle.distributed.barrier()
    if paddle.distributed.get_rank() == 0:
        checkpoints.clear_output(training.output_dir, old_files)
    return trainer, resume_from


def finetune(
    model_args: ModelArguments, data_args: DataArguments, generate_args: GenerationArguments, training: TrainingKeys
) -> Dict[str, float]:
    """One run, from the checked arguments to the saved result (SPEC §3: a LoRA checkpoint or a model folder).

    Returns the metrics of training and evaluation.

    Raises:
        UserError: with what to mend: a folder, a pattern, weights that do not fit, data that cannot be read.
        JobFailed: the loss is no number any more, or a checkpoint could not be written.
    """
    trainer, resume_from = prepare(model_args, data_args, generate_args, training)
    metrics: Dict[str, float] = {}
    if training.do_train:
        metrics.update(trainer.train(resume_from_checkpoint=resume_from))
        if trainer.stop.received and trainer.state.global_step < trainer.state.max_steps:
            logger.warning(f"stopped after step {trainer.state.global_step}: resume with --resume")
            return metrics
        if not training.benchmark:
            partial = os.path.join(training.output_dir, checkpoints.PARTIAL_PREFIX + "files")
            with disk_errors(f"the result in {training.output_dir}", partial):
                trainer.save_model()
                trainer.log_metrics("train", metrics)
                trainer.save_metrics("train", metrics)
                trainer.save_state()
                if trainer.is_world_process_zero():
                    draw_loss(trainer.state.log_history, os.path.join(training.output_dir, CURVE_NAME))
    # A strategy evaluates while training.
    if training.do_eval and (training.evaluation_strategy == "no" or not training.do_train):
        found = trainer.evaluate()
        metrics.update(found)
        if not training.benchmark:
            trainer.log_metrics("eval", found)
            trainer.save_metrics("eval", found)
    trainer.events.close()
    return metrics
