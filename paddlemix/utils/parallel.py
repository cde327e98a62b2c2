"""Pools of worker processes, and mapping a function over chunks in forked ones."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, Tuple

from paddlemix.utils.errors import JobFailed
from paddlemix.utils.surroundings import check_shared_memory

CHUNK_ITEMS, CHUNK_BYTES = 64, 4 << 20


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


def map_chunks(
    function: Callable[[Any], Any],
    chunks: Iterable[Any],
    workers: int,
    instead: str = "--workers 0",
    lost: Any = None,
    full: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
    """function(chunk) for each chunk, in order.

    workers: processes, 0 for this one. They are forked, so not where Paddle runs. Few chunks per worker are taken from
    `chunks` ahead of the results, and none while `full()`. instead: the option that avoids processes, for errors. lost:
    the result for an item that kills its worker, as an image may crash a decoder; then chunks and results are lists.

    Raises:
        JobFailed: a worker was killed, and `lost` is None.
    """
    if workers == 0:
        yield from map(function, chunks)
        return
    global _FUNCTION
    check_shared_memory(workers, instead)
    waiting: Deque[Tuple[Any, Future]] = deque()
    opened = contextlib.ExitStack()

    def start() -> Pool:
        opened.close()
        # A multiprocessing.Pool would wait for ever for a process that was killed.
        pool = opened.enter_context(Pool(workers, multiprocessing.get_context("fork")))
        # All processes are forked by the first call: before `chunks` starts a thread that reads ahead.
        pool.submit(int)
        return pool

    def submit(chunk: Any) -> Future:
        try:
            return pool.submit(_call, chunk)
        except BrokenProcessPool as error:
            broken: Future = Future()
            broken.set_exception(error)
            return broken

    def result() -> Any:
        nonlocal pool
        chunk, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            if lost is None:
                why = "a worker process was killed, probably for lack of memory: use fewer --workers"
                raise JobFailed(why) from None
        # One by one in a new pool, to find the item that is the cause.
        pool, results = start(), []
        for item in chunk:
            try:
                results += submit([item]).result()
            except BrokenProcessPool:
                pool = start()
                results.append(lost)
        for number, (other, _) in enumerate(waiting):
            waiting[number] = other, submit(other)
        return results

    with opened:
        _FUNCTION = function
        try:
            pool = start()
            for chunk in chunks:
                waiting.append((None if lost is None else chunk, submit(chunk)))
                while waiting and (len(waiting) > 2 * workers or full()):
                    yield result()
            while waiting:
                yield result()
        finally:
            # It may refer to much that only the workers needed.
            _FUNCTION = None


def chunks_of(items: Iterable[Any], size: Callable[[Any], int]) -> Iterator[List[Any]]:
    """Lists of at most CHUNK_ITEMS items and some CHUNK_BYTES. size: item → bytes."""
    chunk: List[Any] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += size(item)
        if len(chunk) == CHUNK_ITEMS or held > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
