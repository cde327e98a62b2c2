"""FinetuneTrainer: PaddleNLP's Trainer, wrapped and not rewritten. What the stock method does, and what ours does:

  print_config              prints at debug level → at info level, as the notebook's log has it
  log                       empties the history (3.0.0b4); its rates count all planned steps → the history is kept, the
                            rates are those of this session, skipped samples are reported
  _get_train_sampler        an order that goes on only by reading samples → EpochSampler, which goes on by index
  get_train_dataloader,     workers die by the SIGTERM that the launcher sends to all → they leave it to the trainer;
  get_eval_dataloader       batches lie in /dev/shm, which may be small → they go through pipes
  evaluate                  the loss → captions too: generated, shown, scored
  evaluation_loop,          the loss → that with blank images too (eval_image_gain)
  prediction_step
  compute_loss              takes a criterion, or the first output → the loss that the model computes
  _wrap_model               broadcasts a batch to the cards that share matrices, whose other weights drift apart → each
                            reads the same samples itself, gradients of what all hold are made alike; each batch must
                            give all gradients (2.8) → it may be texts alone
  _prepare_inputs           an error in a loader worker loses its message → the batch carries it, and it is raised here
  training_step             → counts tokens and samples, watches the loss
  _check_loss_valid         waits for the device at every batch → Numerics looks once per step
  create_optimizer          all parameters, weight decay by names → those that train, decay on matrices only, a rate for
                            the connector, clipping by a float32 norm
  _maybe_log_save_evaluate  → keeps the loss of steps not logged yet for the checkpoint
  _save_checkpoint          writes in place; a kill leaves a part → under another name, sealed, renamed
  _rotate_checkpoints       deletes before the new checkpoint is complete → see _save_checkpoint
  _save                     all weights → what the run changes (tuned_model.save_tuned), tokenizer, chat template
  _load_from_checkpoint,    paddle.load, which executes what a pickle names → readers that execute nothing (resume)
  _load_optimizer_and_scheduler
  _load_rng_state           restores generators, which Paddle 2.6 cannot on the CPU → each step is seeded (seed_step)
  train                     → the loss sum over all sessions, the best weights by the safe readers
The stock callbacks that print or report are replaced (callbacks, reports). Losses of accumulated batches are averaged
batch by batch, as PaddleNLP does, not label by label.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from typing import Dict, List, Optional

import paddle
from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer
from paddlenlp.trainer.integrations import TensorBoardCallback, VisualDLCallback
from paddlenlp.transformers.model_utils import _add_variant

from paddlemix.datasets.collator import raise_failure
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.trainer import parallel, resume, run_checkpoints
from paddlemix.trainer.callbacks import Bookkeeping, EvaluationLeftOut, LogLines, StopOnSignal, safe_workers
from paddlemix.trainer.eval_captions import CaptionEvaluator
from paddlemix.trainer.guard import LanguageGuard
from paddlemix.trainer.image_gain import ImageGain
from paddlemix.trainer.numerics import Numerics, unscale_main_gradients
from paddlemix.trainer.optimizer import build_optimizer
from paddlemix.trainer.order import EpochSampler, Order
from paddlemix.trainer.reports import CaptionReport, EventFiles, Parameter
from paddlemix.trainer.throughput import Throughput
from paddlemix.trainer.training_args import print_block
from paddlemix.trainer.tuned_model import Origin, base_of, load_tuned, save_tuned
from paddlemix.utils.compat import handed_over
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import peak_memory


class FinetuneTrainer(Trainer):
    """PaddleNLP's Trainer with the overrides listed at the top of this module.

    chat_template: saved with the result. origin: the models that the run started from. guard: checks that the LLM's
    structure is unchanged. order: of the training samples; None for evaluation only. captions: generated at
    evaluations. image_gain: measured at evaluations (eval_image_gain). parameters: the run's settings, for the event
    files.
    """

    def __init__(
        self,
        *args,
        chat_template: ChatTemplate,
        origin: Origin,
        guard: LanguageGuard,
        order: Optional[Order] = None,
        captions: Optional[CaptionEvaluator] = None,
        image_gain: bool = False,
        parameters: Optional[Dict[str, Parameter]] = None,
        **kwargs,
    ):
        self.chat_template = chat_template
        self.origin, self.guard, self.order = origin, guard, order
        self.captions, self.image_gain = captions, image_gain
        self.sampler: Optional[EpochSampler] = None
        self.stop = StopOnSignal()
        self.numerics = Numerics()
        self._first_step, self._resumed_loss, self._pending_loss = 0, 0.0, 0.0
        self._history: List[dict] = []
        super().__init__(*args, **kwargs)
        if self.do_grad_scaling and self.args.amp_master_grad and not self.args.use_hybrid_parallel:
            unscale_main_gradients(self.scaler)
        self.output_dir = self.args.output_dir
        # The base class would read the best checkpoint with paddle.load; `train` does it with the safe reader.
        self.load_best = self.args.load_best_model_at_end
        self.args.load_best_model_at_end = False
        for stock in (PrinterCallback, ProgressCallback, VisualDLCallback, TensorBoardCallback):
            self.remove_callback(stock)
        self.throughput = Throughput(self.args)
        for callback in (self.stop, self.numerics, self.throughput, Bookkeeping(self)):
            self.add_callback(callback)
        self.lines = LogLines()
        self.callback_handler.callbacks.insert(0, self.lines)
        reports = self.args.report_to if self.is_world_process_zero() else []
        self.events = EventFiles(self.args.logging_dir, reports, parameters)
        self.add_callback(self.events)
        if captions is not None:
            self.caption_report = CaptionReport(self.events, captions.thumbnail, origin.base)

    # ---- what is printed

    def print_config(self, args=None, key=""):
        print_block("Training" if args is None else key, self.args if args is None else args)

    def log(self, logs: Dict[str, float], **kwargs) -> None:
        if "loss" in logs:
            self.throughput.since_last_line(logs)
            logs.update(self.numerics.scalars())
        if "train_runtime" in logs:
            self.throughput.since_start(logs, self.state.global_step)
        datasets = [data for data in (self.train_dataset, self.eval_dataset) if data is not None]
        counts = sum(data.n_skipped for data in datasets), sum(data.n_shortened for data in datasets)
        counts = parallel.sum_over_processes(self.args, *counts)
        for name, count in zip(("skipped_samples", "shortened_samples"), counts):
            if count or (name == "skipped_samples" and "loss" in logs):
                logs[name] = count
        super().log(logs, **kwargs)
        self._history.append(dict(logs, global_step=self.state.global_step))
        if len(self._history) > resume.MOST_LINES and "loss" in logs:
            self._history = resume.thinned(self._history)
        # A copy, since PaddleNLP 2.8 appends to it too.
        self.state.log_history = list(self._history)

    # ---- data

    def _get_train_sampler(self):
        self.sampler = EpochSampler(self.order, self.args.dataset_rank)
        return self.sampler

    def get_train_dataloader(self):
        return safe_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return safe_workers(super().get_eval_dataloader(eval_dataset))

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate the loss and, with `captions`, generate captions. None if SIGTERM interrupted it."""
        with self.throughput.evaluation():
            try:
                return self._evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            except EvaluationLeftOut:
                self.stop.stop(self.args, self.state, self.control)
                return None
            finally:
                self.lines.end_evaluation()

    def _evaluate(self, eval_dataset, *args):
        batches = math.ceil(
            len(self.eval_dataset if eval_dataset is None else eval_dataset)
            / (self.args.per_device_eval_batch_size * self.args.dataset_world_size)
        )
        limit = self.args.max_evaluate_steps
        self.lines.begin_evaluation(self.args, self.state, min(batches, limit) if limit > 0 else batches)
        metrics = super().evaluate(eval_dataset, *args)
        if self.captions is None or not self.captions.limit:
            return metrics
        model, between = base_of(self.model), self.stop.leave_evaluation
        with self.lines.counting(self.args, self.state, self.captions.limit, "captions", "row") as bar:
            found = self.captions.captions(model, between, bar.update)
        if self.is_world_process_zero():
            self.caption_report.show(found[: self.captions.shown], self.state.global_step)
        if self.captions.scored:
            path = os.path.join(self.output_dir, f"generation-{self.state.global_step}.tsv")
            write = self.captions.saved and self.args.should_save
            scores = self.captions.score(found, path if write else None)
            self.log(dict(scores, global_step=self.state.global_step))
            metrics.update(scores)
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._gain = ImageGain(self)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._gain.gains:
            output.metrics[f"{metric_key_prefix}_image_gain"] = self._gain.mean(output.num_samples)
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        step = super().prediction_step(model, inputs, *args, **kwargs)
        if self.image_gain:
            self._gain.add(model, inputs, step[0])
        return step

    # ---- a step

    def compute_loss(self, model, inputs, return_outputs=False):
        """The model's own loss: the mean over the labelled positions of the batch."""
        outputs = model(**inputs, return_dict=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _wrap_model(self, model, training=True):
        with parallel.unused_parameters_found():
            wrapped = super()._wrap_model(model, training)
        if self.args.tensor_parallel_degree > 1:
            parallel.keep_cards_alike(wrapped)
        return wrapped

    def _prepare_inputs(self, inputs):
        # A loader worker reports a failed sample inside the batch; raise it here.
        raise_failure(inputs)
        return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, **kwargs):
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, **kwargs)
        return self.numerics.watch(loss, self.do_grad_scaling)

    def _check_loss_valid(self, loss):
        """Replaced by Numerics."""

    def create_optimizer(self, lr_scheduler=None):
        """AdamW over the parameters that train; weight decay on matrices only."""
        if self.optimizer is None:
            rate = lr_scheduler if lr_scheduler is not None else self.lr_scheduler
            self.optimizer = build_optimizer(self.args, base_of(self.model), rate)
        return self.optimizer

    # ---- checkpoints

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self.control.should_save:
            # A checkpoint's loss sum includes the steps not yet logged.
            self._pending_loss = 0.0 if self.control.should_log else float(tr_loss)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_checkpoint(self, model, metrics=None):
        """Write a checkpoint under a temporary name, seal it and rename it."""
        output_dir, step = self.args.output_dir, self.state.global_step
        final = os.path.join(output_dir, f"checkpoint-{step}")
        partial = os.path.join(output_dir, f"{run_checkpoints.PARTIAL_PREFIX}{step}")
        written = os.path.join(partial, f"checkpoint-{step}")
        deciding = "eval_" + (self.args.metric_for_best_model or "loss").replace("eval_", "")
        if metrics is not None and not math.isfinite(metrics[deciding]):
            # NaN would remain the best: no later value compares as better.
            metrics = None
        with run_checkpoints.disk_errors(f"checkpoint-{step}", partial):
            with self._writing_to(partial):
                super()._save_checkpoint(model, metrics)
            if self.state.best_model_checkpoint == written:
                self.state.best_model_checkpoint = final
            if self.args.world_size > 1:
                paddle.distributed.barrier()
            if not self.args.should_save:
                return
            resume.write_trainer_state(self.state, written)
            run_checkpoints.seal(
                written,
                {
                    "global_step": step,
                    "loss_sum": self._total_loss_scalar + self._pending_loss,
                    "order": self.order.settings(),
                },
            )
            run_checkpoints.publish(written, final)
            logger.info(f"Saved model checkpoint to {final}")
        shutil.rmtree(partial)
        run_checkpoints.thin_out(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _writing_to(self, folder: str):
        """Let the base class write to another folder, without the trainer's state, which is not final yet."""
        # PaddleNLP 2.8 has no output_signal_dir; setting it is harmless.
        kept = self.args.output_dir
        self.args.output_dir = self.args.output_signal_dir = folder
        self.state.save_to_json = lambda path: None
        try:
            yield
        finally:
            del self.state.save_to_json
            self.args.output_dir = self.args.output_signal_dir = kept

    def _rotate_checkpoints(self, use_mtime=False, output_dir=None):
        """Replaced by _save_checkpoint; the stock one runs too early, and only under a launcher."""

    def _save(self, output_dir=None, state_dict=None, merge_tensor_parallel=False):
        """Save weights (see save_tuned), configuration, tokenizer, chat template and arguments.

        The first process writes; the processes that share its matrices must call this too.
        """
        folder = output_dir or self.args.output_dir
        if folder == self.output_dir:
            logger.info(f"Saving model checkpoint to {folder}")
        partial = os.path.join(folder, run_checkpoints.PARTIAL_PREFIX + "files")
        self.guard.check(base_of(self.model))
        if not self.args.should_save:
            save_tuned(self.model, partial, self.origin, False)
            return
        os.makedirs(partial, exist_ok=True)
        save_tuned(self.model, partial, self.origin, True)
        self.tokenizer.save_pretrained(partial)
        self.chat_template.save(partial)
        # Only because the notebook lists this file; never read. Plain values, no pickled classes.
        arguments = dict(self.args.to_sanitized_dict(), output_dir=self.output_dir, output_signal_dir=self.output_dir)
        paddle.save(arguments, os.path.join(partial, "training_args.bin"))
        for name in os.listdir(partial):
            os.replace(os.path.join(partial, name), os.path.join(folder, name))
        os.rmdir(partial)

    def load_weights(self, checkpoint: str) -> None:
        """Set the parameters from a checkpoint of the same kind of run, executing nothing in it."""
        load_tuned(self.model, checkpoint, self.origin)

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        if resume_from_checkpoint is not None:
            logger.info(f"Loading model from {resume_from_checkpoint}")
            self.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        trained = [parameter for parameter in self.model.parameters() if not parameter.stop_gradient]
        paths = [os.path.join(checkpoint, name) for name in self._optimizer_names()]
        resume.load_optimizer(self.optimizer, trained, paths[max(self.args.sharding_parallel_rank, 0)], paths)
        scheduler = os.path.join(checkpoint, resume.SCHEDULER_NAME)
        resume.load_scheduler(self.lr_scheduler, scheduler, self._first_step)
        if self.do_grad_scaling:
            resume.load_scaler(self.scaler, os.path.join(checkpoint, resume.SCALER_NAME))

    def _optimizer_names(self) -> List[str]:
        """The files of the optimizer state; several under sharding."""
        suffix = self.args.optimizer_name_suffix
        shards = range(max(self.args.sharding_parallel_degree, 1))
        variants = [re.sub(r"shard\d+", f"shard{rank:02d}", suffix) if suffix else None for rank in shards]
        return [_add_variant(resume.OPTIMIZER_NAME, variant) for variant in variants]

    def _load_rng_state(self, checkpoint):
        """Not needed: see seed_step."""

    # ---- the run

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train; load the best weights at the end with load_best_model_at_end. Returns the metrics."""
        metrics = self._train(resume_from_checkpoint, **kwargs)
        best = self.state.best_model_checkpoint
        if self.load_best and best is not None:
            logger.info(f"Loading best model from {best} (score: {self.state.best_metric})")
            self.load_weights(best)
        return metrics

    def _train(self, resume_from_checkpoint, **kwargs) -> Dict[str, float]:
        given = contextlib.nullcontext()
        if resume_from_checkpoint is not None:
            position = resume.read_position(resume_from_checkpoint)
            self._first_step, self._resumed_loss = position.step, position.loss_sum
            state = resume.read_trainer_state(resume_from_checkpoint, position.step)
            given = handed_over(state)
            self._history = state.log_history
            self.numerics.overflow.skipped = next(
                (line["skipped_steps"] for line in reversed(self._history) if "skipped_steps" in line), 0
            )
            if position.step >= self.order.steps:
                logger.info(f"{resume_from_checkpoint} is the end of the run: nothing left to train")
                self.load_weights(resume_from_checkpoint)
                self.state = state
                return {"train_loss": position.loss_sum / position.step, "epoch": state.epoch}
        try:
            # Optimizer states get generated names too (see finetune.build).
            with paddle.utils.unique_name.guard(), given:
                metrics = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs).metrics
                return dict(metrics, **peak_memory())
        except SystemError as error:
            # Paddle's message for a dead loader worker; the worker's own error is lost.
            if "DataLoader process" not in str(error):
                raise
            raise JobFailed(
                "a process that reads samples died, perhaps out of memory: try fewer dataloader_num_workers",
                "dataloader_num_workers",
            ) from error
        finally:
            self.stop.disarm()
            self.lines.close()
