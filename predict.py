"""Caption the images of a test file: `python predict.py INPUT OUTPUT MODEL_OR_WEIGHTS_DIR`. See --help."""

from __future__ import annotations

import argparse
import sys

from paddlemix.inference.options import add_model_options
from paddlemix.utils import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Write one line `id \\t caption` for each row `id \\t base64 image` of INPUT, in order. "
        "A killed run goes on where it stopped when the same command is given again.",
    )
    parser.add_argument("input", metavar="INPUT", help="rows of id and base64 image, tab-separated")
    parser.add_argument("output", metavar="OUTPUT", help="appears when whole; until then see OUTPUT.partial")
    parser.add_argument("model", metavar="MODEL_OR_WEIGHTS_DIR", help="a model folder, or the one that holds it")
    parser.add_argument("--prompt", help="the question about each image (default: 请描述图片内容)")
    parser.add_argument(
        "--fallback",
        default="一张广告图片。",
        help="caption of a row whose image cannot be read (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=cli.positive, help="images at a time (default: by memory, up to 32)")
    add_model_options(parser)
    parser.add_argument("--restart", action="store_true", help="drop an unfinished run on OUTPUT")
    return parser.parse_args(argv)


def main() -> int:
    # Captions are Chinese; a platform's locale may be ASCII.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args()

    from paddlemix.inference.prediction import predict_file

    predict_file(**vars(args))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
