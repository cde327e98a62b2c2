"""Command-line options that chat.py and predict.py share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from typing import Any, Dict

from paddlemix.utils.cli import number, path, positive
from paddlemix.utils.errors import UserError

# Caption of a row whose image cannot be read.
FALLBACK = "一张广告图片。"
# How one of several answers is chosen.
CHOICES = ("first", "logprob", "consensus")


def add_model_argument(parser: argparse.ArgumentParser, metavar: str) -> None:
    """The positional argument `model`."""
    parser.add_argument(
        "model", type=path, metavar=metavar,
        help="a model folder, its parent folder, or the output folder of a tuning run",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, answers: bool = True) -> None:
    """System prompt, tuned weights, dtype and device; with `answers`, also the maximum length of an answer."""
    parser.add_argument("--system", help="system prompt, instead of the one in the model's chat_template.json")
    parser.add_argument(
        "--lora_path", type=path, metavar="TUNED",
        help="output folder of a tuning run: apply its adapters or tuned parameters to the model, unmerged",
    )
    if answers:
        parser.add_argument(
            "--max_new_tokens", type=positive,
            help="maximum tokens of an answer (default: the model's)",
        )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype to compute in, if the device supports it (default: that of the weights)",
    )
    parser.add_argument("--device", help="cpu, gpu or gpu:N (default: a GPU if there is one)")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Decoding options, to be read by decoding_options."""
    chosen = parser.add_argument_group(
        "decoding",
        "Greedy by default. --temperature, --top_k, --top_p and --samples sample, --num_beams uses beam search.\n"
        "docs/evaluation.md compares their scores.",
    )
    # In float32, logits divided by much less are infinite.
    up_to_100 = number(float, 1e-6, 100)
    chosen.add_argument("--temperature", type=up_to_100, help="sampling temperature; below 1 favours probable tokens")
    chosen.add_argument(
        "--top_p", type=number(float, above=0, most=1),
        help="sample from the smallest set of tokens with this total probability",
    )
    chosen.add_argument("--top_k", type=positive, help="sample from this many of the most probable tokens")
    chosen.add_argument(
        "--seed", type=number(int, 0, (1 << 31) - 1), help="sampling seed; the same seed gives the same answers"
    )
    chosen.add_argument(
        "--num_beams", type=number(int, 1, 64), help="beam search with this many beams; excludes sampling"
    )
    chosen.add_argument(
        "--length_penalty", type=number(float, -1000, 1000),
        help="for beam search: above 0 favours longer answers, below 0 shorter ones",
    )  # fmt: skip
    chosen.add_argument(
        "--repetition_penalty",
        type=up_to_100,
        help="above 1 makes tokens already in the prompt or answer less probable (1.05 is mild)",
    )
    chosen.add_argument(
        "--no_repeat_ngram_size", type=positive, metavar="N", help="no sequence of N tokens occurs twice"
    )
    chosen.add_argument("--min_new_tokens", type=positive, help="minimum tokens of an answer")
    chosen.add_argument(
        "--stop_repeating",
        type=number(int, 0, 1000),
        metavar="N",
        help="end an answer once it repeats a sequence of up to 16 tokens N times, and keep the sequence once; prices "
        "and phone numbers do not count; not with beam search (default: 4; 0: never)",
    )
    chosen.add_argument(
        "--samples", type=positive, metavar="N", help="number of candidate answers; with --num_beams, its N best"
    )
    chosen.add_argument(
        "--choose",
        choices=CHOICES,
        help="which of the --samples to take: the first; the one with the highest mean log-probability per token; or "
        "the one that agrees most with the others by mean CIDEr-D (default: consensus; with beam search: first, which "
        "is the best)",
    )


_DECODING = (
    "temperature", "top_p", "top_k", "seed", "num_beams", "length_penalty", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens", "stop_repeating", "samples",
)  # fmt: skip


def decoding_options(values: Dict[str, Any], stream: bool = False) -> Dict[str, Any]:
    """The given decoding options as fields of Decoding (and `choose`), with `sample` if they imply sampling. values: of
    all arguments; the options are removed from it.

    Raises:
        UserError: they contradict each other.
    """
    given = {name: values.pop(name) for name in _DECODING}
    given = {name: value for name, value in given.items() if value is not None}
    choose = values.pop("choose")
    beams, samples = given.get("num_beams", 1), given.get("samples", 1)
    samplers = [name for name in ("temperature", "top_p", "top_k", "seed") if name in given]
    if given.get("min_new_tokens", 0) > (values.get("max_new_tokens") or math.inf):
        raise UserError("--min_new_tokens is more than --max_new_tokens")
    if given.get("stop_repeating") == 1:
        raise UserError("--stop_repeating 1 would end every answer: give 2 or more, or 0 for never")
    if beams > 1:
        if samplers:
            listed = ", ".join(f"--{name}" for name in samplers)
            raise UserError(f"--num_beams searches, {listed} samples: give one or the other")
        if stream:
            raise UserError("--stream does not go with --num_beams: the answer of beams is only known at the end")
        if samples > beams:
            raise UserError(f"--samples {samples} with --num_beams: {beams} beams have {beams} answers at most")
        if given.get("stop_repeating"):
            raise UserError("--stop_repeating does not go with --num_beams; --no_repeat_ngram_size does")
    else:
        if "length_penalty" in given:
            raise UserError("--length_penalty is one of beam search: give --num_beams with it")
        if samplers == ["seed"] and samples == 1:
            raise UserError("--seed without sampling changes nothing: give --temperature, --top_p or --top_k with it")
        if samplers or samples > 1:
            given["sample"] = True
    if samples > 1:
        if stream:
            raise UserError("--stream does not go with --samples: which answer is chosen is only known at the end")
        given["choose"] = choose or ("first" if beams > 1 else "consensus")
    elif choose is not None:
        raise UserError("--choose is among --samples: give --samples with it")
    return given


def generate_options(decoding: Dict[str, Any]) -> Dict[str, Any]:
    """decoding_options as options of the model's generate, whose defaults come from generation_config.json."""
    options = {name: value for name, value in decoding.items() if name not in ("sample", "samples", "choose")}
    if decoding.get("num_beams", 1) > 1:
        options["decode_strategy"] = "beam_search"
    elif decoding.get("sample"):
        # Override the file's defaults (the baseline's top_k of 1 disables sampling).
        options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **options, "decode_strategy": "sampling"}
    elif options.pop("num_beams", None):
        options["decode_strategy"] = "greedy_search"
    if "decode_strategy" in options:
        options["num_return_sequences"] = decoding.get("samples", 1)
    return options
