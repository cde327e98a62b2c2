"""Tune MGen-VL on captions: `python supervised_finetune.py CONFIG.json [--key value …]`. See --help."""

from __future__ import annotations

import sys

from paddlemix.trainer import arguments
from paddlemix.utils import cli


def main() -> int:
    argv = sys.argv[1:]
    if not argv or "-h" in argv or "--help" in argv:
        print(arguments.help_text())
        return 0 if argv else 2
    dry_run, cards, argv = arguments.split_dry_run(argv)
    if dry_run:
        from paddlemix.trainer import plan

        return plan.dry_run(argv, cards)
    parsed = arguments.parse(argv)

    from paddlemix.trainer.finetune import finetune

    finetune(parsed.model, parsed.data, parsed.generation, parsed.training)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
