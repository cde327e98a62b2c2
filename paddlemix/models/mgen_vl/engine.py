"""Greedy decoding and sampling with continuous batching (Yu et al. 2022, "Orca", OSDI) in plain Paddle operators: a
finished row frees its slot for the next, so that no row waits for the longest of a batch.

The cache is a ring buffer. A step writes one column for all slots, wherever their rows started, and a row of n tokens
owns the n columns before the next one to write: keys contain their rotary positions, so their columns do not matter.
Prompts are computed in groups; rows without a free slot wait with their keys and values.

A row is decoded as if it were alone, with its own positions, limits, stop ids and random numbers.

Shapes: A slots, B rows of a group, T prompt tokens, S columns of the ring, H heads, d head width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Callable, Deque, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import paddle
import paddle.nn.functional as F

from paddlemix.models.mgen_vl.attention import compute_dtype, spread
from paddlemix.models.mgen_vl.language import MASKED
from paddlemix.models.mgen_vl.slot_cache import PromptCache, SlotCache
from paddlemix.processors.mgen_vl_processing import image_positions
from paddlemix.utils.compat import full_precision
from paddlemix.utils.errors import JobFailed
from paddlemix.utils.log import logger

# Maximum prompts computed together.
GROUP = 4
# Maximum tokens of detected cycles; cycles of digits count only beyond the length of prices and phone numbers.
_LONGEST_CYCLE, _LONGEST_NUMBER = 16, 24
# Decoding.stop_repeating of captions.
STOP_REPEATING = 4
# Notes of rows that ended neither by a stop id nor by their limit.
STUCK, NOT_FINITE = "repeats itself", "not a number"


# Paddle's allocator raises a MemoryError; errors of CUDA and its libraries are OSErrors.
OUT_OF_MEMORY_TYPES = (MemoryError, OSError, RuntimeError, SystemError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Paddle or Python ran out of memory; except for MemoryError, only an error's text tells."""
    signs = ("out of memory", "resourceexhausted", "bad_alloc", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def halved(rows: int, error: BaseException) -> int:
    """Half the number of rows, with which memory ran out. Other errors are raised again.

    Raises:
        JobFailed: memory ran out with one row.
    """
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise JobFailed("out of memory with one row at a time; a lower max_new_tokens needs less") from error
    logger.warning("out of memory with %d rows at a time; continuing with %d", rows, (rows + 1) // 2)
    return (rows + 1) // 2


class Prompt(NamedTuple):
    """One row. ids [T] before the answer; images of its spans, float32 [n, 3, S, S] (arrays or tensors), or their
    features [n, Q, D] (tensors). key: with the seed, it determines the random numbers (default: the row's index)."""

    ids: Sequence[int]
    images: Any = ()
    features: Any = None
    key: Optional[int] = None


class Decoding(NamedTuple):
    """How tokens are chosen: the most probable one, or with `sample` at random from the `top_k` most probable (0: all)
    and among those from the smallest set with total probability `top_p`, with logits divided by `temperature`.

    repetition_penalty: divides positive logits of the row's tokens so far, prompt included, and multiplies negative
    ones (Keskar et al. 2019). no_repeat_ngram_size: no n-gram of the row occurs twice. samples: answers to each prompt.
    stop_repeating: end an answer whose last tokens are this many repeats of a cycle, and keep one of them (0: never).
    num_beams, length_penalty: of PaddleNLP's beam search, which excludes sampling.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    samples: int = 1
    stop_repeating: int = 0
    num_beams: int = 1
    length_penalty: float = 0.0


class Finished(NamedTuple):
    """The answer to prompt `index`. ids: without the stop id; stop: that id, None if the answer was cut off. score:
    mean log-probability of its tokens, including the stop id (nan unless computed). note: why it ended early."""

    index: int
    sample: int
    ids: List[int]
    stop: Optional[int]
    score: float
    note: Optional[str] = None


class _Row:
    """An answer being decoded."""

    def __init__(self, index: int, sample: int, prompt: Prompt, seed: int):
        self.index, self.sample, self.prompt = index, sample, prompt
        self.tokens: List[int] = []
        # Log-probabilities of the tokens so far, including a stop id.
        self.scores: List[float] = []
        self.alpha = 1
        self.random = np.random.default_rng([seed, index if prompt.key is None else prompt.key, sample])
        # n-gram without its last token → last tokens; see Engine._forbidden.
        self.followers: dict = {}
        self.counted = 0


class Engine:
    """Decodes any number of prompts, `slots` rows at a time.

    model: a MGenLMHeadModel in eval mode. stop_ids: each of them ends an answer, and so does the sequence `ending`.
    scores: compute log-probabilities. is_number: whether ids spell a number (for stop_repeating). When memory runs out,
    unfinished rows restart in half the slots.

    on_token: called with each token of each row, including the stop id.

    steps, busy, filled, waited: number of steps; rows decoded in them; of the steps with rows waiting for a slot, the
    rows decoded and the number of steps.
    """

    def __init__(
        self,
        model: Any,
        decoding: Decoding,
        stop_ids: Sequence[int],
        slots: int,
        ending: Sequence[int] = (),
        scores: bool = False,
        is_number: Callable[[Sequence[int]], bool] = lambda ids: False,
    ):
        self.model, self.decoding, self.scores = model, decoding, scores
        self.stop_ids, self.ending = set(stop_ids), list(ending)
        self.slots, self.is_number = slots, is_number
        self.on_token: Callable[[int], None] = lambda token: None
        self.steps = self.busy = self.filled = self.waited = 0
        self._ended = False
        self._tables: dict = {}

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Finished]:
        """The answers, as each is finished. Prompts are read as slots become free.

        Raises:
            UserError: the spans in a prompt do not match its images.
        """
        source = enumerate(prompts)
        again: Deque[Tuple[int, Prompt, List[int]]] = deque()
        while True:
            # Rows in slots, and rows waiting for one with their keys and values.
            self._rows: List[Optional[_Row]] = [None] * self.slots
            self._ready: Deque[Tuple[_Row, PromptCache, int, int]] = deque()
            self._cache, self._done = SlotCache(self.slots), deque()
            if again and paddle.get_device().startswith("gpu"):
                # The failed attempt's tensors are no longer referenced.
                paddle.device.cuda.empty_cache()
            try:
                while self._advance(source, again):
                    while self._done:
                        yield self._done.popleft()
                return
            except OUT_OF_MEMORY_TYPES as error:
                # Fewer than `slots` once no rows are waiting.
                self.slots = halved(len(self._rows), error)
            # Outside the except block, whose traceback would keep the tensors of the failed attempt alive.
            while self._done:
                yield self._done.popleft()
            rows = [row for row in self._rows if row is not None] + [entry[0] for entry in self._ready]
            unfinished: dict = {}
            for row in rows + self._starting:
                unfinished.setdefault(row.index, (row.prompt, set()))[1].add(row.sample)
            again.extendleft((index, *unfinished[index]) for index in sorted(unfinished, reverse=True))
            self._tables.clear()

    @paddle.no_grad()
    def _advance(self, source, again) -> bool:
        """Fill free slots and make one step. Returns False when everything is done."""
        self._starting: List[_Row] = []
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        while free:
            while free and self._ready:
                row, prompts, place, length = self._ready.popleft()
                # Before its keys are copied: if memory runs out there, the row restarts like the others.
                self._rows[free[0]] = row
                self._cache.put(free.pop(0), prompts, place, length)
            if not free or not self._prefill(source, again):
                break
        active = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not active:
            return bool(self._done)
        if len(active) <= len(self._rows) // 2 and not self._ready:
            # No rows are left for the other slots.
            self._cache.keep(active)
            self._rows = [self._rows[slot] for slot in active]
            active = list(range(len(active)))
        self._step(active)
        return True

    def _prefill(self, source, again) -> bool:
        """Compute the prompts of the next group. Returns False if there is none."""
        group: List[Tuple[int, Prompt, Sequence[int]]] = []
        most = max(1, min(GROUP, self.slots) // self.decoding.samples)
        while len(group) < most:
            if again:
                group.append(again.popleft())
                continue
            following = next(source, None)
            if following is None:
                self._ended = True
                break
            group.append((*following, range(self.decoding.samples)))
        if not group:
            return False
        self._starting = [
            _Row(index, sample, prompt, self.decoding.seed) for index, prompt, samples in group for sample in samples
        ]
        prompts = [prompt for _, prompt, _ in group]
        ids, mask = left_pad([prompt.ids for prompt in prompts], self.model.config.pad_token_id or 0)
        cache, config = PromptCache(), self.model.config
        n_images = sum(len(prompt.images if prompt.features is None else prompt.features) for prompt in prompts)
        output = self.model(
            paddle.to_tensor(ids),
            attention_mask=paddle.to_tensor(mask),
            image_positions=paddle.to_tensor(image_positions(ids, n_images, config.image_start_id, config.n_queries)),
            image_features=features_of(self.model, prompts),  # last: copying from the host waits for what runs
            past_key_values=cache,
            use_cache=True,
            last_logits_only=True,
        )
        place = {index: at for at, (index, _, _) in enumerate(group)}
        lines = [place[row.index] for row in self._starting]
        logits = output.logits[:, 0]
        if len(lines) != len(group):
            logits = paddle.index_select(logits, paddle.to_tensor(np.array(lines, dtype=np.int64)))
        going_on = self._take(logits, self._starting)
        for row, at in zip(self._starting, lines):
            row.alpha = cache.alphas[at] if len(cache.alphas) > 1 else cache.alphas[0]
            if row in going_on:
                self._ready.append((row, cache, at, len(row.prompt.ids)))
        self._starting = []
        return True

    def _step(self, active: List[int]) -> None:
        cache, llm = self._cache, self.model.transformer.llm
        cache.fit()
        last = np.zeros([len(self._rows), 1], dtype=np.int64)
        for slot in active:
            last[slot] = self._rows[slot].tokens[-1]
        embeds = llm.wte(paddle.to_tensor(last))
        cos, sin = self._factors(llm, embeds)
        hidden = llm.through(embeds, cos, sin, paddle.to_tensor(cache.bias()), cache)
        cache.advance(active)
        waiting = bool(self._ready) or not self._ended
        self.steps += 1
        self.busy += len(active)
        self.waited += waiting
        self.filled += len(active) * waiting
        going_on = self._take(self.model._logits(hidden)[:, 0], self._rows)
        for slot in active:
            if self._rows[slot] not in going_on:
                self._rows[slot] = None
                cache.lengths[slot] = 0

    def _factors(self, llm, embeds):
        """attention_factors of each slot's next position: two [A, 3, H, 1, d]."""
        alphas = sorted({row.alpha for row in self._rows if row is not None})
        table = self._tables.get((tuple(alphas), self._cache.columns))
        if table is None:
            positions = paddle.arange(self._cache.columns).unsqueeze(0)
            dtype = compute_dtype(embeds)
            with full_precision():
                parts = [llm.factors(positions, [alpha], self._cache.columns, False, dtype) for alpha in alphas]
            # [positions of the first alpha, of the second, …, 3, 1 or H, 1, d]
            table = [paddle.concat(part, axis=3).astype(embeds.dtype) for part in zip(*parts)]
            table = [part.transpose([3, 0, 1, 2, 4]).contiguous() for part in table]
            table = [spread(part, [*part.shape[:2], llm.h[0].attn.num_heads, *part.shape[3:]]) for part in table]
            self._tables = {(tuple(alphas), self._cache.columns): table}
        where = self._cache.lengths.copy()
        for slot, row in enumerate(self._rows):
            if row is not None:
                where[slot] += alphas.index(row.alpha) * self._cache.columns
        where = paddle.to_tensor(where)
        return [paddle.index_select(part, where) for part in table]

    def _take(self, logits, rows: Sequence[Optional[_Row]]) -> List[_Row]:
        """Choose a token for each row from logits [len(rows), V]; rows that end with it go to `_done`. Returns the
        others."""
        decoding = self.decoding
        logits = logits.astype("float32")
        if decoding.repetition_penalty != 1.0:
            logits = self._penalised(logits, rows)
        forbidden = [at * logits.shape[1] + i for at, row in enumerate(rows) if row for i in self._forbidden(row)]
        if forbidden:
            flat, where = logits.reshape([-1]), paddle.to_tensor(np.array(forbidden, dtype=np.int64))
            masked = paddle.full([len(forbidden)], MASKED, logits.dtype)
            logits = paddle.scatter(flat, where, masked).reshape(logits.shape)
        chosen = self._sampled(logits, rows) if decoding.sample else logits.argmax(-1, keepdim=True)
        # A hidden state that is not finite makes all logits of its row NaN, so the chosen one tells.
        columns = [chosen.astype("float32"), paddle.index_sample(logits, chosen)]
        if self.scores:
            columns.append(F.cross_entropy(logits, chosen, reduction="none"))
        # The only synchronisation with the device. float32 represents ids up to 16 million.
        values, taken, *losses = paddle.concat(columns, axis=1).numpy().T
        broken = np.logical_not(np.isfinite(taken))
        scores = -losses[0] if losses else [float("nan")] * len(rows)
        going_on = []
        for row, token, is_broken, score in zip(rows, values.tolist(), broken.tolist(), scores):
            if row is not None and not self._ends(row, int(token), is_broken, float(score)):
                going_on.append(row)
        return going_on

    def _ends(self, row: _Row, token: int, broken: bool, score: float) -> bool:
        """Add a token to a row. Returns whether it is the last one."""
        if broken:
            self._finish(row, row.tokens, None, NOT_FINITE)
            return True
        row.scores.append(score)
        self.on_token(token)
        if token in self.stop_ids:
            self._finish(row, row.tokens, token)
            return True
        row.tokens.append(token)
        n, repeats = len(self.ending), self.decoding.stop_repeating
        if n and row.tokens[-n:] == self.ending:
            self._finish(row, row.tokens[:-n], token)
        elif len(row.tokens) >= self.decoding.max_new_tokens:
            self._finish(row, row.tokens, None)
        elif repeats and (period := _cycle(row.tokens, repeats, self.is_number)):
            first = len(row.tokens)
            while first > period and row.tokens[first - 1] == row.tokens[first - 1 - period]:
                first -= 1
            self._finish(row, row.tokens[:first], None, STUCK)
        else:
            return False
        return True

    def _finish(self, row: _Row, ids: List[int], stop: Optional[int], note: Optional[str] = None) -> None:
        scores = row.scores[: len(ids)] if note == STUCK else row.scores
        score = sum(scores) / len(scores) if scores else 0.0
        self._done.append(Finished(row.index, row.sample, list(ids), stop, score, note))

    def _forbidden(self, row: _Row) -> List[int]:
        """Ids excluded as the row's next token."""
        least, begun = self.decoding.min_new_tokens, len(self.ending) - 1
        found = list(self.stop_ids) if len(row.tokens) < least else []
        if begun > 0 and len(row.tokens) - begun < least and row.tokens[-begun:] == self.ending[:-1]:
            found.append(self.ending[-1])
        n = self.decoding.no_repeat_ngram_size
        if n:
            ids = [*row.prompt.ids, *row.tokens]
            for end in range(max(row.counted, n), len(ids) + 1):
                row.followers.setdefault(tuple(ids[end - n : end - 1]), []).append(ids[end - 1])
            row.counted = len(ids) + 1
            found += row.followers.get(tuple(ids[len(ids) - n + 1 :]), ())
        return found

    def _penalised(self, logits, rows: Sequence[Optional[_Row]]):
        seen = [sorted({*row.prompt.ids, *row.tokens}) if row else [0] for row in rows]
        longest = max(map(len, seen))
        # Padded with duplicate ids, which get the same value.
        where = paddle.to_tensor(np.array([ids + ids[-1:] * (longest - len(ids)) for ids in seen], dtype=np.int64))
        values = paddle.take_along_axis(logits, where, 1)
        penalty = self.decoding.repetition_penalty
        return paddle.put_along_axis(logits, where, paddle.where(values < 0, values * penalty, values / penalty), 1)

    def _sampled(self, logits, rows: Sequence[Optional[_Row]]):
        decoding = self.decoding
        width = logits.shape[1]
        values, ids = paddle.topk(logits / decoding.temperature, min(decoding.top_k or width, width), axis=-1)
        probabilities = F.softmax(values, axis=-1)
        sums = probabilities.cumsum(-1)
        if decoding.top_p < 1.0:
            # Keep tokens before which the cumulative probability is below top_p.
            probabilities = paddle.where(
                sums - probabilities < decoding.top_p, probabilities, paddle.zeros_like(probabilities)
            )
            sums = probabilities.cumsum(-1)
        chance = np.array([[row.random.random() if row else 0.0] for row in rows], dtype=np.float32)
        place = (sums <= paddle.to_tensor(chance) * sums[:, -1:]).astype("int64").sum(-1, keepdim=True)
        # Rounding may reach the full sum: clip to the last possible token.
        last = ((probabilities > 0).astype("int64").sum(-1, keepdim=True) - 1).clip(min=0)
        return paddle.take_along_axis(ids, paddle.minimum(place, last), 1)


def _cycle(tokens: List[int], repeats: int, is_number: Callable[[Sequence[int]], bool]) -> int:
    """The length of the cycle that the last tokens repeat `repeats` times; 0 if there is none."""
    for period in range(1, min(_LONGEST_CYCLE, len(tokens) // repeats) + 1):
        if tokens[-period * (repeats - 1) :] == tokens[-period * repeats : -period]:
            if not is_number(tokens[-period:]):
                return period
            if tokens[-_LONGEST_NUMBER:] == tokens[-_LONGEST_NUMBER - period : -period]:
                return period
    return 0


def features_of(model: Any, prompts: Sequence[Prompt]):
    """Image features of several prompts, [N, Q, D] in the order of their spans, or None."""
    given = [prompt.features for prompt in prompts if prompt.features is not None]
    if given:
        return paddle.concat(given)
    images = [prompt.images for prompt in prompts if len(prompt.images)]
    if not images:
        return None
    on_host = isinstance(images[0], np.ndarray)
    return model.visual(paddle.to_tensor(np.concatenate(images)) if on_host else paddle.concat(images))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> Tuple[np.ndarray, np.ndarray]:
    """(ids int64 [B, T], mask int64 [B, T], 0 for padding) of rows of different lengths, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask
