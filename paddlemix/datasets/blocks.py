"""Input files in blocks and lines, read ahead by a thread; what changes while it is read is refused."""

from __future__ import annotations

import _thread
import os
import sys
from queue import SimpleQueue
from typing import IO, Callable, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

from paddlemix.utils.errors import JobFailed

# Size of reads. Lines are some 50 KB, so few of them span two buffers.
BUFFER_BYTES = 1 << 20


class FileState(NamedTuple):
    """Identifies a file's contents: size, time of the last change in ns, inode, device."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: Union[str, int]) -> FileState:
        """The state of a path or an open file."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def check(self, path: str, file: int) -> None:
        """Raise JobFailed unless the open file is still in this state."""
        now = FileState.of(file)
        if now != self:
            raise JobFailed(
                f"{path} changed while it was read: it had {self.size:,} bytes and has {now.size:,} now; "
                "give the command again when nothing writes to it any more",
                "changed",
            )


def read_blocks(
    path: str, file: IO[bytes], read: Callable[[int], bytes], state: Optional[FileState] = None
) -> Iterator[bytes]:
    """All that `read` returns, in blocks read ahead by a thread.

    file: the open file of that path, which `read` reads from.

    Raises:
        JobFailed: the file has changed since `state`, or since the call.
    """
    before = state or FileState.of(file.fileno())
    asked: SimpleQueue = SimpleQueue()
    given: SimpleQueue = SimpleQueue()
    ended = _thread.allocate_lock()
    ended.acquire()

    def answer() -> None:
        try:
            while asked.get():
                try:
                    given.put((read(BUFFER_BYTES), None))
                except BaseException as error:
                    given.put((b"", error))
        finally:
            ended.release()

    # Not a pool: an unfinished generator may be garbage-collected at any moment, even while the `threading` module
    # starts or stops a thread, and would then deadlock on that module's lock.
    reader = _thread.start_new_thread(answer, ())
    # The modules may be gone at Python's exit.
    get_ident, getpid, pid, at_exit = _thread.get_ident, os.getpid, os.getpid(), sys.is_finalizing
    try:
        # Two requests, so that the thread can continue with the next while this one waits for the first; later it would
        # have to wait for Python's lock.
        asked.put(True)
        asked.put(True)
        while True:
            block, error = given.get()
            if error is not None:
                raise error
            # For each block, so that a change is noticed before an incomplete row is used.
            before.check(path, file.fileno())
            if not block:
                return
            asked.put(True)
            yield block
    finally:
        # The thread must end before the file is closed. At Python's exit it has stopped; a forked process has none.
        asked.put(False)
        if get_ident() != reader and getpid() == pid and not at_exit():
            ended.acquire()


def lines_of(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[Tuple[bytes, int, int, int]]:
    """(buffer, begin, end, length) of each line with its \\n, length being end - begin. Of a line longer than
    max_line_bytes and a buffer, only the first part may be there.

    Lines are not copied; only one that spans two buffers is joined.
    """
    held: List[bytes] = []
    length = 0
    for block in blocks:
        begin, end = 0, block.find(b"\n") + 1
        if held:
            length += end or len(block)
            if length <= max_line_bytes:
                held.append(block[:end] if end else block)
            if not end:
                continue
            line = b"".join(held)
            held = []
            yield line, 0, len(line), length
            begin, end = end, block.find(b"\n", end) + 1
        while end:
            yield block, begin, end, end - begin
            begin, end = end, block.find(b"\n", end) + 1
        if begin < len(block):
            held = [block[begin:]]
            length = len(block) - begin
    if held:
        line = b"".join(held)
        yield line, 0, len(line), length
