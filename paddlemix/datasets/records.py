"""Parsing and validating a record of train.json.

    {"id": …, "conversations": [[prompt, caption], …], "image": …}   (docs/formats.md)

"image" is base64 text, a reference {"file", "offset", "length"} to base64 text in another file (relative to the JSON's
folder), {"file"} for an image file, or a list of these; it may be missing. A prompt may contain its images itself, as
`<img>path or base64</img>`.

Record text is untrusted, so its size is checked before parsing.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, List, NamedTuple, Tuple

from paddlemix.datasets.tsv import MAX_ROW_BYTES
from paddlemix.processors.content import NAMED_IMAGE
from paddlemix.utils.errors import UserError
from paddlemix.utils.json_files import short_int

# Maximum brackets and commas; a record has a few dozen. Parsed, `[],[],[],…` takes twenty times its bytes.
MAX_STRUCTURE = 200_000
MAX_IMAGES = 64
# Far more than max_length tokens; texts are tokenised before truncation.
MAX_TEXT_CHARS = 200_000
# Longer texts between <img> and </img> are taken for base64 without looking for a file.
MAX_PATH_CHARS = 1024

_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(UserError):
    """The record cannot be used; the message is a short reason."""


class Record(NamedTuple):
    """A valid record: id, (prompt, answer) per turn, and the sources of its images, in the order of the text.

    A source is base64 text, a reference dict, or ("path", name). Images in prompts are replaced by `<img></img>`.
    """

    id: str
    turns: List[Tuple[str, str]]
    images: List[Any]


def parse_record(text: bytes, folder: str = "") -> Record:
    """Parse the record in `text`: one JSON object, possibly with white space, commas or an array's bracket around it.

    folder: searched for image paths in prompts, before the working directory.

    Raises:
        SampleError: not JSON, or not a record of the form above.
    """
    text = text.strip(b" \t\r\n,[]\xef\xbb\xbf")
    if sum(map(text.count, (b"[", b"{", b","))) > MAX_STRUCTURE:
        raise SampleError("too many brackets and commas for a record")
    try:
        value = json.loads(text.decode("utf-8"), parse_int=short_int)
    except UnicodeDecodeError:
        raise SampleError("not UTF-8") from None
    except RecursionError:
        raise SampleError("nested too deeply") from None
    except ValueError as error:
        raise SampleError(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise SampleError("not a JSON object")
    record_id = value.get("id", "")
    if not isinstance(record_id, (str, int)):
        raise SampleError('"id" is not a text')
    turns = _turns(value.get("conversations"))
    given = value.get("image")
    images = given if isinstance(given, list) else [] if given in (None, "") else [given]
    for image in images:
        _check_source(image)
    turns, images = _images_in_prompts(turns, images, folder)
    n_chars = sum(len(text) for turn in turns for text in turn)
    if n_chars > MAX_TEXT_CHARS:
        raise SampleError(f"texts of {n_chars} characters; at most {MAX_TEXT_CHARS} are taken")
    if len(images) > MAX_IMAGES:
        raise SampleError(f"{len(images)} images; at most {MAX_IMAGES} are taken")
    return Record(str(record_id), turns, images)


_IMAGE_TEXT = re.compile(rb'"image"\s*:\s*"')


def without_image(text: bytes) -> bytes:
    """A record's text with its base64 cut to a few bytes, for counting tokens.

    Inside a JSON string quotes are escaped, so the searched pattern cannot occur in a caption.
    """
    found = _IMAGE_TEXT.search(text)
    if found is None:
        return text
    begin = found.end()
    end = text.find(b'"', begin)
    if end < begin + 64 or b"\\" in text[begin:end]:
        return text
    return text[: begin + 4] + text[end:]


def _turns(value: Any) -> List[Tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise SampleError('"conversations" is not a list of [prompt, caption] pairs')
    turns = []
    for turn in value:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise SampleError('"conversations" is not a list of [prompt, caption] pairs')
        if any(_SURROGATE.search(text) for text in turn):
            raise SampleError("a text contains a lone surrogate")
        turns.append((turn[0], turn[1]))
    return turns


def _check_source(image: Any) -> None:
    if isinstance(image, str) and image:
        return
    if isinstance(image, dict):
        file, offset, length = image.get("file"), image.get("offset"), image.get("length")
        # In Python bool is an int.
        if isinstance(file, str) and file and "\0" not in file and set(image) == {"file"}:
            return
        if isinstance(file, str) and file and "\0" not in file and type(offset) is type(length) is int:
            checked = image.get("check")
            if offset >= 0 and 0 < length <= MAX_ROW_BYTES and (checked is None or type(checked) is int):
                return
        raise SampleError('"image" is not a reference: it needs "file", "offset" and "length"')
    raise SampleError('"image" is neither base64 text nor a reference')


def _images_in_prompts(
    turns: List[Tuple[str, str]], images: List[Any], folder: str
) -> Tuple[List[Tuple[str, str]], List[Any]]:
    """Extract images from prompts; empty tags take theirs from "image", in order.

    If there are as many tags as images in "image", the tags only name those.
    """
    contents = [found for prompt, _ in turns for found in NAMED_IMAGE.findall(prompt)]
    if not contents:
        return turns, images
    n_empty = sum(not content for content in contents)
    if len(images) == len(contents):
        sources = images
    elif len(images) == n_empty:
        rest = iter(images)
        sources = [_tag_source(content, folder) if content else next(rest) for content in contents]
    else:
        raise SampleError(f'{len(contents)} <img> tags in the prompts, but {len(images)} images in "image"')
    return [(NAMED_IMAGE.sub("<img></img>", prompt), answer) for prompt, answer in turns], sources


def _tag_source(content: str, folder: str) -> Any:
    if re.match(r"https?://", content, re.IGNORECASE):
        raise SampleError("an image is a URL; training data is read from files only")
    if len(content) <= MAX_PATH_CHARS and "\0" not in content:
        for name in (os.path.join(folder, content), content):
            if os.path.exists(name):
                return ("path", name)
    return content
