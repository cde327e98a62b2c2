"""Merge a LoRA checkpoint, or one of a part that was trained whole, into its base model:

python merge_lora_params.py --model_name_or_path BASE --lora_path LORA --merge_model_path OUT
"""

from __future__ import annotations

import argparse
import sys

from paddlemix.utils import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Merge a tuned checkpoint into its base model and write a complete model folder: adapters as W + "
        "(alpha / r) · A @ B, fully trained tensors in place of the base's. Works one tensor at a time, so it needs "
        "memory for a few tensors only. OUT appears once it is complete.",
    )
    parser.add_argument(
        "--model_name_or_path", type=cli.path, required=True, metavar="BASE", help="folder of the base model"
    )
    parser.add_argument(
        "--lora_path", type=cli.path, required=True, metavar="LORA", help="output folder of the tuning run"
    )
    parser.add_argument(
        "--merge_model_path", type=cli.output_folder, required=True, metavar="OUT", help="folder to write"
    )
    parser.add_argument(
        "--text_model_name_or_path",
        type=cli.path,
        metavar="TEXT",
        help="folder whose LLM the run used instead of the base's, if any",
    )
    parser.add_argument(
        "--force", action="store_true", help="merge even if BASE or TEXT is not the model that LORA was tuned from"
    )
    cli.add_weights_options(parser, "OUT")
    parser.add_argument("--disable_tqdm", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()

    from paddlemix.checkpoint.lora_merge import merge
    from paddlemix.utils.log import logger

    result = merge(
        args.model_name_or_path,
        args.lora_path,
        args.merge_model_path,
        progress=not args.disable_tqdm,
        text_folder=args.text_model_name_or_path,
        force=args.force,
        **cli.weights_options(args),
    )
    logger.info(
        f"{result.merged} tensors merged, {result.replaced} replaced, {result.copied} copied into "
        f"{args.merge_model_path}: {', '.join(sorted(result.files))}"
    )
    print("--------merge lora successfully----------")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
