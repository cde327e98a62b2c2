"""Images to captions, in batches and in order.

During generation, threads decode the images of the next rows (PIL releases Python's lock while it decodes and resizes).
A caption depends only on its own image and prompt.

Shapes: T prompt tokens, S image side.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np

from paddlemix.datasets.tsv import TRUNCATED
from paddlemix.inference.choosing import choose as choose_one
from paddlemix.inference.results import REPEATING
from paddlemix.utils.errors import ImageError, UserError
from paddlemix.utils.log import logger
from paddlemix.utils.runtime import decode_threads

MAX_BATCH = 32
# Bounds of decoding ahead: rows, and bytes of encoded images (an image may have 50 MB).
WINDOW_ROWS = 64
WINDOW_BYTES = 128 << 20
EMPTY_ANSWER = "empty answer"
BROKEN_ANSWER = "answer is not a number"


class Answer(NamedTuple):
    """The result of one row. caption: one line, or None.

    note: None, or a short reason to count by: why there is no caption, or TRUNCATED, REPEATING or both. candidates: all
    answers (captioning.Candidate); chosen: the index of the caption among them.
    """

    caption: Optional[str]
    note: Optional[str] = None
    candidates: Sequence = ()
    chosen: Optional[int] = None


def caption_prompt_ids(tokenizer, prompt, system, max_window_size: int, template=None) -> List[int]:
    """Ids of the question about one image, including its span of n_queries ids. prompt, system: None for the default
    prompt and the template's system text."""
    from paddlemix.processors.content import with_images
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, encode_prompt

    query = with_images(DEFAULT_PROMPT if prompt is None else prompt, 1)
    return encode_prompt(tokenizer, query, None, system, max_window_size, template)


