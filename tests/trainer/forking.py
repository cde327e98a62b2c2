"""Runs of supervised_finetune.py that cost no import each: a process that has imported everything forks them.

    {"words": [command line], "log": FILE, "processes": N, "stand_ins": NAME}   a line in: N processes, as launched
    {"pids": [N]}, then {"rank": I, "status": S}   two lines out: of the first that failed, or of process 0; a negative
                                                   status: ended by that signal
    null                                           the end: a worker may hold the pipe's other end open

With several processes, the log of process i is FILE.i, and when one fails the others are ended, as the launcher does.
Gloo's own connecting fails once in hundreds of runs on a busy machine (a time-out between two processes that both run):
such a start is made again.
stand_ins: a module of this folder whose `install` they call first, or null.
While a file `linger.partial-N` is beside the log, checkpoint N is not sealed: its save can be stopped in time.
"""

import json
import os
import signal
import socket
import sys
import time

import pytest

# What Paddle and PaddleNLP print while they are imported is no answer.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import supervised_finetune  # noqa: E402
from paddlemix.trainer import finetune, run_checkpoints  # noqa: E402, F401  what takes long
from paddlemix.utils import cli  # noqa: E402
from tests.trainer import cpu_tensor_parallel, half_states  # noqa: E402

# Behind paddlemix, which readies the process for it.
import paddle  # noqa: E402, I001 isort:skip

STAND_INS = {"cpu_tensor_parallel": cpu_tensor_parallel, "half_states": half_states}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def environments(processes):
    """What python -m paddle.distributed.launch --nproc_per_node N sets for each process on a machine without cards."""
    if processes == 1:
        return [{}]
    master, *ports = free_ports(processes + 1)
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    return [
        {
            "PADDLE_MASTER": f"127.0.0.1:{master}",
            "PADDLE_GLOBAL_SIZE": str(processes),
            "PADDLE_LOCAL_SIZE": str(processes),
            "PADDLE_GLOBAL_RANK": str(rank),
            "PADDLE_LOCAL_RANK": str(rank),
            "PADDLE_NNODES": "1",
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(processes),
            "PADDLE_RANK_IN_NODE": str(rank),
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        for rank in range(processes)
    ]


def child(stand_ins, words, log, environment) -> int:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    # Paddle read its place among the processes when it was imported.
    paddle.distributed.parallel._global_parallel_env = None
    if stand_ins is not None:
        STAND_INS[stand_ins].install(pytest.MonkeyPatch())
    seal = run_checkpoints.seal

    def seal_late(folder, *arguments):
        while os.path.exists(os.path.join(os.path.dirname(log), "linger" + os.path.basename(folder))):
            time.sleep(0.001)
        seal(folder, *arguments)

    run_checkpoints.seal = seal_late
    sys.argv = ["supervised_finetune.py", *words]
    status = cli.run(supervised_finetune.main)
    sys.stderr.flush()
    return status


def fork(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = child(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def wait_for(pids):
    """(index, status) of the first that failed, or of process 0. When one fails the others are ended."""
    running, first = set(pids), None
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and first is None:
            first = pid, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    pid, status = first or (pids[0], 0)
    return pids.index(pid), status


def not_connected(log) -> bool:
    with open(log) as file:
        text = file.read()
    return "gloo/transport/tcp/pair.cc" in text and "TIMEOUT" in text and "new_group" in text


def main():
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            break
        processes = request["processes"]
        logs = [request["log"] + (f".{rank}" if processes > 1 else "") for rank in range(processes)]
        for attempt in (1, 2):
            pids = [fork(request["stand_ins"], request["words"], *pair) for pair in zip(logs, environments(processes))]
            if attempt == 1:
                print(json.dumps({"pids": pids}), file=ANSWERS, flush=True)
            rank, status = wait_for(pids)
            if processes == 1 or not status or not not_connected(logs[rank]):
                break
        print(json.dumps({"rank": rank, "status": status}), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
