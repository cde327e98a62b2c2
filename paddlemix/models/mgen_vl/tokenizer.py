"""MGenVLTokenizer: tiktoken's byte-pair encoding with the chatml and image tokens of docs/formats.md.

An image span is `<img>`, n_queries ids, `</img>`. The ids between the tags are the bytes of a short name (a path), then
`<imgpad>`; the model replaces them by image features. Image data never goes through BPE.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import unicodedata
from typing import Dict, List, Union

from paddlenlp.transformers import PretrainedTokenizer

from paddlemix.checkpoint.model_folder import VOCABULARIES
from paddlemix.processors.content import as_text, list_parts
from paddlemix.utils.errors import ConfigError, ImageTagError, UserError
from paddlemix.utils.files import atomic_write
from paddlemix.utils.json_files import read_config_object, short_int

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMG_START, IMG_END, IMG_PAD = "<img>", "</img>", "<imgpad>"
_GROUNDING_NAMES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_CONTROL_NAMES = (END_OF_TEXT, IM_START, IM_END) + tuple(f"<|extra_{i}|>" for i in range(205))
SPECIAL_TOKENS = _CONTROL_NAMES + _GROUNDING_NAMES + (IMG_START, IMG_END, IMG_PAD)
_IN_CONTENT = set(_GROUNDING_NAMES)
_IN_TEMPLATES = set(_CONTROL_NAMES + _GROUNDING_NAMES)

# The real file has 2.6 MB.
_MAX_VOCABULARY_BYTES = 16 << 20
# tiktoken's regular expressions overflow the stack on some 10⁶ consecutive spaces.
_MAX_STRETCH = 50_000


def read_vocabulary(path: str) -> Dict[bytes, int]:
    """Ranks of a .tiktoken file: a line per token, base64 and rank.

    Raises:
        UserError: the file is missing or too large, a line is malformed, ranks are not 0 … n - 1, or one of the 256
        single bytes is missing.
    """
    try:
        if os.path.getsize(path) > _MAX_VOCABULARY_BYTES:
            raise UserError(f"{path} is larger than {_MAX_VOCABULARY_BYTES >> 20} MB: not a vocabulary", "size")
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}", "unreadable") from None
    ranks: Dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), short_int(parts[1])
        except (IndexError, ValueError, binascii.Error):
            raise UserError(f"{path}, line {number}: not a base64 token and its rank", "line") from None
        if len(parts) != 2 or not token or token in ranks:
            raise UserError(f"{path}, line {number}: an empty or duplicate token, or more than two columns", "line")
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once", "ranks")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise UserError(f"{path}: each of the 256 single bytes needs a rank", "bytes")
    return ranks


class MGenVLTokenizer(PretrainedTokenizer):
    """Text and ids of MGen-VL.

    vocab_file: a .tiktoken file. n_queries: ids between the image tags. The 217 special ids follow the ranks.

    Attributes: eod_id, im_start_id, im_end_id, img_start_id, img_end_id, img_pad_id, n_queries.
    """

    resource_files_names = {"vocab_file": VOCABULARIES[0]}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, n_queries=256, padding_side="left", **kwargs):
        if not isinstance(n_queries, int) or isinstance(n_queries, bool) or not 0 < n_queries <= 65536:
            text = f"tokenizer_config.json: n_queries must be an integer above 0, not {n_queries!r}"
            raise ConfigError(text, "n_queries")
        self.ranks = read_vocabulary(vocab_file)
        self.n_queries = n_queries
        self._build()
        super().__init__(padding_side=padding_side, pad_token=END_OF_TEXT, eos_token=END_OF_TEXT)

    def _build(self) -> None:
        import tiktoken

        self.special_ids = {token: len(self.ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "mgen", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_ids
        )
        self._bytes = {rank: token for token, rank in self.ranks.items()}
        self._bytes.update({i: token.encode() for token, i in self.special_ids.items()})
        self.eod_id = self.special_ids[END_OF_TEXT]
        self.im_start_id = self.special_ids[IM_START]
        self.im_end_id = self.special_ids[IM_END]
        self.img_start_id = self.special_ids[IMG_START]
        self.img_end_id = self.special_ids[IMG_END]
        self.img_pad_id = self.special_ids[IMG_PAD]

    def __getstate__(self):
        # tiktoken's encoder cannot be pickled; it is rebuilt from the ranks.
        return {key: value for key, value in self.__dict__.items() if key not in ("_encoding", "_bytes")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._build()

    def __len__(self) -> int:
        return self._encoding.n_vocab

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    def get_vocab(self) -> Dict[Union[bytes, str], int]:
        return {**self.ranks, **self.special_ids}

    # ---- text to ids

    def text_to_ids(self, text: str) -> List[int]:
        """Encode a text, NFC-normalised, with all tags as tokens: control tokens and image spans.

        Only for trusted texts; those of users and data go through plain_ids.

        Raises:
            ImageTagError: `<img>` without its `</img>`, one inside another, a special token between them, or more
            bytes between them than n_queries.
        """
        allowed = set(SPECIAL_TOKENS)
        text = unicodedata.normalize("NFC", text)
        ids: List[int] = []
        position = 0
        while True:
            start = text.find(IMG_START, position)
            if start < 0:
                break
            end = text.find(IMG_END, start)
            if end < 0:
                raise ImageTagError(f"<img> at character {start} has no </img>")
            ids += self._encode(text[position:start], allowed)
            ids += self._encode_span(text[start + len(IMG_START) : end])
            position = end + len(IMG_END)
        return ids + self._encode(text[position:], allowed)

    def plain_ids(self, text: str, control_tokens: bool = False) -> List[int]:
        """Encode a text, NFC-normalised, with image tags as plain characters. Never raises.

        control_tokens: whether `<|im_start|>` and the like are tokens, as in a chat template, or plain characters too.
        Grounding tags are tokens.
        """
        return self._encode(unicodedata.normalize("NFC", text), _IN_TEMPLATES if control_tokens else _IN_CONTENT)

    def _encode(self, text: str, allowed) -> List[int]:
        ids: List[int] = []
        for start in range(0, len(text), _MAX_STRETCH):
            stretch = text[start : start + _MAX_STRETCH]
            ids += self._encoding.encode(stretch, allowed_special=allowed, disallowed_special=())
        return ids

    def _encode_span(self, name: str) -> List[int]:
        for token in SPECIAL_TOKENS:
            if token in name:
                raise ImageTagError(f"{token} is between <img> and </img>")
        return self.image_span(name)

    def image_span(self, name: str = "") -> List[int]:
        """Ids of one image: `<img>`, the bytes of its name padded by `<imgpad>` to n_queries ids, `</img>`.

        Raises:
            ImageTagError: the name is longer than n_queries bytes.
        """
        content = list(name.encode("utf-8", "replace"))
        if len(content) > self.n_queries:
            raise ImageTagError(f"{len(content)} bytes between <img> and </img>, with room for {self.n_queries}")
        padding = [self.img_pad_id] * (self.n_queries - len(content))
        return [self.img_start_id] + content + padding + [self.img_end_id]

    def tokenize(self, text, **kwargs):
        """Tokens as in PaddleNLP's base class: bytes, or str for special ones; see text_to_ids."""
        return self.convert_ids_to_tokens(self.text_to_ids(text))

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, (str, bytes)):
            return self._id_of(tokens)
        return [self._id_of(token) for token in tokens]

    def _id_of(self, token) -> int:
        if isinstance(token, int):  # a byte of an image's name
            return token
        found = self.special_ids.get(token)
        return self.ranks[token] if found is None else found

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        """Ids to bytes or str. Inside an image span the bytes of the name stay numbers."""
        single = isinstance(ids, int)
        inside, tokens = False, []
        for i in [ids] if single else [int(i) for i in ids]:
            special = i >= self.eod_id
            if i == self.img_start_id:
                inside = True
            elif i == self.img_end_id:
                inside = False
            if special and skip_special_tokens:
                continue
            if special:
                tokens.append(SPECIAL_TOKENS[i - self.eod_id])
            else:
                tokens.append(i if inside else self._bytes[i])
        return tokens[0] if single else tokens

    # ---- ids to text

    def decode(self, token_ids, skip_special_tokens=False, **kwargs) -> str:
        """Text of ids. Invalid UTF-8 becomes U+FFFD; ids beyond the vocabulary are dropped.

        An image span becomes its name; an incomplete one, which a model may generate, is decoded as plain tokens.
        """
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        out = bytearray()
        position = 0
        while position < len(ids):
            i = ids[position]
            if i == self.img_start_id:
                end = position + 1 + self.n_queries
                content = ids[position + 1 : end]
                name = [b for b in content if b != self.img_pad_id]
                if end < len(ids) and ids[end] == self.img_end_id and all(b < 256 for b in name):
                    tags = ("", "") if skip_special_tokens else (IMG_START, IMG_END)
                    out += tags[0].encode() + bytes(name) + tags[1].encode()
                    position = end + 1
                    continue
            if not (skip_special_tokens and i >= self.eod_id):
                out += self._bytes.get(i, b"")
            position += 1
        return out.decode("utf-8", "replace")

    # ---- list format

    def from_list_format(self, parts: List[Dict]) -> str:
        """Text of a query given in parts: {"image": …}, {"text": …}, {"ref": …, "box": (x1, y1, x2, y2) or several}.

        An image whose source is longer than n_queries bytes (base64, a long path) is written as `<img></img>`.

        Raises:
            UserError: an unknown part.
        """
        return as_text(list_parts(parts, self.n_queries))

    def to_list_format(self, text: str) -> List[Dict[str, str]]:
        """The parts of a text: the inverse of from_list_format, with strings as values."""
        parts = []
        for piece in re.split(r"(<(img|ref|box|quad)>.*?</\2>)", text, flags=re.DOTALL):
            if piece in ("img", "ref", "box", "quad") or not piece:
                continue
            tagged = re.fullmatch(r"<(img|ref|box|quad)>(.*?)</\1>", piece, flags=re.DOTALL)
            if tagged:
                parts.append({"image" if tagged.group(1) == "img" else tagged.group(1): tagged.group(2)})
            else:
                parts.append({"text": piece})
        return parts

    # ---- folders

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Open a model or LoRA folder: mgen.tiktoken (or qwen.tiktoken) and tokenizer_config.json, if there is one.

        n_queries comes from tokenizer_config.json, else from config.json's visual part, else it is 256.

        Raises:
            UserError: no vocabulary, or a file that cannot be read.
        """
        for name in VOCABULARIES:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                break
        else:
            raise UserError(f"no {VOCABULARIES[0]} in {folder}: give the folder of a model", "no-vocabulary")
        if "n_queries" not in kwargs:
            n_queries = _read_json(folder, "tokenizer_config.json").get("n_queries")
            if n_queries is None:
                visual = _read_json(folder, "config.json").get("visual")
                n_queries = visual.get("n_queries") if isinstance(visual, dict) else None
            kwargs["n_queries"] = 256 if n_queries is None else n_queries
        return cls(path, **kwargs)

    def save_pretrained(self, folder, **kwargs):
        """Write mgen.tiktoken, tokenizer_config.json and special_tokens_map.json."""
        os.makedirs(folder, exist_ok=True)
        with atomic_write(os.path.join(folder, VOCABULARIES[0]), "wb") as file:
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
                file.write(base64.b64encode(token) + b" %d\n" % rank)
        names = {"pad_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        config = {
            "tokenizer_class": type(self).__name__,
            "n_queries": self.n_queries,
            "padding_side": self.padding_side,
            **names,
        }
        for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
            with atomic_write(os.path.join(folder, name)) as file:
                json.dump(values, file, ensure_ascii=False, indent=2)
                file.write("\n")


def _read_json(folder: str, name: str) -> Dict:
    path = os.path.join(folder, name)
    return read_config_object(path) if os.path.isfile(path) else {}


def check_vocabulary(tokenizer, config) -> None:
    """Check that the tokenizer belongs to the model: ids within the embeddings, and the same image tags.

    Raises:
        ConfigError: the tokenizer has more ids (the embeddings would have to grow), or other image ids.
    """
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} ids, the model {config.vocab_size} rows of embeddings: the language "
            "model's structure must not change, so no rows are added; use the tokenizer that belongs to the model",
            "vocabulary",
        )
    if tokenizer.img_start_id != config.image_start_id:
        raise ConfigError(
            f"<img> is {tokenizer.img_start_id} in the tokenizer and {config.image_start_id} in config.json "
            "(visual.image_start_id): use the tokenizer that belongs to the model",
            "vocabulary",
        )
    if tokenizer.n_queries != config.n_queries:
        raise ConfigError(
            f"an image span has {tokenizer.n_queries} ids in the tokenizer and {config.n_queries} in config.json "
            "(visual.n_queries): use the tokenizer that belongs to the model",
            "vocabulary",
        )
