"""Score captions against references, with confidence intervals, and write a report page.

    python tools/evaluate_captions.py RESULTS REFERENCES [--compare OTHER …] [--json OUT] [--html report.html]

RESULTS is what predict.py writes: id \\t caption. REFERENCES is one of
    id \\t caption               ids may repeat; further columns are further references
    id \\t base64 \\t caption     the contest's training rows
    train.json, val.json         chatml records; the first answer is the reference

CIDEr, CIDEr-D, BLEU-1…4 and ROUGE-L equal pycocoevalcap's. METEOR is not included, as it needs Java.
Intervals are 95 % percentiles of a bootstrap over rows, with fixed document frequencies for CIDEr. Missing, duplicate
and unknown ids are listed and end the run. docs/evaluation.md explains each number.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Dict, List, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import UserError  # noqa: E402
from paddlemix.utils.json_files import write_json  # noqa: E402
from paddlemix.utils.outputs import check_kind, keep_apart  # noqa: E402

# Columns of the table: name, value, interval.
_WIDTHS = (28, 11, 19)


def parse_arguments(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("results", type=cli.path, metavar="RESULTS", help="id \\t caption")
    parser.add_argument("references", type=cli.path, metavar="REFERENCES", help="see above")
    parser.add_argument(
        "--compare", type=cli.path, metavar="OTHER", action="append", default=[],
        help="another results file: reports the paired difference RESULTS - OTHER; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--attributes", type=cli.path, metavar="LISTS",
        help='word lists of attributes to check, as JSON: {"side": [["左侧", "左边"], ["右侧"]], …}',
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", choices=("char", "jieba"), default="char",
        help="char (default): single characters, but runs of Latin letters and digits as one token; jieba: words",
    )  # fmt: skip
    parser.add_argument(
        "--intersection", action="store_true",
        help="score only the ids that all files have, and report how many are left out",
    )
    parser.add_argument(
        "--sample", type=cli.positive, metavar="N",
        help="score N rows drawn with --seed; CIDEr's document frequencies still come from all references",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=cli.number(int, 0), default=1000, metavar="N",
        help="bootstrap resamples (default: 1000; 0: no intervals)",
    )
    parser.add_argument(
        "--seed", type=cli.number(int, 0), default=0, help="seed of --sample and of the bootstrap (default: 0)"
    )
    parser.add_argument(
        "--json", type=cli.output_file, metavar="OUT",
        help="write everything that is printed as JSON, with more digits",
    )
    parser.add_argument(
        "--html", type=cli.output_file, metavar="OUT", help="write the report page: captions, worst first"
    )
    parser.add_argument(
        "--images", type=cli.path, metavar="TSV",
        help="images for the page: `id \\t base64` rows or a train.json (default: REFERENCES, if it has images)",
    )
    parser.add_argument(
        "--scores", type=cli.path, metavar="FILE",
        help="show on the page how much each image helps, from a file of tools/score_rows.py",
    )  # fmt: skip
    parser.add_argument(
        "--html_rows", type=cli.positive, default=10000, metavar="N", help="maximum rows on the page (default: 10000)"
    )
    parser.add_argument(
        "--thumbnail", type=cli.positive, default=160, metavar="PIXELS",
        help="size of the thumbnails on the page (default: 160)",
    )
    cli.add_work_options(parser)
    return parser.parse_args(arguments)


def print_table(evaluation) -> None:
    """The measures of one file, and of others and the differences to them, with intervals."""
    from paddlemix.metrics.evaluation import RATES, SHARES

    def text(value: float, form: str) -> str:
        """Without the sign of what is rounded to zero."""
        shown = format(value, form)
        return shown if float(shown.rstrip("%")) else format(0.0, form)

    columns = [("captions", evaluation.results.measures)]
    for number, (other, difference) in enumerate(zip(evaluation.others, evaluation.differences), 1):
        which = f" {number}" if len(evaluation.others) > 1 else ""
        columns += [("other" + which, other.measures), ("difference", difference)]
    name_width, value_width, interval_width = _WIDTHS
    print(" " * name_width + "".join(f"{title:>{value_width}}{'95 %':>{interval_width}}" for title, _ in columns))
    for name in evaluation.results.measures:
        line = name.ljust(name_width)
        for title, measures in columns:
            value, interval = measures[name]
            sign = "+" if title == "difference" else ""
            share = name in RATES or name.endswith(SHARES)
            form = sign + (".2%" if share else ".2f" if name == "tokens" else ".4f")
            line += text(value, form).rjust(value_width)
            ends = [] if interval is None else [text(end, form) for end in interval]
            line += " … ".join(ends).rjust(interval_width)
        print(line)
    print("\n… not in references: a rough sign of hallucination; listed words that no reference of the row contains.")
    for kind, pairs in evaluation.results.wording.most.items():
        if pairs:
            print(f"  {kind}: " + ", ".join(f"{word} {count}" for word, count in pairs))
    if evaluation.results.attributes is not None:
        print("\n… right: the caption names the same values as one of its references. Most frequent errors:")
        for name, pairs in evaluation.results.attributes.most.items():
            if pairs:
                print(f"  {name}: " + ", ".join(f"{error} {count}" for error, count in pairs))


def main() -> None:
    args = parse_arguments()
    for name in ("images", "scores"):
        if getattr(args, name) and not args.html:
            raise UserError(f"--{name} is for the page; give --html too")

    inputs = [args.results, args.references, *args.compare, args.images, args.attributes, args.scores]
    keep_apart(inputs, [args.json, args.html])
    for path, kind in ((args.json, "a JSON report"), (args.html, "a report page")):
        if path is not None:
            check_kind(path, kind)

    from paddlemix.datasets.caption_files import common_ids, read_captions, read_references
    from paddlemix.datasets.score_files import read_scores
    from paddlemix.datasets.tsv import check_input
    from paddlemix.metrics.attributes import AttributeLists
    from paddlemix.metrics.evaluation import evaluate

    lists = AttributeLists(args.attributes) if args.attributes else None
    if args.images:
        # Now, not after minutes of scoring.
        check_input(args.images)
    gains = None
    if args.scores:
        gains = {name: score.gain for name, score in read_scores(args.scores) if score is not None}
    captions = read_captions(args.results, args.quiet)
    references = read_references(args.references, args.quiet)
    others = [read_captions(path, args.quiet) for path in args.compare]
    if gains is not None:
        unscored = len(captions) - len(common_ids(captions, gains))
        if unscored == len(captions):
            raise UserError(f"{args.scores} has no score for any row of {args.results}", "no-scores")
        if unscored:
            print(f"{unscored} rows of {args.results} have no score in {args.scores}")
    texts = references.texts
    if args.intersection:
        sides = [texts, captions, *others]
        ids = common_ids(*sides)
        left_out = len(set().union(*sides)) - len(ids)
        if not ids:
            raise UserError("no id is in all of the files")
        texts, captions, *others = ({key: side[key] for key in ids} for side in sides)
        print(f"{len(ids)} ids are in all files; {left_out} others are left out")

    evaluation = evaluate(
        captions, texts, others, args.tokenizer, args.resamples, args.seed, args.workers, args.quiet, args.sample, lists
    )
    evaluation.settings["files"] = {
        "results": args.results, "references": args.references, "others": args.compare, "attributes": args.attributes,
    }  # fmt: skip
    n_references = sum(map(len, texts.values()))
    sampled = f"; {len(evaluation.ids)} of them, drawn with seed {args.seed}, are scored" * (args.sample is not None)
    print(f"captions: {args.results} ({len(captions)} rows{sampled})")
    for number, path in enumerate(args.compare, 1):
        print(f"other{f' {number}' if len(args.compare) > 1 else ''}: {path}")
    print(f"references: {args.references} ({n_references} for {len(texts)} rows)")
    print(f"tokenizer: {evaluation.settings['tokenizer']}")
    resamples = f"{args.resamples} bootstrap resamples of rows, seed {args.seed}"
    print(f"intervals: 95 %, {resamples}; document frequencies held fixed")
    print()
    print_table(evaluation)
    if args.json:
        write_json(args.json, evaluation.to_json())
    if args.html:
        write_page(args, evaluation, args.images or (args.references if references.has_images else None), gains)


def write_page(
    args: argparse.Namespace, evaluation, images: Optional[str], gains: Optional[Dict[str, float]]
) -> None:
    """Write the page and say how large it is."""
    from paddlemix.datasets.thumbnails import Thumbnail, read_thumbnails
    from paddlemix.metrics.report import choose_rows, write_report

    rows = choose_rows(evaluation, args.html_rows)
    pictures: Dict[str, Thumbnail] = {}
    if images:
        pictures = read_thumbnails(images, [evaluation.ids[row] for row in rows], args.thumbnail, args.quiet)
    write_report(args.html, evaluation, rows, pictures if images else None, gains)
    shown = "all" if len(rows) == len(evaluation.ids) else f"the {len(rows)} rows with the lowest CIDEr of"
    print(f"\npage: {args.html}, {shown} {len(evaluation.ids)} rows, {os.path.getsize(args.html) / 1e6:.1f} MB")
    problems = sum(1 for picture in pictures.values() if picture.problem)
    if images and (problems or len(pictures) < len(rows)):
        print(f"{problems} images could not be decoded, {len(rows) - len(pictures)} rows have none")


if __name__ == "__main__":
    sys.exit(cli.run(main))
