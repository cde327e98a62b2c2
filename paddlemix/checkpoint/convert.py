"""Import a public Qwen-VL or Qwen-VL-Chat checkpoint: its names and layouts become this project's (docs/formats.md).

The public model keeps its vision tower inside `transformer`, and its Linear weights are [out, in] where Paddle's are
[in, out]. Everything else is the same, tensor for tensor. One tensor is in memory at a time.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from paddlemix.checkpoint.model_folder import FONT, LICENCE, TOKENIZER, VOCABULARIES, check_new_model, gather, inside
from paddlemix.checkpoint.shards import WeightsReader, open_weights, write_model
from paddlemix.checkpoint.structure import LANGUAGE_KEYS, VISUAL_KEYS, differences
from paddlemix.checkpoint.tensors import FLOATS, convert_dtype
from paddlemix.utils.errors import UserError, WeightsError
from paddlemix.utils.json_files import read_json_object, write_json
from paddlemix.utils.log import logger
from paddlemix.utils.texts import one_line, some

# Public name → ours; w_b stands for weight or bias.
_RULES = tuple(
    (re.compile(public.replace("w_b", "(?:weight|bias)")), ours)
    for public, ours in (
        (r"lm_head\.weight", "lm_head.weight"),
        (r"transformer\.((?:wte|ln_f|h\.\d+\.ln_[12])\.weight)", r"transformer.llm.\1"),
        (r"transformer\.(h\.\d+\.(?:attn\.(?:c_attn|c_proj)|mlp\.(?:w1|w2|c_proj))\.w_b)", r"transformer.llm.\1"),
        (r"transformer\.visual\.(conv1\.weight|positional_embedding|ln_pre\.w_b)", r"visual.vit.\1"),
        (r"transformer\.visual\.(transformer\.resblocks\.\d+\.ln_[12]\.w_b)", r"visual.vit.\1"),
        (
            r"transformer\.visual\.(transformer\.resblocks\.\d+\.(?:attn\.(?:in|out)_proj|mlp\.c_(?:fc|proj))\.w_b)",
            r"visual.vit.\1",
        ),
        (r"transformer\.visual\.(attn_pool\.(?:pos_embed|query|kv_proj\.weight|ln_(?:q|kv)\.w_b))", r"visual.\1"),
        (r"transformer\.visual\.(attn_pool\.attn\.(?:in_proj_w_b|out_proj\.w_b))", r"visual.\1"),
        (r"transformer\.visual\.(ln_post\.w_b|proj)", r"visual.\1"),
    )
)
# The weights of Linear layers: [out, in] there, [in, out] here.
_TRANSPOSED = re.compile(
    r".*(lm_head|\.(?:c_attn|c_proj|w1|w2|c_fc|in_proj|out_proj|kv_proj))\.weight|.*\.in_proj_weight"
)

# Computed buffers in some public checkpoints. Nothing else may be left out.
IGNORED = re.compile(
    r"transformer\.(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias|rotary_emb\.inv_freq|logn_tensor)|logn_tensor)"
)

# The keys of config.json that are kept; a model has at least the first six.
_CONFIG_KEYS = (
    *LANGUAGE_KEYS, "max_position_embeddings", "initializer_range", "attn_dropout_prob", "emb_dropout_prob",
)  # fmt: skip
_GENERATION_KEYS = (
    "max_new_tokens", "max_window_size", "top_k", "top_p", "temperature", "repetition_penalty",
)  # fmt: skip

# <img> comes this many ids after <|endoftext|>: two chat marks, 205 extras, six tags of references and boxes.
_IMG_AFTER_EOD = 214

# Rows transposed at a time; a plain transposed copy of a large matrix misses the cache at each element.
_ROWS = 32


@dataclass(frozen=True)
class ConvertResult:
    """Number of tensors written, names of buffers left out, names of files written."""

    tensors: int
    ignored: List[str]
    files: List[str]


def public_to_ours(name: str) -> Optional[Tuple[str, bool]]:
    """(our name, whether to transpose) of a public parameter name; None if it is not one of the architecture's."""
    for pattern, ours in _RULES:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(ours), _TRANSPOSED.fullmatch(name) is not None
    return None


def transposed(array: np.ndarray) -> np.ndarray:
    """[out, in] → [in, out], as a new array in C order."""
    result = np.empty(array.shape[::-1], array.dtype)
    for start in range(0, len(array), _ROWS):
        result[:, start : start + _ROWS] = array[start : start + _ROWS].T
    return result


def plan_convert(
    reader: WeightsReader, shapes: Dict[str, Tuple[int, ...]]
) -> Tuple[List[Tuple[str, str, bool]], List[str]]:
    """[(public name, our name, transpose)], in the order of `shapes`, and the ignored buffers.

    shapes: those of the model of this configuration, by our names.

    Raises:
        WeightsError: lists names that are not the architecture's, and missing, surplus or misshapen parameters.
    """
    found: Dict[str, Tuple[str, bool]] = {}
    found_shapes: Dict[str, Tuple[int, ...]] = {}
    ignored, unknown = [], []
    for name in reader.keys():
        target = public_to_ours(name)
        if target is None:
            (ignored if IGNORED.fullmatch(name) else unknown).append(name)
            continue
        ours, transpose = target
        shape = reader.info(name).shape
        found[ours], found_shapes[ours] = (name, transpose), shape[::-1] if transpose else shape
    problems = differences(found_shapes, shapes)
    if unknown:
        problems.insert(0, f"{len(unknown)} unknown: {some(one_line(name, 300) for name in unknown)}")
    if problems:
        text = "the checkpoint is not a complete Qwen-VL; by the names and shapes of MGen-VL: " + "; ".join(problems)
        raise WeightsError(text, "keys")
    return [(found[ours][0], ours, found[ours][1]) for ours in shapes], ignored


