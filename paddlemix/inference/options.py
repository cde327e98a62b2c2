"""Command-line options that chat.py and predict.py share. Imports nothing heavy."""

from __future__ import annotations

import argparse

from paddlemix.utils.cli import positive


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the model runs in, and how long it may talk."""
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer in tokens (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="compute in this dtype, where the device can (default: as the weights are stored)",
    )
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")
