"""Make a small MGen-VL with random weights and its own vocabulary, and optionally pretrain it.

    python tools/make_tiny_model.py OUT --captions A.tsv [B.tsv …] [--pretrain CONFIG.json [--key value …]]

The vocabulary is a byte-pair encoding trained on the captions of the tables, so that a caption takes about a dozen
tokens. With --pretrain, all parameters are trained by `supervised_finetune.py CONFIG.json`, which gets everything that
follows --pretrain.
"""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from typing import Iterable, List, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from paddlemix.datasets.rows import read_rows  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402

# Initial values with which training on a CPU takes minutes instead of hours. By default every query of attn_pool starts
# as the average of all patches, and a patch's position has a tenth of the size of its content: colours are learned at
# once, but shapes and places only after thousands of steps (left, middle or right: at chance after 900 steps of 16).
POSITION_STD = 1.0
LANGUAGE_STD = 0.08
# On the query and key projections of the ViT.
SHARPNESS = 2.0
# attn_pool starts as a soft copy: the query and key projections are this multiple of the identity, and content is small
# compared with the position table, so that each query attends mostly to the patch at its own place.
POOL_SHARPNESS = 4.0
POOL_CONTENT = 0.1
POOL_QUERY = 0.05


def train_vocabulary(texts: Iterable[str], merges: int) -> List[bytes]:
    """Byte-pair ranks: the 256 bytes, every character of the texts, then the `merges` most frequent pairs.

    Merges never cut a character, and never cross the pieces that the tokenizer splits a text into. Equal
    counts are decided by the text of the pair, so the same texts give the same ranks.
    """
    import regex

    from paddlemix.models.mgen_vl.tokenizer import PATTERN

    pieces: Counter = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
    characters: Counter = Counter()
    for piece, count in pieces.items():
        for character in piece:
            characters[character] += count

    # A dict keeps the order of first insertion, which is the rank.
    ranks = dict.fromkeys(bytes([value]) for value in range(256))
    for character, _ in sorted(characters.items(), key=lambda item: (-item[1], item[0])):
        encoded = character.encode()
        # tiktoken joins two neighbours at a time: the beginnings of a character need ranks too.
        ranks.update(dict.fromkeys(encoded[:end] for end in range(2, len(encoded) + 1)))

    words = [(list(piece), count) for piece, count in sorted(pieces.items())]
    for _ in range(merges):
        pairs: Counter = Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks.setdefault((left + right).encode())
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return list(ranks)


def read_captions(paths: List[str]) -> List[str]:
    """The captions of tables (datasets/rows.py).

    Raises:
        UserError: a file cannot be read, or no row of any has a caption.
    """
    captions = [row.caption for path in paths for row in read_rows(path, want_caption=True)]
    if not any(captions):
        raise UserError(f"no captions in {', '.join(paths)}: rows are `id \\t base64 \\t caption`")
    return [caption for caption in captions if caption]


def fixed_texts() -> List[str]:
    """The fixed text of every sequence, so that it costs few tokens."""
    from paddlemix.processors.mgen_vl_processing import DEFAULT_PROMPT, DEFAULT_SYSTEM

    return [DEFAULT_SYSTEM, DEFAULT_PROMPT, "system\n", "user\nPicture 1: ", "assistant\n"]


def make_config(args: argparse.Namespace, ranks: int):
    """The configuration for a vocabulary of so many ranks; the special ids follow them."""
    from paddlemix.models.mgen_vl.configuration import MGenConfig
    from paddlemix.models.mgen_vl.tokenizer import IMG_START, SPECIAL_TOKENS

    used = ranks + len(SPECIAL_TOKENS)
    return MGenConfig(
        vocab_size=used + -used % 64,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        kv_channels=args.hidden // args.heads,
        seq_length=512,
        max_position_embeddings=512,
        initializer_range=args.std,
        emb_dropout_prob=0.0,
        attn_dropout_prob=0.0,
        pad_token_id=ranks,
        bos_token_id=ranks,
        eos_token_id=ranks,
        visual={
            "image_size": args.image_size,
            "patch_size": args.patch_size,
            "width": args.vit_width,
            "layers": args.vit_layers,
            "heads": args.vit_heads,
            "mlp_ratio": args.mlp_ratio,
            "output_dim": args.hidden,
            "image_start_id": ranks + SPECIAL_TOKENS.index(IMG_START),
            "n_queries": args.n_queries,
        },
    )


def prepare_vision(visual) -> None:
    """Set the initial values described at the constants above."""
    import numpy as np
    import paddle

    positions = visual.vit.positional_embedding
    positions.set_value(paddle.normal(0.0, POSITION_STD, positions.shape))
    for block in visual.vit.transformer.resblocks:
        weight = block.attn.in_proj.weight
        # [head][q, k, v][head width]
        parts = weight.reshape([weight.shape[0], block.attn.heads, 3, -1]).numpy()
        parts[:, :, :2] *= SHARPNESS
        weight.set_value(parts.reshape(weight.shape))
    pool = visual.attn_pool
    dim = pool.query.shape[1]
    # [q; k; v] blocks
    parts = pool.attn.in_proj_weight.numpy()
    parts[:, :dim] = parts[:, dim : 2 * dim] = POOL_SHARPNESS * np.eye(dim)
    parts[:, 2 * dim :] /= POOL_CONTENT
    pool.attn.in_proj_weight.set_value(parts)
    pool.ln_q.weight.set_value(np.full(dim, POOL_QUERY, np.float32))
    pool.ln_kv.weight.set_value(np.full(dim, POOL_CONTENT, np.float32))


