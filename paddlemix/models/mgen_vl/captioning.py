"""Prompts with images to captions: the one way in which prediction and evaluation generate.

Shapes: B rows, T padded prompt length, n images of a row, S image side.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import paddle

from paddlemix.models.mgen_vl.generation import decode_response
from paddlemix.processors.mgen_vl_processing import ChatTemplate
from paddlemix.processors.postprocess import single_line, without_grounding


class Prompt(NamedTuple):
    """One row: ids [T] up to where the answer begins, and the images of its spans, float32 [n, 3, S, S]."""

    ids: Sequence[int]
    images: np.ndarray


class Decoding(NamedTuple):
    """How captions are chosen. keep_boxes: `<ref>`, `<box>` and `<quad>` stay in them, as text."""

    max_new_tokens: int
    decode_strategy: str = "greedy_search"
    top_k: int = 1
    top_p: float = 1.0
    keep_boxes: bool = False


def generate_captions(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], decoding: Decoding, template: Optional[ChatTemplate] = None
) -> List[str]:
    """A caption for each prompt, in order, one line each; "" where the model says nothing.

    A greedy caption does not depend on the others of the call. template: the prompts'; None for the default.
    """
    stop_ids = model.stop_ids(tokenizer, template)
    ids, mask = left_pad([prompt.ids for prompt in prompts], tokenizer.pad_token_id)
    images = np.concatenate([prompt.images for prompt in prompts])
    options = {} if decoding.decode_strategy == "greedy_search" else {"top_k": decoding.top_k, "top_p": decoding.top_p}
    new_ids, _ = model.generate(
        paddle.to_tensor(ids),
        images=paddle.to_tensor(images) if len(images) else None,
        attention_mask=paddle.to_tensor(mask),
        max_new_tokens=decoding.max_new_tokens,
        decode_strategy=decoding.decode_strategy,
        eos_token_id=stop_ids,
        **options,
    )
    ending = () if template is None else template.ending(tokenizer)
    return [caption(tokenizer, row, stop_ids, ending, decoding.keep_boxes) for row in new_ids.tolist()]


def caption(tokenizer: Any, ids: Sequence[int], stop_ids, ending=(), keep_boxes: bool = False) -> str:
    """Generated ids as a caption: the answer in one line, without image tags and, unless asked for, without boxes."""
    # Image tags as tokens are no words; where an answer spells them, they are ordinary ids.
    ids = [i for i in ids if i not in (tokenizer.img_start_id, tokenizer.img_end_id, tokenizer.img_pad_id)]
    text = decode_response(tokenizer, ids, stop_ids, ending)
    return single_line(text if keep_boxes else without_grounding(text))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tuple[np.ndarray, np.ndarray]:
    """(ids int64 [B, T], mask int64 [B, T], 0 on the padding) of rows of different lengths."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask
