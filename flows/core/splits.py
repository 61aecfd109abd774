"""Splitting rows so that no text stands on both sides.

Core layer, pure. Two rows belong to one group when they share a text, directly or through other rows (a connected
component of the graph whose nodes are texts and whose edges are rows). Groups stay whole; only when a group is too
big for that, its texts are dealt out to the splits and the rows between splits are left out.

The outcome depends on the seed and on the set of rows, not on their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from flows.params import DataParams

IntArray = npt.NDArray[np.int64]
SPLITS = ("train", "dev", "test")
PASSES = 4  # over the texts of groups that must be cut
SKEWS = (1.0, 0.75, 0.5)  # exponents tried on the fractions: of a dense group, a split keeps the square of its share


@dataclass(frozen=True)
class Split:
    """Which row goes where."""

    rows: dict[str, IntArray]  # split -> positions of its rows, ascending
    dropped: int  # rows left out because their texts went to different splits
    groups: int  # connected components


def split_fractions(missing: Sequence[str], params: DataParams) -> dict[str, float]:
    """Shares of train and of what is split off it, train first."""
    wanted = {"dev": params.dev_fraction, "test": params.test_fraction}
    held_out = {name: wanted[name] for name in missing}
    return {"train": 1 - sum(held_out.values()), **held_out}


def split_groups(text_a: Sequence[str], text_b: Sequence[str], fractions: Mapping[str, float], *, seed: int) -> Split:
    """Deal rows out to splits without a text on both sides.

    Args:
        text_a: one text of each row.
        text_b: the other text of each row.
        fractions: split -> share of the rows, summing to 1; the first one takes what fits nowhere else.
        seed: other seeds give other splits.
    """
    if len(text_a) == 0:
        return Split({name: np.empty(0, dtype=np.int64) for name in fractions}, 0, 0)
    codes, texts = pd.factorize(np.array([*text_a, *text_b], dtype=object))
    a, b = codes[: len(text_a)], codes[len(text_a) :]
    count, component_of_text = connected_components(
        csr_matrix((np.ones(len(a)), (a, b)), shape=(len(texts), len(texts))), directed=False
    )
    component = component_of_text[a]
    sizes = np.bincount(component, minlength=count)
    digests = np.array([_digest(text, seed) for text in texts])
    keys = np.full(count, "~", dtype=digests.dtype)  # a group goes by its smallest digest
    for text, group in enumerate(component_of_text):
        keys[group] = min(keys[group], digests[text])
    order = np.argsort(keys)
    by_size = sorted(range(count), key=lambda group: (-sizes[group], keys[group]))
    shares = np.array(list(fractions.values()))

    split = np.full(len(a), -1, dtype=np.int64)
    for cut in range(count + 1):  # groups that had to be cut so far, biggest first
        in_cut = np.isin(component, by_size[:cut])
        split[in_cut] = _cut_rows(a[in_cut], b[in_cut], digests, shares)
        place = _place_groups(order[~np.isin(order, by_size[:cut])], sizes, split[in_cut], shares)
        split[~in_cut] = place[component[~in_cut]]
        filled = np.bincount(split[split >= 0], minlength=len(shares))
        if (filled[1:] >= 0.5 * shares[1:] * filled.sum()).all() or sizes[by_size[cut : cut + 1]].sum() < 2:
            break
    rows = {name: np.flatnonzero(split == index).astype(np.int64) for index, name in enumerate(fractions)}
    return Split(rows, int((split < 0).sum()), count)


def _digest(text: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed}:{text}".encode(errors="surrogatepass"), digest_size=12).hexdigest()


def _place_groups(order: IntArray, sizes: IntArray, already: IntArray, shares: npt.NDArray[np.float64]) -> IntArray:
    """A split for each whole group: held-out ones first, as long as a group brings them nearer to their share.

    Groups bigger than a held-out share have their turn last, when smaller ones did not do.
    """
    filled = np.bincount(already[already >= 0], minlength=len(shares)).astype(float)
    target = shares * (filled.sum() + sizes[order].sum())
    place = np.zeros(len(sizes), dtype=np.int64)
    for group in sorted(order, key=lambda group: bool(sizes[group] > target.min())):
        for index in range(len(shares) - 1, 0, -1):
            if sizes[group] <= 2 * (target[index] - filled[index]):
                place[group] = index
                break
        filled[place[group]] += sizes[group]
    return place


def _cut_rows(a: IntArray, b: IntArray, digests: npt.NDArray[np.str_], shares: npt.NDArray[np.float64]) -> IntArray:
    """A split for each row of groups that are too big to stay whole, or -1 when its texts went to different splits.

    How many rows survive depends on how dense the graph is, so a few ways to share out the texts are tried, and the one
    whose most starved split has the most rows is taken.
    """
    best = np.empty(0, dtype=np.int64)
    best_worst = -1.0
    for skew in SKEWS if len(a) else ():
        skewed = shares**skew / (shares**skew).sum()
        place = _deal_texts(a, b, digests, skewed)
        split = np.where(place[a] == place[b], place[a], -1)
        worst = float((np.bincount(split[split >= 0], minlength=len(shares)) / shares).min())
        if worst > best_worst:
            best, best_worst = split, worst
    return best


def _deal_texts(a: IntArray, b: IntArray, digests: npt.NDArray[np.str_], shares: npt.NDArray[np.float64]) -> IntArray:
    """A split for each text, few rows between splits: restreaming linear deterministic greedy partitioning.

    Every text in turn (by digest) goes where most of its neighbours are, weighted by the room left there (Stanton and
    Kliot 2012); passes after the first start from the one before (Nishimura and Ugander 2013). Room is counted in rows.
    """
    neighbours: dict[int, list[int]] = {}
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    order = sorted(neighbours, key=lambda text: digests[text])
    capacity = [float(share) * 2 * len(a) for share in shares]
    load = [0.0] * len(shares)
    place = [-1] * len(digests)
    for _ in range(PASSES):
        for text in order:
            degree = len(neighbours[text])
            if place[text] >= 0:
                load[place[text]] -= degree
            near = [0] * len(shares)
            for other in neighbours[text]:
                if place[other] >= 0:
                    near[place[other]] += 1
            room = [1 - used / size for used, size in zip(load, capacity, strict=True)]
            place[text] = max(range(len(shares)), key=lambda i: (near[i] * max(room[i], 0.0), room[i]))
            load[place[text]] += degree
    return np.array(place, dtype=np.int64)
