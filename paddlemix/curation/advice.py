"""Advice on a set that has been inspected: settings and filters, with the numbers they are based on."""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np

from paddlemix.curation.image_facts import usable
from paddlemix.curation.inspection import Inspection, repeats

# Limits beyond which a caption counts as a loop, and an image as a sliver or a stamp.
MAX_REPETITION, MIN_CHINESE, MAX_ASPECT, MIN_SIDE = 0.3, 0.5, 8, 64
# Limits beyond which near duplicates that are not copies are rather images of the same layout: of all images decoded,
# those in the groups and in the largest one, which then has more than some rows.
MOST_NEAR, MOST_IN_GROUP, SMALL_GROUP = 0.2, 0.05, 50
_TOKENS_A_CHARACTER = 0.75


def _up(value: float, step: int) -> int:
    return int(-(-value // step) * step)


def advice(found: Inspection, numbers: Dict[str, Any], n_queries: int = 256, around: int = 289) -> List[str]:
    """Recommended settings and filters, with the numbers they are based on.

    around: tokens of a sample with one image and the default prompt, without its caption; the defaults are the 7B's.
    """
    lines: List[str] = []
    good = found.rows[found.good & (found.rows["caption"] != 0)]
    images, n = numbers["images"], numbers["rows"]

    def share(count: int, of: int = n) -> str:
        return f"{count:,} ({100 * count / of:.2f} %)"

    def drop(rule: str, text: str, count: int, of: int = n) -> None:
        if 2 * count > of:
            lines.append(f"{rule} would drop {share(count, of)}, which is most of them: look at the gallery first")
        elif count:
            lines.append(f"{share(count, of)} {text}: drop them with {rule}")

    if not numbers["captions"]["rows"]:
        lines.append("the rows have no captions: if this is a test set, drop none of them")
    if len(good):
        counted = bool(good["tokens"].any())
        tokens = good["tokens"] if counted else good["chars"] * _TOKENS_A_CHARACTER
        longest, most = int(np.ceil(tokens.max())), int(np.ceil(np.percentile(tokens, 99.9)))
        lines.append(
            f"max_length {_up(longest + around, 64)}: the longest sample takes {longest + around} tokens with the "
            f"default prompt, {n_queries + 2} of them for the image and {longest} for the caption"
            if counted
            else f"max_length {_up(longest + around, 64)}: the longest sample takes about {longest + around} tokens, "
            f"{n_queries + 2} of them for the image, as in the 7B, and {longest} for the caption, estimated as "
            f"{_TOKENS_A_CHARACTER} per character; --tokenizer counts them"
        )
        if _up(most + around, 64) < _up(longest + around, 64):
            lines.append(
                f"max_length {_up(most + around, 64)} is enough for 99.9 % of the rows, whose captions have at most "
                f"{most} tokens"
            )
        new = _up(most + 1, 16)
        lines.append(f"max_new_tokens {new} is enough for {'all' if longest < new else '99.9 % of the'} captions")
        for rule, text, which in (
            (f"--max_repetition {MAX_REPETITION}", "captions repeat themselves", good["repetition"] > MAX_REPETITION),
            (f"--min_chinese {MIN_CHINESE}", "captions are less than half Chinese", good["chinese"] < MIN_CHINESE),
        ):
            drop(rule, text, int(which.sum()))
        opening = numbers["captions"]["texts"]["opening"]["listed"][:1]
        if opening and opening[0][1] > 0.2 * len(good) and len(good) > 100:
            text = f"{share(opening[0][1])} captions begin with “{opening[0][0]}”: the model will, too"
            # What nearly all captions begin with is their form.
            few = opening[0][1] <= 0.5 * len(good)
            lines.append(text + f"; balance them with --per_opening {_up(0.05 * len(good), 10)}" * few)
        marks = numbers["captions"]["with"]
        if marks["control"]:
            text = "captions contain control characters: --clean of convert_labels removes them"
            lines.append(f"{share(marks['control'])} {text}")
        drop("--must_not '<'", "captions contain tags", marks["tags"])
    near, closer = images["near duplicates"], images["near duplicates by bits"]
    copies = repeats(found.exact[usable(found.facts)])
    beyond, largest = (near[key] - copies[key] for key in ("rows beyond the first", "largest"))
    decoded = images["decoded"]
    looked_at = f"of the {decoded:,} decoded images"
    near_text = f"{looked_at} are near duplicates of earlier ones"
    drop("--near_duplicates 0", "images are copies of earlier ones", images["copies"]["rows beyond the first"])
    layouts = beyond > MOST_NEAR * decoded or largest > max(MOST_IN_GROUP * decoded, SMALL_GROUP)
    if layouts:
        at = ", ".join(f"{bits}: {count:,}" for bits, count in closer.items())
        lines.append(
            f"{share(near['rows beyond the first'], decoded)} {near_text} at {near['bits apart']} bits, "
            f"the largest group has {near['largest']:,} (at fewer bits: {at}): perhaps images of the same layout; "
            "look at the groups on the page, and try --near_duplicates 2 or 3 before you drop any"
        )
    elif beyond:
        drop(f"--near_duplicates {near['bits apart']}", near_text, near["rows beyond the first"], decoded)
    readable = found.facts[found.readable]
    sides = np.minimum(readable["width"], readable["height"]), np.maximum(readable["width"], readable["height"])
    drop("--drop_truncated", f"{looked_at} are truncated", images["truncated"], decoded)
    drop("--min_sharpness 1", f"{looked_at} show one colour", images["one colour"], decoded)
    drop(f"--min_side {MIN_SIDE}", f"images have a side under {MIN_SIDE} pixels", int((sides[0] < MIN_SIDE).sum()))
    text = f"images are more than {MAX_ASPECT} times as long as wide"
    drop(f"--max_aspect {MAX_ASPECT}", text, int((sides[1] > float(MAX_ASPECT) * sides[0]).sum()))
    if numbers["rejected"]:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in numbers["rejected"].items())
        lines.append(f"{share(n - numbers['good rows'])} rows cannot be used: {reasons}")
    if numbers["ids doubled"]:
        lines.append(f"{share(numbers['ids doubled'])} rows repeat an earlier id, and results are matched by id")
    leaks = numbers.get("overlap")
    if leaks and leaks["exact"] + leaks["near"]:
        text = f"{leaks['exact']:,} images are also in {leaks['file']}, and {leaks['near']:,} nearly"
        lines.append(
            f"{text}: perhaps these have the same layout; look at them on the page, and try --near_duplicates 2 or 3 "
            f"with --not_in {leaks['file']} before you drop any"
            if layouts and leaks["near"]
            else f"{text}: scores there would not be those of unseen images; drop them with --not_in {leaks['file']}"
        )
    if decoded < images["readable"]:
        lines.append(
            f"{decoded:,} of {images['readable']:,} images were decoded: --hash all finds the near "
            "duplicates among all"
        )
    return lines
