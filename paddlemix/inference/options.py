"""Command-line options that chat.py and predict.py share. Imports nothing heavy."""

from __future__ import annotations

import argparse

from paddlemix.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with bad usage as one line in place of the whole usage text."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the model runs in, and how long it may talk."""
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer in tokens (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="compute in this dtype, where the device can (default: as the weights are stored)",
    )
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")
