"""Prompts and labels: the one place where a conversation becomes token ids, for training and for generation.

The chatml sequence of SPEC §3:

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\nPicture 1: <img>⟨n_queries ids⟩</img>\\n{prompt}<|im_end|>\\n
    <|im_start|>assistant\\n{caption}<|im_end|>\\n

Shapes: T tokens, N images, S image side.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from paddlemix.utils.errors import ConfigError, UserError
from paddlemix.utils.files import atomic_write, read_config_object

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_PROMPT = "请描述图片内容"
CHAT_TEMPLATE_NAME = "chat_template.json"
IGNORE_INDEX = -100
# Letters of a template's texts. They come in front of every answer, and a window holds 6144 tokens.
_MAX_TEMPLATE = 1 << 14

_USER = "<|im_start|>user\n{{user}}<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n{{bot}}<|im_end|>\n"
_SYSTEM = ("<|im_start|>system\n", "<|im_end|>\n")


class ChatTemplate(NamedTuple):
    """chat_template.json (SPEC §3). user and assistant: the text before and after the turn's content."""

    user: Tuple[str, str]
    assistant: Tuple[str, str]
    system: str = DEFAULT_SYSTEM

    @classmethod
    def default(cls) -> ChatTemplate:
        return cls(tuple(_USER.split("{{user}}")), tuple(_ASSISTANT.split("{{bot}}")))

    @classmethod
    def from_file(cls, path: str) -> ChatTemplate:
        """Read a chat_template.json.

        Raises:
            ConfigError: missing, not JSON, not two templates with {{user}} and {{bot}} once each, or longer texts than
                any model's window.
        """
        values = read_config_object(path)
        conversation = values.get("conversation")
        if not isinstance(conversation, list) or len(conversation) != 2:
            raise ConfigError(f"{path}: \"conversation\" must hold two templates, the user's and the assistant's")
        parts: List[Tuple[str, ...]] = []
        for template, slot in zip(conversation, ("{{user}}", "{{bot}}")):
            if not isinstance(template, str) or template.count(slot) != 1:
                raise ConfigError(f"{path}: each template is a text with {slot} in it once, not {template!r}")
            parts.append(tuple(template.split(slot)))
        system = values.get("system", DEFAULT_SYSTEM)
        if not isinstance(system, str):
            raise ConfigError(f'{path}: "system" must be a text')
        if sum(map(len, (system, *parts[0], *parts[1]))) > _MAX_TEMPLATE:
            raise ConfigError(f"{path}: the texts have more than {_MAX_TEMPLATE:,} letters together")
        return cls(parts[0], parts[1], system)

    def save(self, folder: str) -> None:
        """Write chat_template.json into `folder`."""
        values = {"conversation": ["{{user}}".join(self.user), "{{bot}}".join(self.assistant)]}
        if self.system != DEFAULT_SYSTEM:
            values["system"] = self.system
        with atomic_write(f"{folder}/{CHAT_TEMPLATE_NAME}") as file:
            json.dump(values, file, ensure_ascii=False, indent=2)
            file.write("\n")


# ---- training


def with_images(prompt: str, n_images: int, first: int = 1) -> str:
    """`Picture k: <img></img>\\n` for each image in front of a prompt, numbered from `first`."""
    return "".join(f"Picture {k}: <img></img>\n" for k in range(first, first + n_images)) + prompt


def _drop_image_data(text: str, n_queries: int) -> str:
    """Empty every `<img>…</img>` that holds more than a short name, so that base64 never reaches the tokenizer."""
    kept, position = [], 0
    while True:
        start = text.find("<img>", position)
        end = text.find("</img>", start) if start >= 0 else -1
        if end < 0:
            return "".join(kept) + text[position:]
        name = text[start + 5 : end]
        is_short = len(name.encode("utf-8", "replace")) <= n_queries
        kept += [text[position : start + 5], name if is_short else "", "</img>"]
        position = end + 6


class _Piece:
    """Ids of one stretch of a sequence and whether each is learned."""

    def __init__(self, ids, learned, is_text=False):
        self.ids, self.learned, self.is_text = list(ids), list(learned), is_text

    def shorten(self, surplus: int, tokenizer, keep: int) -> int:
        """Drop up to `surplus` ids from the end, no image span among them, and leave at least `keep` of text."""
        inside, spare = False, []
        for position, i in enumerate(self.ids):
            inside = inside or i == tokenizer.img_start_id
            if not inside:
                spare.append(position)
            inside = inside and i != tokenizer.img_end_id
        gone = set(spare[max(keep, len(spare) - surplus) :])
        self.ids, self.learned = (
            [x for position, x in enumerate(xs) if position not in gone] for xs in (self.ids, self.learned)
        )
        return len(gone)


