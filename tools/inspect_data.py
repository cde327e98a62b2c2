"""Report on a dataset of images and captions: statistics, duplicates, leaks into other sets, and advice.

    python tools/inspect_data.py IN… [--out DIR] [--compare OTHER]

IN is a TSV (`id \\t base64 \\t caption`), a table of image files, or a train.json with its images inline or by
reference; several files count as one set. DIR gets report.html (numbers, plots, duplicates, and rows with their
pictures) and report.json.

Every caption is read, and the header and bytes of every image. About --images of them are decoded, for sharpness,
one-colour images and near duplicates. --hash all decodes every image, once: the results are kept in a hidden file
beside IN, and an interrupted run continues from there.
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.json_files import write_json  # noqa: E402
from paddlemix.utils.language import tr  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("input", type=cli.path, metavar="IN", nargs="+", help="images with captions")
    parser.add_argument(
        "--out", type=cli.output_folder, metavar="DIR", default="inspection",
        help="folder of the report (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", type=cli.path, metavar="OTHER",
        help="show another set, such as val.json, next to IN, and find images of IN that are also in it, exactly or "
        "nearly",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=cli.path, metavar="MODEL",
        help="model folder whose tokenizer counts tokens (default: estimate)",
    )
    parser.add_argument(
        "--images", type=cli.positive, metavar="N", default=20_000,
        help="decode about N images, drawn at random (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--hash", choices=("sample", "all"), default="sample", help="decode --images of them, or all (default: sample)"
    )
    parser.add_argument(
        "--near_duplicates", type=cli.number(int, 0, 10), metavar="BITS", default=6,
        help="largest Hamming distance of the 64-bit hashes of near duplicates (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample and the gallery (default: 0)")
    cli.add_work_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from paddlemix.curation.advice import advice
    from paddlemix.curation.inspection import Options, inspect, overlap, summary
    from paddlemix.curation.report_page import write_page
    from paddlemix.datasets.rows import keep_images
    from paddlemix.datasets.tsv import check_input
    from paddlemix.utils.outputs import check_kind

    page, numbers_file = (os.path.join(args.out, name) for name in ("report.html", "report.json"))
    inputs = [*args.input, *([args.compare] if args.compare else [])]
    for path in inputs:
        check_input(path)
    keep_images(inputs, [page, numbers_file])
    check_kind(page, "a report page")
    check_kind(numbers_file, "a JSON report")
    count_tokens, frame = None, ()
    if args.tokenizer:
        from paddlemix.auto import AutoTokenizerMIX
        from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, ChatTemplate, LengthCounter

        tokenizer = AutoTokenizerMIX.from_pretrained(args.tokenizer)
        length = LengthCounter(tokenizer, ChatTemplate.of_folder(args.tokenizer), sys.maxsize)
        frame = tokenizer.n_queries, length([(DEFAULT_PROMPT, "")], 1)

        def count_tokens(text: str) -> int:
            return len(tokenizer.plain_ids(text))

    options = Options(args.images, args.hash == "all", args.near_duplicates, args.seed, args.workers, args.quiet)
    found, other, shared = inspect(args.input, options, count_tokens), None, None
    numbers = summary(found, options.near)
    if args.compare:
        other = inspect([args.compare], options, count_tokens)
        shared = overlap(found, other, options.near)
        numbers.update(other=summary(other, options.near), overlap=shared.to_json(found, other))
    page_text = f"page: {page}" + ", in place of an earlier one" * os.path.lexists(page)
    numbers["advice"] = advice(found, numbers, *frame)
    numbers["settings"] = {**options._asdict(), "tokenizer": args.tokenizer}
    write_page(page, found, numbers, options.seed, other, shared)
    write_json(numbers_file, numbers)
    print(tr(f"{numbers['rows']:,} rows, {numbers['good rows']:,} of them usable"))
    for text in numbers["advice"]:
        print(cli.harmless(f"- {tr(text)}"))
    print(tr(page_text))


if __name__ == "__main__":
    sys.exit(cli.run(main))
