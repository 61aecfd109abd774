"""How far two versions are apart on the texts that are really asked: same-text cosine, and whose neighbours change.

The cosine of a text's two vectors means something only in one space: where the versions have two, and neither's
lunchbox holds a map into the other's, there is none. Neighbours need no common space: among recent texts, those nearest
to a text are found once by each version, and counted where both find them (overlap@10, as in flows/core/compat.py). No
text is kept, only vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bentos.lunchbox import Lunchbox
from bentos.vectors import FloatArray, Vectors, cosine_pairs, normalize

NEIGHBOURS = 10
RECENT_TEXTS = 500  # among which neighbours are looked for
FEWEST_TEXTS = 50  # with fewer, a tenth of any ten would be found by chance
RECENT_VALUES = 2000  # that mean and percentile are of
SAME_TEXT_COSINE = 1 - 1e-5  # in both versions: the text came before, and is no neighbour of itself

Relation = Literal["same", "mapped", "apart"]
Map = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Comparison:
    """What some texts say of two versions."""

    cosines: Sequence[float]  # one a text; none when the spaces are apart
    overlaps: Sequence[float]  # 0..1, one a text; none while too few texts came before
    fresh: Sequence[int]  # rows of texts that did not come before


class Drift:
    """What was seen of one pair of versions. Belongs to one task at a time; `compare` may run in another thread."""

    def __init__(self, live: Lunchbox, other: Lunchbox) -> None:
        self.live, self.other = live.manifest, other.manifest
        self.relation, self._map_live, self._map_other = _relate(live, other)
        self._live_rows = np.empty((RECENT_TEXTS, self.live.dim), dtype=np.float32)
        self._other_rows = np.empty((RECENT_TEXTS, self.other.dim), dtype=np.float32)
        self._kept = 0  # ever; they overwrite each other in turn
        self._texts = 0
        self._cosines: deque[float] = deque(maxlen=RECENT_VALUES)
        self._overlaps: deque[float] = deque(maxlen=RECENT_VALUES)

    def compare(self, live: Vectors, other: Vectors) -> Comparison:
        """Compare the vectors of the same texts, raw as the models give them: (texts, dim of each)."""
        live, other = normalize(live).astype(np.float32), normalize(other).astype(np.float32)
        cosines = (
            [] if self.relation == "apart" else cosine_pairs(self._map_live(live), self._map_other(other)).tolist()
        )
        size = min(self._kept, RECENT_TEXTS)
        near_live, near_other = live @ self._live_rows[:size].T, other @ self._other_rows[:size].T
        same = (near_live > SAME_TEXT_COSINE) & (near_other > SAME_TEXT_COSINE)
        overlaps = []
        for row in range(len(live)):
            if size - np.count_nonzero(same[row]) >= FEWEST_TEXTS:
                found = [_nearest(np.where(same[row], -2.0, near[row])) for near in (near_live, near_other)]
                overlaps.append(len(found[0] & found[1]) / NEIGHBOURS)
        return Comparison(cosines, overlaps, np.flatnonzero(~same.any(axis=1)).tolist())

    def add(self, comparison: Comparison, live: Vectors, other: Vectors) -> None:
        """Take note of a comparison, and keep the vectors for the texts to come."""
        self._texts += len(live)
        self._cosines.extend(comparison.cosines)
        self._overlaps.extend(comparison.overlaps)
        for row in comparison.fresh:
            place = self._kept % RECENT_TEXTS
            self._live_rows[place], self._other_rows[place] = normalize(live[row]), normalize(other[row])
            self._kept += 1

    def describe(self) -> dict[str, Any]:
        """The figures so far; those of a kind are None while there are none."""
        return {
            "model": self.other.tag,
            "space_id": self.other.space_id,
            "beside": self.live.tag,
            "relation": self.relation,
            "texts": self._texts,
            "cosine": _summarize(self._cosines),
            f"overlap_at_{NEIGHBOURS}": _summarize(self._overlaps),
        }


def _relate(live: Lunchbox, other: Lunchbox) -> tuple[Relation, Map, Map]:
    """How the spaces of two versions relate, and what brings the vectors of each into one of both."""
    if live.manifest.space_id == other.manifest.space_id:
        return "same", _keep, _keep
    if (adapter := other.adapters.get(live.manifest.space_id)) is not None:
        return "mapped", _keep, adapter.apply
    if (adapter := live.adapters.get(other.manifest.space_id)) is not None:
        return "mapped", adapter.apply, _keep
    return "apart", _keep, _keep


def _keep(vectors: FloatArray) -> FloatArray:
    return vectors


def _nearest(cosines: FloatArray) -> set[int]:
    return set(np.argpartition(-cosines, NEIGHBOURS - 1)[:NEIGHBOURS].tolist())


def _summarize(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    array = np.asarray(values)
    return {
        "mean": float(array.mean()),
        "p05": float(np.quantile(array, 0.05)),
        "min": float(array.min()),
        "values": len(array),
    }