def _sequence(tokenizer, conversations, n_images, template, max_length, label_all_turn_markers) -> List[_Piece]:
    """The pieces of a training sequence, at most max_length ids in all; see encode_example."""
    template = template or ChatTemplate.default()
    if not conversations or not all(
        len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in conversations
    ):
        raise UserError("a conversation is a list of [prompt, answer] pairs of texts")
    turns = [[_drop_image_data(text, tokenizer.n_queries) for text in turn] for turn in conversations]
    if n_images and not any("<img>" in prompt for prompt, _ in turns):
        turns[0][0] = with_images(turns[0][0], n_images)

    newline = tokenizer.text_to_ids("\n")
    markers = {tokenizer.im_start_id, tokenizer.im_end_id, *newline}

    def opening(text):
        ids = tokenizer.text_to_ids(text)
        return _Piece(ids, [label_all_turn_markers and i == tokenizer.im_start_id for i in ids])

    def closing(text, learned):
        ids = tokenizer.text_to_ids(text)
        return _Piece(ids, [learned or (label_all_turn_markers and i in markers) for i in ids])

    def content(text, learned):
        ids = tokenizer.text_to_ids(text, control_tokens=False)
        return _Piece(ids, [learned] * len(ids), is_text=True)

    pieces = [opening(_SYSTEM[0]), content(template.system, False), closing(_SYSTEM[1], False)]
    answers, prompts = [], []
    for prompt, answer in turns:
        prompts.append(content(prompt, False))
        answers.append(content(answer, True))
        pieces += [opening(template.user[0]), prompts[-1], closing(template.user[1], False)]
        pieces += [opening(template.assistant[0]), answers[-1], closing(template.assistant[1], True)]

    spans = sum(piece.ids.count(tokenizer.img_start_id) for piece in pieces)
    if spans != n_images:
        raise UserError(f"the conversation has {spans} image spans, but {n_images} images")

    surplus = sum(len(piece.ids) for piece in pieces) - max_length
    # An answer keeps its first token, or the sample would teach an empty caption.
    for piece, keep in [(answer, 1) for answer in reversed(answers)] + [(prompt, 0) for prompt in reversed(prompts)]:
        if surplus > 0:
            surplus -= piece.shorten(surplus, tokenizer, keep)
    if surplus > 0:
        raise UserError(f"max_length {max_length} is too small: the image spans and turn markers alone need more")

    return pieces


def encode_example(
    tokenizer,
    conversations: Sequence[Sequence[str]],
    n_images: int,
    *,
    template: Optional[ChatTemplate] = None,
    max_length: int = 2048,
    label_all_turn_markers: bool = True,
) -> Dict[str, np.ndarray]:
    """A conversation as a training sequence.

    conversations: [[prompt, answer], …]. n_images: spans to hold; they are put in front of the first prompt unless
    the prompts already have `<img>…</img>`. A sequence above max_length loses text from its end: the last answer
    first, then earlier ones, then prompts; never a part of an image span.
    label_all_turn_markers: learn `<|im_start|>`, `<|im_end|>` and the newline after it in every turn (label scheme b
    of SPEC §3), not in the answers alone.

    Returns:
        {"input_ids": int64 [T], "labels": int64 [T]}, labels -100 where nothing is learned.

    Raises:
        ImageTagError: image tags that do not pair up. UserError: the spans are not n_images, a turn is no pair of
        texts, or not even a sequence without text fits max_length.
    """
    pieces = _sequence(tokenizer, conversations, n_images, template, max_length, label_all_turn_markers)
    ids = np.array([i for piece in pieces for i in piece.ids], dtype=np.int64)
    learned = np.array([flag for piece in pieces for flag in piece.learned], dtype=bool)
    return {"input_ids": ids, "labels": np.where(learned, ids, IGNORE_INDEX)}


def example_length(
    tokenizer,
    conversations: Sequence[Sequence[str]],
    n_images: int,
    *,
    template: Optional[ChatTemplate] = None,
    max_length: int = 2048,
) -> int:
    """How many ids encode_example gives for the same arguments; raises what it raises. For planning batches."""
    return sum(len(piece.ids) for piece in _sequence(tokenizer, conversations, n_images, template, max_length, True))


