"""Caption the images of a test file: `python predict.py INPUT OUTPUT MODEL_OR_WEIGHTS_DIR`. See --help."""

from __future__ import annotations

import argparse
import sys

from paddlemix.inference.options import (
    FALLBACK,
    add_decoding_options,
    add_model_argument,
    add_model_options,
    decoding_options,
)
from paddlemix.inference.row_shards import add_shard_options
from paddlemix.processors.postprocess import PostProcessing
from paddlemix.utils import cli

MORE = """\
examples:
  python predict.py test.tsv results.txt weights/
  python predict.py test.tsv results.txt weights/ --cut_repeats --end_mark --max_chars 200
  # the consensus of eight samples per image; all eight go to n_best.jsonl
  python predict.py test.tsv results.txt weights/ --samples 8 --top_p 0.9 --n_best n_best.jsonl
  # two machines or terminals: each captions every second row; then join the shards
  python predict.py test.tsv results.txt weights/ --shard 1/2
  python predict.py test.tsv results.txt weights/ --shard 2/2
  python tools/merge_results.py results.txt --input test.tsv
  # the same with one process per GPU of this machine
  python -m paddle.distributed.launch predict.py test.tsv results.txt weights/

After a kill or a full disk, run the same command again: it resumes after the last complete line, unless the input, the
model or a setting has changed. docs/predict.md lists the result for each kind of bad row.

exit status: 0 complete; 1 no row could be captioned (OUTPUT is complete), or the job failed; 2 bad usage
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Caption the images of INPUT: one line `id \\t caption` for each row `id \\t base64 image`, in the "
        "same order.",
        epilog=MORE,
    )
    parser.add_argument(
        "input", type=cli.path, metavar="INPUT",
        help="rows `id \\t base64 image`, a table of image files, or a train.json or val.json; see docs/formats.md",
    )
    parser.add_argument(
        "output", type=cli.path, metavar="OUTPUT", help="appears once it is complete; until then see OUTPUT.partial"
    )
    add_model_argument(parser, "MODEL_OR_WEIGHTS_DIR")
    parser.add_argument("--prompt", help="the prompt for each image (default: 请描述图片内容)")
    parser.add_argument(
        "--fallback",
        default=FALLBACK,
        help="caption of rows whose image cannot be read (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size", type=cli.number(int, 1, 4096),
        help="images per batch (default: by available memory, up to 32)",
    )
    add_model_options(parser)
    add_shard_options(parser, "OUTPUT")
    parser.add_argument("--keep_boxes", action="store_true", help="keep <ref>, <box> and <quad> tags in captions")
    add_decoding_options(parser)
    parser.add_argument(
        "--n_best",
        type=cli.path,
        metavar="FILE",
        help="also write all --samples, before post-processing, with their mean log-probabilities: one line of JSON "
        "per row",
    )
    repairs = parser.add_argument_group("post-processing of captions, in this order; off by default")
    repairs.add_argument("--strip_echo", action="store_true", help="remove a leading prompt, 图片描述： and the like")
    repairs.add_argument(
        "--full_width", action="store_true",
        help="replace ASCII punctuation next to Chinese text by ，。 …",
    )
    repairs.add_argument(
        "--cut_repeats", action="store_true",
        help="keep only the first occurrence of a repeated clause",
    )
    repairs.add_argument(
        "--max_chars", type=cli.positive,
        help="truncate to this many characters, at the end of a clause if possible",
    )
    repairs.add_argument("--end_mark", action="store_true", help="remove an incomplete last sentence, or add 。")
    return parser.parse_args(argv)


def main() -> int:
    values = vars(parse_args())
    values["decoding"] = decoding_options(values)
    values["postprocess"] = PostProcessing(**{name: values.pop(name) for name in PostProcessing._fields})

    from paddlemix.inference.prediction import predict_file

    predict_file(**values)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, "the same command (without --restart) goes on from here"))
