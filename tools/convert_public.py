"""Convert a public caption dataset to rows: `python tools/convert_public.py IMAGES CAPTIONS OUT`.

    MUGE ECommerce-IC     IMAGES is IC_train.tsv (id \\t base64), CAPTIONS IC_train.jsonl, a line per image:
                          {"image_id": "…", "text": ["…", "…"]}
    AI Challenger         IMAGES is the folder caption_train_images_20170902, CAPTIONS is
                          caption_train_annotations_20170902.json: [{"image_id": "….jpg", "caption": ["…", …]}, …]

OUT is a TSV `id \\t base64 \\t caption` or, if it ends in .json, has records for training. It has one row per caption,
or with --one_row one per image, as input for predict.py. Next to OUT.tsv it writes:

    OUT.references.tsv    id \\t caption \\t caption …, for evaluate_captions.py
    OUT.rejected.tsv      line, id, and why it was rejected; the line is that of IMAGES, and of CAPTIONS if IMAGES is a
                          folder or lacks the image
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from typing import Dict, Iterator, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.datasets import labels  # noqa: E402
from paddlemix.datasets.json_index import scan_records  # noqa: E402
from paddlemix.datasets.records import MAX_STRUCTURE  # noqa: E402
from paddlemix.datasets.rows import is_json, keep_images, read_rows  # noqa: E402
from paddlemix.datasets.tsv import (  # noqa: E402
    PATH_LEADS_OUT,
    ImagePlace,
    TsvRow,
    check_input,
    check_text,
    clean_id,
    path_inside,
    row_id,
)
from paddlemix.datasets.writing import output_rows  # noqa: E402
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402
from paddlemix.utils.outputs import check_earlier, disk_errors  # noqa: E402
from paddlemix.utils.progress import Progress  # noqa: E402
from paddlemix.utils.texts import ranked  # noqa: E402

NO_CAPTIONS = "no captions"
NOT_IN_IMAGES = "image is not in IMAGES"
# Of an image with its captions.
_MAX_RECORD_BYTES = 1 << 20
_HEAD_BYTES = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("source", type=cli.path, metavar="IMAGES", help="a TSV of images, or a folder of image files")
    parser.add_argument("captions", type=cli.path, metavar="CAPTIONS", help="JSON, or JSON lines")
    parser.add_argument("output", type=cli.output_rows, metavar="OUT", help="a .json, or a TSV")
    parser.add_argument("--one_row", action="store_true", help="one row per image, with its first caption")
    parser.add_argument(
        "--images", choices=("inline", "reference"), default="inline",
        help="for .json: inline copies an image into each of its rows; reference stores where it is",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace OUT even if it is not from an earlier run, which has OUT.references.tsv beside it",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def read_captions(path: str) -> Iterator[Tuple[str, List[str]]]:
    """(image id, its captions that are not blank) of each record of a file of JSON or JSON lines.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or a record has another form.
    """
    check_input(path)
    with open(path, "rb") as file:
        for number, (begin, end) in enumerate(scan_records(path).tolist(), 1):
            file.seek(begin)
            text = file.read(min(end - begin, _MAX_RECORD_BYTES)).strip(b" \t\r\n,[]")
            if not text.isascii():
                check_text(path, text + b"\n", want_caption=True)
            try:
                if sum(map(text.count, (b"[", b"{", b","))) > MAX_STRUCTURE:
                    raise ValueError
                record = json.loads(text)
                name, captions = record["image_id"], record["text"] if "text" in record else record["caption"]
                captions = [captions] if isinstance(captions, str) else captions
                texts = [clean_id(" ".join(caption.split())) for caption in captions if caption.strip()]
                yield clean_id(str(name)), texts
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                form = '{"image_id": …, "text": ["…", …]} or {"image_id": …, "caption": ["…", …]}'
                raise UserError(f"{path}: record {number} is not {form}") from None


def rows_of_folder(folder: str, captions: str) -> Iterator[Tuple[TsvRow, List[str]]]:
    """(row, captions) of each record of CAPTIONS, whose image is a file in the folder."""
    for number, (name, texts) in enumerate(read_captions(captions), 1):
        path = path_inside(folder, name)
        error, place = (PATH_LEADS_OUT, None) if path is None else (None, ImagePlace(path))
        yield TsvRow(number, name, b"", -1, 0, None, error, number, place), texts


def rows_of_tsv(images: str, captions: str) -> Iterator[Tuple[TsvRow, List[str]]]:
    """(row, captions) of each row of IMAGES, and then of each image that is not there, with an error. The captions
    alone fit into memory."""
    check_input(images)
    with open(images, "rb") as file:
        check_text(images, file.read(_HEAD_BYTES), want_caption=True)
    texts: Dict[str, List[str]] = {}
    missing: Dict[str, int] = {}
    for number, (name, found) in enumerate(read_captions(captions), 1):
        texts.setdefault(name, []).extend(found)
        missing.setdefault(name, number)
    end = 0
    for row in read_rows(images, want_caption=False):
        end = row.next_offset
        missing.pop(row.id, None)
        yield row, texts.get(row.id, [])
    for name, number in missing.items():
        yield TsvRow(number, name, b"", -1, 0, None, NOT_IN_IMAGES, end), texts[name]


def main() -> int:
    args = parse_arguments()
    stem = os.path.splitext(args.output)[0]
    names = [f"{stem}.references.tsv", f"{stem}.rejected.tsv"]
    keep_images([args.source, args.captions], [args.output, *names])
    check_earlier(args.output, os.path.isfile(names[0]), args.overwrite)
    folder = os.path.isdir(args.source)
    if os.path.isdir(args.captions) or os.path.isfile(args.source) and is_json(args.source):
        text = f"{args.captions} is not a file of captions, or {args.source} not images: give IMAGES CAPTIONS OUT"
        raise UserError(text, "argument-order")
    if args.images == "reference" and not args.output.endswith(".json"):
        raise UserError("--images reference needs an OUT.json")
    rows = (rows_of_folder if folder else rows_of_tsv)(args.source, args.captions)
    size = check_input(args.captions if folder else args.source)
    bar = Progress(None if folder else size, "images", "image" if folder else "B", args.quiet)
    # That an image can be read is seen at its header.
    options = labels.Options(images=args.images, verify="header")
    images = written = 0
    rejected: Counter = Counter()
    with disk_errors(args.output), bar, atomic_write(names[0]) as references, atomic_write(names[1]) as rejects, (
        output_rows(args.output, args.source, args.images == "reference", DEFAULT_PROMPT)
    ) as add:
        for row, texts in rows:
            bar.reach(row.next_offset)
            _, image, _, reason = labels.check_row(row._replace(caption=" ".join(texts)), options)
            reason = reason if texts else NO_CAPTIONS
            if reason:
                rejected[reason] += 1
                rejects.write(f"{row.line}\t{row_id(row)}\t{reason}\n")
                continue
            images += 1
            references.write("\t".join([row_id(row), *texts]) + "\n")
            for text in texts[:1] if args.one_row else texts:
                add(row, image, text)
                written += 1
        if not written:
            raise JobFailed(f"no image of {args.source} has a caption in {args.captions}: {ranked(rejected)}")
    for reason, count in rejected.most_common():
        print(f"rejected {count:10d}  {reason}", file=sys.stderr)
    print(f"{images} images, {written} rows")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
