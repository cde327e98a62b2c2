"""Supervised finetuning: build the trainer of a resolved run, train, save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
from typing import Dict, List

import paddle
from paddlenlp.utils.log import logger as paddlenlp_logger

from paddlemix.checkpoint.model_folder import find_tuned_weights, merge_command
from paddlemix.datasets.collator import MGenVLCollator
from paddlemix.datasets.packing import PackedDataset
from paddlemix.trainer import freeze, run_checkpoints
from paddlemix.trainer.eval_captions import CaptionEvaluator
from paddlemix.trainer.keys import Arguments
from paddlemix.trainer.reports import CURVE_NAME, Parameter, draw_loss
from paddlemix.trainer.resume import write_trainer_state
from paddlemix.trainer.run import Run, contributions, resolve
from paddlemix.trainer.trainer import FinetuneTrainer
from paddlemix.trainer.training_args import paddlenlp_arguments, print_block
from paddlemix.trainer.tuned_model import choose_trainable, load_base_model
from paddlemix.utils.files import only_writer
from paddlemix.utils.log import logger, print_like_ours
from paddlemix.utils.runtime import describe_threads, rank, seed_everything


def finetune(arguments: Arguments) -> Dict[str, float]:
    """One run, from its arguments to the saved result (a LoRA checkpoint, trained parts, or a model folder).

    Returns the metrics of training and evaluation.

    Raises:
        UserError: a folder, a pattern, weights or data must be changed.
        JobFailed: the loss became NaN or infinite, or a checkpoint could not be written.
    """
    writing = only_writer(arguments.training.output_dir) if rank() == 0 else contextlib.nullcontext()
    with writing:
        return _finetune(arguments)


def _finetune(arguments: Arguments) -> Dict[str, float]:
    run = resolve(arguments)
    training = arguments.training
    trainer = build(run)
    # Only now that everything was read and checked, and every process has seen the folder.
    if trainer.args.world_size > 1:
        paddle.distributed.barrier()
    if paddle.distributed.get_rank() == 0:
        run_checkpoints.clear_output(training.output_dir, run.old_files)
    metrics: Dict[str, float] = {}
    if training.do_train:
        metrics.update(trainer.train(resume_from_checkpoint=run.resume_from))
        stopped = trainer.stop.received and trainer.state.global_step < trainer.state.max_steps
        if training.benchmark:
            rates = (f"{metrics[f'train_{unit}_per_second']:,} {unit}" for unit in ("samples", "tokens", "steps"))
            logger.info(f"benchmark: {', '.join(rates)} per second over the entire run; nothing was saved")
        elif stopped:
            logger.warning(f"stopped after step {trainer.state.global_step}: resume with --resume")
        else:
            _save_result(trainer, metrics)
        if stopped:
            return metrics
    # With an evaluation_strategy, training evaluates.
    if training.do_eval and (training.evaluation_strategy == "no" or not training.do_train):
        found = trainer.evaluate()
        metrics.update(found)
        if not training.benchmark:
            trainer.log_metrics("eval", found)
            trainer.save_metrics("eval", found)
            if training.do_train:
                _write_history(trainer)
    trainer.events.close()
    if training.do_train and not training.benchmark and trainer.is_world_process_zero():
        for line in _what_next(trainer):
            logger.info(line)
    return metrics


def build(run: Run) -> FinetuneTrainer:
    """The trainer of a run, ready for the first step. Changes no file.

    Raises:
        ConfigError: lists all problems of the run, if there are any.
    """
    run.refuse()
    model_args, training = run.arguments.model, run.arguments.training
    _announce(run)
    training_args = paddlenlp_arguments(training, run.precision, run.order)
    logger.warning(
        f"Process rank: {training_args.local_rank}, device: {run.machine.device}, "
        f"world_size: {training_args.world_size}, distributed training: {training_args.world_size > 1}, "
        f"16-bits training: {run.precision.compute != 'float32'}"
    )
    seed_everything(training.seed)
    # Optimizer states are stored under Paddle's generated names; restart their numbering.
    with paddle.utils.unique_name.guard():
        card = max(training_args.tensor_parallel_rank, 0)
        model = load_base_model(model_args, run.config, run.precision.weights, run.tensor, card)
        run.guard.check(model)
        model = choose_trainable(model, model_args, run.trainable)
    for line in (freeze.summary_line(run.counts()), *freeze.table_lines(run.counts())):
        logger.info(line)
    train, evaluation = run.datasets.get("train"), run.datasets.get("eval")
    template = (evaluation if train is None else train).template
    if run.packs is not None:
        train = PackedDataset(train, run.packs)
    return FinetuneTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=MGenVLCollator(
            run.tokenizer.pad_token_id, image_start_id=run.tokenizer.img_start_id, n_queries=run.tokenizer.n_queries
        ),
        tokenizer=run.tokenizer,
        chat_template=template,
        order=run.order,
        origin=run.origin,
        guard=run.guard,
        parameters=_parameters(run),
        image_gain=run.arguments.data.eval_image_gain,
        captions=CaptionEvaluator(evaluation, run.tokenizer, run.arguments) if training.evaluates else None,
    )


def _parameters(run: Run) -> Dict[str, Parameter]:
    """All keys of model, data and generation, and the training keys that were set, as numbers and strings."""
    *blocks, training = run.arguments[:4]
    values = {name: value for block in blocks for name, value in dataclasses.asdict(block).items()}
    values.update((name, value) for name, value in dataclasses.asdict(training).items() if name in run.arguments.given)
    return {
        name: value if type(value) in (int, float, str) else json.dumps(value, ensure_ascii=False)
        for name, value in sorted(values.items())
        if value is not None
    }


def _announce(run: Run) -> None:
    """Log the arguments, and the warnings and notes of the resolved run."""
    print_like_ours(paddlenlp_logger.logger)
    for title, block in zip(("Model", "Data", "Generation"), run.arguments):
        print_block(title, block)
    for text in run.warnings:
        logger.warning(text)
    for text in run.notes:
        logger.info(text)
    for part in run.datasets:
        for line in contributions(run, part):
            logger.info(f"dataset.{part}: {line}")
    if not run.machine.gpu:
        logger.info(describe_threads())
    packs = run.packs
    if packs is not None:
        filled = run.lengths.tokens.sum() / (packs.count * packs.max_length)
        logger.info(
            f"packed {run.order.samples} samples into {packs.count} sequences of at most {packs.max_length} tokens, "
            f"{filled:.1%} filled"
        )


def _save_result(trainer: FinetuneTrainer, metrics: Dict[str, float]) -> None:
    """Write weights, metrics, history and the loss curve to output_dir."""
    folder = trainer.args.output_dir
    unfinished = os.path.join(folder, run_checkpoints.PARTIAL_PREFIX + "files")
    with run_checkpoints.disk_errors(f"the result in {folder}", unfinished):
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        _write_history(trainer)


def _write_history(trainer: FinetuneTrainer) -> None:
    """Write trainer_state.json and the loss curve."""
    folder = trainer.args.output_dir
    if trainer.is_world_process_zero():
        write_trainer_state(trainer.state, folder)
        draw_loss(trainer.state.log_history, os.path.join(folder, CURVE_NAME))


def _what_next(trainer: FinetuneTrainer) -> List[str]:
    """Where the result is, and the next commands, ready to be copied."""
    folder = trainer.args.output_dir
    quoted = shlex.quote(folder)
    lines = [f"result: {folder}"]
    if os.path.isfile(os.path.join(folder, CURVE_NAME)):
        lines.append(f"loss curve: {os.path.join(folder, CURVE_NAME)}")
    if "visualdl" in trainer.events.kinds:
        shown = ", captions on their images" if trainer.events.pictures else ""
        lines.append(f"more curves{shown}: visualdl --logdir {shlex.quote(trainer.events.folder)}")
    lines.append(f"try it: python chat.py {quoted}")
    if find_tuned_weights(folder) is not None:
        lines.append(f"merge it: {merge_command(folder, trainer.origin.base, trainer.origin.text)}")
    return lines
