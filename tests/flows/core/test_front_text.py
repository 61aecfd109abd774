from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flows.core.front_text import HEIGHT, WIDTH, picture_lines, table_lines

COSTS = ["p95_ms", "bytes_per_vector"]


def row(trial: int, value: float, p95: float, size: float = 1536.0, **more: Any) -> dict[str, Any]:
    usual = {"front": True, "taken": False, "base_model": "org/small", "layers": None, "steps": 30}
    return {"trial": trial, "value": value, "p95_ms": p95, "bytes_per_vector": size, **usual, **more}


ROWS = [row(4, 0.71, 0.5, 256.0, layers=1), row(2, 0.80, 1.0, layers=3), row(0, 0.84, 2.0, taken=True)]


def test_the_table_shows_what_differs_between_architectures() -> None:
    assert table_lines(ROWS, "spearman", COSTS, ["base_model", "layers", "steps"]) == [
        "     trial  dev spearman  p95_ms  bytes_per_vector  layers",
        "  ●  4      0.7100        0.5     256               1",
        "  ●  2      0.8000        1       1536              3",
        "  ◉  0      0.8400        2       1536              all",
    ]


def test_the_picture_has_better_above_and_cheaper_to_the_left() -> None:
    lines = picture_lines([*ROWS, row(5, 0.75, 2.0, front=False)], "spearman", "p95_ms")
    plane = lines[1 : 1 + HEIGHT]
    places = {
        mark: next((at, line.index(mark)) for at, line in enumerate(plane) if mark in line)
        for mark in ("●4", "●2", "◉0", "·")
    }
    assert places["◉0"][0] < places["●2"][0] < places["·"][0] < places["●4"][0]
    assert places["●4"][1] < places["●2"][1] < places["◉0"][1] == places["·"][1]
    assert places["●2"][1] - places["●4"][1] in (29, 30)  # in the middle, on a logarithmic axis
    assert "0.8400" in lines[1]
    assert "0.7100" in lines[HEIGHT]
    assert lines[-1].split() == ["0.5", "ms", "2", "ms"]


def test_one_point_is_no_picture() -> None:
    assert picture_lines(ROWS[:1], "spearman", "p95_ms") == []


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 1e6), st.booleans()), min_size=2, max_size=12))
def test_any_points_fit_into_the_picture(points: list[tuple[float, float, bool]]) -> None:
    rows = [row(number, value, p95, front=front) for number, (value, p95, front) in enumerate(points)]
    lines = picture_lines(rows, "spearman", "p95_ms")
    assert len(lines) == HEIGHT + 3
    assert max(len(line) for line in lines[1:-1]) <= WIDTH + 16
