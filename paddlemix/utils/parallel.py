"""Pools of worker processes, and a function over chunks of rows in forked ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Deque, Iterable, Iterator, Optional

from paddlemix.utils.errors import JobFailed
from paddlemix.utils.surroundings import check_shared_memory


def _end_with_parent() -> None:
    """In a worker: end when the parent is killed. Waiting for work it would not notice, and keep open files locked."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class Pool(ProcessPoolExecutor):
    """Worker processes that do not see Ctrl-C and end with this one. An exception that leaves the block kills them."""

    def __init__(self, workers: int, context: multiprocessing.context.BaseContext):
        super().__init__(workers, context, _end_with_parent)

    def submit(self, *args, **kwargs) -> Future:
        # Any call may start processes, which inherit what is blocked. Ctrl-C is delivered after it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def kill(self) -> None:
        """End the processes, whatever they are doing."""
        processes = list((self._processes or {}).values())
        # Threads of the pool, for which the interpreter waits, may be in the middle of a write or a read that only a
        # worker would have ended. Once workers have died, these threads close the pipes themselves.
        if not self._broken:
            for pipe in (getattr(self._call_queue, "_reader", None), getattr(self._result_queue, "_writer", None)):
                if pipe is not None:
                    pipe.close()
        for process in processes:
            process.kill()
        # Waits: at its exit the interpreter writes to a pipe that these threads may be closing.
        self.shutdown()

    def __exit__(self, kind, *_) -> None:
        self.shutdown() if kind is None else self.kill()


# What a forked worker calls; it inherits the function and all that the function refers to, without a copy.
_FUNCTION: Optional[Callable[[Any], Any]] = None


def _call(chunk: Any) -> Any:
    return _FUNCTION(chunk)


def map_chunks(function: Callable[[Any], Any], chunks: Iterable[Any], workers: int) -> Iterator[Any]:
    """function(chunk) for each chunk, in order.

    workers: processes, 0 for this one. They are forked, so not where Paddle runs. Few chunks per worker are taken from
    `chunks` ahead of the results.

    Raises:
        JobFailed: a worker was killed.
    """
    if workers == 0:
        yield from map(function, chunks)
        return
    check_shared_memory(workers, "--workers 0")
    global _FUNCTION
    _FUNCTION = function
    waiting: Deque[Future] = deque()
    # A Pool would wait for ever for a process that was killed.
    with Pool(workers, multiprocessing.get_context("fork")) as pool:
        try:
            # All processes are forked by the first call: before `chunks` starts a thread that reads ahead.
            pool.submit(int)
            for chunk in chunks:
                waiting.append(pool.submit(_call, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            why = "a worker process was killed, mostly for want of memory; fewer --workers need less"
            raise JobFailed(why) from None
        finally:
            # It may refer to much that only the workers needed.
            _FUNCTION = None
