from __future__ import annotations

import math

import pytest

from tests.benchmarks.load import GAVE_UP, RESET, Load, Shot
from tests.benchmarks.servers import ServerError
from tests.benchmarks.workloads import (
    Examiner,
    compute_rate,
    count_outcomes,
    select_due,
    summarize_latencies,
)


def test_a_request_counts_by_its_part_in_the_window() -> None:
    load = Load(begin=10.0, end=12.0)
    load.shots = [
        Shot(10.5, 11.0, 200),  # inside
        Shot(9.0, 11.0, 200),  # half of it
        Shot(11.0, 15.0, 200),  # a quarter
        Shot(8.0, 9.0, 200),  # before
        Shot(10.5, 11.5, 500),  # no answer
    ]
    assert compute_rate(load) == pytest.approx((1 + 0.5 + 0.25) / 2)


def test_a_steady_loop_has_the_same_rate_however_the_window_lies() -> None:
    shots = [Shot(0.7 * number, 0.7 * (number + 1), 200) for number in range(100)]
    for begin in (10.0, 10.3, 10.65):
        load = Load(begin, begin + 5.0, shots)
        assert compute_rate(load) == pytest.approx(1 / 0.7)


def test_percentiles_are_of_the_right_answers_only() -> None:
    shots = [Shot(0.0, 0.001 * number, 200) for number in range(1, 101)] + [Shot(0.0, 9.0, 500)]
    figures = summarize_latencies(shots)
    assert figures["p50_ms"] == pytest.approx(50.5)
    assert figures["p99_ms"] == pytest.approx(99.01)
    assert summarize_latencies([Shot(0.0, 9.0, 500)]) == {}
    assert summarize_latencies([Shot(0.0, 9.0, GAVE_UP)], (200, GAVE_UP))["p50_ms"] == pytest.approx(9000)


def test_every_outcome_is_counted_once() -> None:
    statuses = [200, 200, 429, 500, 503, 404, 302, RESET, GAVE_UP]
    figures = count_outcomes([Shot(0.0, 1.0, status) for status in statuses])
    assert figures == {
        "requests": 9,
        "ok": 2,
        "refused": 1,
        "server_errors": 2,
        "other_errors": 2,
        "resets": 1,
        "late": 1,
    }


def test_only_requests_due_in_the_window_have_their_latency_counted() -> None:
    load = Load(begin=1.0, end=2.0, shots=[Shot(0.9, 1.5, 200), Shot(1.0, 9.0, 200), Shot(2.0, 2.1, 200)])
    assert select_due(load) == [load.shots[1]]


def test_the_examiner_finds_the_worst_vector_and_ignores_what_it_does_not_know() -> None:
    examiner = Examiner({"a": [1.0, 0.0], "b": [0.0, 2.0]})
    assert examiner.find_min_cosine(["a", "b", "c"], [[3.0, 0.0], [1.0, 1.0], [9.0, 9.0]]) == pytest.approx(
        1 / math.sqrt(2)
    )
    with pytest.raises(ServerError, match="1 vectors came back for 2 texts"):
        examiner.find_min_cosine(["a", "b"], [[1.0, 0.0]])
