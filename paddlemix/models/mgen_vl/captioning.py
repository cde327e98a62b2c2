"""Generating captions for prompts with images, shared by prediction and evaluation."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import paddle

from paddlemix.models.mgen_vl.engine import NOT_FINITE, Decoding, Engine, Finished, Prompt, left_pad
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
        found = _by_beams(model, prompts, decoding, stop_ids, max(1, slots // decoding.num_beams))
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


def _by_beams(model, prompts: Iterable[Prompt], decoding: Decoding, stop_ids, rows: int) -> Iterator[Finished]:
    """Beam search with PaddleNLP's loop, `rows` prompts at a time."""
    source, index = iter(prompts), 0
    for batch in iter(lambda: list(islice(source, rows)), []):
        ids, mask = left_pad([prompt.ids for prompt in batch], model.config.pad_token_id or 0)
        images = np.concatenate([prompt.images for prompt in batch])
        new, scores = model.generate(
            paddle.to_tensor(ids),
            images=paddle.to_tensor(images) if len(images) else None,
            attention_mask=paddle.to_tensor(mask),
            decode_strategy="beam_search",
            eos_token_id=stop_ids,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.samples,
            length_penalty=decoding.length_penalty,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens,
            repetition_penalty=decoding.repetition_penalty,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size or None,
        )
        # PaddleNLP's softmax hides NaN logits.
        broken = paddle.stack(model.broken).any(axis=0).reshape([len(batch), -1]).any(axis=1).numpy()
        for at, (row, score) in enumerate(zip(new.tolist(), scores.flatten().tolist())):
            number, sample = divmod(at, decoding.samples)
            end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
            stop = row[end] if end < len(row) else None
            yield Finished(index + number, sample, row[:end], stop, score, NOT_FINITE if broken[number] else None)
        index += len(batch)
