"""Filter the rows of a dataset by rules: `python tools/curate_data.py IN OUT.tsv|OUT.json [rules]`.

IN is a TSV or CSV as for convert_labels.py, or a train.json. Without rules only unusable rows are dropped. --dry_run
writes nothing and shows how many rows each rule drops, on its own and after the preceding rules. Next to OUT.tsv
(`id \\t base64 \\t caption`) or OUT.json (records with the ids of IN) it writes:

    OUT.rejected.tsv     line in IN, id, and the reason
    OUT.curation.json    the settings, and the numbers of --dry_run

The same command always writes the same bytes. Facts computed from images are kept in .IN.facts next to IN, even if a
run is interrupted, and are used by later commands. docs/data.md shows how to choose rules.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any, Dict, Pattern, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import UserError  # noqa: E402


def pattern(text: str) -> Pattern:
    """An argument's type: a regular expression."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, which matches every caption")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def share_of_file(text: str) -> Tuple[str, float]:
    """An argument's type: FILE:5% → (FILE, 0.05)."""
    found = re.fullmatch(r"(.+):(\d{1,3}(?:\.\d+)?)%", text)
    if not found or float(found.group(2)) > 100:
        raise argparse.ArgumentTypeError(f"is FILE:PERCENT%, such as scores.tsv:5%, not {text!r}")
    return cli.path(found.group(1)), float(found.group(2)) / 100


def captions_and_scores(text: str) -> Tuple[str, Any]:
    """An argument's type: RESULTS or RESULTS:SCORES."""
    captions, _, scores = text.rpartition(":")
    whole = not captions or os.path.exists(cli.path(text))
    return (cli.path(text), None) if whole else (cli.path(captions), cli.path(scores))


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("input", type=cli.path, metavar="IN", help="images with captions")
    parser.add_argument("output", type=cli.output_rows, metavar="OUT", help="the file to write")
    share, count = cli.number(float, 0, 1), cli.positive
    rules = parser.add_argument_group("rules, applied in this order")
    add = rules.add_argument
    add("--must", type=pattern, metavar="REGEX", help="keep only captions that match")
    add("--must_not", type=pattern, metavar="REGEX", help="drop captions that match")
    add("--min_chars", type=count, metavar="N", help="minimum characters of a caption")
    add("--max_chars", type=count, metavar="N", help="maximum characters of a caption")
    add("--min_tokens", type=count, metavar="N", help="minimum tokens of a caption; needs --tokenizer")
    add("--max_tokens", type=count, metavar="N", help="maximum tokens of a caption; needs --tokenizer")
    add(
        "--max_repetition", type=share, metavar="X",
        help="maximum fraction of 4-grams that occurred before in the caption, e.g. 0.3",
    )
    add("--min_chinese", type=share, metavar="X", help="minimum fraction of Chinese characters, e.g. 0.5")
    add("--drop_truncated", action="store_true", default=None, help="drop images whose file ends early")
    add("--min_side", type=count, metavar="PIXELS", help="minimum length of the image's shorter side")
    add(
        "--max_aspect", type=cli.number(float, 1), metavar="X",
        help="maximum ratio of longer to shorter side, e.g. 8",
    )
    add(
        "--min_sharpness", type=cli.number(float, 0), metavar="X",
        help="minimum variance of the Laplacian; inspect_data.py shows its distribution",
    )  # fmt: skip
    add(
        "--not_in", type=cli.path, metavar="VAL", action="append",
        help="drop images that are also in VAL (TSV, CSV or JSON), exactly or as near duplicates; may be repeated",
    )  # fmt: skip
    add(
        "--drop_scores", type=share_of_file, metavar="SCORES:P%",
        help="drop the P percent of rows with the lowest gain in SCORES, the output of score_rows.py for IN",
    )  # fmt: skip
    add(
        "--near_duplicates", type=cli.number(int, 0, 10), metavar="BITS",
        help="keep one row (see --per_group, --keep) per group of images whose 64-bit hashes differ in at most this "
        "many bits, e.g. 6",
    )  # fmt: skip
    add(
        "--per_opening", type=count, metavar="N",
        help="keep at most N captions with the same first six characters, chosen at random",
    )
    add("--limit", type=count, metavar="N", help="keep at most N rows, chosen at random")
    parser.add_argument(
        "--keep", choices=("first", "longest", "best"),
        help="which near duplicates to keep: the first row (default), the longest caption, or the highest gain in "
        "--drop_scores",
    )  # fmt: skip
    parser.add_argument(
        "--per_group", type=count, metavar="N",
        help="rows to keep per group of near duplicates (default: 1)",
    )
    parser.add_argument(
        "--prefer", type=captions_and_scores, metavar="RESULTS[:SCORES]",
        help="take the captions of predict.py's results or its --n_best file: for every row, or, with SCORES (of the "
        "new captions) and --drop_scores (of the old ones), where their gain is higher",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=cli.path, metavar="MODEL",
        help="model folder whose tokenizer counts tokens",
    )
    parser.add_argument("--prompt", help="prompt of the records in OUT.json if IN is a table (default: 请描述图片内容)")
    parser.add_argument(
        "--images", choices=("inline", "reference"), default="inline",
        help="for OUT.json: inline copies each image; reference stores where it is, which must not change afterwards",
    )  # fmt: skip
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="random seed (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="write nothing, only show the numbers")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace OUT even if it is not from an earlier run, which has OUT.curation.json beside it",
    )  # fmt: skip
    cli.add_work_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace, rules: Dict[str, Any]) -> None:
    needs = [
        ("--keep", args.keep, "--near_duplicates", args.near_duplicates is not None),
        ("--per_group", args.per_group, "--near_duplicates", args.near_duplicates is not None),
        ("--keep best", args.keep == "best", "--drop_scores (SCORES:0% drops nothing)", args.drop_scores),
        ("a rule of tokens", {"min_tokens", "max_tokens"} & set(rules), "--tokenizer", args.tokenizer),
        ("--prefer with scores", args.prefer and args.prefer[1], "--drop_scores of the old captions", args.drop_scores),
        ("--images reference", args.images == "reference", "an OUT.json", args.output.endswith(".json")),
    ]  # fmt: skip
    for option, given, other, there in needs:
        if given and not there:
            raise UserError(f"{option} needs {other}")


