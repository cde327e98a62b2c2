"""Check a submission by the contest's rules: `python tools/check_submission.py submission`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402

MORE = """\
The report has one line per rule of the notebook's sections (四), what to submit, and (六), what may change. run.sh runs
twice in a read-only copy of the folder at a path with spaces, without a network: with absolute paths, then with the
notebook's relative ones and a Python as the fourth argument. The network is disabled with `unshare --net`; where the
system does not allow this, the rule is not checked. The copy is created next to the folder and removed afterwards; its
weights are hard links where the file system supports them. The submission's code is run: check only what you trust.

exit status: 0 all rules pass; 1 a rule fails; 2 bad usage
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Check a submission folder the way the contest's platform would.",
        epilog=MORE,
    )
    parser.add_argument(
        "submission", type=cli.path, metavar="SUBMISSION", help="the folder written by tools/pack_submission.py"
    )
    parser.add_argument(
        "--base", type=cli.path,
        help="the base model: check that the LLM's structure is unchanged, and list what differs",
    )
    parser.add_argument(
        "--sample", type=cli.path, metavar="TSV", help="rows to caption (default: four, two of them bad)"
    )
    parser.add_argument(
        "--python", default=sys.executable, type=cli.path,
        help="interpreter to run it with (default: this one)",
    )
    parser.add_argument(
        "--fresh_venv",
        action="store_true",
        help="also install requirements.txt into a new environment and run it there (takes minutes and a network)",
    )
    parser.add_argument(
        "--time_limit", type=cli.positive, default=3600,
        help="time limit per run in seconds (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main() -> int:
    values = vars(parse_args())
    folder = values.pop("submission")

    from paddlemix.contest.check import FAIL, NOT_RUN, check_submission
    from paddlemix.utils.language import tr

    report = check_submission(folder, **values)
    print(cli.harmless("\n".join(report.lines())))
    failed = sum(verdict.status == FAIL for verdict in report.values())
    waiting = sum(verdict.status == NOT_RUN and bool(verdict.problems) for verdict in report.values())
    says = f"{failed} rules failed, {waiting} could not be checked because of them"
    says = "ready to submit" if report.passed else says
    print(f"{folder}: {tr(says)}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
