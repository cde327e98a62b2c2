"""generate and chat: greedy search and sampling by the engine, beam search by PaddleNLP's loop over our cache.

For the latter, this module has the model's part: the inputs of each step, the cache and its reordering.

Shapes: B rows, T prompt tokens, N images, Q queries, D hidden.
"""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from typing import Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import paddle
from paddlenlp.generation import GenerationConfig

from paddlemix.models.mgen_vl.engine import (
    NOT_FINITE,
    OUT_OF_MEMORY_TYPES,
    STUCK,
    Decoding,
    Engine,
    Finished,
    Prompt,
    features_of,
    halved,
    left_pad,
)
from paddlemix.models.mgen_vl.language import MASKED
from paddlemix.processors.content import count_images, named_images
from paddlemix.processors.mgen_vl_processing import encode_prompt, image_positions
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.json_files import read_config_object
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import resolve_flash

# Keys of generation_config.json with type and range; other keys of public files (transformers_version, …) are ignored.
_NUMBERS = {
    "max_new_tokens": (int, 1, 1 << 16),
    "min_new_tokens": (int, 0, 1 << 16),
    "top_k": (int, 0, 1 << 22),
    "top_p": (float, 0.0, 1.0),
    "temperature": (float, 1e-6, 1e6),
    "num_beams": (int, 1, 64),
    "num_return_sequences": (int, 1, 64),
    "length_penalty": (float, -1e3, 1e3),
    "repetition_penalty": (float, 1e-6, 1e6),
    "no_repeat_ngram_size": (int, 0, 1 << 16),
    "eos_token_id": (int, 0, 1 << 22),
    "pad_token_id": (int, 0, 1 << 22),
    "bos_token_id": (int, 0, 1 << 22),
    "max_window_size": (int, 1, 1 << 22),
}
# Only for sampling or beams; PaddleNLP warns about them in a greedy configuration.
_NOT_GREEDY = ("top_k", "top_p", "temperature", "num_beams", "num_return_sequences", "length_penalty")


def load_generation_config(folder, config) -> GenerationConfig:
    """generation_config.json of a folder over this model's defaults: greedy, 512 new tokens, the config's ids.

    Sampling or beams are used only if the file sets decode_strategy. null counts as not set.

    Raises:
        ConfigError: the file is not JSON, or a value has the wrong type or is out of range.
    """
    values = {
        "decode_strategy": "greedy_search",
        "max_new_tokens": 512,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
    }
    extra = {"chat_format": "chatml", "max_window_size": 6144}
    path = os.path.join(folder, "generation_config.json") if folder else None
    if path and os.path.isfile(path):
        for key, value in read_config_object(path).items():
            if value is None:
                continue
            if key in _NUMBERS:
                kind, low, high = _NUMBERS[key]
                fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
                if not fits or not low <= value <= high:
                    raise ConfigError(f"{path}: {key} must be from {low} to {high}, not {value!r}", key)
                (extra if key in extra or key in _NOT_GREEDY else values)[key] = value
            elif key == "decode_strategy":
                if value not in ("greedy_search", "sampling", "beam_search"):
                    raise ConfigError(f"{path}: decode_strategy is greedy_search, sampling or beam_search", key)
                values[key] = value
            elif key == "chat_format":
                if value != "chatml":
                    raise ConfigError(f"{path}: chat_format must be chatml, not {value!r}", key)
    made = GenerationConfig(**values)
    for key, value in extra.items():
        setattr(made, key, value)
    # Keep PaddleNLP from deriving it from the model's configuration again.
    made._from_model_config = False
    return made


