"""Make one results file of several: `python tools/combine_results.py A.txt B.txt C.txt OUT`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402

MORE = """\
example, three models over the same test set:
  python tools/combine_results.py base.txt seed1.txt seed2.txt consensus.txt

All files have lines `id \\t caption` for the same rows in the same order, as predict.py writes them. Each row gets the
caption with the highest mean CIDEr-D against those of the other files (minimum Bayes risk; document frequencies of all
rows of all files). Ties go to the file given first, so put the best one first. Give at least three files: two can only
agree or disagree. A fallback caption, which a file's .run.json names, is not taken if another file has a caption.
OUT.run.json records what was combined.

exit status: 0 done; 1 the job failed; 2 bad usage, or files that do not belong together
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Write, for each row, the caption that agrees most with those of the other results files.",
        epilog=MORE,
    )
    parser.add_argument("results", type=cli.path, nargs="+", metavar="RESULTS", help="two or more results files")
    parser.add_argument("output", type=cli.output_file, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace OUT even if this command did not write it, as OUT.run.json says",
    )  # fmt: skip
    cli.add_work_options(parser)
    args = parser.parse_args(argv)
    if len(args.results) < 2:
        parser.error("give two results files at least, and OUT behind them")
    return args


def main() -> int:
    args = parse_args()

    from paddlemix.datasets.rows import holds_images
    from paddlemix.inference.combining import combine, combined
    from paddlemix.inference.results import SIDECAR
    from paddlemix.utils.errors import UserError
    from paddlemix.utils.outputs import check_earlier, check_file, keep_apart

    check_file(args.output, plain=True)
    keep_apart(args.results + [path + SIDECAR for path in args.results], [args.output, args.output + SIDECAR])
    if holds_images(args.output):
        text = f"OUT {args.output} holds images or records: the order is RESULTS… OUT"
        raise UserError(text, "argument-order")
    check_earlier(args.output, combined(args.output), args.overwrite)
    done = combine(args.results, args.output, args.workers, args.quiet)
    taken = ", ".join(f"{one['taken']} of {one['path']}" for one in done["combined"])
    print(f"{args.output}: {done['rows']} rows, {taken}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
