"""Runs of supervised_finetune.py that cost no import each: a process that has imported everything forks them.

    {"words": [command line], "log": FILE, "processes": N, "stand_ins": bool}   a line in: N processes, as launched
    {"pids": [N]}, then {"statuses": [N]}    two lines out; a negative status: ended by that signal

With several processes, the log of process i is FILE.i, and when one fails the others are ended, as the launcher does.
stand_ins: whether they run with those of cpu_tensor_parallel.
"""

import json
import os
import signal
import socket
import sys

import paddle

import supervised_finetune
from paddlemix.trainer import finetune  # noqa: F401  what takes long
from paddlemix.utils import cli
from tests.trainer import cpu_tensor_parallel


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
    if stand_ins:
        cpu_tensor_parallel.install()
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


def main():
    for line in sys.stdin:
        request = json.loads(line)
        processes = request["processes"]
        logs = [request["log"] + (f".{rank}" if processes > 1 else "") for rank in range(processes)]
        pids = [fork(request["stand_ins"], request["words"], *pair) for pair in zip(logs, environments(processes))]
        print(json.dumps({"pids": pids}), flush=True)
        statuses = {}
        while len(statuses) < processes:
            pid, status = os.wait()
            statuses[pid] = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            if statuses[pid]:
                for other in set(pids) - set(statuses):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps({"statuses": [statuses[pid] for pid in pids]}), flush=True)


if __name__ == "__main__":
    main()
