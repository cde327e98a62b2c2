"""Chat: turns with images, streamed answers, and an interactive prompt.

Shapes: N images, S image side, Q queries, D hidden.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from paddlemix.inference.boxes import FORMATS, save_boxes
from paddlemix.inference.loading import Loaded
from paddlemix.models.mgen_vl.engine import OUT_OF_MEMORY_TYPES, is_out_of_memory
from paddlemix.utils.cli import harmless
from paddlemix.utils.errors import JobFailed, UserError

HELP = """\
/image PATH   add an image (path, URL or base64) to the next prompt; may be repeated
/reset        forget all turns and images
/quit         leave (or Ctrl-D); Ctrl-C stops an answer and discards its prompt
"""


class Conversation:
    """A model with the turns so far and their images.

    system: overrides the template's. choose: one of CHOICES, among num_return_sequences answers. options: of generate
    (max_new_tokens, decode_strategy, temperature, …). Each image goes through the vision tower once, however many turns
    follow. Images are numbered through the conversation: `Picture 1`, `Picture 2`, …

    Attributes: history: (query, answer) pairs as text. picture: the newest image (PIL, RGB) of a question, or None.
    """

    def __init__(self, loaded: Loaded, system: Optional[str] = None, choose: str = "first", **options):
        self.loaded, self.system, self.choose = loaded, system, choose
        self.options: Dict[str, Any] = options
        self.reset()

    def reset(self) -> None:
        self._turns: List[Tuple] = []
        self.picture = None
        self._pending: List = []
        self._features = None

    @property
    def history(self) -> List[Tuple[str, str]]:
        from paddlemix.processors.content import as_text

        return [(as_text(query), answer) for query, answer in self._turns]

    def add_image(self, data: bytes) -> None:
        """Add an image file to the next question.

        Raises:
            ImageError: it cannot be decoded.
        """
        from paddlemix.processors.images import open_image

        self._pending.append(open_image(data))

    def ask(self, text: str, write: Optional[Callable[[str], Any]] = None) -> str:
        """The answer to `text`. write: called with each piece of the answer as it is generated, in complete characters.

        An exception during generation leaves the conversation unchanged, with its images still pending.

        Raises:
            UserError: beam search with `write`. JobFailed: out of memory.
        """
        import numpy as np
        import paddle

        from paddlemix.inference.choosing import choose
        from paddlemix.models.mgen_vl.engine import STOP_REPEATING
        from paddlemix.models.mgen_vl.generation import TextStreamer
        from paddlemix.processors.content import with_images

        model, tokenizer, template = self.loaded.model, self.loaded.tokenizer, self.loaded.template
        options = {"stop_repeating": STOP_REPEATING, **self.options}
        if write is not None:
            options["streamer"] = TextStreamer(
                tokenizer, model.stop_ids(tokenizer, template), write, template.ending(tokenizer)
            )
        try:
            features = self._features
            if self._pending:
                pixels = np.stack([self.loaded.image_processor(image) for image in self._pending])
                with paddle.no_grad():
                    new = model.visual(paddle.to_tensor(pixels))
                features = new if features is None else paddle.concat([features, new])
            shown = 0 if self._features is None else self._features.shape[0]
            query = with_images(text, len(self._pending), first=shown + 1)
            answer, turns = model.chat(
                tokenizer, query, self._turns, system=self.system, image_features=features, template=template,
                choose=lambda texts, scores: choose(texts, scores, self.choose), **options,
            )  # fmt: skip
        except (JobFailed, *OUT_OF_MEMORY_TYPES) as error:
            if not is_out_of_memory(error):
                raise
            raise JobFailed("out of memory; /reset, fewer images or --max_new_tokens need less") from error
        self._turns = turns
        self._features = features
        if self._pending:
            self.picture = self._pending[-1]
            self._pending = []
        return answer


def write_piece(piece: str) -> None:
    """Print a piece of an answer at once."""
    print(harmless(piece), end="", flush=True)


def numbered(path: str, number: int) -> str:
    """boxes.png, boxes-2.png, boxes-3.png, …"""
    stem, ending = os.path.splitext(path)
    return path if number == 1 else f"{stem}-{number}{ending}"


def typed_path(path: str) -> str:
    """A path as typed or dropped on a terminal: without quotes around it, and with ~ expanded."""
    path = path.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        path = path[1:-1]
    return os.path.expanduser(path)


def has_image_name(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in FORMATS and os.path.isfile(path)


def converse(
    conversation: Conversation,
    fetch: Callable[[str], bytes],
    folder: str,
    boxes: str,
    stream: bool = False,
    first: Optional[str] = None,
) -> None:
    """Read questions from the terminal and print answers until /quit or end of input.

    fetch: returns an image's bytes for the argument of /image. folder: the model's. boxes: the file for boxes in
    answers; the second drawing is named -2. first: an initial question. Errors only affect their own turn.
    """
    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:  # not in every Python
        pass
    print("/help lists the commands", file=sys.stderr)
    if not conversation._pending:
        print("no image yet: /image PATH adds one", file=sys.stderr)
    drawn = 0
    while True:
        try:
            if first is not None:
                line, first = first, None
                print(f"> {line}")
            else:
                line = input("> ").strip()
        except (EOFError, NotImplementedError):  # the latter is a notebook's that takes no input
            print()
            return
        except KeyboardInterrupt:
            print("\ntype /quit to leave")
            continue
        command, _, argument = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return
            elif command == "/help":
                print(HELP, end="")
            elif command == "/reset":
                conversation.reset()
                print("conversation reset")
            elif command == "/image":
                path = typed_path(argument)
                if not path:
                    raise UserError("/image PATH: a path, a URL or base64")
                conversation.add_image(fetch(path))
                print("image added; ask about it")
            elif has_image_name(typed_path(line)):
                raise UserError(f"that is an image file: /image {line} adds it")
            elif command.startswith("/"):
                raise UserError(f"no command {command}; /help lists them")
            elif line:
                answer = conversation.ask(line, write_piece if stream else None)
                empty = not answer.strip()
                print("(an empty answer)" if empty else "" if stream else harmless(answer))
                if save_boxes(answer, conversation.picture, numbered(boxes, drawn + 1), folder):
                    drawn += 1
        except KeyboardInterrupt:
            print("\nstopped; the prompt is discarded")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
