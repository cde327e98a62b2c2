"""Conversations to token ids: prompts and labels for training, evaluation, prediction and chat.

The default template gives chatml (docs/formats.md, "Training sequence"):

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\nPicture 1: <img>⟨n_queries ids⟩</img>\\n{prompt}<|im_end|>\\n
    <|im_start|>assistant\\n{caption}<|im_end|>\\n

A prompt is a training sequence that ends where its last answer would begin.

Tags in texts are plain characters: only an Image makes an image span (content.py), and only a template's own text makes
control tokens. Grounding tags (`<ref>`, `<box>`, `<quad>`) are tokens everywhere.

Shapes: T tokens, N images, S image side.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.processors.content import (
    Content,
    Image,
    count_images,
    list_parts,
    named_images,
    parts_of,
    split_images,
    with_images,
)
from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.json_files import read_config_object, write_json

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_PROMPT = "请描述图片内容"
CHAT_TEMPLATE_NAME = "chat_template.json"
# Label of positions without a loss.
IGNORE_INDEX = -100
# Maximum characters of a template's texts, which are part of every prompt; a window holds 6144 tokens.
_MAX_TEMPLATE = 1 << 14

_USER = "<|im_start|>user\n{{user}}<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n{{bot}}<|im_end|>\n"
_SYSTEM = ("<|im_start|>system\n", "<|im_end|>\n")


# ---- the template


class Segment(NamedTuple):
    """Part of a sequence. kind: "open", "close" or "end" (the template's text before a content, after it, after an
    answer), "system", "prompt", "image" or "answer"."""

    kind: str
    ids: List[int]


class ChatTemplate(NamedTuple):
    """chat_template.json (docs/formats.md). user, assistant: the text before and after the turn's content, in which
    `<|im_start|>` and the like are tokens and image tags plain characters."""

    user: Tuple[str, str]
    assistant: Tuple[str, str]
    system: str = DEFAULT_SYSTEM

    @classmethod
    def default(cls) -> ChatTemplate:
        return cls(tuple(_USER.split("{{user}}")), tuple(_ASSISTANT.split("{{bot}}")))

    @classmethod
    def of_folder(cls, folder: str) -> ChatTemplate:
        """The template that a model folder was tuned with: its chat_template.json, or the default."""
        path = os.path.join(folder, CHAT_TEMPLATE_NAME)
        return cls.from_file(path) if os.path.isfile(path) else cls.default()

    @classmethod
    def from_file(cls, path: str) -> ChatTemplate:
        """Read a chat_template.json.

        Raises:
            ConfigError: missing, not JSON, not two templates with {{user}} and {{bot}} once each, or texts longer than
            any model's window.
        """
        values = read_config_object(path)
        conversation = values.get("conversation")
        if not isinstance(conversation, list) or len(conversation) != 2:
            text = f"{path}: \"conversation\" must hold two templates, the user's and the assistant's"
            raise ConfigError(text, "conversation")
        parts: List[Tuple[str, ...]] = []
        for template, slot in zip(conversation, ("{{user}}", "{{bot}}")):
            if not isinstance(template, str) or template.count(slot) != 1:
                raise ConfigError(f"{path}: a template must contain {slot} once, not {template!r}", "conversation")
            parts.append(tuple(template.split(slot)))
        system = values.get("system", DEFAULT_SYSTEM)
        if not isinstance(system, str):
            raise ConfigError(f'{path}: "system" must be a text', "system")
        if sum(map(len, (system, *parts[0], *parts[1]))) > _MAX_TEMPLATE:
            raise ConfigError(f"{path}: the texts have more than {_MAX_TEMPLATE:,} characters together", "size")
        return cls(parts[0], parts[1], system)

    def save(self, folder: str) -> None:
        """Write chat_template.json into `folder`."""
        values = {"conversation": ["{{user}}".join(self.user), "{{bot}}".join(self.assistant)]}
        if self.system != DEFAULT_SYSTEM:
            values["system"] = self.system
        write_json(f"{folder}/{CHAT_TEMPLATE_NAME}", values)

    def head(self, tokenizer) -> List[Segment]:
        """The start of every sequence."""
        return [
            Segment("open", tokenizer.plain_ids(_SYSTEM[0], control_tokens=True)),
            Segment("system", tokenizer.plain_ids(self.system)),
            Segment("close", tokenizer.plain_ids(_SYSTEM[1], control_tokens=True)),
        ]

    def turn(self, tokenizer, prompt: Content, answer: Optional[str]) -> List[Segment]:
        """A question and its answer; with an answer of None, only up to where it begins."""

        def own(kind: str, text: str) -> Segment:
            return Segment(kind, tokenizer.plain_ids(text, control_tokens=True))

        segments = [own("open", self.user[0])]
        for part in parts_of(prompt):
            if isinstance(part, Image):
                segments.append(Segment("image", tokenizer.image_span(part.name)))
            else:
                segments.append(Segment("prompt", tokenizer.plain_ids(part)))
        segments += [own("close", self.user[1]), own("open", self.assistant[0])]
        if answer is not None:
            segments += [Segment("answer", tokenizer.plain_ids(answer)), own("end", self.assistant[1])]
        return segments

    def encode(
        self,
        tokenizer,
        turns: Sequence[Tuple[Content, Optional[str]]],
        max_length: int,
        label_all_turn_markers: bool = True,
    ) -> Dict[str, Any]:
        """The sequence of a conversation; the last answer may be None, for the model to generate.

        A sequence above max_length is truncated: the last answer first, then earlier ones, then prompts; never an image
        span. label_all_turn_markers: see encode_example.

        Returns:
            {"input_ids": int64 [T], "labels": int64 [T], "cut": tokens lost}; labels are -100 without a loss.

        Raises:
            UserError: even without texts the sequence exceeds max_length.
        """
        segments = self.head(tokenizer)
        for prompt, answer in turns:
            segments += self.turn(tokenizer, prompt, answer)
        kept = kept_lengths([(segment.kind, len(segment.ids)) for segment in segments], max_length)
        all_turns = {"open": {tokenizer.im_start_id}}
        all_turns["close"] = {tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.plain_ids("\n")}
        ids: List[int] = []
        labels: List[int] = []
        for segment, length in zip(segments, kept):
            ids += segment.ids[:length]
            if segment.kind in ("answer", "end"):
                labels += segment.ids[:length]
            else:
                learned = all_turns.get(segment.kind, ()) if label_all_turn_markers else ()
                labels += [i if i in learned else IGNORE_INDEX for i in segment.ids[:length]]
        cut = sum(len(segment.ids) for segment in segments) - len(ids)
        return {"input_ids": np.array(ids, dtype=np.int64), "labels": np.array(labels, dtype=np.int64), "cut": cut}

    def ending(self, tokenizer) -> List[int]:
        """The ids that mark the end of an answer: those after it, up to the first control token."""
        ids = tokenizer.plain_ids(self.assistant[1], control_tokens=True)
        first = next((place for place, i in enumerate(ids) if i >= tokenizer.eod_id), len(ids))
        return ids[: first + 1]


def kept_lengths(segments: Sequence[Tuple[str, int]], max_length: int) -> List[int]:
    """How many ids of each segment to keep for a total of at most max_length.

    segments: (kind, length) in order. Answers are cut first, from the last on, down to one token each (or the sample
    would teach an empty caption); then the texts of prompts.

    Raises:
        UserError: the rest alone is longer.
    """
    kept = [length for _, length in segments]
    surplus = sum(kept) - max_length
    for kind, least in (("answer", 1), ("prompt", 0)):
        for index in reversed(range(len(kept))):
            if surplus > 0 and segments[index][0] == kind:
                cut = min(surplus, max(0, kept[index] - least))
                kept[index] -= cut
                surplus -= cut
    if surplus > 0:
        text = f"max_length {max_length} is too small: the image spans and turn markers alone need more"
        raise UserError(text, "max_length")
    return kept


# ---- training


def place_images(conversations: Sequence[Sequence[str]], n_images: int, n_queries: int) -> List[Tuple[Content, str]]:
    """The turns of a record. Images are where prompts have `<img>…</img>`, else before the first prompt.

    Raises:
        UserError: the prompts have another number of images, or a turn is not a pair of texts.
    """
    if not conversations or not all(
        len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in conversations
    ):
        raise UserError("a conversation is a list of [prompt, answer] pairs of texts", "conversation")
    turns = [(split_images(prompt, n_queries), answer) for prompt, answer in conversations]
    spans = sum(count_images(prompt) for prompt, _ in turns)
    if not spans:
        turns[0] = (with_images(turns[0][0], n_images), turns[0][1])
    elif spans != n_images:
        raise UserError(f"the conversation has {spans} image spans, but {n_images} images", "images")
    return turns


def encode_example(
    tokenizer,
    conversations: Sequence[Sequence[str]],
    n_images: int,
    *,
    template: Optional[ChatTemplate] = None,
    max_length: int = 2048,
    label_all_turn_markers: bool = True,
) -> Dict[str, Any]:
    """A conversation as a training sequence; see ChatTemplate.encode.

    conversations: [[prompt, answer], …] of a record. n_images: number of image spans; see place_images.
    label_all_turn_markers: also learn `<|im_start|>`, `<|im_end|>` and the newline after it in every turn (label scheme
    b of docs/formats.md).

    Raises:
        UserError: see place_images and ChatTemplate.encode.
    """
    turns = place_images(conversations, n_images, tokenizer.n_queries)
    return (template or ChatTemplate.default()).encode(tokenizer, turns, max_length, label_all_turn_markers)


class LengthCounter:
    """The number of ids that encode_example returns, or its errors, for a million conversations: the parts they have in
    common are counted once."""

    # Maximum prompts cached.
    _REMEMBERED = 10_000

    def __init__(self, tokenizer, template: Optional[ChatTemplate], max_length: int):
        self.tokenizer, self.template, self.max_length = tokenizer, template or ChatTemplate.default(), max_length
        self._known: Dict[Tuple, int] = {}

    def _without_answers(self, conversations: Sequence[Sequence[str]], n_images: int) -> int:
        key = (n_images, *(prompt for prompt, _ in conversations))
        found = self._known.get(key)
        if found is None:
            segments = self.template.head(self.tokenizer)
            for prompt, _ in place_images(conversations, n_images, self.tokenizer.n_queries):
                segments += self.template.turn(self.tokenizer, prompt, "")
            found = sum(len(segment.ids) for segment in segments)
            if len(self._known) < self._REMEMBERED:
                self._known[key] = found
        return found

    def __call__(self, conversations: Sequence[Sequence[str]], n_images: int) -> int:
        total = self._without_answers(conversations, n_images)
        total += sum(len(self.tokenizer.plain_ids(answer)) for _, answer in conversations)
        if total <= self.max_length:
            return total
        return len(
            encode_example(
                self.tokenizer, conversations, n_images, template=self.template, max_length=self.max_length
            )["labels"]
        )


# ---- generation


def image_positions(ids: np.ndarray, n_images: int, image_start_id: int, n_queries: int) -> np.ndarray:
    """Flat indices, int64 [n_images × n_queries] into B × T, of the positions that image features fill, in row-major
    order. ids: int64 [B, T]; image_start_id: of `<img>`; that of `</img>` is one more.

    Raises:
        UserError: a span is not exactly `<img>`, n_queries ids, `</img>`, or there are more or fewer than n_images.
    """
    rows, columns = np.nonzero(ids == image_start_id)
    if len(rows) != n_images:
        raise UserError(f"the text has {len(rows)} image spans, but {n_images} images were given", "images")
    ends = columns + n_queries + 1
    end_id = image_start_id + 1
    if (ends >= ids.shape[1]).any() or (ids[rows, np.minimum(ends, ids.shape[1] - 1)] != end_id).any():
        raise UserError(f"an image span must be <img>, {n_queries} ids and </img>", "image-span")
    if (ids == end_id).sum() != n_images:
        raise UserError("the text has a </img> without its <img>", "image-span")
    return ((rows * ids.shape[1] + columns + 1)[:, None] + np.arange(n_queries)).reshape(-1)


def label_positions(labels: np.ndarray) -> np.ndarray:
    """Flat indices, int64 [M] into B × T, of the positions whose next position has a label. labels: int64 [B, T]."""
    rows, columns = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    return rows * labels.shape[1] + columns


def encode_prompt(
    tokenizer,
    query: Content,
    history: Optional[Sequence[Tuple[Content, str]]] = None,
    system: Optional[str] = None,
    max_window_size: int = 6144,
    template: Optional[ChatTemplate] = None,
) -> List[int]:
    """The ids of the prompt that the model continues with an answer to `query`.

    query: Content, or a text from tokenizer.from_list_format, with images as `<img>…</img>`. history: earlier (query,
    answer) pairs; the oldest are dropped so that system and history take at most max_window_size tokens. system:
    overrides the template's.
    """
    template = template or ChatTemplate.default()
    if system is not None:
        template = template._replace(system=system)

    def ids_of(segments: Sequence[Segment]) -> List[int]:
        return [i for segment in segments for i in segment.ids]

    head = ids_of(template.head(tokenizer))
    ids: List[int] = []
    for earlier, answer in reversed(list(history or ())):
        turn = ids_of(template.turn(tokenizer, named_images(earlier, tokenizer.n_queries), answer))
        if len(head) + len(turn) + len(ids) > max_window_size:
            break
        ids = turn + ids
    return head + ids + ids_of(template.turn(tokenizer, named_images(query, tokenizer.n_queries), None))


class MGenVLProcessor:
    """Queries in the notebook's list form to model inputs.

    tokenizer: MGenVLTokenizer; image_processor: MGenVLImageProcessor. template: the model's, None for the default.
    """

    def __init__(self, tokenizer, image_processor, template: Optional[ChatTemplate] = None):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template or ChatTemplate.default()

    def __call__(self, query, return_tensors="pd"):
        """query: a list of parts {"image": path, URL, base64 or bytes} and {"text": …}, or a text without images.

        Returns:
            {"input_ids": int64 [1, T], "attention_mask": int64 [1, T], "images": float32 [N, 3, S, S] or None}, as
            Paddle tensors, or numpy arrays with return_tensors="np".

        Raises:
            ImageError: an image cannot be read. UserError: an unknown part, or return_tensors.
        """
        from paddlemix.processors.image_sources import load_image_source
        from paddlemix.processors.images import open_image

        if return_tensors not in ("pd", "np"):
            raise UserError(f'return_tensors is "pd" or "np", not {return_tensors!r}', "return_tensors")
        if isinstance(query, str):
            query = [{"text": query}]
        sources = [part["image"] for part in query if "image" in part]
        pixels = [self.image_processor(open_image(load_image_source(source))) for source in sources]
        parts = list_parts(query, self.tokenizer.n_queries)
        ids = encode_prompt(self.tokenizer, parts, template=self.template)
        ids = np.array([ids], dtype=np.int64)
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "images": np.stack(pixels) if pixels else None,
        }
        if return_tensors == "np":
            return arrays
        import paddle

        return {name: None if array is None else paddle.to_tensor(array) for name, array in arrays.items()}