def generation_values(generation_config: GenerationConfig) -> dict:
    """The values of a configuration for generation_config.json: the keys that load_generation_config reads."""
    keys = ["chat_format", "decode_strategy", *_NUMBERS]
    values = {key: getattr(generation_config, key, None) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


class CaptionGeneration:
    """Mixin of the model, before PaddleNLP's GenerationMixin."""

    @paddle.no_grad()
    def generate(
        self,
        input_ids,
        images=None,
        attention_mask=None,
        image_features=None,
        streamer=None,
        ending=(),
        stop_repeating=0,
        is_number=lambda ids: False,
        **kwargs,
    ):
        """Continue each row. kwargs: values of generation_config.json to override, under PaddleNLP's names
        (max_new_tokens, decode_strategy, num_beams, top_p, …), and seed: of sampling, by default from paddle.seed.

        input_ids: int64 [B, T], padded on the left; attention_mask: 0/1 [B, T], all ones by default; images
        [N, 3, S, S] or image_features [N, Q, D], in row-major order of their spans. A row gives the same ids alone as
        in a batch. eos_token_id may be a list. streamer: receives each token of a single row (`put`, `end`). ending,
        stop_repeating, is_number: see Engine and Decoding; not for beams.

        Returns:
            (new ids int64 [B, new], scores [B, 1]): finished rows are padded with pad_token_id; a score is the mean
            log-probability of the row's new tokens (for beams, PaddleNLP's score).

        Raises:
            UserError: the spans in the text do not match the images, or beam search with a streamer.
        """
        known = (*_NUMBERS, "decode_strategy", "seed")
        options = {name: getattr(self.generation_config, name, None) for name in known}
        if set(kwargs) - set(options):
            raise TypeError(f"generate takes no {', '.join(sorted(set(kwargs) - set(options)))}")
        options.update((name, value) for name, value in kwargs.items() if value is not None)
        strategy, samples = options["decode_strategy"], options["num_return_sequences"]
        if strategy == "beam_search" and streamer is not None:
            raise UserError("--stream does not go with beam search: its answer is only known at the end")
        if strategy == "sampling" and options["seed"] is None:
            options["seed"] = int(paddle.randint(0, (1 << 31) - 1, [1]))
        options.update(sample=strategy == "sampling", samples=samples, stop_repeating=stop_repeating)
        decoding = Decoding(**{name: options[name] for name in Decoding._fields if options.get(name) is not None})
        check_lengths(decoding)
        stops, pad = options["eos_token_id"], options["pad_token_id"] or 0
        stops = stops if isinstance(stops, (list, tuple)) else [] if stops is None else [stops]
        kind, given = ("images", images) if image_features is None else ("features", image_features)
        ids = input_ids.numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy()
        n_images = 0 if given is None else given.shape[0]
        # Refuses too many images, of which no prompt would take the last.
        image_positions(ids, n_images, self.config.image_start_id, self.config.n_queries)
        prompts, first = [], 0
        for row in (row[seen != 0].tolist() for row, seen in zip(ids, mask)):
            behind = first + row.count(self.config.image_start_id)
            prompts.append(Prompt(row, **({kind: given[first:behind]} if first < behind else {})))
            first = behind
        with self.generating():
            if strategy == "beam_search":
                found = list(self.beams(prompts, decoding, stops, len(prompts)))
            else:
                engine = Engine(
                    self, decoding, stops, len(prompts) * decoding.samples, ending, scores=True, is_number=is_number
                )
                if streamer is not None:
                    engine.on_token = lambda token: streamer.put(np.array([[token]]))
                found = sorted(engine.run(prompts))
        for note, what in ((STUCK, "repeated themselves"), (NOT_FINITE, "ended at logits that are not finite")):
            noted = sum(one.note == note for one in found)
            if noted:
                logger.warning("%d of %d answers %s", noted, len(found), what)
        if streamer is not None:
            streamer.end()
        new = [one.ids + [one.stop] * (one.stop in stops) for one in found]
        longest = max(map(len, new))
        new = np.array([row + [pad] * (longest - len(row)) for row in new], dtype=np.int64)
        scores = np.array([[one.score] for one in found], dtype=np.float32)
        return paddle.to_tensor(new), paddle.to_tensor(scores)

    @contextlib.contextmanager
    def generating(self):
        """Context for generation: eval mode, and fused attention where possible."""
        was_training, was_fused = self.training, self.config.use_flash_attention
        self.eval()
        self.fuse(self.generates_fused())
        try:
            yield
        finally:
            self.fuse(was_fused)
            if was_training:
                self.train()

    def generates_fused(self) -> bool:
        """Whether generation uses Paddle's fused attention: if card and weights allow it; on the CPU as configured."""
        device = paddle.get_device()
        if not device.startswith("gpu"):
            return self.config.use_flash_attention
        return resolve_flash(True, str(self.lm_head.weight.dtype).replace("paddle.", ""), device)[0]

    def fuse(self, fused: bool) -> None:
        self.config.use_flash_attention = self.visual.use_flash_attention = fused

    def beams(self, prompts: Iterable[Prompt], decoding: Decoding, stop_ids, rows: int) -> Iterator[Finished]:
        """decoding.samples answers to each prompt, in order, by beam search for `rows` prompts at a time; half of them
        from then on if memory runs out. Their scores are PaddleNLP's."""
        source, again = enumerate(prompts), []
        while True:
            batch, again = again[:rows] or list(islice(source, rows)), again[rows:]
            if not batch:
                return
            try:
                found = self._search(batch, decoding, stop_ids)
            except OUT_OF_MEMORY_TYPES as error:
                rows, again = halved(len(batch), error), batch + again
            else:
                yield from found

    @paddle.no_grad()
    def _search(self, batch: Sequence[Tuple[int, Prompt]], decoding: Decoding, stop_ids) -> List[Finished]:
        """The answers to a batch of (index, prompt)."""
        prompts = [prompt for _, prompt in batch]
        ids, mask = left_pad([prompt.ids for prompt in prompts], self.config.pad_token_id or 0)
        n_images = sum(len(prompt.images if prompt.features is None else prompt.features) for prompt in prompts)
        self.stops, self.broken = list(stop_ids), []
        new, scores = super().generate(
            paddle.to_tensor(ids),
            attention_mask=paddle.to_tensor(mask),
            image_positions=image_positions(ids, n_images, self.config.image_start_id, self.config.n_queries),
            image_features=features_of(self, prompts),
            decode_strategy="beam_search",
            eos_token_id=self.stops[-1] if self.stops else None,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.samples,
            length_penalty=decoding.length_penalty,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens,
            repetition_penalty=decoding.repetition_penalty,
            no_repeat_ngram_size=decoding.no_repeat_ngram_size or None,
        )
        # [steps, rows]
        broken = paddle.stack(self.broken).numpy().reshape([-1, len(batch), decoding.num_beams]).any(axis=2)
        found = []
        for at, (row, score) in enumerate(zip(new.tolist(), scores.flatten().tolist())):
            number, sample = divmod(at, decoding.samples)
            end = next((i for i, token in enumerate(row) if token in self.stops), len(row))
            stop = row[end] if end < len(row) else None
            # After the end of its answers, a row's beams may be another's.
            note = NOT_FINITE if broken[: end + 1, number].any() else None
            found.append(Finished(batch[number][0], sample, row[:end], stop, score, note))
        return found

    # ---- hooks of PaddleNLP's beam search

    def prepare_inputs_for_generation(self, input_ids, attention_mask, past_key_values=None, **kwargs):
        """Inputs of one step: the full prompt first, then the newest token with the cache."""
        inputs = {"past_key_values": past_key_values, "use_cache": True, "last_logits_only": True, "return_dict": True}
        if past_key_values is None:
            images = {name: kwargs.get(name) for name in ("image_features", "image_positions")}
            return dict(inputs, input_ids=input_ids, attention_mask=attention_mask, **images)
        return dict(inputs, input_ids=input_ids[:, -1:])

    def adjust_logits_during_generation(self, logits):
        """The logits of a step, float32 [B × beams, V], with the probabilities of all stop ids at the last one:
        PaddleNLP's scorer takes a single id, and would end no answer at one of a list. Rows that are not finite are
        recorded in `broken`, since its softmax hides them."""
        logits = logits.astype("float32")
        self.broken.append(paddle.logical_not(paddle.isfinite(logits.sum(-1))))
        if len(self.stops) > 1:
            ends = paddle.concat([logits[:, stop : stop + 1] for stop in self.stops], axis=1)
            for stop in self.stops:
                logits[:, stop] = MASKED
            logits[:, self.stops[-1]] = paddle.logsumexp(ends, axis=1)
        return logits

    @staticmethod
    def update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False):
        model_kwargs["past_key_values"] = outputs.past_key_values
        return model_kwargs

    def reorder_cache(self, cache, beam_idx):
        return cache.reordered(beam_idx)

    def expand_inputs_for_generation(self, input_ids, expand_size, attention_mask=None, **model_kwargs):
        """Repeat each row, and the features of its images with it."""
        features, places = model_kwargs.pop("image_features", None), model_kwargs.pop("image_positions")
        B, T = input_ids.shape
        if features is not None:
            places = places.reshape(features.shape[:2])
            row, order = places[:, 0] // T, np.arange(B * expand_size)[:, None]
            # For each new row, the images of the row that it repeats.
            new_row, image = np.nonzero(order // expand_size == row)
            features = paddle.gather(features, paddle.to_tensor(image))
            places = (places[image] + ((new_row - row[image]) * T)[:, None]).reshape(-1)
        rows = paddle.arange(B, dtype="int64").repeat_interleave(expand_size)
        model_kwargs.update(image_features=features, image_positions=places)
        model_kwargs["attention_mask"] = paddle.gather(attention_mask, rows)
        return paddle.gather(input_ids, rows), model_kwargs

    def chat(
        self,
        tokenizer,
        query,
        history=None,
        images=None,
        system=None,
        image_features=None,
        template=None,
        choose=lambda texts, scores: 0,
        **kwargs,
    ):
        """One turn of a conversation, as in the baseline's chat.py.

        query: text with images as `<img>…</img>` (from tokenizer.from_list_format), or Content (processors). history:
        earlier (query, response) pairs. images [N, 3, S, S] or image_features [N, Q, D]: for all spans of history and
        query, in order. template: the model's ChatTemplate, None for the default; system: overrides its system text.
        choose: (texts, scores) → index of the answer to take, with num_return_sequences above 1. kwargs: see generate.

        Returns:
            (response, history with this turn appended).

        Raises:
            UserError: the prompt is longer than the model's positions, or the numbers of images and spans differ.
        """
        history = list(history or [])
        window = self.generation_config.max_window_size
        ids = encode_prompt(tokenizer, query, history, system, window, template)
        check_positions(self.config, ids)
        # Turns that were dropped from the window took their images with them.
        spans = ids.count(tokenizer.img_start_id)
        asked = [query, *(earlier for earlier, _ in history)]
        given = sum(count_images(named_images(one, tokenizer.n_queries)) for one in asked)
        if images is not None:
            images = images[given - spans :]
        if image_features is not None:
            image_features = image_features[given - spans :] if spans else None
        ending = () if template is None else template.ending(tokenizer)
        kwargs.setdefault("eos_token_id", self.stop_ids(tokenizer, template))
        kwargs.setdefault("is_number", lambda ids: is_number(tokenizer.decode(list(ids))))
        new_ids, scores = self.generate(
            paddle.to_tensor([ids]), images=images, image_features=image_features, ending=ending, **kwargs
        )
        texts = [decode_response(tokenizer, row, kwargs["eos_token_id"], ending) for row in new_ids.numpy().tolist()]
        response = texts[choose(texts, scores.flatten().tolist())]
        history.append((query, response))
        return response, history

    @staticmethod
    def stop_ids(tokenizer, template=None):
        """Ids that end an answer: those of chatml, and the template's own if it is a single id."""
        ids = [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]
        ending = [] if template is None else template.ending(tokenizer)
        return ids + [i for i in ending if len(ending) == 1 and i not in ids]


def is_number(text: str) -> bool:
    """Whether a text has digits, and no letters except for the units of prices: 138-1388, 99元."""
    return any(map(str.isdigit, text)) and not any(c.isalpha() and c not in "元角分块折" for c in text)


def check_positions(config, ids) -> None:
    """Raise UserError if a prompt has more tokens than the model has positions."""
    most = config.max_position_embeddings
    if len(ids) > most:
        raise UserError(
            f"question and system text take {len(ids):,} tokens, and the model takes {most:,} at most "
            "(max_position_embeddings): shorten them"
        )


def check_lengths(decoding: Decoding) -> None:
    """Raise UserError if an answer's shortest length is above its longest."""
    if decoding.min_new_tokens > decoding.max_new_tokens:
        raise UserError(
            f"min_new_tokens is {decoding.min_new_tokens}, and an answer has {decoding.max_new_tokens} tokens at most "
            "(max_new_tokens)"
        )


def decode_response(tokenizer, ids, stop_ids, ending=()) -> str:
    """Text of generated ids up to the first stop id, or the first `ending` (see ChatTemplate.ending)."""
    return tokenizer.decode(_answer(ids, stop_ids, ending)).strip()


def _answer(ids, stop_ids, ending):
    """The ids of an answer up to its end."""
    stop, n = set(stop_ids), len(ending)
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    if n > 1:
        end = next((i for i in range(end) if ids[i : i + n] == list(ending)), end)
    return ids[:end]


class TextStreamer:
    """generate's `streamer` for one row: the text of an answer, in pieces, as soon as they are final.

    tokenizer, stop_ids, ending: as for decode_response, whose result is the concatenation of the pieces. write: called
    with each piece, a str. Held back: bytes of an incomplete character, trailing spaces, an image span, a possible
    start of `ending`.
    """

    def __init__(self, tokenizer, stop_ids, write, ending=()):
        self._tokenizer, self._write = tokenizer, write
        self._stops = stop_ids, ending
        self._ids, self._shown = [], ""

    def put(self, token_ids) -> None:
        """token_ids: the next id, int64 [1, 1] or [1], a tensor or numpy's."""
        self._ids += token_ids.flatten().tolist()
        known, span = _answer(self._ids, *self._stops), self._tokenizer.img_start_id
        if len(known) == len(self._ids):
            known = known[: len(known) - max(0, len(self._stops[1]) - 1)]
        known = known[: known.index(span)] if span in known else known
        self._show(decode_response(self._tokenizer, known, *self._stops).rstrip("\ufffd").rstrip())

    def end(self) -> None:
        self._show(decode_response(self._tokenizer, self._ids, *self._stops))

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text