class LengthCounter:
    """example_length for a million conversations: what they have in common is counted once.

    Calling it gives what example_length gives, and raises what that raises.
    """

    # Prompts repeat themselves; these many are remembered.
    _REMEMBERED = 10_000

    def __init__(self, tokenizer, template: Optional[ChatTemplate], max_length: int):
        self.tokenizer, self.template, self.max_length = tokenizer, template or ChatTemplate.default(), max_length
        markers = [self.template.user, self.template.assistant]
        self._system = self._count(self.template.system, False) + sum(self._count(text, True) for text in _SYSTEM)
        self._turn = sum(self._count(text, True) for pair in markers for text in pair)
        self._prompts: Dict[str, int] = {}

    def _count(self, text: str, control_tokens: bool) -> int:
        return len(self.tokenizer.text_to_ids(text, control_tokens))

    def _prompt(self, text: str) -> int:
        found = self._prompts.get(text)
        if found is None:
            found = self._count(text, False)
            if len(self._prompts) < self._REMEMBERED:
                self._prompts[text] = found
        return found

    def __call__(self, conversations: Sequence[Sequence[str]], n_images: int) -> int:
        if conversations and not any("<img>" in text for turn in conversations for text in turn):
            total = self._system + self._turn * len(conversations)
            for number, (prompt, answer) in enumerate(conversations):
                prompt = with_images(prompt, 0 if number else n_images)
                total += self._prompt(prompt) + self._count(answer, False)
            if total <= self.max_length:
                return total
        return example_length(
            self.tokenizer, conversations, n_images, template=self.template, max_length=self.max_length
        )


# ---- generation


def encode_prompt(
    tokenizer,
    query: str,
    history: Optional[Sequence[Tuple[str, str]]] = None,
    system: str = DEFAULT_SYSTEM,
    max_window_size: int = 6144,
) -> Tuple[str, List[int]]:
    """The chatml context that the model continues with an answer to `query`.

    history: earlier (query, answer) pairs; the oldest are left out so that system and history stay below
    max_window_size tokens. Returns (text, ids).

    Raises:
        ImageTagError: image tags in query or history that do not pair up.
    """
    newline = tokenizer.text_to_ids("\n")

    def block(role, content):
        text = f"<|im_start|>{role}\n{content}<|im_end|>"
        content = _drop_image_data(content, tokenizer.n_queries)
        ids = tokenizer.text_to_ids(role + "\n") + tokenizer.text_to_ids(content, control_tokens=False)
        return text, [tokenizer.im_start_id] + ids + [tokenizer.im_end_id]

    text, ids = block("system", system)
    kept_text, kept_ids = "", []
    for earlier, answer in reversed(list(history or ())):
        user_text, user_ids = block("user", earlier)
        bot_text, bot_ids = block("assistant", answer)
        turn = newline + user_ids + newline + bot_ids
        if len(ids) + len(turn) + len(kept_ids) >= max_window_size:
            break
        kept_text = f"\n{user_text}\n{bot_text}" + kept_text
        kept_ids = turn + kept_ids
    user_text, user_ids = block("user", query)
    text += f"{kept_text}\n{user_text}\n<|im_start|>assistant\n"
    ids = ids + kept_ids + newline + user_ids + newline
    return text, ids + [tokenizer.im_start_id] + tokenizer.text_to_ids("assistant\n")


def clean_caption(text: str) -> str:
    """A caption as one line of a results file: line breaks, tabs and other control characters become spaces,
    runs of spaces one (SPEC §3)."""
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join(text.split())


class MGenVLProcessor:
    """Queries in the notebook's list form to model inputs.

    tokenizer: MGenVLTokenizer; image_processor: MGenVLImageProcessor.
    """

    def __init__(self, tokenizer, image_processor):
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def __call__(self, query, return_tensors="pd", allow_private_urls=False):
        """query: a list of parts {"image": path, URL, base64 or bytes} and {"text": …}, or a text without images.

        Returns:
            {"input_ids": int64 [1, T], "attention_mask": int64 [1, T], "images": float32 [N, 3, S, S] or None}, as
            Paddle tensors, or numpy arrays with return_tensors="np".

        Raises:
            ImageError: an image cannot be read. UserError: a part of another kind.
        """
        from paddlemix.processors.images import load_image_source, open_image

        if return_tensors not in ("pd", "np"):
            raise UserError(f'return_tensors is "pd" or "np", not {return_tensors!r}')
        if isinstance(query, str):
            query = [{"text": query}]
        sources = [part["image"] for part in query if "image" in part]
        pixels = [
            self.image_processor(open_image(load_image_source(source, allow_private_urls=allow_private_urls)))
            for source in sources
        ]
        _, ids = encode_prompt(self.tokenizer, self.tokenizer.from_list_format(query))
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
