"""Build training data from a table of images and captions: `python tools/convert_labels.py IN OUT_DIR`.

IN is a TSV of `id \\t base64 \\t caption` rows (or `base64 \\t caption`). Instead of base64 a row may have the path of
an image file in the folder of IN or below. IN may also be a CSV whose header names the columns: image (a path or
base64), caption and, optionally, id; or a .gz, .tar or .tar.gz of such tables.

Written to OUT_DIR:

    train.json, val.json   one record per line; every 20th accepted row goes to val.json
    chat_template.json     the chat template, for the training config
    ids.tsv                record id, id in IN, line in IN (in an archive FILE:line)
    rejected.tsv           line in IN, id, and why the row was rejected

Unusable rows are counted and skipped; they never stop the conversion.
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.datasets import labels  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import UserError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "input", type=cli.path, metavar="IN",
        help="TSV or CSV; images are JPEG, PNG, WebP, GIF or BMP",
    )
    parser.add_argument("out_dir", type=cli.output_folder, metavar="OUT_DIR", help="folder to write")
    parser.add_argument(
        "--prompt", default=labels.Options().prompt,
        help="prompt of every record (default: %(default)s)",
    )
    parser.add_argument(
        "--captions", type=cli.path, metavar="RESULTS",
        help="take the captions of this file, which predict.py made of IN (its results or its --n_best file); rows of "
        "IN need none of their own, and those without one in RESULTS are rejected",
    )  # fmt: skip
    parser.add_argument(
        "--val_every", type=cli.number(int, 0), default=20, metavar="N",
        help="every Nth accepted row goes to val.json; 0: none (default: 20)",
    )
    parser.add_argument(
        "--clean", action="store_true",
        help="clean captions: wrong encodings, control characters, repeated spaces and punctuation",
    )  # fmt: skip
    parser.add_argument(
        "--dedupe", action="store_true",
        help="skip rows whose image and caption both occurred before (100 bytes of memory per row)",
    )  # fmt: skip
    parser.add_argument(
        "--min_chars", type=cli.number(int, 0), default=1, metavar="N",
        help="minimum characters of a caption (default: 1)",
    )
    parser.add_argument(
        "--max_chars", type=cli.number(int, 0), default=0, metavar="N",
        help="maximum characters of a caption (default: 200,000)",
    )
    parser.add_argument(
        "--verify", choices=("none", "header", "decode"), default="none",
        help="what to check of images. none: the base64 text; header: format and size; decode: everything, which also "
        "rejects truncated images",
    )  # fmt: skip
    parser.add_argument(
        "--images", choices=("inline", "reference"), default="inline",
        help="inline: copy images into the JSON; reference: store where each image is (in IN or in a file), which must "
        "not change afterwards",
    )  # fmt: skip
    cli.add_work_options(parser, "processes for --verify decode (default: number of cores)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.max_chars and args.max_chars < args.min_chars:
        raise UserError("--max_chars is less than --min_chars")
    args.fallback = None
    if args.captions:
        # Not needed for --help, which would load numpy with it.
        from paddlemix.datasets.archives import is_packed
        from paddlemix.inference.results import check_same_input, recorded

        # predict.py reads no archives.
        if not is_packed(args.input):
            check_same_input(args.captions, "captions", args.input)
        args.fallback = recorded(args.captions).fallback
    options = labels.Options(**{name: getattr(args, name) for name in labels.Options._fields})
    result = labels.convert(args.input, args.out_dir, options, disable_progress=args.quiet)
    rejected = sum(result.rejected.values())
    if rejected:
        total = rejected + result.n_train + result.n_val
        print(
            f"rejected {rejected} of {total} rows (see {os.path.join(args.out_dir, 'rejected.tsv')}):", file=sys.stderr
        )
        for reason, count in result.rejected.most_common():
            print(f"  {count:10d}  {reason}", file=sys.stderr)
    for text in result.warnings:
        print(f"warning: {text}", file=sys.stderr)
    print(f"num of training set: {result.n_train}")
    print(f"num of validation set: {result.n_val}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
