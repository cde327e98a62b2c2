"""How much a caption depends on its image: the job of tools/score_rows.py.

A row's loss is that of training with `label_all_turn_markers` off: the mean over the caption's tokens and the end of
the turn. It is computed with the row's image and with a blank one; the difference is the gain. A caption that belongs
to another picture has a small gain.

Shared parts are computed once: the features of the blank image, and the keys and values of a question about it, which
the captions continue.

Shapes: B rows, T tokens, M tokens of a caption, S image side.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import paddle

from paddlemix.datasets.collator import MGenVLCollator
from paddlemix.datasets.rows import BAD_RECORD
from paddlemix.datasets.score_files import COLUMNS, read_scores
from paddlemix.datasets.tsv import TsvRow
from paddlemix.inference.captioner import MAX_BATCH, Answer, Sample, ahead, decoded, free_memory, rows_that_fit
from paddlemix.inference.loading import Loaded, load_model
from paddlemix.inference.prediction import RowJob, base64_or_answer
from paddlemix.inference.results import ResultsWriter
from paddlemix.inference.row_shards import Shard
from paddlemix.models.mgen_vl.engine import OUT_OF_MEMORY_TYPES, halved
from paddlemix.models.mgen_vl.language import KVCache
from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, encode_example
from paddlemix.utils.errors import UserError
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import decode_threads

NOT_A_NUMBER = "loss is not a number"
# For the collator: a sample without an image.
_NO_IMAGE = np.zeros(0, np.float32)
# Tokens listed per row.
_NAMED = 5
# Maximum tokens of one character.
_MOST_IN_CHARACTER = 4
# Assumed length of a caption, for the memory estimate.
_USUAL_TOKENS = 256
# Questions whose keys and values are cached.
_QUESTIONS = 4


class Losses(NamedTuple):
    """loss, blank_loss: float32 [M] each. ids: the M tokens. note: as in Answer."""

    loss: np.ndarray
    blank_loss: np.ndarray
    ids: np.ndarray
    note: Optional[str] = None


class _Pair(NamedTuple):
    """A row as model input. ids, labels: int64 [T]; begin: first position after the cached question."""

    ids: np.ndarray
    labels: np.ndarray
    begin: int
    pixels: np.ndarray
    note: Optional[str]

    def sample(self, begin: int, images: np.ndarray) -> Dict[str, np.ndarray]:
        return {"input_ids": self.ids[begin:], "labels": self.labels[begin:], "images": images}


class Scorer:
    """Scores captions under the same question for every image, unless a row has a prompt of its own.

    loaded: from load_model. prompt, system: see Captioner. batch_size: rows at a time (default: by memory), halved when
    memory runs out.

    Raises:
        UserError: the question alone is longer than max_length.
    """

    def __init__(
        self,
        loaded: Loaded,
        prompt: Optional[str] = None,
        system: Optional[str] = None,
        max_length: int = 2048,
        batch_size: Optional[int] = None,
    ):
        self.model, self.tokenizer, self.image_processor = loaded.model, loaded.tokenizer, loaded.image_processor
        self.template = loaded.template if system is None else loaded.template._replace(system=system)
        self.prompt, self.max_length, self.workers = prompt, max_length, decode_threads()
        self.collate = MGenVLCollator(
            self.tokenizer.pad_token_id or 0,
            image_start_id=self.tokenizer.img_start_id,
            n_queries=self.tokenizer.n_queries,
        )
        config = self.model.config
        fit = rows_that_fit(
            config, len(self._encoded(prompt, "")["input_ids"]), _USUAL_TOKENS, str(config.dtype),
            free_memory(paddle.get_device()), self.model.generates_fused(),
        )  # fmt: skip
        self.batch_size = batch_size or max(1, min(MAX_BATCH, fit // 2))
        self._blank: Any = None
        self._questions: Dict[Tuple[int, ...], Any] = {}

    def scores(self, rows: Iterable[Tuple[TsvRow, Any]]) -> Iterator[Union[Losses, Answer]]:
        """The Losses of each (row, base64 text of its image or an Answer), in order, or an Answer with the reason why
        there are none."""
        held: List[Union[_Pair, Answer]] = []
        pairs = 0
        sized = ((row, 0 if isinstance(row[1], Answer) else len(row[1])) for row in rows)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool, self.model.generating():
            for one in ahead(sized, self._prepare, pool):
                held.append(one)
                pairs += isinstance(one, _Pair)
                if pairs == self.batch_size:
                    yield from self._scored(held)
                    held, pairs = [], 0
            yield from self._scored(held)

    def _encoded(self, prompt: Optional[str], caption: str) -> Dict[str, Any]:
        turn = (DEFAULT_PROMPT if prompt is None else prompt, caption)
        return encode_example(
            self.tokenizer, [turn], 1, template=self.template, max_length=self.max_length, label_all_turn_markers=False
        )

    def _prepare(self, given: Tuple[TsvRow, Any]) -> Union[_Pair, Answer]:
        """Runs in a thread."""
        row, image = given
        image = image if isinstance(image, Answer) else decoded(image, (), self.image_processor)
        if not isinstance(image, Sample):
            return image
        try:
            encoded = self._encoded(row.prompt if self.prompt is None else self.prompt, row.text)
        except UserError:
            return Answer(None, BAD_RECORD)
        # The token before the caption predicts its first one.
        begin = int(np.argmax(encoded["labels"] >= 0)) - 1
        return _Pair(encoded["input_ids"], encoded["labels"], begin, image.pixels, image.note)

    def _scored(self, held: List[Union[_Pair, Answer]]) -> Iterator[Union[Losses, Answer]]:
        pairs = [one for one in held if isinstance(one, _Pair)]
        losses = iter(self._losses(pairs) if pairs else ())
        for one in held:
            yield one if isinstance(one, Answer) else Losses(*next(losses), one.ids[one.begin + 1 :], one.note)

    def _losses(self, pairs: List[_Pair]) -> List[Tuple[np.ndarray, np.ndarray]]:
        try:
            return list(zip(self._with_images(pairs), self._with_blank(pairs)))
        except OUT_OF_MEMORY_TYPES as error:
            half = halved(len(pairs), error)
        # Outside the except block, whose traceback would keep the tensors of the failed attempt alive.
        self.batch_size = min(self.batch_size, half)
        return self._losses(pairs[:half]) + self._losses(pairs[half:])

    @paddle.no_grad()
    def _with_images(self, pairs: List[_Pair]) -> List[np.ndarray]:
        batch = self.collate([pair.sample(0, pair.pixels[None]) for pair in pairs])
        ids, images, mask = (paddle.to_tensor(batch[name]) for name in ("input_ids", "images", "attention_mask"))
        embeds = self.model.embed(ids, images, places=batch["image_positions"])
        return self._by_row(self.model.transformer.llm(embeds, mask), batch)

    @paddle.no_grad()
    def _with_blank(self, pairs: List[_Pair]) -> List[np.ndarray]:
        found: Dict[int, np.ndarray] = {}
        groups: Dict[Tuple[int, ...], List[int]] = {}
        for number, pair in enumerate(pairs):
            groups.setdefault(tuple(pair.ids[: pair.begin].tolist()), []).append(number)
        llm, fused = self.model.transformer.llm, self.model.config.use_flash_attention
        for question, members in groups.items():
            cache = self._question(question).reordered(paddle.zeros([len(members)], "int64"))
            batch = self.collate([pairs[i].sample(pairs[i].begin, _NO_IMAGE) for i in members])
            # The fused kernel does not help few queries with many keys. Padding comes last and is not attended to.
            self.model.fuse(False)
            try:
                hidden = llm(llm.wte(paddle.to_tensor(batch["input_ids"])), cache=cache)
            finally:
                self.model.fuse(fused)
            found.update(zip(members, self._by_row(hidden, batch)))
        return [found[number] for number in range(len(pairs))]

    def _question(self, ids: Tuple[int, ...]):
        """The KVCache of a question about the blank image."""
        if ids not in self._questions:
            if self._blank is None:
                self._blank = self.model.visual(paddle.to_tensor(self.image_processor.blank()[None]))
            if len(self._questions) == _QUESTIONS:
                self._questions.clear()
            cache = KVCache()
            self.model.transformer.llm(
                self.model.embed(paddle.to_tensor([ids]), image_features=self._blank), cache=cache
            )
            self._questions[ids] = cache
        return self._questions[ids]

    def _by_row(self, hidden, batch: Dict[str, Any]) -> List[np.ndarray]:
        """The losses of each row's caption: float32 [M]."""
        places, labels = batch["label_positions"], batch["labels"]
        losses = self.model.token_losses(hidden, paddle.to_tensor(labels), paddle.to_tensor(places)).numpy().flatten()
        return np.split(losses, np.searchsorted(places, np.arange(1, len(labels)) * labels.shape[1]))

    def line(self, name: str, score: Union[Losses, Answer]) -> Tuple[str, Optional[str]]:
        """(COLUMNS of a row, joined by tabs; its note)."""
        if isinstance(score, Answer):
            return f"\t\t\t{score.note}", score.note
        loss, blank = float(score.loss.mean()), float(score.blank_loss.mean())
        if not np.isfinite((loss, blank)).all():
            return f"\t\t\t{NOT_A_NUMBER}", NOT_A_NUMBER
        tokens = json.dumps(self._costly(score), ensure_ascii=False)
        return f"{loss:.6f}\t{blank:.6f}\t{blank - loss:.6f}\t{tokens}", score.note

    def _costly(self, score: Losses) -> List[Tuple[str, float]]:
        """The texts with the highest losses, by token; tokens of one character are joined."""
        pieces: List[Tuple[str, float]] = []
        ids, begin = score.ids.tolist(), 0
        while begin < len(ids):
            for end in range(begin + 1, min(begin + _MOST_IN_CHARACTER, len(ids)) + 1):
                text = self.tokenizer.decode(ids[begin:end])
                if "\ufffd" not in text:
                    break
            pieces.append((text, round(float(score.loss[begin:end].sum()), 3)))
            begin = end
        return sorted(pieces, key=lambda piece: -piece[1])[:_NAMED]


