"""Captions of the validation set during training: generated in batches, scored with CIDEr, written if wanted."""

from __future__ import annotations

from itertools import groupby
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from paddlemix.datasets.chatml import Question
from paddlemix.datasets.collator import Failure
from paddlemix.metrics.captions import score_captions
from paddlemix.models.mgen_vl.captioning import generate_captions
from paddlemix.models.mgen_vl.engine import STOP_REPEATING, Decoding, Prompt
from paddlemix.processors.postprocess import single_line, without_grounding
from paddlemix.trainer.keys import Arguments
from paddlemix.utils.errors import UserError
from paddlemix.utils.files import atomic_write


class Caption(NamedTuple):
    """One validation row: its id, the generated caption and the reference."""

    id: str
    text: str
    reference: str


def _prompts(group: Iterable[Tuple[int, Question]], asked: List[Caption]) -> Iterator[Prompt]:
    """Prompts of questions, each recorded in `asked` as a Caption without text."""
    for index, question in group:
        name, reference = single_line(question.id), single_line(without_grounding(question.answer))
        asked.append(Caption(f"{name}#{index}", "", reference))
        yield Prompt(question.ids, question.images, key=index)


def caption_count(arguments: Arguments, samples: int) -> int:
    """How many captions an evaluation of so many validation samples generates."""
    data, training = arguments.data, arguments.training
    if not data.eval_with_do_generation:
        return 0 if training.benchmark else min(data.shown_captions, samples)
    batches = training.max_evaluate_steps
    return min(batches * training.per_device_eval_batch_size, samples) if batches > 0 else samples


class CaptionEvaluator:
    """Generates the first caption of each validation sample.

    dataset: a ChatmlDataset, whose unreadable samples are left out. limit: samples at most. scored, saved: whether
    the captions are scored, and written. shown: how many are shown.
    """

    def __init__(self, dataset, tokenizer, arguments: Arguments):
        _, data, generation, training = arguments[:4]
        self.dataset, self.tokenizer = dataset, tokenizer
        self.decoding = Decoding(
            generation.max_new_tokens,
            sample=generation.top_k != 1,
            top_k=generation.top_k,
            top_p=generation.top_p,
            stop_repeating=STOP_REPEATING,
        )
        self.batch_size = training.per_device_eval_batch_size
        self.scored, self.saved = data.eval_with_do_generation, data.save_generation_output
        self.shown = 0 if training.benchmark else data.shown_captions
        self.limit = caption_count(arguments, len(dataset))

    def captions(
        self, model, between: Callable[[], None] = lambda: None, done: Callable[[], None] = lambda: None
    ) -> List[Caption]:
        """Captions of each sample by `model`, a MGenLMHeadModel.

        between: called before each sample is read. done: called for each caption.
        """
        found: List[Caption] = []
        for template, group in groupby(self._questions(between), key=lambda sample: sample[1].template):
            asked: List[Caption] = []
            answers = generate_captions(
                model, self.tokenizer, _prompts(group, asked), self.decoding, self.batch_size, template
            )
            texts = {}
            for number, candidates in answers:
                texts[number] = candidates[0].text
                done()
            found += [one._replace(text=texts[number]) for number, one in enumerate(asked)]
        return found

    def _questions(self, between: Callable[[], None]) -> Iterator[Tuple[int, Question]]:
        for index in range(self.limit):
            between()
            question = self.dataset.attempt(index, "it gets no caption", self.dataset.question)
            if not isinstance(question, Failure):
                yield index, question

    def thumbnail(self, name: str, side: int = 224) -> Optional[np.ndarray]:
        """The first image of a Caption's sample: uint8 [h, w, 3], subsampled to at most `side`; None without images."""
        images = self.dataset.sample(int(name.rpartition("#")[2]))["images"]
        if not len(images):
            return None
        step = -(-images[0].shape[1] // side)
        return np.ascontiguousarray(self.dataset.image_processor.picture(images[0])[::step, ::step])

    @staticmethod
    def score(found: List[Caption], output_path: Optional[str] = None) -> Dict[str, float]:
        """{"eval_cider": …}: CIDEr-D × 10 over characters, as pycocoevalcap prints CIDEr.

        output_path: where to write `id \\t caption \\t reference` lines.
        """
        scored = [caption for caption in found if caption.reference]
        if not scored:
            raise UserError("eval_with_do_generation: no validation sample could be read")
        scores = score_captions(
            {caption.id: caption.text for caption in scored}, {caption.id: [caption.reference] for caption in scored}
        )
        if output_path is not None:
            with atomic_write(output_path) as file:
                file.writelines(f"{one.id}\t{one.text}\t{one.reference}\n" for one in found)
        return {"eval_cider": round(scores.corpus["CIDEr-D"], 6)}