def make_model(out: str, captions: List[str], args: argparse.Namespace):
    """Write the model folder: vocabulary, tokenizer files, configurations, random weights. Returns the model."""
    # Each fixed text counts as often as there are captions: it is in as many sequences.
    ranks = train_vocabulary(captions + fixed_texts() * len(captions), args.merges)
    vocabulary = os.path.join(out, "mgen.tiktoken")
    with atomic_write(vocabulary, "wb") as file:
        for rank, token in enumerate(ranks):
            file.write(base64.b64encode(token) + b" %d\n" % rank)

    from paddlemix.models.mgen_vl.modeling import MGenLMHeadModel
    from paddlemix.models.mgen_vl.tokenizer import MGenVLTokenizer
    from paddlemix.utils.runtime import seed_everything

    tokenizer = MGenVLTokenizer(vocabulary, n_queries=args.n_queries)
    tokenizer.save_pretrained(out)
    seed_everything(args.seed)
    model = MGenLMHeadModel(make_config(args, len(ranks)))
    prepare_vision(model.visual)
    # A model that has learned nothing yet does not stop by itself.
    model.generation_config.max_new_tokens = args.max_new_tokens
    model.save_pretrained(out)
    return model


def pretrain(out: str, words: List[str]) -> None:
    """Run supervised_finetune.py on the model in `out`; words: the config file and further --key value pairs.

    Raises:
        JobFailed: it ended with another status than 0.
    """
    command = [sys.executable, os.path.join(ROOT, "supervised_finetune.py"), *words, "--model_name_or_path", out]
    status = subprocess.call(command)
    if status:
        raise JobFailed(f"supervised_finetune.py ended with status {status}")


def parse_arguments(arguments: Optional[List[str]] = None) -> Tuple[argparse.Namespace, List[str]]:
    """The arguments, and the words for supervised_finetune.py (all that follows --pretrain)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    handed_on: List[str] = []
    if "--pretrain" in words:
        at = words.index("--pretrain")
        words, handed_on = words[:at], words[at + 1 :]
        if not handed_on:
            raise UserError("--pretrain needs the configuration for supervised_finetune.py")
    parser = cli.Parser(description=__doc__)
    parser.add_argument("out", type=cli.output_folder, help="folder of the new model")
    parser.add_argument(
        "--captions", type=cli.path, nargs="+", required=True, help="tables of id, image and caption"
    )
    parser.add_argument("--pretrain", nargs="...", help="config and --key value pairs; must come last")
    parser.add_argument("--merges", type=int, default=120, help="merges of the byte-pair encoding (default: 120)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="maximum tokens of a caption (default: 64)")
    parser.add_argument("--seed", type=cli.seed, default=7)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--image_size", type=int, default=84)
    sizes.add_argument("--patch_size", type=int, default=21)
    sizes.add_argument("--vit_width", type=int, default=96)
    sizes.add_argument("--vit_layers", type=int, default=2)
    sizes.add_argument("--vit_heads", type=int, default=4)
    sizes.add_argument("--mlp_ratio", type=float, default=3.0, help="width of the ViT's MLP ÷ vit_width")
    sizes.add_argument("--n_queries", type=int, default=16, help="a square number; best equal to the number of patches")
    sizes.add_argument("--hidden", type=int, default=128, help="a multiple of 128")
    sizes.add_argument("--layers", type=int, default=1)
    sizes.add_argument("--heads", type=int, default=4)
    sizes.add_argument("--intermediate", type=int, default=512, help="w1 and w2 have half this width each")
    sizes.add_argument("--std", type=float, default=LANGUAGE_STD, help="standard deviation of the LLM's random weights")
    args = parser.parse_args(words)
    if args.heads < 1 or args.hidden % args.heads:
        raise UserError(f"--hidden {args.hidden} cannot be divided among {args.heads} heads")
    return args, handed_on


def main() -> None:
    from paddlemix.models.mgen_vl.parameters import count, parameter_shapes

    args, handed_on = parse_arguments()
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out} is not empty: give another folder")
    model = make_model(args.out, read_captions(args.captions), args)
    config = model.config
    print(
        f"{args.out}: {count(parameter_shapes(config)):,} parameters, {config.visual['image_size']} px images, "
        f"{config.n_queries} queries, vocabulary {config.vocab_size}"
    )
    if handed_on:
        pretrain(args.out, handed_on)


if __name__ == "__main__":
    sys.exit(cli.run(main))
