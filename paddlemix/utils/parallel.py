"""A function over chunks of rows, in forked processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Deque, Iterable, Iterator, Optional

from paddlemix.utils.errors import JobFailed
from paddlemix.utils.surroundings import check_shared_memory

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
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
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
