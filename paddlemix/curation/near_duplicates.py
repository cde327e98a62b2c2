"""Near duplicates among a million 64-bit hashes: those that differ in few bits (image_facts.py makes them).

Two hashes that differ in d bits agree in t of any d + t blocks of their bits. So for each choice of t blocks the hashes
are sorted by these, and compared with those that have the same: every pair is found, and few others are looked at. The
memory is some arrays of the hashes' length.

Shapes: [n] hashes, uint64.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Iterator, List, Optional, Tuple

import numpy as np

from paddlemix.utils.log import logger

# Beyond this distance, unrelated images are equally near, and the search takes minutes.
MAX_DISTANCE = 10
# A search makes no more, which takes half a minute. Only very many hashes that are nearly alike need more; then those
# far apart in the order of a bucket are not compared.
MOST_COMPARISONS = 2_000_000_000
# Cost of sorting by one choice of blocks, in comparisons per hash.
_SORT = 4
_HELD_PAIRS = 1 << 20
_PART = 1 << 14


def bits_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamming distances, uint64 [n], of hashes [n]."""
    x = a ^ b
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    y = (x >> np.uint64(2)) & np.uint64(0x3333333333333333)
    x &= np.uint64(0x3333333333333333)
    x += y
    x += x >> np.uint64(4)
    x &= np.uint64(0x0F0F0F0F0F0F0F0F)
    x *= np.uint64(0x0101010101010101)
    x >>= np.uint64(56)
    return x


def _plan(n: int, distance: int) -> Tuple[List[Tuple[int, int]], int]:
    """(blocks as (shift, width), how many of them make a key): the cheapest for n hashes. A key has at most 32 bits."""

    def cost(t: int) -> float:
        return comb(distance + t, t) * (_SORT * n + n * n / 2.0 ** (1 + 64 * t // (distance + t)))

    best = min((t for t in range(1, 5) if 64 * t <= 32 * (distance + t)), key=cost)
    edges = [64 * block // (distance + best) for block in range(distance + best + 1)]
    return [(begin, end - begin) for begin, end in zip(edges, edges[1:])], best


def _sorted_by(key: np.ndarray) -> np.ndarray:
    """A stable order of uint32 keys; numpy sorts 16 bits by counting."""
    order = np.argsort(key.astype(np.uint16), kind="stable")
    high = (key >> np.uint32(16)).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def _near_pairs(hashes: np.ndarray, distance: int) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(i, j, bits apart) of pairs within `distance` among sorted, distinct hashes; a pair may come several times."""
    # Of distinct hashes none are 0 apart.
    if distance < 1 or len(hashes) < 2:
        return
    blocks, chosen = _plan(len(hashes), distance)
    choices = list(combinations(blocks, chosen))
    budget, left_out = MOST_COMPARISONS, 0
    for number, choice in enumerate(choices):
        key = np.zeros(len(hashes), np.uint32)
        for shift, width in choice:
            part = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
            key = (key << np.uint32(width)) | part.astype(np.uint32)
        order = _sorted_by(key)
        key, ordered = key[order], hashes[order]
        # How many of the same key follow each.
        ends = np.append(np.flatnonzero(key[1:] != key[:-1]) + 1, len(key))
        follow = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(len(key)) - 1
        # Blocks that one choice does not use are used by another.
        left = share = budget // (len(choices) - number)
        place, step = np.flatnonzero(follow), 1
        while len(place) and left > 0:
            # In parts that fit the processor's cache.
            for part in np.split(place, range(_PART, len(place), _PART)):
                apart = bits_apart(ordered[part], ordered[part + step])
                near = apart <= distance
                if near.any():
                    found = part[near]
                    yield order[found], order[found + step], apart[near]
            left -= len(place)
            step += 1
            place = place[follow[place] >= step]
        budget -= share - left
        left_out += int((follow[place] - step + 1).sum())
    if left_out:
        logger.warning(
            f"{left_out:,} pairs were not compared: very many images of this set are nearly alike, "
            "and a group of them may stay in several parts"
        )


def _check(distance: int) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}: 0 to {MAX_DISTANCE} bits")


def _join(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union-find, all pairs at once: afterwards group[a] == group[b], the least member of each group."""
    while True:
        low, high = np.minimum(group[a], group[b]), np.maximum(group[a], group[b])
        apart = low != high
        if not apart.any():
            return
        a, b, low, high = a[apart], b[apart], low[apart], high[apart]
        # If several are joined to the same root, one wins; the others are handled in the next round.
        group[high] = low
        while True:
            root = group[group]
            if (root == group).all():
                break
            group[:] = root


def near_groups(hashes: np.ndarray, distance: int, usable: Optional[np.ndarray] = None) -> np.ndarray:
    """int64 [n]: for each hash the index of the first one of its group.

    A group is all that is joined by pairs within `distance` bits (0…MAX_DISTANCE). usable: bool [n]; the others stay by
    themselves (one-colour pictures, whose hashes mean nothing).
    """
    _check(distance)
    result = np.arange(len(hashes))
    rows = result if usable is None else np.flatnonzero(usable)
    distinct, first, number = np.unique(hashes[rows], return_index=True, return_inverse=True)
    group = np.arange(len(distinct))
    held: List[Tuple[np.ndarray, np.ndarray]] = []
    waiting = 0
    for i, j, _ in _near_pairs(distinct, distance):
        new = group[i] != group[j]
        held.append((i[new], j[new]))
        waiting += int(new.sum())
        if waiting > _HELD_PAIRS:
            _join(group, *map(np.concatenate, zip(*held)))
            held, waiting = [], 0
    if held:
        _join(group, *map(np.concatenate, zip(*held)))
    # Distinct hashes are in the order of their bits; the first of a group is so in the order of the rows.
    least = np.full(len(distinct), len(hashes))
    np.minimum.at(least, group, first)
    result[rows] = rows[least[group][number]]
    return result


def nearest_in(hashes: np.ndarray, others: np.ndarray, distance: int) -> Tuple[np.ndarray, np.ndarray]:
    """(index in `others`, int64 [n], bits apart, int64 [n]) of the nearest within `distance` bits of each of `hashes`;
    of several the first. (-1, -1) where there is none."""
    _check(distance)
    distinct, number = np.unique(np.concatenate([hashes, others]), return_inverse=True)
    none = np.int64(1) << 62
    # Of each distinct hash: its first place among the others.
    place = np.full(len(distinct), none)
    np.minimum.at(place, number[len(hashes) :], np.arange(len(others)))
    # Distance and place are packed into one number, so that the minimum finds both.
    best = place.copy()
    for i, j, apart in _near_pairs(distinct, distance):
        for mine, other in ((i, j), (j, i)):
            value = (apart.astype(np.int64) << 40) + place[other]
            better = value < best[mine]
            np.minimum.at(best, mine[better], value[better])
    found = best[number[: len(hashes)]]
    missing = found == none
    return np.where(missing, -1, found & ((1 << 40) - 1)), np.where(missing, -1, found >> 40)
