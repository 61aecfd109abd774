"""Which points are worth having, and which one a policy takes: properties over any points, and cases by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.front import MIN_PEERS, Point, as_cheap, choose, dominates, is_hopeless, pareto_front
from flows.errors import ParamsError

LEVELS = st.integers(0, 8)  # few values, so that ties are common
POLICIES = ["best-quality", "knee", "cheapest-within 0", "cheapest-within 3", "cheapest-within 100"]


@st.composite
def studies(draw: st.DrawFn, *, costs: int | None = None, with_base: bool = True) -> list[Point]:
    """Draw the finished trials of a study: unique numbers, at most one base."""
    count = draw(st.integers(0, 3)) if costs is None else costs
    rows = draw(st.lists(st.tuples(LEVELS, *[LEVELS] * count), min_size=1, max_size=14))
    base = draw(st.integers(-1, len(rows) - 1)) if with_base else -1
    return [
        Point(number, 0.5 + row[0] / 20, tuple(2.0**level for level in row[1:]), is_base=number == base)
        for number, row in enumerate(rows)
    ]


def chosen_by(points: list[Point], policy: str, min_improvement: float = 0.0) -> Point:
    return choose(points, policy, min_improvement=min_improvement)


@given(points=studies())
def test_nothing_beats_the_front_and_everything_else_is_beaten_by_it(points: list[Point]) -> None:
    front = pareto_front(points)
    assert front
    assert set(front) <= set(points)
    for point in points:
        assert not any(dominates(point, other) for other in front)
        if point not in front:
            assert any(dominates(other, point) or same_place(other, point) for other in front)
    assert len({(point.quality, point.costs) for point in front}) == len(front)
    assert [point.log_cost for point in front] == sorted(point.log_cost for point in front)


def same_place(one: Point, other: Point) -> bool:
    return (one.quality, one.costs) == (other.quality, other.costs) and one.number < other.number


@given(points=studies(), order=st.randoms(use_true_random=False))
def test_the_front_and_the_choice_do_not_depend_on_the_order(points: list[Point], order: object) -> None:
    shuffled = list(points)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pareto_front(shuffled) == pareto_front(points)
    for policy in POLICIES:
        assert chosen_by(shuffled, policy, 0.002) == chosen_by(points, policy, 0.002)


@given(points=studies(), a=st.integers(0, 13), b=st.integers(0, 13), c=st.integers(0, 13))
def test_beating_is_a_strict_order(points: list[Point], a: int, b: int, c: int) -> None:
    one, two, three = (points[index % len(points)] for index in (a, b, c))
    assert not dominates(one, one)
    assert not (dominates(one, two) and dominates(two, one))
    if dominates(one, two) and dominates(two, three):
        assert dominates(one, three)


@pytest.mark.parametrize("policy", POLICIES)
@given(points=studies(with_base=False))
def test_without_a_base_every_policy_takes_a_point_of_the_front(policy: str, points: list[Point]) -> None:
    assert chosen_by(points, policy) in pareto_front(points)


@pytest.mark.parametrize("policy", POLICIES)
@given(points=studies(costs=2, with_base=False), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_of_a_cost_does_not_matter(policy: str, points: list[Point], factor: float) -> None:
    scaled = [Point(point.number, point.quality, (point.costs[0] * factor, point.costs[1])) for point in points]
    one, two = chosen_by(points, policy), chosen_by(scaled, policy)
    # Rounding may break a tie the other way: then both are as good a choice.
    assert one.number == two.number or one.log_cost == pytest.approx(points[two.number].log_cost)


@given(points=studies(), min_improvement=st.sampled_from([0.0, 0.002, 0.06]))
def test_best_quality_never_ends_below_the_base_and_leaves_it_only_for_a_clear_gain(
    points: list[Point], min_improvement: float
) -> None:
    chosen = chosen_by(points, "best-quality", min_improvement)
    base = next((point for point in points if point.is_base), None)
    best = max(point.quality for point in points)
    if base is None:
        assert chosen.quality == best
    elif best < base.quality + min_improvement:
        assert chosen is base
    else:
        assert chosen.quality == best


@given(points=studies(), percent=st.sampled_from([0, 1, 5, 20, 100]))
def test_cheapest_within_is_good_enough_and_nothing_as_good_is_cheaper(points: list[Point], percent: int) -> None:
    chosen = chosen_by(points, f"cheapest-within {percent}")
    floor = max(point.quality for point in points) * (1 - percent / 100)
    assert chosen.quality >= floor - 1e-12
    good = [point for point in points if point.quality >= floor + 1e-12]
    assert all(chosen.log_cost <= point.log_cost + 1e-12 for point in good)


def test_each_policy_on_a_front_that_bends() -> None:
    points = [
        Point(0, 0.880, (8.0, 1536.0), is_base=True),
        Point(1, 0.700, (1.0, 256.0)),
        Point(2, 0.860, (2.0, 512.0)),
        Point(3, 0.884, (16.0, 1536.0)),
        Point(4, 0.840, (4.0, 512.0)),  # behind trial 2
        Point(5, 0.872, (4.0, 1536.0)),
    ]
    assert [point.number for point in pareto_front(points)] == [1, 2, 5, 0, 3]
    assert chosen_by(points, "best-quality", 0.002).number == 3
    assert chosen_by(points, "best-quality", 0.005).number == 0
    assert chosen_by(points, "cheapest-within 1").number == 0
    assert chosen_by(points, "cheapest-within 2").number == 5
    assert chosen_by(points, "cheapest-within 3").number == 2
    assert chosen_by(points, "cheapest-within 50").number == 1
    assert chosen_by(points, "knee").number == 2
    assert chosen_by(points, "trial 4").number == 4


def test_of_equal_qualities_the_cheaper_one_is_the_best() -> None:
    points = [Point(0, 0.8, (4.0,)), Point(1, 0.8, (2.0,)), Point(2, 0.8, (2.0,))]
    assert chosen_by(points, "best-quality").number == 1


def test_a_gain_within_the_noise_is_not_worth_its_cost_to_the_knee() -> None:
    points = [Point(0, 0.8000, (1.0,)), Point(1, 0.8009, (2.0,)), Point(2, 0.8010, (4.0,))]
    assert chosen_by(points, "knee", 0.002).number == 0
    assert chosen_by(points, "knee", 0.0).number == 1


def test_a_trial_that_is_not_there_is_an_error_that_names_the_front() -> None:
    with pytest.raises(ParamsError, match=r"trial 7, .* on the front are 1, 0"):
        chosen_by([Point(0, 0.9, (2.0,)), Point(1, 0.8, (1.0,)), Point(2, 0.7, (3.0,))], "trial 7")


@given(value=st.floats(0, 1), peers=st.lists(st.floats(0, 1), max_size=9), margin=st.sampled_from([0.0, 0.01, 0.1]))
def test_a_trial_is_given_up_only_when_at_least_half_of_enough_peers_are_clearly_ahead(
    value: float, peers: list[float], margin: float
) -> None:
    ahead = sum(value < peer - margin for peer in peers)
    if is_hopeless(value, peers, margin=margin):
        assert len(peers) >= MIN_PEERS
        assert ahead >= len(peers) / 2
    elif len(peers) >= MIN_PEERS:
        assert ahead <= len(peers) / 2 + 0.5
    assert not is_hopeless(float("nan"), peers, margin=margin)


@given(value=st.floats(0, 1), better=st.floats(0, 1), peers=st.lists(st.floats(0, 1), max_size=9))
def test_a_better_trial_is_never_given_up_before_a_worse_one(value: float, better: float, peers: list[float]) -> None:
    low, high = sorted((value, better))
    if is_hopeless(high, peers):
        assert is_hopeless(low, peers)


def test_as_cheap_looks_at_every_cost() -> None:
    assert as_cheap((1.0, 512.0), (1.0, 1536.0))
    assert not as_cheap((1.1, 512.0), (1.0, 1536.0))
    assert as_cheap((), ())
