"""Join the shards of a prediction: `python tools/merge_results.py OUTPUT [--input INPUT]`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402

MORE = """\
OUTPUT is what predict.py was given; its shards OUTPUT.shard-1-of-n … n-of-n and their .run.json files lie beside it.
All must be there, whole, as they were written, and of one run: the same input, model and settings. The lines come out
in the order of the input, and OUTPUT and OUTPUT.run.json are what a single run over all rows writes. The shards stay.
An OUTPUT that a single process has finished stays as it is.

exit status: 0 joined; 1 joined, but not one row could be captioned; 2 something is missing or does not belong together
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Make one results file of the shards that predict.py --shard, or one process per GPU, wrote.",
        epilog=MORE,
    )
    parser.add_argument("output", type=cli.path, metavar="OUTPUT", help="the results file to write")
    parser.add_argument(
        "--input", type=cli.path, help="the file that was captioned: each line's id is compared with its row's"
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
