"""Captions of the validation set during training: generated in batches, scored with CIDEr, written if wanted.

Shapes: B samples, T padded prompt length, N images, S image side.
"""

from __future__ import annotations

import copy
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import paddle

from paddlemix.metrics.captions import score_captions
from paddlemix.models.mgen_vl.generation import decode_response
from paddlemix.processors.mgen_vl_processing import IGNORE_INDEX, clean_caption
from paddlemix.trainer.keys import GenerationArguments
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import atomic_write


class Caption(NamedTuple):
    """One validation row: its id, what the model says, what the data says."""

    id: str
    text: str
    reference: str


class CaptionEvaluator:
    """Generates the first caption of each validation sample.

    dataset: a ChatmlDataset. limit: most samples looked at, None for all. A sample that cannot be read is left out.
    """

    def __init__(self, dataset, tokenizer, generation: GenerationArguments, batch_size: int, limit: Optional[int]):
        # The first labelled position must be where the caption begins, whatever training labels besides.
        self.dataset = copy.copy(dataset)
        self.dataset.label_all_turn_markers = False
        self.tokenizer = tokenizer
        self.generation = generation
        self.batch_size = batch_size
        self.limit = len(dataset) if limit is None else min(limit, len(dataset))

    def captions(self, model, between: Callable[[], None] = lambda: None) -> List[Caption]:
        """What `model`, a MGenLMHeadModel, says about each sample. between: called before each batch."""
        found: List[Caption] = []
        for begin in range(0, self.limit, self.batch_size):
            between()
            samples = []
            for index in range(begin, min(begin + self.batch_size, self.limit)):
                try:
                    record = self.dataset.record(index)
                    samples.append((f"{record.id}#{index}", record.turns[0][1], self.dataset.sample(index)))
                except UserError:
                    continue
            if samples:
                texts = self._generate(model, [sample for _, _, sample in samples])
                found += [Caption(name, text, clean_caption(truth)) for (name, truth, _), text in zip(samples, texts)]
        return found

    def _generate(self, model, samples: List[Dict[str, np.ndarray]]) -> List[str]:
        prompts = [sample["input_ids"][: np.argmax(sample["labels"] != IGNORE_INDEX)] for sample in samples]
        T = max(map(len, prompts))
        ids = np.full([len(prompts), T], self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, T - len(prompt) :] = prompt
            mask[row, T - len(prompt) :] = 1
        # Spans of later turns lie behind the prompt; their images go with them.
        spans = [int((prompt == self.tokenizer.img_start_id).sum()) for prompt in prompts]
        images = np.concatenate([sample["images"][:count] for sample, count in zip(samples, spans)])
        settings = self.generation
        stop_ids = model.stop_ids(self.tokenizer)
        new_ids, _ = model.generate(
            paddle.to_tensor(ids),
            images=paddle.to_tensor(images) if len(images) else None,
            attention_mask=paddle.to_tensor(mask),
            max_new_tokens=settings.max_new_tokens,
            decode_strategy="greedy_search" if settings.top_k == 1 else "sampling",
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=stop_ids,
        )
        return [clean_caption(decode_response(self.tokenizer, row, stop_ids)) for row in new_ids.tolist()]

    def thumbnail(self, name: str, side: int = 224) -> Optional[np.ndarray]:
        """The first image of the sample behind a Caption's id: uint8 [h, w, 3], thinned out to at most `side`.

        None when the sample is text alone.
        """
        images = self.dataset.sample(int(name.rpartition("#")[2]))["images"]
        if not len(images):
            return None
        step = -(-images[0].shape[1] // side)
        return np.ascontiguousarray(self.dataset.image_processor.picture(images[0])[::step, ::step])

    def evaluate(
        self, model, output_path: Optional[str] = None, between: Callable[[], None] = lambda: None
    ) -> Tuple[Dict[str, float], List[Caption]]:
        """({"eval_cider": …}, captions). eval_cider is CIDEr-D × 10 over characters, as pycocoevalcap prints CIDEr.

        output_path: where to write `id \\t caption \\t reference` lines. between: as `captions` takes it.
        """
        found = self.captions(model, between)
        scored = [caption for caption in found if caption.reference]
        if not scored:
            raise UserError("eval_with_do_generation: no validation sample could be read")
        scores = score_captions(
            {caption.id: caption.text for caption in scored}, {caption.id: [caption.reference] for caption in scored}
        )
        if output_path is not None:
            with atomic_write(output_path) as file:
                file.writelines(f"{one.id}\t{one.text}\t{one.reference}\n" for one in found)
        return {"eval_cider": round(scores.corpus["CIDEr-D"], 6)}, found
