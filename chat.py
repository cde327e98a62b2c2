"""Ask a model about images: `python chat.py MODEL [IMAGE] [PROMPT]`. See --help."""

from __future__ import annotations

import argparse
import os
import sys
import time

from paddlemix.inference.boxes import check_boxes_path
from paddlemix.inference.options import (
    add_decoding_options,
    add_model_argument,
    add_model_options,
    decoding_options,
    generate_options,
)
from paddlemix.utils import cli
from paddlemix.utils.errors import ImageError, UserError
from paddlemix.utils.log import logger
from paddlemix.utils.outputs import keep_apart

# Drawn for the project: a red cup of coffee on a wooden table, with a price tag.
EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "example.jpg")

MORE = """\
examples:
  python chat.py weights/ cup.jpg 图中的价格是多少？
  python chat.py weights/ before.jpg 这两张图有什么不同？ --image after.jpg
  python chat.py weights/ cup.jpg --stream --temperature 0.8 --top_p 0.9 --seed 7
  python chat.py weights/ cup.jpg --samples 8 --top_p 0.9
  python chat.py weights/ --interactive --stream
  python chat.py weights/ cup.jpg 框出图中的杯子 --boxes cup-boxes.png

An image is a path, an http(s) URL (up to 64 MB, 20 seconds) or base64. Boxes in an answer, such as
<ref>a cup</ref><box>(x1,y1),(x2,y2)</box>, are drawn on the most recent image and written to the file of --boxes. The
font for Chinese names comes from the model folder (SimSun.ttf) or from Debian's packages (fonts-noto-cjk).
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Ask a model about one image or several, or hold a conversation (--interactive).",
        epilog=MORE,
    )
    add_model_argument(parser, "MODEL")
    parser.add_argument(
        "image", type=cli.path, metavar="IMAGE", nargs="?",
        help="path, URL or base64 (default: a picture of a red cup; with --interactive, none)",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt (default: 请描述图片内容)")
    parser.add_argument(
        "--image", type=cli.path, dest="images", metavar="IMAGE", action="append", default=[],
        help="another image; may be repeated",
    )
    parser.add_argument("--interactive", action="store_true", help="hold a conversation; /help lists its commands")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    parser.add_argument(
        "--boxes", type=cli.output_file, metavar="FILE",
        help="file for an image with the answer's boxes (default: boxes.png)",
    )
    add_model_options(parser)
    add_decoding_options(parser)
    # Intermixed: IMAGE may stand behind an option, too.
    return parser.parse_intermixed_args(argv)


def main() -> int:
    args = parse_args()
    decoding = decoding_options(dict(vars(args)), args.stream)
    options = generate_options(decoding)
    # Turns of a conversation differ; seed_everything sets where they begin.
    options.pop("seed", None)
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    boxes = check_boxes_path(args.boxes or "boxes.png")

    from paddlemix.inference.boxes import save_boxes
    from paddlemix.inference.conversation import Conversation, converse, write_piece
    from paddlemix.inference.loading import load_model
    from paddlemix.inference.source import find_source
    from paddlemix.processors.image_sources import load_image_source
    from paddlemix.processors.images import read_header
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT
    from paddlemix.utils.runtime import seed_everything

    def fetch(source: str) -> bytes:
        data = load_image_source(source)
        try:
            read_header(data)
        except ImageError as error:
            raise ImageError(error.reason, f"{source}: {error}") from None
        return data

    # Before the model, which takes a minute to load.
    model = find_source(args.model, args.lora_path)
    sources = ([] if args.image is None else [args.image]) + args.images
    if not sources and not args.interactive:
        sources = [EXAMPLE]
        logger.info("no IMAGE is given: about %s", EXAMPLE)
    keep_apart(sources, [boxes])
    try:
        images = [fetch(source) for source in sources]
    except ImageError as error:
        lacks_image = error.reason == "no such file" and args.image and not os.path.isfile(args.image)
        if not lacks_image or args.prompt and not os.path.isfile(args.prompt):
            raise
        raise UserError(f"{error}; the order is MODEL IMAGE PROMPT") from None
    loaded = load_model(model, args.dtype, args.device)
    conversation = Conversation(loaded, args.system, decoding.get("choose", "first"), **options)
    for image in images:
        conversation.add_image(image)
    if args.seed is not None:
        seed_everything(args.seed)
    if args.interactive:
        converse(conversation, fetch, model.base, boxes, args.stream, args.prompt)
        return 0

    start = time.time()
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    print(f"prompt: {prompt}")
    if args.stream:
        print("response: ", end="", flush=True)
    response = conversation.ask(prompt, write_piece if args.stream else None)
    print("" if args.stream else f"response: {cli.harmless(' '.join(response.split()))}")
    print("------------------")
    print(f"It took {time.time() - start:.2f} seconds!")
    save_boxes(response, conversation.picture, boxes, model.base)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
