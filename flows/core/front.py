"""Which trials are worth having, which one is taken, and which one need not go on: rules over figures. Core layer.

Pure: knows neither Optuna nor how anything was measured. A trial is a point: one quality, the higher the better, and
costs, the lower the better. Costs are compared by ratio, so their units do not matter: twice as slow weighs as much as
twice as large.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flows.errors import ParamsError

BEST_QUALITY, KNEE, CHEAPEST_WITHIN, TRIAL = "best-quality", "knee", "cheapest-within", "trial"
MIN_PEERS = 3  # the median of fewer trials says little
PRUNING_MARGIN = 0.01  # of the dev metric: what a trial must be behind that median to be given up


@dataclass(frozen=True)
class Point:
    """A trial that was trained to its end."""

    number: int
    quality: float  # dev metric
    costs: tuple[float, ...] = ()  # each > 0, in the order of `tune.costs`
    is_base: bool = False  # the parameters that the user gave

    @property
    def log_cost(self) -> float:
        """All costs as one number: the sum of their logarithms. Only differences mean something, as ratios."""
        return sum(math.log(cost) for cost in self.costs)


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is at least as good and as cheap in everything, and better or cheaper in something."""
    if one.quality < other.quality or any(a > b for a, b in zip(one.costs, other.costs, strict=True)):
        return False
    return one.quality > other.quality or one.costs != other.costs


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one dominates, cheapest first; of equal ones the first trial."""
    first: dict[tuple[float, tuple[float, ...]], Point] = {}
    for point in sorted(points, key=lambda point: point.number):
        first.setdefault((point.quality, point.costs), point)
    front = [point for point in first.values() if not any(dominates(other, point) for other in first.values())]
    return sorted(front, key=lambda point: (point.log_cost, point.quality, point.number))


def choose(points: Sequence[Point], policy: str, *, min_improvement: float) -> Point:
    """Take the point that the written policy asks for.

    - `best-quality`: the highest quality; the base, unless that is higher by `min_improvement`, since on a small dev
      set the highest of many scores is often only the luckiest. Of equal ones the cheapest, then the first.
    - `cheapest-within PCT`: the lowest `log_cost` among those whose quality is at most PCT percent below the highest.
    - `knee`: the point of the front that lies farthest above the line from its cheap end to its good end, with quality
      and `log_cost` scaled to 0..1 (the normalised difference curve of Satopää et al., 2011, "Finding a 'Kneedle' in
      a haystack"). A spread of quality below `min_improvement` counts as nothing gained for its cost.
    - `trial N`: that one.

    Args:
        points: Trials that were trained to their end and are within the budgets; at least one.
        policy: As above; `TuneParams.policy` has checked how it is written.
        min_improvement: Smaller differences of quality are noise.

    Raises:
        ParamsError: the policy names a trial that is not among the points.
    """
    kind, _, argument = policy.partition(" ")
    if kind == TRIAL:
        return _find(points, int(argument))
    if kind == CHEAPEST_WITHIN:
        best = max(point.quality for point in points)
        floor = best - abs(best) * float(argument) / 100
        within = [point for point in points if point.quality >= floor]
        return min(within, key=lambda point: (point.log_cost, -point.quality, point.number))
    if kind == KNEE:
        return _find_knee(pareto_front(points), min_improvement)
    chosen = max(points, key=lambda point: (point.quality, -point.log_cost, -point.number))
    base = next((point for point in points if point.is_base), chosen)
    return base if chosen.quality < base.quality + min_improvement else chosen


def is_hopeless(value: float, peers: Sequence[float], *, margin: float = PRUNING_MARGIN) -> bool:
    """Whether a trial that stands at `value` need not go on: it is clearly behind the median of its peers.

    Args:
        value: Dev metric at a check before the trial's end.
        peers: Dev metric at the same check of the trials that are as cheap or cheaper in every cost. A trial that is
            behind these ends up behind the front; one that is behind dearer ones may still be on it.
        margin: Smaller differences are noise.
    """
    return len(peers) >= MIN_PEERS and value < statistics.median(peers) - margin


def as_cheap(costs: Sequence[float], than: Sequence[float]) -> bool:
    """Whether no cost is higher than the other's."""
    return all(a <= b for a, b in zip(costs, than, strict=True))


def _find(points: Sequence[Point], number: int) -> Point:
    for point in points:
        if point.number == number:
            return point
    front = ", ".join(str(point.number) for point in pareto_front(points))
    raise ParamsError(
        f"tune.policy asks for trial {number}, which is not among the finished trials within the limits "
        f"of cost; on the front are {front}"
    )


def _find_knee(front: Sequence[Point], min_improvement: float) -> Point:
    cheapest, worst = min(point.log_cost for point in front), min(point.quality for point in front)
    cost_span = max(point.log_cost for point in front) - cheapest
    quality_span = max(max(point.quality for point in front) - worst, min_improvement)

    def height(point: Point) -> float:
        gained = (point.quality - worst) / quality_span if quality_span else 0.0
        paid = (point.log_cost - cheapest) / cost_span if cost_span else 0.0
        return round(gained - paid, 9)  # of points on one line the best one, whatever the rounding

    return max(front, key=lambda point: (height(point), point.quality, -point.number))
