"""Captions of the validation set during training: generated in batches, scored with CIDEr, written if wanted."""

from __future__ import annotations

from itertools import groupby
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from paddlemix.datasets.chatml import Question
from paddlemix.datasets.collator import Failure
from paddlemix.metrics.captions import score_captions
from paddlemix.models.mgen_vl.captioning import Decoding, Prompt, generate_captions
from paddlemix.processors.postprocess import single_line, without_grounding
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
        self.dataset = dataset
        self.tokenizer = tokenizer
        strategy = "greedy_search" if generation.top_k == 1 else "sampling"
        self.decoding = Decoding(generation.max_new_tokens, strategy, generation.top_k, generation.top_p)
        self.batch_size = batch_size
        self.limit = len(dataset) if limit is None else min(limit, len(dataset))

    def captions(self, model, between: Callable[[], None] = lambda: None) -> List[Caption]:
        """What `model`, a MGenLMHeadModel, says about each sample. between: called before each batch."""
        found: List[Caption] = []
        for begin in range(0, self.limit, self.batch_size):
            between()
            samples = []
            for index in range(begin, min(begin + self.batch_size, self.limit)):
                question = self.dataset.attempt(index, "it gets no caption", self.dataset.question)
                if not isinstance(question, Failure):
                    samples.append((index, question))
            for _, group in groupby(samples, key=lambda sample: sample[1].template):
                found += self._generate(model, list(group))
        return found

    def _generate(self, model, samples: List[Tuple[int, Question]]) -> List[Caption]:
        prompts = [Prompt(question.ids, question.images) for _, question in samples]
        texts = generate_captions(model, self.tokenizer, prompts, self.decoding, samples[0][1].template)
        return [
            Caption(f"{single_line(asked.id)}#{index}", text, single_line(without_grounding(asked.answer)))
            for (index, asked), text in zip(samples, texts)
        ]

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