def score_file(
    model: str,
    data: str,
    output: str,
    prompt: Optional[str] = None,
    system: Optional[str] = None,
    max_length: int = 2048,
    batch_size: Optional[int] = None,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    restart: bool = False,
    shard: Optional[Shard] = None,
    lora_path: Optional[str] = None,
) -> None:
    """Write a line of COLUMNS for each row of `data`; see tools/score_rows.py --help, and predict_file for the rest.

    Raises:
        UserError: bad arguments, data or model.
        JobFailed: the disk is full, memory runs out, the data changes while it is read, or no row got a score.
    """
    settings = {
        "columns": len(COLUMNS), "prompt": prompt, "system": system, "max_length": max_length, "dtype": dtype,
    }  # fmt: skip
    job = RowJob(data, output, model, lora_path, settings, shard, "MODEL DATA OUT", want_caption=True)
    if not restart and job.is_done():
        return
    with ResultsWriter(job.output, job.run, restart) as results:
        rows = job.rows(results)
        scorer = Scorer(load_model(job.source, dtype, device), prompt, system, max_length, batch_size)
        logger.info("%d rows at a time, images decoded by %d threads", scorer.batch_size, scorer.workers)
        job.answer(rows, results, lambda row: (row, base64_or_answer(row)), scorer.scores, scorer.line, "scores")
        job.finish(rows, results)
    job.report(rows, results)
    _summarise(job.output)


def _summarise(path: str) -> None:
    values = np.array([score for _, score in read_scores(path) if score is not None]).reshape(-1, 3)
    if len(values):
        loss, blank, gain = values.mean(axis=0)
        low = np.percentile(values[:, 2], 5)
        print(f"{path}: {len(values)} rows scored, mean loss {loss:.4f}, with a blank image {blank:.4f}")
        print(f"mean gain {gain:.4f}; 5 % of the rows gain less than {low:.4f}")
