"""Plant faults in the demo's ads and find them with the data tools, as `make demo-data` does after `make demo`.

    python tools/demo_data.py [--demo demo] [--out demo/curation]

The ads for tuning get faults: swapped captions, near duplicates, broken rows, and images of the validation set.
inspect_data.py reports on them, a model tuned on them scores them (score_rows.py), and curate_data.py drops what the
report and the scores suggest. It prints how many rows of each fault, and how many sound rows, were dropped, and how
well a model captions unseen ads if tuned on all rows or on the remaining ones, with equal steps. Logs are in OUT/logs.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import shutil
import sys
import time
from statistics import fmean
from typing import Dict, List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from demo import Stage, claim, command, run_stage  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402

# Shares of the rows that are planted, and the share that curation leaves out for its scores.
SWAPPED, COPIES, BROKEN, LEAKED, DROPPED = 0.05, 0.05, 0.02, 0.02, 0.06
# Bits in which hashes of near duplicates differ at most. Drawn ads are more alike than photographs.
NEAR = 2
# Ads that no model sees before it captions them, and the least of others, so that there is a row of each fault.
UNSEEN, LEAST = 300, 50
# What is written to OUT, and removed from it before.
WRITTEN = re.compile(r"report|lora_(before|after)|\.?(rows|val|unseen|before|after|scores|curated)(\..*)?")


def read_table(path: str) -> List[List[str]]:
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def copied(image: str) -> str:
    """An image, a little smaller and compressed once more."""
    from PIL import Image

    opened, file = Image.open(io.BytesIO(base64.b64decode(image))), io.BytesIO()
    opened.resize((opened.width - 8, opened.height - 8)).save(file, "JPEG", quality=75)
    return base64.b64encode(file.getvalue()).decode()


def plant(demo: str, out: str, seed: int) -> Dict[str, Dict[int, str]]:
    """Write OUT/rows.tsv, OUT/val.tsv and OUT/unseen.tsv. Returns fault → {place of the ad: id in rows.tsv}.

    A near duplicate has the place of its original, whose fault is "copied"; that of other sound rows is "".
    """
    rng, data = random.Random(seed), os.path.join(demo, "data")
    ads = read_table(os.path.join(data, "tune.tsv"))
    if len(ads) < UNSEEN + LEAST:
        raise UserError(f"{data} has {len(ads)} ads to tune on, and {UNSEEN + LEAST} are needed")
    unseen, rows = ads[:UNSEEN], [row[1:] for row in ads[UNSEEN:]]
    captions = dict(read_table(os.path.join(data, "held_out_captions.tsv")))
    val = [[image, captions[name]] for name, image in read_table(os.path.join(data, "held_out.tsv"))]
    n_swapped, n_copies, n_broken, n_leaked = (int(len(rows) * part) for part in (SWAPPED, COPIES, BROKEN, LEAKED))
    places = rng.sample(range(len(rows)), n_swapped + n_copies)
    faults = [("", place, row) for place, row in enumerate(rows)]
    for place, other in zip(places[:n_swapped], places[1:n_swapped] + places[:1]):
        faults[place] = ("swapped caption", place, [rows[place][0], rows[other][1]])
    for place in places[n_swapped:]:
        faults[place] = ("copied", place, rows[place])
        faults.append(("near duplicate", place, [copied(rows[place][0]), rows[place][1]]))
    broken = ["not base64!", base64.b64encode(b"a text").decode(), "", rows[0][0][:200]]
    faults += [("broken row", place, [broken[place % 4], rows[place][1]]) for place in range(n_broken)]
    leaks = enumerate(rng.sample(val, min(n_leaked, len(val))))
    faults += [("leak from val", place, [copied(image), text]) for place, (image, text) in leaks]
    rng.shuffle(faults)
    planted: Dict[str, Dict[int, str]] = {}
    for number, (fault, place, _) in enumerate(faults):
        planted.setdefault(fault, {})[place] = f"row{number}"
    tables = {"rows": [row for _, _, row in faults], "val": val, "unseen": [row[1:] for row in unseen]}
    for name, table in tables.items():
        with atomic_write(os.path.join(out, f"{name}.tsv")) as file:
            file.writelines(f"{name.rstrip('s')}{number}\t" + "\t".join(row) + "\n" for number, row in enumerate(table))
    return planted


def stages(args: argparse.Namespace) -> List[Stage]:
    values = {**vars(args), "near": NEAR, "dropped": f"{DROPPED:.0%}"}

    def tuned(name: str, table: str) -> Stage:
        folder = os.path.join(args.out, name)
        files = {"data_files": f"{folder}/train.json", "chat_template": f"{folder}/chat_template.json"}
        more = {**values, "name": name, "table": table, "dataset": json.dumps({"train": files})}
        commands = [
            "{python} tools/convert_labels.py {out}/{table} {out}/{name} --val_every 0",
            "{python} supervised_finetune.py config/mgen_vl/lora_sft_demo.json --seed {seed} "
            "--model_name_or_path {demo}/pretrained --output_dir {out}/lora_{name} --do_eval false "
            "--max_steps {steps} --learning_rate 0.001 --dataset {dataset}",
            "{python} predict.py {out}/unseen.tsv {out}/{name}.txt {out}/lora_{name}",
        ]
        title = f"tune {name} curation, caption unseen ads"
        return Stage(f"tune_{name}", title, [command(text, more) for text in commands], "training")

    def stage(name: str, title: str, text: str, bar: str = "") -> Stage:
        return Stage(name, title, [command(text, values)], bar)

    return [
        stage("inspect", "inspect the rows",
              "{python} tools/inspect_data.py {out}/rows.tsv --out {out}/report --compare {out}/val.tsv --hash all "
              "--near_duplicates {near}"),
        tuned("before", "rows.tsv"),
        stage("score", "score the rows with that model",
              "{python} tools/score_rows.py {out}/lora_before {out}/rows.tsv {out}/scores.tsv", "scores"),
        stage("curate", "curate them",
              "{python} tools/curate_data.py {out}/rows.tsv {out}/curated.tsv --not_in {out}/val.tsv "
              "--near_duplicates {near} --drop_scores {out}/scores.tsv:{dropped}"),
        tuned("after", "curated.tsv"),
    ]  # fmt: skip


def report(out: str, planted: Dict[str, Dict[int, str]]) -> None:
    """Print what was left out, and what models make of the rows."""
    from make_demo_data import parse_caption

    from paddlemix.datasets.score_files import read_scores

    def table(name: str) -> Dict[str, str]:
        return {row[0]: row[-1] for row in read_table(os.path.join(out, name))}

    kept, swapped = table("curated.tsv"), set(planted["swapped caption"].values())
    counts = {fault: [len(rows), sum(name not in kept for name in rows.values())] for fault, rows in planted.items()}
    # Of a copy and its original, either may stay.
    copies, originals = planted["near duplicate"], planted.pop("copied")
    stay = [(name in kept) + (originals[place] in kept) for place, name in copies.items()]
    counts["near duplicate"][1] = len(stay) - stay.count(2)
    counts["sound row"] = [counts[""][0] + len(stay), counts[""][1] + stay.count(0)]
    print(f"\n{'planted':<18}{'rows':>8}{'left out':>11}")
    for fault in ("swapped caption", "near duplicate", "leak from val", "broken row", "sound row"):
        print(f"{fault:<18}{counts[fault][0]:>8,}{counts[fault][1]:>11,}")

    scores = {name: score.gain for name, score in read_scores(os.path.join(out, "scores.tsv")) if score is not None}
    ranked, wrong = sorted(scores, key=scores.get), len(swapped)
    below = sum(rank for rank, name in enumerate(ranked) if name in swapped) - wrong * (wrong - 1) / 2
    area = 1 - below / wrong / (len(ranked) - wrong)
    lowest = len(swapped.intersection(ranked[: int(len(ranked) * DROPPED)])) / wrong
    print(f"\ngain of swapped captions: area under the ROC {area:.3f}, {lowest:.0%} in the lowest {DROPPED:.0%}")
    truth = {name: parse_caption(caption) for name, caption in table("unseen.tsv").items()}
    for name, rows in (("before", "rows.tsv"), ("after", "curated.tsv")):
        captions = table(f"{name}.txt")
        found = {ad: parse_caption(captions[ad]) for ad in truth}
        right = [[found[ad][field] == value for field, value in wanted.items()] for ad, wanted in truth.items()]
        mean, whole = fmean(map(fmean, right)), fmean(map(all, right))
        print(f"tuned {name} curation, on {len(table(rows)):,} rows: attributes of unseen ads right {mean:.1%}, "
              f"all of an ad {whole:.1%}")  # fmt: skip


def main() -> int:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--demo", type=cli.path, default="demo", help="output folder of make demo (default: demo)")
    parser.add_argument(
        "--out", type=cli.output_folder, default="demo/curation", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=cli.seed, default=7, help="random seed (default: 7)")
    parser.add_argument("--steps", type=cli.positive, default=100, help="steps of each tuning (default: 100)")
    args = parser.parse_args()
    data = [os.path.join("data", name) for name in ("tune.tsv", "held_out.tsv", "held_out_captions.tsv")]
    for name in (os.path.join("pretrained", "config.json"), *data):
        if not os.path.isfile(os.path.join(args.demo, name)):
            raise UserError(f"no {name} in {args.demo}: run make demo first")
    from paddlemix.checkpoint.model_folder import check_new_folder

    began, planned = time.monotonic(), stages(args)
    check_new_folder(args.out, [os.path.join(args.demo, name) for name in ("data", "pretrained")], overwrite=True)
    claim(args.out, planned[0].name)
    for name in filter(WRITTEN.fullmatch, os.listdir(args.out)):
        path = os.path.join(args.out, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    planted = plant(args.demo, args.out, args.seed)
    for number, stage in enumerate(planned, 1):
        run_stage(args.out, stage, f"[{number}/{len(planned)}] {stage.title:<45}")
    report(args.out, planted)
    print(f"\n{time.monotonic() - began:.0f} s; the report: {os.path.join(args.out, 'report', 'report.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