def rows_that_fit(
    config, prompt_length: int, new_tokens: int, dtype: str, free: int, fused: bool = False, sample: bool = False
) -> int:
    """Number of rows that fit into `free` bytes of memory.

    A row needs its keys and values up to the last token, those of one layer twice while the cache grows, and its
    logits. The rows of a group, whose prompts are computed together, also need their prompt's keys and values, which
    wait for a slot, and the larger of two working sets: the ViT's attention scores (8 bytes each: float32, and the
    model's dtype before and after) with its widened MLP, or the decoder's prefill. fused: with a fused attention
    kernel, which stores no scores. sample: sampling also sorts probabilities, sums and ids.
    """
    from paddlemix.models.mgen_vl.engine import GROUP

    size = 4 if dtype == "float32" else 2
    visual, layers = config.visual, config.num_hidden_layers
    token = 2 * config.hidden_size * size
    row = (layers + 1) * (prompt_length + new_tokens) * token + config.vocab_size * (size + (32 if sample else 8))
    patches = (visual["image_size"] // visual["patch_size"]) ** 2
    vit_mlp = 4 * patches * int(visual["width"] * visual["mlp_ratio"]) * size
    score = 0 if fused else 8
    vit = visual["heads"] * patches**2 * score + vit_mlp
    mlp = 4 * prompt_length * config.intermediate_size * size
    prefill = config.num_attention_heads * prompt_length**2 * score + mlp
    computed = layers * prompt_length * token + max(vit, prefill)
    return min(free // (row + computed), GROUP) if free < GROUP * (row + computed) else (free - GROUP * computed) // row


def free_memory(device: str) -> int:
    """Bytes available for batches: nine tenths of a GPU's free memory, half of the host's, which other programs use
    too."""
    if device.startswith("gpu"):
        import paddle

        card = int(device.split(":")[1]) if ":" in device else 0
        total = paddle.device.cuda.get_device_properties(card).total_memory
        return int(0.9 * (total - paddle.device.cuda.memory_allocated(card)))
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    # A container may have a lower limit than its host.
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_file) as limit, open(used_file) as used:
                available = min(available, int(limit.read()) - int(used.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, available // 2)


class Captioner:
    """Asks a model the same question about every image.

    prompt: the question. system: the system text (default: the template's). max_new_tokens: default from the model's
    generation configuration. batch_size: rows at a time (default: by memory, see rows_that_fit, at most MAX_BATCH); it
    is halved when memory runs out. template: the model's ChatTemplate. keep_boxes:
    keep `<ref>` and `<box>` in captions. decoding: further fields of Decoding, by name, and `choose`, one of CHOICES.
    scores: always compute the candidates' scores.

    Raises:
        UserError: the prompt is longer than the model's positions, or memory does not hold the samples or beams.
    """

    def __init__(
        self,
        model,
        tokenizer,
        image_processor,
        prompt: Optional[str] = None,
        system: Optional[str] = None,
        max_new_tokens: Optional[int] = None,
        batch_size: Optional[int] = None,
        template=None,
        keep_boxes: bool = False,
        decoding: Optional[Mapping[str, Any]] = None,
        scores: bool = False,
    ):
        import paddle

        from paddlemix.models.mgen_vl.engine import STOP_REPEATING, Decoding
        from paddlemix.models.mgen_vl.generation import check_lengths, check_positions

        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        generation = model.generation_config
        self.template = template
        self.prompt_ids = caption_prompt_ids(tokenizer, prompt, system, generation.max_window_size, template)
        check_positions(model.config, self.prompt_ids)
        options = {"stop_repeating": STOP_REPEATING, **(decoding or {})}
        self.choose = options.pop("choose", "first")
        self.decoding = Decoding(max_new_tokens or generation.max_new_tokens, **options)
        check_lengths(self.decoding)
        self.scores, self.keep_boxes = scores or self.choose == "logprob", keep_boxes
        self.workers = decode_threads()
        device, dtype = paddle.get_device(), str(model.config.dtype)
        fit = rows_that_fit(
            model.config, len(self.prompt_ids), self.decoding.max_new_tokens, dtype, free_memory(device),
            model.generates_fused(), self.decoding.sample,
        )  # fmt: skip
        for name in ("samples", "num_beams"):
            asked = getattr(self.decoding, name)
            if asked > max(fit, 1):
                held = f"the memory of {device} holds: about {fit} rows at a time"
                raise UserError(f"--{name} {asked} is more than {held}")
        self.batch_size = batch_size or max(self.decoding.num_beams, min(MAX_BATCH, fit))

    def captions(self, images: Iterable, keys: Optional[Iterable[int]] = None) -> Iterator[Answer]:
        """An answer for each image, in order, as soon as it and all before it are complete.

        images: base64 text (str, bytes or a memoryview), or an Answer for a row without an image, which is passed
        through. No row raises an error. keys: with the seed, they determine an image's random numbers (default: its
        index).

        Raises:
            JobFailed: memory ran out with a single image.
        """
        from paddlemix.models.mgen_vl.captioning import generate_captions
        from paddlemix.models.mgen_vl.engine import Prompt

        known: Dict[int, Answer] = {}
        # Of the prompts passed on: the row's number and its note.
        asked: List[Tuple[int, Optional[str]]] = []

        def prompts(pool: ThreadPoolExecutor):
            numbered = enumerate(self._prepared(images, pool))
            for (number, prepared), key in zip(numbered, count() if keys is None else keys):
                if isinstance(prepared, Answer):
                    known[number] = prepared
                else:
                    asked.append((number, prepared.note))
                    yield Prompt(prepared.ids, prepared.pixels[None], key=key)

        next_number = 0
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            answers = generate_captions(
                self.model,
                self.tokenizer,
                prompts(pool),
                self.decoding,
                self.batch_size,
                self.template,
                self.keep_boxes,
                self.scores,
            )
            for index, candidates in answers:
                number, note = asked[index]
                asked[index] = None
                known[number] = self._answer(candidates, note)
                while next_number in known:
                    yield known.pop(next_number)
                    next_number += 1
        while next_number in known:
            yield known.pop(next_number)
            next_number += 1

    def _answer(self, candidates, note: Optional[str]) -> Answer:
        from paddlemix.models.mgen_vl.engine import NOT_FINITE, STUCK

        usable = [i for i, one in enumerate(candidates) if one.text and one.note != NOT_FINITE]
        if not usable:
            broken = any(one.note == NOT_FINITE for one in candidates)
            return Answer(None, BROKEN_ANSWER if broken else EMPTY_ANSWER, candidates)
        texts, scores = zip(*((candidates[i].text, candidates[i].score) for i in usable))
        chosen = usable[choose_one(texts, scores, self.choose)]
        notes = [note] * (note is not None) + [REPEATING] * (candidates[chosen].note == STUCK)
        return Answer(candidates[chosen].text, ", ".join(notes) or None, candidates, chosen)

    def _prepared(self, images: Iterable, pool: ThreadPoolExecutor) -> Iterator:
        """The result of _prepare for each image, in order; threads decode ahead."""
        return ahead(((image, 0 if isinstance(image, Answer) else len(image)) for image in images), self._prepare, pool)

    def _prepare(self, image):
        """A Sample, or an Answer with the reason why there is none. Runs in a thread."""
        return image if isinstance(image, Answer) else decoded(image, self.prompt_ids, self.image_processor)


class Sample(NamedTuple):
    """One row as model input: prompt ids [T], pixel values float32 [3, S, S], the note of its Answer."""

    ids: List[int]
    pixels: np.ndarray
    note: Optional[str] = None


def ahead(items: Iterable[Tuple[Any, int]], prepare: Callable[[Any], Any], pool: ThreadPoolExecutor) -> Iterator:
    """prepare(item) of each (item, its bytes), in order; the pool works ahead."""
    waiting: Deque = deque()
    size = 0
    for item, length in items:
        waiting.append((pool.submit(prepare, item), length))
        size += length
        while len(waiting) >= WINDOW_ROWS or size >= WINDOW_BYTES:
            future, length = waiting.popleft()
            size -= length
            yield future.result()
    for future, _ in waiting:
        yield future.result()


def decoded(image, ids: Sequence[int], image_processor) -> Union[Sample, Answer]:
    """The Sample of a base64 text, or an Answer that says why there is none."""
    from paddlemix.processors.images import decode_base64, open_image

    try:
        opened = open_image(decode_base64(image))
        truncated = opened.info.get("truncated", False)
        return Sample(ids, image_processor(opened), TRUNCATED if truncated else None)
    except ImageError as error:
        return Answer(None, error.reason)
    except MemoryError:
        return Answer(None, "out of memory")
    except Exception as error:  # noqa: BLE001
        # A decoder's bug must cost one row, not the rows behind it. It is counted under its own name.
        logger.warning("an image could not be decoded: %s: %s", type(error).__name__, error)
        return Answer(None, f"decoder error ({type(error).__name__})")
