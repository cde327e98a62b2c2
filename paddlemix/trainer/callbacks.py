"""Callbacks of the training loop: log lines in the notebook's format, progress, signals, bookkeeping; workers."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import signal
import time
from typing import Any, Dict, Optional, Union

import paddle
from paddlenlp.trainer import TrainerCallback
from paddlenlp.trainer.trainer_utils import ShardingOption

from paddlemix.trainer.optimizer import begin_with_zeros
from paddlemix.utils.compat import name_the_epoch
from paddlemix.utils.log import logger
from paddlemix.utils.progress import Progress
from paddlemix.utils.runtime import seed_step
from paddlemix.utils.surroundings import check_shared_memory

# Seconds between two log lines on the progress of an evaluation with disable_tqdm.
LINE_SECONDS = 30.0


def time_left(done: int, total: int, seconds: float) -> str:
    """Estimated time for the rest of `total`, after `done` in `seconds`: h:mm:ss."""
    left = round(seconds / max(done, 1) * (total - done))
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


class ProgressLines:
    """The interface of Progress, as a log line every LINE_SECONDS."""

    def __init__(self, total: int, desc: str):
        self._total, self._desc = total, desc
        self._done, self._began = 0, time.monotonic()
        self._reported = self._began

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._reported >= LINE_SECONDS and self._done < self._total:
            self._reported = now
            left = time_left(self._done, self._total, now - self._began)
            logger.info(f"{self._desc}: {self._done:,} of {self._total:,}, time left: {left}")

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class LogLines(TrainerCallback):
    """Log lines from the first process, and progress bars of training and evaluation unless disable_tqdm.

    First of the callbacks, so that later ones see the epoch's name that it sets.
    """

    def __init__(self):
        self._bar: Optional[Progress] = None
        self._evaluation: Optional[Union[Progress, ProgressLines]] = None
        self._shown = self._first_step = 0
        self._began = time.monotonic()

    @staticmethod
    def counting(args, state, total: int, desc: str, unit: str) -> Union[Progress, ProgressLines]:
        """A progress bar, or log lines, for `total` units of work."""
        if args.disable_tqdm and state.is_local_process_zero:
            return ProgressLines(total, desc)
        return Progress(total, desc, unit, disable=not state.is_local_process_zero)

    def begin_evaluation(self, args, state, batches: int) -> None:
        """Show the progress of an evaluation's loss, by batches."""
        self._evaluation = self.counting(args, state, batches, "evaluation", "batch")

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._evaluation is not None:
            self._evaluation.update()

    def end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_evaluate(self, args, state, control, **kwargs):
        self.end_evaluation()

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_step, self._began = state.global_step, time.monotonic()
        if state.is_local_process_zero and not args.disable_tqdm:
            self._shown = state.global_step
            self._bar = Progress(total=state.max_steps, desc="training", unit="step", initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._shown)
            self._shown = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        name_the_epoch(logs)
        if "loss" in logs and self._bar is not None:
            rates = ("interval_samples_per_second", "samples/s"), ("interval_tokens_per_second", "tokens/s")
            shown = [f"{logs[name]:.4g} {unit}" for name, unit in rates if name in logs]
            self._bar.note(", ".join([f"loss {logs['loss']:.4f}", *shown]))
        if state.is_world_process_zero:
            line = ", ".join(f"{name}: {value}" for name, value in logs.items())
            if "loss" in logs and state.max_steps > 0:
                step, begin, end = state.global_step, self._first_step, state.max_steps
                left = time_left(step - begin, end - begin, time.monotonic() - self._began)
                line += f", step: {step}/{end}, time left: {left}"
            logger.info(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Close the bars, however training ended, so that later lines appear below them."""
        self.end_evaluation()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# <linux/prctl.h>: send a signal to this process when its parent dies.
_PR_SET_PDEATHSIG = 1
# Shared with forked processes: 1 while the trainer handles SIGTERM.
_HANDLED = mmap.mmap(-1, 1)


def leave_sigterm_to_parent(number: int = 0) -> None:
    """Worker init: ignore SIGTERM and SIGHUP while the trainer handles them.

    Launchers and schedulers signal all processes of a run, and a run whose worker dies fails instead of saving.
    """

    def end(signum, frame):
        if not _HANDLED[0]:
            # Paddle reports a worker killed by a signal as an error, even while the parent exits.
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    # Workers must not outlive a killed parent: Paddle's own watchdog waits for the next index.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# Right after the fork; worker_init_fn calls it again, since Paddle installs a handler of its own in between.
os.register_at_fork(after_in_child=lambda: leave_sigterm_to_parent() if _HANDLED[0] else None)


class EvaluationLeftOut(Exception):
    """SIGTERM arrived while an evaluation ran."""


class StopOnSignal(TrainerCallback):
    """On SIGTERM (a scheduler) or SIGHUP (a closed terminal), save a checkpoint after the current step and stop.

    An evaluation during training is aborted at its next batch. All processes of a run stop after the same step, though
    the signal reaches them at different times.
    """

    def __init__(self):
        self.received, self._name = False, "SIGTERM"
        self._saved = -1  # step of the last checkpoint
        self._previous: Dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether any process received a signal. A collective call."""
        if paddle.distributed.get_world_size() > 1:
            stopping = paddle.to_tensor([int(self.received)])
            paddle.distributed.all_reduce(stopping, paddle.distributed.ReduceOp.MAX)
            self.received = bool(stopping.item())
        return self.received

    def leave_evaluation(self) -> None:
        """Raise EvaluationLeftOut if the training around this evaluation must stop."""
        if self._previous and self.asked():
            raise EvaluationLeftOut

    def on_prediction_step(self, args, state, control, **kwargs):
        self.leave_evaluation()

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Under nohup SIGHUP stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        _HANDLED[0] = 1

    def _note(self, number, frame):
        self.received, self._name = True, signal.Signals(number).name

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked():
            self.stop(args, state, control)

    def stop(self, args, state, control) -> None:
        """Save unless training is complete, and skip evaluations: there may be only seconds left."""
        control.should_evaluate = False
        control.should_training_stop = True
        if state.global_step < state.max_steps:
            logger.warning(f"{self._name}: stopping after step {state.global_step}")
            control.should_save = not args.benchmark

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.asked():
            control.should_evaluate = False
            control.should_save = control.should_save and self._saved != state.global_step

    def on_save(self, args, state, control, **kwargs):
        self._saved = state.global_step

    def disarm(self):
        """Restore the former signal handlers, however training ended."""
        _HANDLED[0] = 0
        while self._previous:
            signal.signal(*self._previous.popitem())


def safe_workers(loader: Any) -> Any:
    """Let workers ignore SIGTERM, and pass batches through pipes instead of /dev/shm.

    /dev/shm may be small (64 MB in Docker): a batch that does not fit fails or hangs the run, and what a killed run
    leaves there stays until reboot. The extra copy takes some milliseconds of a thread per batch.
    """
    if loader.num_workers:
        check_shared_memory(loader.num_workers, "dataloader_num_workers 0")
        loader.worker_init_fn = leave_sigterm_to_parent
        loader.use_shared_memory = False
    return loader


class Bookkeeping(TrainerCallback):
    """Restores the sampler's position, the epoch and the loss sum on a resume, which the stock loop loses."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # PaddleNLP logs it only at debug level.
        count = sum(math.prod(p.shape) for p in self.trainer.model.parameters() if not p.stop_gradient)
        logger.info(f"  Number of trainable parameters = {count:,} (per device)")
        # Stage 2 keeps gradients in buffers of its own.
        if ShardingOption.SHARD_GRAD_OP not in args.sharding:
            begin_with_zeros(self.trainer.model.parameters())

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The loop has just reset its sum.
        self.trainer._total_loss_scalar += self.trainer._resumed_loss
        self.trainer._resumed_loss = 0.0
        epoch, step = divmod(state.global_step, self.trainer.order.steps_per_epoch)
        self.trainer.sampler.start_at(epoch, 0 if args.ignore_data_skip else step * self.trainer.order.batches_per_step)

    def on_step_begin(self, args, state, control, **kwargs):
        seed_step(args.seed, state.global_step, args.dataset_rank, max(args.tensor_parallel_rank, 0))

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / self.trainer.order.steps_per_epoch
