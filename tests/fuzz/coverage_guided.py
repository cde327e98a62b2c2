"""Fuzzing that looks for new paths through the code: `python -m tests.fuzz.coverage_guided weights --runs 500000`.

Needs atheris (`pip install atheris`), which is no part of the tests: they fuzz with hypothesis. Python's branches in
paddlemix and in Pillow's plugins are what is looked at; decoders in C are run, not seen. An input that breaks a promise
of targets.py, takes more than 20 seconds or more than 2 GB is kept beside the corpus, and ends the run.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import tempfile
import warnings
from typing import List

TARGETS = (
    "weights", "images", "base64_image", "tsv_rows", "table", "archive", "records", "lora_config", "index",
    "json_object", "model_config", "model", "generation_config", "chat_template", "vocabulary", "run_config",
)  # fmt: skip


def seeds(target: str, folder: str) -> None:
    """Good files to begin with, small so that many cases are tried."""
    import pickle

    import numpy as np

    from tests.checkpoint.files import arrays, entry, safetensors_bytes, torch_file
    from tests.helpers import image_bytes

    if target == "weights":
        few = {name: array[:2] if array.ndim else array for name, (_, array) in arrays().items()}
        for protocol in (2, 3, 4):
            put(folder, f"seed-{protocol}", b"\0" + pickle.dumps(few, protocol))
        few = {name: (dtype, few[name].copy()) for name, (dtype, _) in arrays().items()}
        path = torch_file(os.path.join(folder, "torch"), few)
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
        put(folder, "seed-torch", b"\1" + data)
        header = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22), "__metadata__": {"format": "np"}}
        put(folder, "seed-safetensors", b"\2" + safetensors_bytes(header, bytes(22)))
        state = {"x": np.float32(1), "LR_Scheduler": {"last_epoch": 3, "last_lr": 0.1}, "list": [None, True, (1, "a")]}
        put(folder, "seed-state", b"\0" + pickle.dumps(state, 4))
        return
    if target != "images":
        for number, text in enumerate(texts(target)):
            put(folder, f"seed-{number}", text)
        return
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        put(folder, f"seed-{format}", image_bytes(size=(12, 9), format=format))
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(image_bytes(size=(12, 9))))
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = {
        "progressive": (picture, "JPEG", {"progressive": True, "exif": exif}),
        "cmyk": (picture.convert("CMYK"), "JPEG", {}),
        "palette": (picture.convert("P"), "PNG", {"transparency": 0, "exif": exif}),
        "alpha": (picture.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif}),
        "sixteen": (picture.convert("I;16"), "PNG", {}),
        "apng": (picture, "PNG", {"save_all": True, "append_images": [picture.convert("L").convert("RGB")]}),
        "animated": (picture.convert("P"), "GIF", {"save_all": True, "append_images": [picture], "comment": b"hello"}),
    }
    for name, (image, format, options) in variants.items():
        file = BytesIO()
        image.save(file, format, **options)
        put(folder, f"seed-{name}", file.getvalue())


def texts(target: str) -> List[bytes]:
    """As seeds, for the targets that read text."""
    import json

    from tests.fuzz.targets import GENERATION, IMAGE, LORA, RECORD, RUN, TEMPLATE, VOCABULARY, archives
    from tests.helpers import tiny_config

    row = b"1\t" + IMAGE + b"\t\xe5\xa5\xbd\n"
    record = json.dumps(RECORD, ensure_ascii=False).encode()
    named = dict(RECORD, image={"file": "a.png"}), dict(RECORD, image={"file": "table.csv", "offset": 2, "length": 40})
    if target in ("tsv_rows", "table", "records"):
        tables = [b"image,caption\na.png,hello\n", b'id,text,path\r\n1,"a ""b""\nc",a.png\r\n', b"1\ta.png\thello\n"]
        several = [b"[\n" + record + b",\n" + json.dumps(one).encode() + b"\n]" for one in named]
        return [row, b"\xef\xbb\xbf" + row * 2, *tables, record + b"\n" + record, *several]
    if target == "archive":
        return archives()
    if target == "base64_image":
        return [IMAGE, b"data:image/png;base64," + IMAGE]
    config = tiny_config().to_dict() if target.startswith("model") else {}
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model_state-00001-of-00001.pdparams"}}
    values = {"lora_config": LORA, "generation_config": GENERATION, "chat_template": TEMPLATE, "run_config": RUN}
    values.update(index=index, model_config=config, model=config, json_object={"a": [1, 0.5, None, {"b": "c"}]})
    return [VOCABULARY] if target == "vocabulary" else [json.dumps(values[target]).encode()]


def put(folder: str, name: str, data: bytes) -> None:
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=0, help="at most this long")
    parser.add_argument("--runs", type=int, default=-1, help="at most so many cases")
    parser.add_argument("--corpus", help="folder that keeps what was found from run to run (default: a fresh one)")
    args = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("error: atheris is missing: pip install atheris")
    with atheris.instrument_imports(include=["paddlemix", "PIL", "tarfile", "gzip"]):
        # Pillow loads its plugins late; they are what is to be seen.
        from PIL import Image

        from tests.fuzz import targets

        Image.init()
        if args.target in ("model", "generation_config", "chat_template", "vocabulary", "run_config"):
            # The targets import these late, too.
            from paddlemix.models.mgen_vl import configuration, generation, tokenizer  # noqa: F401
            from paddlemix.processors import mgen_vl_processing  # noqa: F401
            from paddlemix.trainer import command_line  # noqa: F401
    warnings.simplefilter("ignore")  # Pillow tells what it makes of broken files
    corpus = args.corpus or tempfile.mkdtemp(prefix="corpus-")
    os.makedirs(corpus, exist_ok=True)
    seeds(args.target, corpus)
    # In memory: millions of small files are written.
    work = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)

    targets.put(work, "a.png", base64.b64decode(targets.IMAGE))

    def one(data: bytes) -> None:
        if args.target in ("images", "base64_image"):
            (targets.image if args.target == "images" else targets.base64_image)(data)
        elif args.target != "weights":
            getattr(targets, args.target)(data, work)
        elif data:
            targets.weights(data[1:], targets.SUFFIXES[data[0] % len(targets.SUFFIXES)], work)

    findings = os.path.join(corpus, "findings-")
    limits = ["-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"]
    limits += [f"-max_total_time={args.seconds}", f"-runs={args.runs}"]
    atheris.Setup([sys.argv[0], corpus, f"-artifact_prefix={findings}", "-print_final_stats=1", *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
