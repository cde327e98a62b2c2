"""Tune MGen-VL on captions: `python supervised_finetune.py CONFIG.json [--key value …]`. See --help."""

from __future__ import annotations

import sys

from paddlemix.trainer import command_line, keys_help
from paddlemix.utils import cli


def main() -> int:
    argv = sys.argv[1:]
    if not argv or "-h" in argv or "--help" in argv:
        print(keys_help.help_text())
        return 0 if argv else 2
    dry_run, cards, argv = command_line.split_dry_run(argv)
    if dry_run:
        from paddlemix.trainer.dry_run import dry_run as show

        return show(argv, cards)
    arguments = command_line.parse(argv)

    from paddlemix.trainer.finetune import finetune

    finetune(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, "--resume goes on from the last checkpoint of a training run"))
