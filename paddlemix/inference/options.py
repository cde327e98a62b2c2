"""Command-line options that chat.py and predict.py share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from typing import Any, Callable, Dict

from paddlemix.utils.cli import path, positive
from paddlemix.utils.errors import UserError

# Caption of a row whose image cannot be read.
FALLBACK = "一张广告图片。"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What the model runs in, how it is addressed, and how long it may talk."""
    parser.add_argument("--system", help="system text in place of the one in the model's chat_template.json")
    parser.add_argument(
        "--lora_path", type=path, metavar="TUNED",
        help="folder of a tuning run: answer with its adapters, or parts, on the model",
    )
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer in tokens (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="compute in this dtype, where the device can (default: as the weights are stored)",
    )
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")


def _number(low: float, high: float, says: str) -> Callable[[str], float]:
    """An argument's type: a number above `low`, up to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"must be {says}, not {text!r}")
        return value

    return parse


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How an answer's words are chosen; sampling_options makes generate's options of it."""
    chosen = parser.add_argument_group(
        "how words are chosen: the likeliest one at each step, unless one of these is given"
    )
    hot = _number(0, 100, "above 0 and at most 100 (without sampling, the likeliest word is taken)")
    chosen.add_argument("--temperature", type=hot, help="sample; below 1 keeps closer to the likely words")
    top_p = _number(0, 1, "above 0 and at most 1")
    chosen.add_argument("--top_p", type=top_p, help="sample among the likeliest words that make up this share")
    chosen.add_argument("--top_k", type=positive, help="sample among this many of the likeliest words")
    chosen.add_argument("--seed", type=int, help="of sampling: the same seed gives the same answers")
    chosen.add_argument("--num_beams", type=positive, help="search with so many beams, in place of sampling")


def sampling_options(temperature, top_p, top_k, seed, num_beams, stream: bool = False) -> Dict[str, Any]:
    """Options of generate for what add_sampling_options and --stream gave (None where not given).

    Raises:
        UserError: they contradict each other.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if seed is not None and not 0 <= seed < 1 << 31:
        raise UserError("--seed is a whole number from 0 to 2147483647")
    if num_beams is not None and num_beams > 1:
        if sampling or seed is not None:
            given = ", ".join(f"--{name}" for name in [*sampling, *(["seed"] if seed is not None else [])])
            raise UserError(f"--num_beams searches, {given} samples: give one or the other")
        if stream:
            raise UserError("--stream does not go with --num_beams: the answer of beams is only known at the end")
        return {"decode_strategy": "beam_search", "num_beams": num_beams, "num_return_sequences": 1}
    if sampling:
        # What is not given must not come in from generation_config.json (the baseline's top_k of 1 is no sampling).
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "num_return_sequences": 1}
        return {"decode_strategy": "sampling", **neutral, **sampling}
    if seed is not None:
        raise UserError("--seed without sampling changes nothing: give --temperature, --top_p or --top_k with it")
    return {} if num_beams is None else {"decode_strategy": "greedy_search"}
