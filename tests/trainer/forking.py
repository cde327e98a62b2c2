"""Runs of supervised_finetune.py that cost no import each: a process that has imported everything forks one per line.

    {"words": [command line], "log": FILE, "cwd": FOLDER}  in
    {"pid": N}, then {"status": N}                         out; negative: ended by that signal
"""

import json
import os
import sys

import supervised_finetune
from paddlemix.trainer import finetune  # noqa: F401  what takes long
from paddlemix.utils import cli


def child(request) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setpgid(0, 0)
    sys.argv = ["supervised_finetune.py", *request["words"]]
    status = cli.run(supervised_finetune.main)
    sys.stderr.flush()
    return status


def main():
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(json.loads(line))
            finally:
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        print(json.dumps({"status": code}), flush=True)


if __name__ == "__main__":
    main()
