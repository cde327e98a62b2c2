"""Ask a model about an image: `python chat.py MODEL [IMAGE] [PROMPT]`. See --help."""

from __future__ import annotations

import argparse
import os
import sys
import time

from paddlemix.utils import cli

# Drawn for the project: a red cup on a yellow ground with a price tag.
EXAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "example.jpg")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print what a model says about an image.")
    parser.add_argument("model", metavar="MODEL", help="a model folder, or the folder that holds one")
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="?",
        default=EXAMPLE,
        help="a path, a URL or base64 (default: %(default)s)",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question (default: 请描述图片内容)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer, in tokens (default: the model's)")
    parser.add_argument("--allow_private_urls", action="store_true", help="fetch from any address")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="as in predict.py")
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    # Answers are Chinese; a locale may be ASCII.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")

    from paddlemix.inference.loading import find_model_folder, load_model
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT

    loaded = load_model(find_model_folder(args.model), args.dtype, args.device)
    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    options = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}

    start = time.time()
    query = [{"image": args.image}, {"text": prompt}]
    inputs = loaded.processor(query=query, return_tensors="pd", allow_private_urls=args.allow_private_urls)
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
