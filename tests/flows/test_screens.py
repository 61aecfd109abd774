"""What the command shows at its end, made from results alone."""

from __future__ import annotations

from typing import Any

from flows import screens
from flows.settings import load_settings
from flows.tune import TuneResult

PARAMS = {"base_model": "org/small", "layers": None, "precision": "int8", "learning_rate": 2.345e-5}


def tuned(rows: list[dict[str, Any]], **changed: Any) -> str:
    usual: dict[str, Any] = {
        "run_id": "ab12", "version": "3", "primary_metric": "spearman", "base_score": 0.7, "score": 0.8,
        "metrics": {"base/spearman": 0.7, "eval/spearman": 0.8}, "study": "spearman+p95_ms-12", "study_run_id": "cd",
        "finished_trials": 3, "hopeless_trials": 0, "ended_by": "trials", "policy": "knee", "trial": 2,
        "best_params": PARAMS, "costs": ["p95_ms"], "trials": rows,
    }  # fmt: skip
    return str(screens.tuned(TuneResult(**usual | changed), load_settings()))


def row(trial: int, value: float, p95_ms: float, *, front: bool = True, taken: bool = False) -> dict[str, Any]:
    return {"trial": trial, "value": value, "p95_ms": p95_ms, "front": front, "taken": taken, **PARAMS, "layers": trial}


ROWS = [row(1, 0.7, 1.0), row(2, 0.8, 2.0, taken=True), row(3, 0.75, 3.0, front=False)]


def test_a_study_ends_with_its_front_and_what_was_taken_from_it() -> None:
    shown = tuned(ROWS)
    lines = shown.splitlines()
    assert "trial 2, by tune.policy=knee" in shown
    assert "learning_rate 2.35e-05" in shown
    assert "layers all" in shown
    assert "  ◉  2      0.8000        2       2" in lines
    assert "  ●  1      0.7000        1       1" in lines
    assert not any(line.startswith("  ·  3") for line in lines)  # behind the front: in the picture alone
    assert "dev spearman against p95_ms" in shown
    assert "hopeless" not in shown
    assert "2 given up as hopeless" in tuned(ROWS, hopeless_trials=2)


def test_a_study_of_quality_alone_shows_no_front() -> None:
    for shown in (tuned(ROWS, costs=[]), tuned(ROWS[:1])):
        assert "◉" not in shown
        assert "Tuned: version 3" in shown
