"""Generating captions for prompts with images, shared by prediction and evaluation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from paddlemix.models.mgen_vl.engine import Decoding, Engine, Prompt
from paddlemix.models.mgen_vl.generation import decode_response, is_number
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.processors.postprocess import single_line, without_grounding


class Candidate(NamedTuple):
    """text: a caption in one line, possibly empty. score: its mean log-probability per token (nan unless computed).
    note: why it ended early, or None."""

    text: str
    score: float = float("nan")
    note: Optional[str] = None


def generate_captions(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    decoding: Decoding,
    slots: int,
    template: Optional[ChatTemplate] = None,
    keep_boxes: bool = False,
    scores: bool = False,
) -> Iterator[Tuple[int, List[Candidate]]]:
    """(index of the prompt, its decoding.samples captions), as each prompt is finished.

    A caption does not depend on the other prompts. slots: rows decoded at a time. template: of the prompts, None for
    the default. keep_boxes: keep `<ref>`, `<box>` and `<quad>` in captions, as text. scores: see Engine.
    """
    stop_ids = model.stop_ids(tokenizer, template)
    ending = () if template is None else template.ending(tokenizer)
    if decoding.num_beams > 1:
        found = model.beams(prompts, decoding, stop_ids, max(1, slots // decoding.num_beams))
    else:
        engine = Engine(
            model,
            decoding,
            stop_ids,
            slots,
            ending=ending,
            scores=scores,
            is_number=lambda ids: is_number(tokenizer.decode(list(ids))),
        )
        found = engine.run(prompts)
    answers: Dict[int, Dict[int, Candidate]] = defaultdict(dict)
    with model.generating():
        for one in found:
            text = caption(tokenizer, one.ids, stop_ids, ending, keep_boxes)
            answers[one.index][one.sample] = Candidate(text, one.score, one.note)
            if len(answers[one.index]) == decoding.samples:
                yield one.index, [text for _, text in sorted(answers.pop(one.index).items())]


def caption(tokenizer: Any, ids: Sequence[int], stop_ids, ending=(), keep_boxes: bool = False) -> str:
    """Generated ids as a caption: the answer in one line, without image tags and, by default, without boxes."""
    # Only image tags that are tokens; spelled out, they are ordinary ids.
    ids = [i for i in ids if i not in (tokenizer.img_start_id, tokenizer.img_end_id, tokenizer.img_pad_id)]
    text = decode_response(tokenizer, ids, stop_ids, ending)
    return single_line(text if keep_boxes else without_grounding(text))