def check_scores(args: argparse.Namespace) -> None:
    """Check that --drop_scores and --prefer are of IN, and the scores of --prefer are not, as far as their runs are
    recorded."""
    from paddlemix.inference.facts import input_facts
    from paddlemix.inference.results import check_same_input, recorded

    captions, scores = args.prefer or (None, None)
    if args.drop_scores:
        check_same_input(args.drop_scores[0], "scores", args.input)
    if captions:
        check_same_input(captions, "captions", args.input)
    there = recorded(scores).input if scores else None
    if there and there == input_facts(args.input).sha256:
        text = f"{scores} has the scores of {args.input}, not of the captions in {captions}, as {scores}.run.json says"
        raise UserError(text)


def show(result, args: argparse.Namespace) -> None:
    """The numbers, a line per rule."""
    unusable = sorted(result.unusable.items(), key=lambda item: -item[1])
    lines = [("rule", "alone", "together"), ("rows", "", result.rows)]
    lines += [(f"unusable: {reason}", -count, -count) for reason, count in unusable]
    lines += [(f"--{name}", -count, -result.together[name]) for name, count in result.alone.items()]
    lines.append(("kept", "", result.kept))
    width = max(len(name) for name, *_ in lines)
    for name, alone, together in lines:
        print(f"{name:<{width}}{alone:>12}{together:>12}")
    if args.prefer:
        print(f"{result.preferred} rows have a caption of {args.prefer[0]}")
    if result.unscored:
        print(f"warning: {result.unscored} usable rows have no score in {args.drop_scores[0]}", file=sys.stderr)


def main() -> int:
    args = parse_arguments()

    from paddlemix.curation.selection import RULES, Settings, curate, output_names
    from paddlemix.inference.results import recorded

    rules = {rule.name: getattr(args, rule.name) for rule in RULES if getattr(args, rule.name) is not None}
    check(args, rules)
    check_scores(args)
    count_tokens = None
    if args.tokenizer:
        from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer

        tokenizer = MGenVLTokenizer.from_pretrained(args.tokenizer)

        def count_tokens(text: str) -> int:
            return len(tokenizer.plain_ids(text))

    chosen = {name: getattr(args, name) for name in ("keep", "per_group", "prompt") if getattr(args, name) is not None}
    fallback = recorded(args.prefer[0]).fallback if args.prefer else None
    settings = Settings(
        rules, prefer=args.prefer, fallback=fallback, images=args.images, seed=args.seed, workers=args.workers,
        quiet=args.quiet, **chosen,
    )  # fmt: skip
    unsaid = {"input", "output", "dry_run", "overwrite", "workers", "quiet"}
    shown = {name: value for name, value in vars(args).items() if name not in unsaid and value is not None}
    # As on the command line.
    shown.update((name, value.pattern) for name, value in shown.items() if isinstance(value, re.Pattern))
    if args.drop_scores:
        shown["drop_scores"] = f"{args.drop_scores[0]}:{100 * args.drop_scores[1]:.10g}%"
    if args.prefer:
        shown["prefer"] = ":".join(filter(None, args.prefer))
    result = curate(args.input, None if args.dry_run else args.output, settings, shown, count_tokens, args.overwrite)
    show(result, args)
    if not args.dry_run:
        print("written: " + ", ".join(output_names(args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
