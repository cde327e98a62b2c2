"""Start-up of chat.py and predict.py beyond `import paddle, paddlenlp`: `python benchmarks/startup.py`

Each is a new process: predict.py and chat.py with a tiny model and one new token, against one that only imports Paddle
and PaddleNLP. Both have the same CPU settings. A quick run only runs --help.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import harness
import scratch


def make_model(folder: str) -> None:
    from tests.helpers import save_tiny_model

    save_tiny_model(folder)


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    import paddlemix  # noqa: F401 (the CPU settings, for the children of both sides)

    bench = harness.Bench(args, "Start-up with the tiny model")
    with scratch.folder(1 << 20) as folder:
        model, rows, results = (os.path.join(folder, name) for name in ("model", "in.tsv", "out.tsv"))

        def run(*command: str):
            def call() -> None:
                if os.path.exists(results):
                    os.unlink(results)
                subprocess.run(
                    [sys.executable, *command], cwd=harness.ROOT, check=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip

            return harness.timed(call)

        if args.size == "quick":
            imports, chat, predict = run("-c", "import json"), run("chat.py", "--help"), run("predict.py", "--help")
        else:
            harness.in_child(args, make_model, model)
            scratch.write_tsv(rows, 1, scratch.jpegs(1, side=64))
            imports = run("-c", "import paddle, paddlenlp")
            chat = run("chat.py", model, "--max_new_tokens", "1")
            predict = run("predict.py", rows, results, model, "--max_new_tokens", "1")
            imports()
        for name, script in (("chat.py", chat), ("predict.py", predict)):
            taken = harness.pairs(args, imports, script)
            beyond = statistics.median(ours - theirs for theirs, ours in zip(*taken))
            times = {"baseline": statistics.median(taken.baseline), "ours": statistics.median(taken.ours)}
            bench.value(f"{name} beyond the imports", beyond, "s", at_most=1.5, **times)
    bench.finish()


if __name__ == "__main__":
    main()
