"""What the command shows at its end, made from results alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flows import screens
from flows.cli_lineage import render_chain
from flows.command import where
from flows.core.explain import Chain, Link
from flows.settings import load_settings
from flows.tune import TuneResult

PARAMS = {"base_model": "org/small", "layers": None, "precision": "int8", "learning_rate": 2.345e-5}


LINKS = ("vectors", "bento", "version", "space", "run", "gates", "base_model", "data", "commit", "lock")


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


@pytest.mark.parametrize("uri", ["postgresql://me:secret@host/db", "http://me:secret@host:5000"])
def test_no_screen_shows_the_password_of_mlflow(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    settings = load_settings()
    assert settings.mlflow_uri == uri
    chain = Chain("3", "registry", tuple(Link(name, "ok", "", {"run_id": "ab12"}) for name in LINKS), ())
    shown = [
        tuned(ROWS),
        str(screens.status([], [], [], settings)),
        str(screens.history([], settings)),
        screens.mlflow_command(settings),
        json.dumps(where(settings)),
        str(render_chain(chain, settings)),
    ]
    for text in shown:
        assert "secret" not in text
    assert '"$MLFLOW_TRACKING_URI"' in shown[-1]


def test_paths_of_data_are_words_of_the_command() -> None:
    facts = {"looked_at": [{"place": "/data/my pairs; rm -r x.csv", "md5": "0"}]}
    links = [Link(name, "ok", "", facts if name == "data" else {}) for name in LINKS]
    shown = str(render_chain(Chain("3", "registry", tuple(links), ()), load_settings()))
    assert "$ md5sum '/data/my pairs; rm -r x.csv'" in shown


def test_a_study_of_quality_alone_shows_no_front() -> None:
    for shown in (tuned(ROWS, costs=[]), tuned(ROWS[:1])):
        assert "◉" not in shown
        assert "Tuned: version 3" in shown


def test_a_model_that_was_kept_near_the_champion_says_so_beside_its_gain() -> None:
    near = {"anchor/same_text_cosine": 0.98124, "anchor/weight": 1.0, "anchor/version": 2.0}
    scores = {"base/spearman": 0.7, "eval/spearman": 0.8, "gain/spearman": 0.1, "gain/low": 0.05, "gain/high": 0.15}
    lines = tuned(ROWS, metrics=scores | near).splitlines()
    at = lines.index("  gain +0.1000, interval +0.0500 to +0.1500")
    assert lines[at + 1] == "  kept near version 2: same-text cosine 0.9812 on dev, weight 1 (train.anchor_weight)"