def our_config(public: Dict[str, Any], dtype: str) -> Dict[str, Any]:
    """config.json of the MGen-VL folder, from the public one.

    Raises:
        WeightsError: it has no visual part, or required keys are missing.
    """
    if public.get("model_type") == "mgen":
        raise WeightsError("this is a MGen-VL model already: use it as it is", "converted")
    visual = public.get("visual")
    if not isinstance(visual, dict):
        raise WeightsError("config.json has no visual part: this is a text model, not Qwen-VL", "visual")
    needed = [key for key in _CONFIG_KEYS[:6] if key not in public] + [
        f"visual.{key}" for key in VISUAL_KEYS[:8] if key not in visual
    ]
    if needed:
        raise WeightsError(f"config.json lacks {', '.join(needed)}", *needed)
    if not isinstance(visual["image_start_id"], int):
        raise WeightsError("config.json: visual.image_start_id is not an integer", "visual.image_start_id")
    eod = visual["image_start_id"] - _IMG_AFTER_EOD
    config: Dict[str, Any] = {
        "architectures": ["MGenLMHeadModel"],
        "model_type": "mgen",
        "llm_pretrained_model_name_or_path": "mgen-7b",
    }
    config.update((key, public[key]) for key in _CONFIG_KEYS if key in public)
    config.update(dtype=dtype, bos_token_id=eod, eos_token_id=eod, pad_token_id=eod)
    config["visual"] = {key: visual[key] for key in VISUAL_KEYS if key in visual}
    return config


def our_generation_config(public: Dict[str, Any], eod: int) -> Dict[str, Any]:
    """generation_config.json: greedy search, with the limits and sampling values of the public file."""
    config: Dict[str, Any] = {
        "chat_format": "chatml",
        "decode_strategy": "greedy_search",
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
        "max_new_tokens": 512,
        "max_window_size": 6144,
    }
    config.update((key, public[key]) for key in _GENERATION_KEYS if public.get(key) is not None)
    return config


def convert_qwen_vl(
    source: str,
    target: str,
    *,
    shapes_of: Callable[[Dict[str, Any]], Dict[str, Tuple[int, ...]]],
    dtype: Optional[str] = None,
    format: str = "pdparams",
    max_shard_size: Union[int, str] = "10GB",
    overwrite: bool = False,
    progress: bool = True,
) -> ConvertResult:
    """Write a public checkpoint folder (safetensors or .bin, sharded or not) as a MGen-VL folder.

    shapes_of: config.json → parameter shapes, with which names and shapes are compared. dtype: of the floating-point
    tensors written (default: each as stored). `target` is written atomically.

    Raises:
        UserError: target overlaps source or is not empty. WeightsError: the files are broken, or not a complete
        Qwen-VL. ConfigError: config.json is invalid for MGen-VL. JobFailed: the disk is full.
    """
    check_new_model(target, [source], overwrite)
    if not os.path.isdir(source):
        raise UserError(f"no folder {source}", "no-folder")
    public = read_json_object(inside(source, "config.json"))
    generation_path = inside(source, "generation_config.json")
    generation = read_json_object(generation_path) if os.path.isfile(generation_path) else {}
    with open_weights(source) as reader:
        stored = [reader.info(name).dtype for name in reader.keys()]
        config = our_config(public, dtype or max(FLOATS, key=stored.count))
        plan, ignored = plan_convert(reader, shapes_of(config))
        if ignored:
            logger.info(f"Not copied, since they are computed: {some(one_line(name, 300) for name in ignored)}")
        items = []
        for name, ours, transpose in plan:
            _, to, shape, read = reader.item(name, dtype)
            if transpose:
                shape, read = shape[::-1], functools.partial(_turned, reader, name, to)
            items.append((ours, to, shape, read))
        files = write_model(
            target,
            items,
            functools.partial(_write_side_files, source, config, generation),
            format=format,
            max_shard_size=max_shard_size,
            progress="convert" if progress else None,
        )
    return ConvertResult(len(items), ignored, files)


def _turned(reader: WeightsReader, name: str, to: str) -> np.ndarray:
    # Before a conversion, which may double the bytes to move.
    turned = transposed(reader.read(name))
    try:
        return convert_dtype(turned, reader.info(name).dtype, to)
    except WeightsError as error:
        raise WeightsError(f"{one_line(name)}: {error}", *error.about) from None


def _write_side_files(source: str, config: Dict[str, Any], generation: Dict[str, Any], folder: str) -> List[str]:
    """Write configurations, tokenizer files and the licence of the weights."""
    names = dict.fromkeys(("pad_token", "eos_token"), "<|endoftext|>")
    n_queries = config["visual"].get("n_queries", 256)
    made = {
        "config.json": config,
        "generation_config.json": our_generation_config(generation, config["eos_token_id"]),
        "tokenizer_config.json": {"tokenizer_class": "MGenVLTokenizer", "n_queries": n_queries, **names},
        "special_tokens_map.json": names,
    }
    copied = {
        VOCABULARIES[0] if name in VOCABULARIES else name: path
        for name, path in gather([source], TOKENIZER, FONT, LICENCE).items()
        if not name.endswith(".json")
    }
    for name, path in copied.items():
        shutil.copyfile(path, os.path.join(folder, name))
    for name, values in made.items():
        write_json(os.path.join(folder, name), values)
    return [*made, *copied]
