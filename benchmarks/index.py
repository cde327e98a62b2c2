"""Opening a train.json of many records, and one record of it: `python benchmarks/index.py [--large]`

Baseline: json.load of the file. Ours: datasets.chatml, with the index next to the file (and once without, which builds
it). Records hold small images; 1,000,000 of them with --large.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time

import harness
import scratch

RECORDS = {"quick": 500, "normal": 200_000, "large": 1_000_000}


def load_whole(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        return len(json.load(file))


def open_dataset(path: str, records: int = 0) -> list:
    """Open a train.json; the seconds of each of some records picked at random."""
    from paddlemix.datasets.chatml import ChatmlDataset

    dataset = ChatmlDataset(path, None, tokenizer=None, image_processor=None)
    rng, seconds = random.Random(0), []
    for _ in range(records):
        start = time.perf_counter()
        dataset.record(rng.randrange(len(dataset)))
        seconds.append(time.perf_counter() - start)
    return seconds


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    count = RECORDS[args.size]
    bench = harness.Bench(args, f"Opening a train.json of {count:,} records")
    with scratch.folder(count * 1000) as folder:
        path = os.path.join(folder, "train.json")
        image = scratch.jpegs(1, side=64)[0].decode()[:600]
        with open(path, "w", encoding="utf-8") as file:
            for n in range(count):
                record = {"id": f"identity_{n}", "conversations": [["请描述图片内容", f"标题{n}"]], "image": image}
                file.write((",\n" if n else "[\n") + json.dumps(record, ensure_ascii=False))
            file.write("\n]\n")
        whole, building, opening = [], [], []
        for _ in range(args.pairs):
            whole.append(harness.in_child(args, load_whole, path))
            for name in os.listdir(folder):
                if name.endswith(".idx"):
                    os.unlink(os.path.join(folder, name))
            building.append(harness.in_child(args, open_dataset, path))
            opening.append(harness.in_child(args, open_dataset, path))
        records = harness.in_child(args, open_dataset, path, 1000).result
    loading = [done.seconds for done in whole]
    bench.ratio("json.load ÷ with an index", harness.Pairs(loading, [done.seconds for done in opening]))
    bench.ratio("json.load ÷ building the index", harness.Pairs(loading, [done.seconds for done in building]))
    bench.value("opening with an index", statistics.median(done.seconds for done in opening), "s", at_most=2)
    bench.value("building the index", statistics.median(done.seconds for done in building), "s", at_most=30)
    bench.value("a random record, median", statistics.median(records) * 1e3, "ms", at_most=1)
    bench.value("peak memory, building", max(done.peak_bytes for done in building) / 1e6, "MB", at_most=300)
    bench.value("peak memory, json.load", whole[0].peak_bytes / 1e6, "MB")
    bench.finish()


if __name__ == "__main__":
    main()
