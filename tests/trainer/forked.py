"""A run of the script in a process of its own, started by forking.py: watched, stopped and killed from outside."""

import json
import os
import signal
import time

from paddlemix.trainer import run_checkpoints

PATIENCE = 60  # seconds until a run that shows nothing fails the test


class Run:
    """One run of the script, in a folder of its own; of several processes, with a log each (log.0, log.1)."""

    def __init__(self, forker, folder, processes=1, stand_ins=None, **keys):
        self.out, self.forker = folder / "out", forker
        self.log = folder / ("log" if processes == 1 else "log.0")
        (folder / "config.json").write_text(json.dumps(dict(keys, output_dir=str(self.out))))
        words = [str(folder / "config.json")]
        request = {"words": words, "log": str(folder / "log"), "processes": processes, "stand_ins": stand_ins}
        forker.stdin.write(json.dumps(request) + "\n")
        forker.stdin.flush()
        self.pid = json.loads(forker.stdout.readline())["pids"][0]

    def status(self) -> int:
        """When all have ended: of the first that failed, whose log is the log from now on, else 0."""
        answer = json.loads(self.forker.stdout.readline())
        self.log = self.log.with_suffix(f".{answer['rank']}") if self.log.suffix else self.log
        return answer["status"]

    def lines(self):
        return self.log.read_text().splitlines()

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.status()

    def wait_for(self, *names):
        """Until one of these folders appears in output_dir."""
        end = time.monotonic() + PATIENCE
        while not any((self.out / name).exists() for name in names):
            assert time.monotonic() < end and os.path.exists(f"/proc/{self.pid}/fd/0"), self.log.read_text()[-2000:]
            time.sleep(0.001)

    def stop_inside_saving(self, steps):
        """Freeze the run in the middle of writing one of these checkpoints; returns which."""
        for step in steps:
            partial = self.out / f"{run_checkpoints.PARTIAL_PREFIX}{step}"
            linger = self.out.with_name("linger" + partial.name)
            linger.touch()
            self.wait_for(partial.name, f"checkpoint-{step}")
            os.kill(self.pid, signal.SIGSTOP)
            linger.unlink()
            if partial.exists() and not (self.out / f"checkpoint-{step}").exists():
                return step
            os.kill(self.pid, signal.SIGCONT)
        raise AssertionError("no save was caught")
