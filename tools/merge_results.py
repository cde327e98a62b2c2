"""Join the shards of a prediction: `python tools/merge_results.py OUTPUT [--input INPUT]`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402

MORE = """\
OUTPUT is the path that predict.py was given; its shards OUTPUT.shard-1-of-n … n-of-n and their .run.json files are in
the same folder. All must exist, complete and unmodified, and belong to one run: the same input, model and settings.
Lines are in the order of the input; OUTPUT and OUTPUT.run.json equal those of a single run over all rows. The shards
are kept. An OUTPUT that a single process has finished is left unchanged.

exit status: 0 joined; 1 joined, but no row could be captioned; 2 shards are missing or do not belong together
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Join the shards written by predict.py --shard, or by one process per GPU, into one results file.",
        epilog=MORE,
    )
    parser.add_argument("output", type=cli.path, metavar="OUTPUT", help="the results file to write")
    parser.add_argument(
        "--input", type=cli.path,
        help="the input of the prediction: another file is refused, and the rows that a changed shard lacks are named",
    )
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()

    from paddlemix.inference.results import report_notes
    from paddlemix.inference.row_shards import merge_shards
    from paddlemix.utils.errors import JobFailed

    merged = merge_shards(args.output, args.input)
    failed = report_notes(merged["rows"], merged["notes"], merged["settings"].get("fallback"))
    if failed:
        raise JobFailed(failed)
    print(f"{args.output}: {merged['rows']} rows")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
