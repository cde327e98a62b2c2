"""Check that the pipeline can memorise real ads: a small MGen-VL, trained on a handful of images, must repeat their
captions word for word, and must not do so for other images.

    python tools/overfit_real_samples.py SAMPLES.txt CAPTIONS.tsv OUT [--steps 200]

SAMPLES has `id \\t base64 image` rows, CAPTIONS `id \\t caption`; further columns are ignored. The steps are commands
of the project: convert_labels, make_tiny_model with full training by supervised_finetune, run.sh on the samples, and
run.sh again after each image has moved on to the next id. All rows have the same prompt, so only the image can tell the
model which caption to repeat.

Exit status 1 unless at least 90 % of the captions are repeated exactly, and at most 10 % of them for other images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Dict, List, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from demo import command  # noqa: E402
from paddlemix.datasets.caption_files import read_captions, read_references  # noqa: E402
from paddlemix.datasets.rows import read_rows  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import JobFailed, UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402
from paddlemix.utils.texts import some  # noqa: E402

# Shares of the captions that must be repeated, and that may be for another image.
REQUIRED, PERMITTED = 0.9, 0.1


def read_samples(samples: str, captions: str) -> List[Tuple[str, str, str]]:
    """(id, base64 image, caption) of every sample, in order.

    Raises:
        UserError: a file cannot be read, a sample has no caption, or two have the same id.
    """
    texts = read_references(captions).texts
    rows = [(row.id, bytes(row.image).decode(), texts.get(row.id, [""])[0]) for row in read_rows(samples, False)]
    missing = [key for key, _, caption in rows if not caption]
    if missing or len({key for key, *_ in rows}) < max(len(rows), 2):
        raise UserError(
            f"{samples} must hold two rows or more with an id each, all with a caption in {captions}"
            + (f"; missing: {some(missing)}" if missing else "")
        )
    return rows


def run(words: List[str]) -> None:
    """Run a command of the project from its top folder; its output goes where ours goes.

    Raises:
        JobFailed: it ended with another status than 0.
    """
    print("$ " + " ".join(words)[:160], flush=True)
    status = subprocess.call(words, cwd=ROOT, env=dict(os.environ, PYTHONIOENCODING="utf-8"))
    if status:
        raise JobFailed(f"{words[1]} ended with status {status}")


def predict(rows: List[Tuple[str, str]], name: str, out: str) -> Dict[str, str]:
    """Captions by id that run.sh writes for (id, base64 image) rows."""
    source, target = os.path.join(out, f"{name}.tsv"), os.path.join(out, f"{name}.txt")
    with atomic_write(source) as file:
        file.writelines(f"{key}\t{image}\n" for key, image in rows)
    run(["sh", "run.sh", source, target, os.path.join(out, "tuned"), sys.executable])
    return read_captions(target)


def overfit(args: argparse.Namespace) -> Tuple[int, int, int]:
    """Do it all. Returns (rows, captions repeated exactly, captions repeated for another image)."""
    out = os.path.abspath(args.out)
    rows = read_samples(args.samples, args.captions)
    with atomic_write(os.path.join(out, "train.tsv")) as file:
        file.writelines("\t".join(row) + "\n" for row in rows)
    files = {"data_files": f"{out}/data/train.json", "chat_template": f"{out}/data/chat_template.json"}
    values = {**vars(args), "out": out, "rows": len(rows), "dataset": json.dumps({"train": files})}
    run(command("{python} tools/convert_labels.py {out}/train.tsv {out}/data --val_every 0 --quiet", values))
    # The same vocabulary as the demo's way of making one: captions a few dozen tokens long.
    run(command(
        "{python} tools/make_tiny_model.py {out}/model --captions {out}/train.tsv --max_new_tokens 256 --seed {seed} "
        "--pretrain config/mgen_vl/pretrain_demo.json --dataset {dataset} --output_dir {out}/tuned --do_eval false "
        "--seed {seed} --max_steps {steps} --per_device_train_batch_size {rows} --dataloader_num_workers 0 "
        "--learning_rate 0.001 --logging_steps 50 --max_length 512", values,
    ))  # fmt: skip
    keys, images, captions = zip(*rows)
    truth = dict(zip(keys, captions))
    repeated = predict(list(zip(keys, images)), "same_images", out)
    shifted = predict(list(zip(keys, images[1:] + images[:1])), "other_images", out)
    for key, caption in truth.items():
        print(f"{key}\n  caption       {caption}\n  its image     {repeated[key]}\n  another image {shifted[key]}")
    return (
        len(rows),
        sum(repeated[key] == caption for key, caption in truth.items()),
        sum(shifted[key] == caption for key, caption in truth.items()),
    )


def parse_arguments(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("samples", type=cli.path, help="id and base64 image")
    parser.add_argument("captions", type=cli.path, help="id and caption")
    parser.add_argument("out", type=cli.output_folder, help="output folder")
    parser.add_argument("--steps", type=cli.positive, default=200)
    parser.add_argument("--seed", type=cli.seed, default=7)
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"{args.out} is not empty: give another folder")
    count, same, other = overfit(args)
    print(f"repeated exactly: {same} of {count}; for another image: {other} of {count}")
    return 0 if same >= REQUIRED * count and other <= PERMITTED * count else JobFailed.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
