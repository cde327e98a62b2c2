"""tools/inspect_data.py on many rows, and the search for near duplicates: `python benchmarks/inspection.py [--large]`

Images have 30 KB, as most ads; their rows 40 of base64 and a caption. It runs in worker processes, one a core, and
decodes 20,000 images in a million, as the tool does, then all of them (--hash all). What a million rows would take is
measured on 30,000, by the clock and as processor time over the cores. Memory is that of all processes with rows of 1 KB
(200,000; a million with --large), as it grows with the number of rows alone. The search is among 1,000,000 random
hashes, a hundredth of them copies with 3 bits changed, and among those of 2,000 layouts with 500 ads each.
"""

from __future__ import annotations

import os
import resource

import harness
import scratch

ROWS = {"quick": 40, "normal": 30_000, "large": 100_000}
SMALL_ROWS = {"quick": 100, "normal": 200_000, "large": 1_000_000}
HASHES = {"quick": 1_000, "normal": 1_000_000, "large": 1_000_000}
MILLION = 1_000_000


def inspect(path: str, images: int, hash_all: bool, workers: int) -> dict:
    """Inspect all rows: their number, processor seconds of all processes, peak bytes of the largest worker."""
    from paddlemix.curation import advice, inspection

    options = inspection.Options(images=images, hash_all=hash_all, workers=workers, quiet=True)
    found = inspection.inspect([path], options)
    numbers = inspection.summary(found, options.near)
    advice.advice(found, numbers)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    return {"rows": numbers["rows"], "cpu": cpu, "worker": usage[1].ru_maxrss * 1024}


def search(count: int, crowded: bool) -> int:
    """The number of groups."""
    import numpy as np

    from paddlemix.curation.near_duplicates import near_groups

    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    if crowded:
        hashes = hashes[: max(count // 500, 1)][rng.integers(0, max(count // 500, 1), count)]
    changed = slice(None) if crowded else slice(count // 100)
    if not crowded:
        hashes[changed] = hashes[-(count // 100) :]
    for _ in range(10 if crowded else 3):
        hashes[changed] ^= np.uint64(1) << rng.integers(0, 64, len(hashes[changed])).astype(np.uint64)
    return len(np.unique(near_groups(hashes, 6)))


def main(argv=None) -> None:
    args = harness.parse(argv, __doc__)
    workers = 0 if args.size == "quick" else os.cpu_count()
    bench = harness.Bench(args, "inspect a dataset")
    rows, small = ROWS[args.size], SMALL_ROWS[args.size]
    with scratch.folder(rows * 44_000 + small * 1500) as folder:
        path = os.path.join(folder, "rows.tsv")
        written = scratch.write_tsv(path, rows * 42_000, scratch.jpegs(2 if args.size == "quick" else 48, side=384))
        for name, share, hash_all in (("20,000 decoded", 20_000 / MILLION, False), ("--hash all", 1.0, True)):
            done = harness.in_child(args, inspect, path, max(1, int(share * written)), hash_all, workers)
            minutes = MILLION / written / 60
            bench.value(f"1,000,000 rows, {name}", done.seconds * minutes, "min", rows=written)
            cpu = done.result["cpu"] * minutes / (workers or 1)
            bench.value("processor time of that over the cores", cpu, "min", at_most=25)
        os.truncate(path, 0)
        written = scratch.write_tsv(path, small * 1000, scratch.jpegs(2 if args.size == "quick" else 48, side=16))
        done = harness.in_child(args, inspect, path, 20_000, False, workers)
        peak = (done.peak_bytes + workers * done.result["worker"]) / 1e6
        bench.value(f"peak memory, {written:,} rows, all processes", peak, "MB", at_most=1000)
    for name, crowded in (("random", False), ("2,000 layouts", True)):
        done = harness.in_child(args, search, HASHES[args.size], crowded)
        bench.value(f"near duplicates among {HASHES[args.size]:,} hashes, {name}", done.seconds, "s", at_most=60)
        bench.value("peak memory of that", done.peak_bytes / 1e6, "MB", at_most=500)
    bench.finish()


if __name__ == "__main__":
    main()
