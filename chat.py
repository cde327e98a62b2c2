"""Ask a model about an image: `python chat.py MODEL [IMAGE] [PROMPT]`. See --help."""

from __future__ import annotations

import argparse
import os
import sys
import time

from paddlemix.inference.options import add_model_options
from paddlemix.utils import cli

# Drawn for the project: a red cup of coffee on a wooden table, with a price tag.
EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "example.jpg")


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(description="Print what a model says about an image.")
    parser.add_argument("model", metavar="MODEL", help="a model folder, or the one that holds it")
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", default=EXAMPLE, help="a path, a URL or base64 (default: a red cup)"
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question (default: 请描述图片内容)")
    add_model_options(parser)
    parser.add_argument("--allow_private_urls", action="store_true", help="fetch images from private addresses too")
    # Intermixed: IMAGE may stand behind an option, too.
    return parser.parse_intermixed_args(argv)


def main() -> int:
    # Answers are Chinese; a locale may be ASCII.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args()

    from paddlemix.inference.loading import find_model_folder, load_model
    from paddlemix.processors.images import load_image_source, read_header
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT

    # Before the model, which takes a minute to load.
    folder = find_model_folder(args.model)
    image = load_image_source(args.image, allow_private_urls=args.allow_private_urls)
    read_header(image)
    loaded = load_model(folder, args.dtype, args.device)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    options = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}

    start = time.time()
    query = [{"image": image}, {"text": prompt}]
    inputs = loaded.processor(query=query, return_tensors="pd")
    response, _ = loaded.model.chat(
        loaded.tokenizer,
        query=loaded.tokenizer.from_list_format(query),
        history=None,
        images=inputs["images"],
        system=loaded.system,
        **options,
    )
    response = " ".join(response.split())
    print(f"prompt: {prompt}")
    print(f"response: {response}")
    print("------------------")
    print("It took", time.time() - start, "seconds!")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
