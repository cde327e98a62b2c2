"""Choose the rows to train on: `python tools/curate_data.py IN OUT.tsv|OUT.json [rules]`.

IN is a TSV or CSV as convert_labels.py takes it, or a train.json. Without a rule only rows that cannot be used are left
out. --dry_run writes nothing and shows how many rows each rule drops, by itself and after those above it. Beside
OUT.tsv (`id \\t base64 \\t caption`) or OUT.json (records with the ids of IN) are written:

    OUT.rejected.tsv     line in IN, id, and the reason
    OUT.curation.json    the settings, and the numbers of --dry_run

The same command writes the same bytes again. What is computed of the images stays in .IN.facts beside IN, also when a
run is stopped, and serves every later command. docs/data.md shows how rules are chosen.
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
from paddlemix.utils.runtime import physical_cores  # noqa: E402


def pattern(text: str) -> Pattern:
    """An argument's type: a regular expression."""
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


def number(low: float, high: float = float("inf"), kind: type = int):
    """An argument's type: a number from low to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            wanted = f"{'whole ' * (kind is int)}number from {low}" + (f" to {high}" if high < float("inf") else "")
            raise argparse.ArgumentTypeError(f"must be a {wanted}, not {text!r}")
        return value

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("input", type=cli.path, metavar="IN")
    parser.add_argument("output", type=cli.output_file, metavar="OUT")
    share, count = number(0, 1, float), number(1)
    rules = parser.add_argument_group("rules, applied in this order")
    add = rules.add_argument
    add("--must", type=pattern, metavar="REGEX", help="keep captions in which this is found")
    add("--must_not", type=pattern, metavar="REGEX", help="drop captions in which this is found")
    add("--min_chars", type=count, metavar="N", help="shortest caption in characters")
    add("--max_chars", type=count, metavar="N", help="longest caption in characters")
    add("--min_tokens", type=count, metavar="N", help="shortest caption in tokens, with --tokenizer")
    add("--max_tokens", type=count, metavar="N", help="longest caption in tokens, with --tokenizer")
    add("--max_repetition", type=share, metavar="X", help="share (0 to 1) of 4-grams that came before at most, say 0.3")
    add("--min_chinese", type=share, metavar="X", help="share (0 to 1) of Chinese characters at least, say 0.5")
    add("--min_side", type=count, metavar="PIXELS", help="shorter side of the image at least")
    add("--max_aspect", type=number(1, kind=float), metavar="X", help="longer side over shorter one at most, say 8")
    add(
        "--min_sharpness", type=number(0, kind=float), metavar="X",
        help="variance of the Laplacian at least; inspect_data.py shows its distribution",
    )  # fmt: skip
    add(
        "--not_in", type=cli.path, metavar="VAL", action="append",
        help="drop images that are also in VAL (TSV, CSV or JSON), exactly or as a near duplicate; may be given again",
    )  # fmt: skip
    add(
        "--drop_scores", type=share_of_file, metavar="SCORES:P%",
        help="drop the P percent of the rows with the lowest gain in SCORES, which score_rows.py wrote of IN",
    )  # fmt: skip
    add(
        "--near_duplicates", type=number(0, 10), metavar="BITS",
        help="keep one row (see --per_group, --keep) of each group of images whose hashes of 64 bits differ in at most "
        "so many, say 6",
    )  # fmt: skip
    add("--per_opening", type=count, metavar="N", help="at most N captions of the same first six characters, at random")
    add("--limit", type=count, metavar="N", help="at most N rows, drawn at random")
    parser.add_argument(
        "--keep", choices=("first", "longest", "best"),
        help="of near duplicates: the first row (default), the longest caption, or the highest gain in --drop_scores",
    )  # fmt: skip
    parser.add_argument("--per_group", type=count, metavar="N", help="rows that stay of near duplicates (default: 1)")
    parser.add_argument(
        "--prefer", type=captions_and_scores, metavar="RESULTS[:SCORES]",
        help="take captions from predict.py's results or its --n_best file: of each row, or with SCORES (of the new "
        "captions) and --drop_scores (of the old) where the gain is higher",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=cli.path, metavar="MODEL", help="model folder, to count tokens")
    parser.add_argument("--prompt", help="what records of OUT.json ask, if IN is a table (default: 请描述图片内容)")
    parser.add_argument(
        "--images", choices=("inline", "reference"), default="inline",
        help="of an OUT.json: inline copies each image; reference stores where it is, which must then stay as it is",
    )  # fmt: skip
    parser.add_argument("--seed", type=number(0), default=0, help="of the random draws (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="write nothing, show the numbers")
    parser.add_argument(
        "--workers", type=number(0), default=physical_cores(), metavar="N",
        help="processes beside this one (default: the number of cores)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")
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


def show(result, args: argparse.Namespace) -> None:
    """The numbers, a line per rule."""
    print(f"{'rule':<34}{'alone':>12}{'together':>12}")
    print(f"{'rows':<34}{'':>12}{result.rows:>12}")
    for reason, count in sorted(result.unusable.items(), key=lambda item: -item[1]):
        print(f"{'unusable: ' + reason:<34}{-count:>12}{-count:>12}")
    for name, count in result.alone.items():
        print(f"{'--' + name:<34}{-count:>12}{-result.together[name]:>12}")
    print(f"{'kept':<34}{'':>12}{result.kept:>12}")
    if args.prefer:
        print(f"{result.preferred} rows have a caption of {args.prefer[0]}")


def main() -> int:
    args = parse_arguments()

    from paddlemix.datasets.curation import RULES, Settings, curate, output_names

    rules = {rule.name: getattr(args, rule.name) for rule in RULES if getattr(args, rule.name) is not None}
    check(args, rules)
    count_tokens = None
    if args.tokenizer:
        from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer

        tokenizer = MGenVLTokenizer.from_pretrained(args.tokenizer)

        def count_tokens(text: str) -> int:
            return len(tokenizer.plain_ids(text))

    chosen = {name: getattr(args, name) for name in ("keep", "per_group", "prompt") if getattr(args, name) is not None}
    settings = Settings(
        rules, prefer=args.prefer, images=args.images, seed=args.seed, workers=args.workers, quiet=args.quiet, **chosen
    )
    unsaid = {"input", "output", "dry_run", "workers", "quiet"}
    shown = {name: value for name, value in vars(args).items() if name not in unsaid and value is not None}
    shown.update((name, value.pattern) for name, value in shown.items() if isinstance(value, re.Pattern))
    result = curate(args.input, None if args.dry_run else args.output, settings, shown, count_tokens)
    show(result, args)
    if not args.dry_run:
        print("written: " + ", ".join(output_names(args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
