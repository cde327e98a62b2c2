"""Caption the images of a test file: `python predict.py INPUT OUTPUT MODEL_OR_WEIGHTS_DIR`. See --help."""

from __future__ import annotations

import argparse
import sys

from paddlemix.inference.options import FALLBACK, add_decoding_options, add_model_options, decoding_options
from paddlemix.inference.row_shards import Shard
from paddlemix.processors.postprocess import PostProcessing
from paddlemix.utils import cli

MORE = """\
examples:
  python predict.py test.tsv results.txt weights/
  python predict.py test.tsv results.txt weights/ --cut_repeats --end_mark --max_chars 200
  # the caption that agrees most with seven others, all eight of them in n_best.jsonl
  python predict.py test.tsv results.txt weights/ --samples 8 --top_p 0.9 --n_best n_best.jsonl
  # two machines, or two windows: each answers every second row; then one file of them
  python predict.py test.tsv results.txt weights/ --shard 1/2
  python predict.py test.tsv results.txt weights/ --shard 2/2
  python tools/merge_results.py results.txt --input test.tsv
  # the same with a process for each GPU of this machine
  python -m paddle.distributed.launch predict.py test.tsv results.txt weights/

Killed, or out of disk? Give the same command again: it goes on behind the last whole line, and refuses to if the
input, the model or a setting has changed. What each kind of broken row gives is in docs/predict.md.

exit status: 0 all done; 1 not one row could be captioned (OUTPUT is whole), or the job broke off; 2 bad usage
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Write one line `id \\t caption` for each row `id \\t base64 image` of INPUT, in order.",
        epilog=MORE,
    )
    parser.add_argument("input", type=cli.path, metavar="INPUT", help="rows of id and base64 image, tab-separated")
    parser.add_argument(
        "output", type=cli.path, metavar="OUTPUT", help="appears when whole; until then see OUTPUT.partial"
    )
    parser.add_argument(
        "model", type=cli.path, metavar="MODEL_OR_WEIGHTS_DIR",
        help="a model folder, the one that holds it, or what a run tuned",
    )
    parser.add_argument("--prompt", help="the question about each image (default: 请描述图片内容)")
    parser.add_argument(
        "--fallback",
        default=FALLBACK,
        help="caption of a row whose image cannot be read (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=cli.positive, help="images at a time (default: by memory, up to 32)")
    add_model_options(parser)
    parser.add_argument("--restart", action="store_true", help="drop an unfinished run on OUTPUT, or a finished shard")
    parser.add_argument(
        "--shard",
        metavar="i/n",
        type=Shard.parse,
        help="answer rows i, i + n, i + 2n, … only, into OUTPUT.shard-i-of-n; tools/merge_results.py joins the shards",
    )
    parser.add_argument("--keep_boxes", action="store_true", help="keep <ref>, <box> and <quad> of an answer")
    add_decoding_options(parser)
    parser.add_argument(
        "--n_best",
        type=cli.path,
        metavar="FILE",
        help="write all of --samples there, before repairs, with their mean log-probabilities: a line of JSON per row",
    )
    repairs = parser.add_argument_group("repairs of finished captions, made in this order; all are off unless given")
    repairs.add_argument("--strip_echo", action="store_true", help="drop the question, 图片描述： and its like")
    repairs.add_argument("--full_width", action="store_true", help="ASCII marks beside Chinese text become ，。 …")
    repairs.add_argument("--cut_repeats", action="store_true", help="keep the first of clauses that are said again")
    repairs.add_argument("--max_chars", type=cli.positive, help="cut behind a clause so that no more are left")
    repairs.add_argument("--end_mark", action="store_true", help="drop a half last sentence, or add 。")
    return parser.parse_args(argv)


def main() -> int:
    values = vars(parse_args())
    values["decoding"] = decoding_options(values)
    values["postprocess"] = PostProcessing(**{name: values.pop(name) for name in PostProcessing._fields})

    from paddlemix.inference.prediction import predict_file

    predict_file(**values)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
