"""Rates of a training run: samples, tokens and steps per second of all processes, evaluations left out."""

from __future__ import annotations

import contextlib
import time
from typing import Dict, Iterator, List, Optional

import numpy as np
from paddlenlp.trainer import TrainerCallback

from paddlemix.trainer.parallel import sum_over_processes
from paddlemix.utils.log import logger

# Shorter evaluations are never reported as too long.
_LONG_SECONDS = 10.0


class Throughput(TrainerCallback):
    """Counts samples and tokens, and replaces PaddleNLP's rates: those include evaluations and, after a resume or a
    signal, steps that were not run."""

    def __init__(self, args):
        self._args = args
        # Samples and tokens: of this process since the last line (tokens on the device); of all since the start.
        self._samples, self._tokens = 0, 0
        self._total = np.zeros(2, np.int64)
        # Start of the interval of the next line, of the training since the last evaluation.
        self._since: float = time.time()
        self._trained_since: Optional[float] = None
        self._first_step = 0
        self._evaluated, self._warned = 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        # Loading is not part of the first interval.
        self._since = self._trained_since = time.time()
        self._first_step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self._trained_since = None

    def count(self, inputs: Dict) -> None:
        """Count a micro-batch."""
        packed = inputs.get("sample_lengths")
        self._samples += len(inputs["input_ids"]) if packed is None else np.count_nonzero(packed)
        self._tokens = self._tokens + inputs["attention_mask"].sum()

    def _take(self) -> List[int]:
        """Samples and tokens of all processes since the last call. A collective call."""
        counts = sum_over_processes(self._args, self._samples, self._tokens)
        self._samples = self._tokens = 0
        self._total += counts
        return counts

    def since_last_line(self, logs: Dict[str, float]) -> None:
        """Set the rates of a log line with a loss."""
        now, (samples, tokens) = time.time(), self._take()
        seconds = max(now - self._since, 1e-6)
        if "interval_steps_per_second" in logs:
            steps = round(logs["interval_steps_per_second"] * logs["interval_runtime"])
            logs["interval_steps_per_second"] = round(steps / seconds, 4)
        logs["interval_runtime"] = round(seconds, 4)
        logs["interval_samples_per_second"] = round(samples / seconds, 4)
        logs["interval_tokens_per_second"] = round(tokens / seconds, 1)
        self._since = now

    def since_start(self, logs: Dict[str, float], step: int) -> None:
        """Set the rates of the final metrics, after optimizer step `step`."""
        self._take()
        seconds = max(logs["train_runtime"] - self._evaluated, 1e-6)
        samples, tokens = self._total.tolist()
        logs["train_samples_per_second"] = round(samples / seconds, 4)
        logs["train_tokens_per_second"] = round(tokens / seconds, 1)
        logs["train_steps_per_second"] = round((step - self._first_step) / seconds, 4)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Leave out the time of an evaluation; warn once if it takes longer than the training before it."""
        began = time.time()
        try:
            yield
        finally:
            seconds = time.time() - began
            self._since += seconds
            if self._trained_since is not None:
                self._evaluated += seconds
                trained = began - self._trained_since
                if seconds > max(trained, _LONG_SECONDS) and not self._warned:
                    self._warned = True
                    logger.warning(
                        f"this evaluation took {seconds:,.0f} s, the training before it {trained:,.0f} s: raise "
                        "eval_steps, or limit its batches with max_evaluate_steps"
                    )
                self._trained_since = time.time()
