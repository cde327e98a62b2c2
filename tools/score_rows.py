"""Score the captions of a data set by a model: `python tools/score_rows.py MODEL DATA OUT.tsv`. See --help."""

from __future__ import annotations

import argparse
import os
import sys

# Run as a script, the project's top folder is not on the path yet.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.inference.options import add_model_argument, add_model_options  # noqa: E402
from paddlemix.inference.row_shards import add_shard_options  # noqa: E402
from paddlemix.utils import cli  # noqa: E402

MORE = """\
OUT has one line per row of DATA, in order, without a header: id \\t loss \\t blank_loss \\t gain \\t tokens

    loss         mean cross-entropy per token of the caption given its image, as in training
    blank_loss   the same given a grey image
    gain         blank_loss - loss: how much the image helps; lowest for captions of other images
    tokens       the five tokens with the highest loss, as JSON: [["杯子", 9.21], …], each with its loss

A row that cannot be scored has empty numbers and the reason in the last column, and is counted. The id of a row without
one is its line number. The model should know the style of the captions: tune it on DATA, for example.

examples:
  python tools/score_rows.py output/lora train.tsv scores.tsv
  python tools/curate_data.py train.tsv clean.tsv --drop_scores scores.tsv:5%
  # two machines or terminals: each scores every second row; then join the shards
  python tools/score_rows.py output/lora train.tsv scores.tsv --shard 1/2
  python tools/score_rows.py output/lora train.tsv scores.tsv --shard 2/2
  python tools/merge_results.py scores.tsv --input train.tsv

After a kill or a full disk, run the same command again: it resumes after the last complete line.

exit status: 0 complete; 1 no row could be scored (OUT is complete), or the job failed; 2 bad usage
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Write a model's loss on each caption, with its image and with a blank one.", epilog=MORE
    )
    add_model_argument(parser, "MODEL")
    parser.add_argument(
        "data", type=cli.path, metavar="DATA", help="rows of id, image and caption (TSV, CSV), or a train.json"
    )
    parser.add_argument(
        "output", type=cli.path, metavar="OUT", help="appears once it is complete; until then see OUT.partial"
    )
    parser.add_argument(
        "--prompt", help="the prompt for each image (default: that of the record; for tables 请描述图片内容)"
    )
    parser.add_argument(
        "--max_length", type=cli.positive, default=2048,
        help="longer samples are truncated, as in training (default: 2048)",
    )
    parser.add_argument(
        "--batch_size", type=cli.number(int, 1, 4096),
        help="rows per batch (default: by available memory, up to 32)",
    )
    add_model_options(parser, answers=False)
    add_shard_options(parser, "OUT")
    return parser.parse_args(argv)


def main() -> int:
    values = vars(parse_args())

    from paddlemix.inference.scoring import score_file

    score_file(**values)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, "the same command (without --restart) goes on from here"))
