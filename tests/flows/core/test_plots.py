from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bentos.manifest import Calibration
from flows.core.evaluation import Evaluation, Interval, Scores
from flows.core.plots import write_front_plot, write_plots

LOSSES = [(step, 0.05 / step) for step in range(1, 61)]
PAIR_METRICS = {"spearman": 0.8, "mae": 0.1, "mae_uncalibrated": 0.2, "accuracy": 0.7}


def make_evaluation(rows: int = 60, queries: int = 0) -> Evaluation:
    random = np.random.default_rng(0)
    base, tuned = random.uniform(-0.2, 1, (2, rows))
    text = [f"text {row}" for row in range(rows)]
    table = {"text_a": text, "text_b": text, "score": tuned.clip(0, 1), "base_cosine": base, "tuned_cosine": tuned}
    ndcg = random.uniform(0, 1, (2, queries)) if queries else (None, None)
    calibration = Calibration(cosines=[0.0, 0.5, 1.0], scores=[0.1, 0.2, 0.9]) if rows else None
    scores = [
        Scores(PAIR_METRICS if rows else {}, cosines if rows else None, each)
        for cosines, each in zip((base, tuned), ndcg, strict=True)
    ]
    return Evaluation(
        base=scores[0],
        tuned=scores[1],
        base_dev=scores[0],
        tuned_dev=scores[1],
        calibration=calibration,
        base_calibration=calibration,
        decision_threshold=0.4 if rows else None,
        primary_metric="spearman" if rows else "ndcg_at_10",
        gain=Interval(0.02, 0.01, 0.03),
        test_rows=pd.DataFrame(table),
    )


def read_image(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize(
    ("evaluation", "losses", "expected"),
    [
        (make_evaluation(), LOSSES, ["score_scatter", "calibration", "training_curve"]),
        (make_evaluation(rows=0, queries=30), LOSSES, ["ndcg_gain", "training_curve"]),
        (make_evaluation(queries=30), LOSSES, ["score_scatter", "calibration", "ndcg_gain", "training_curve"]),
        (make_evaluation(), [], ["score_scatter", "calibration"]),
    ],
    ids=["pairs", "retrieval", "both", "no-losses"],
)
def test_there_is_a_picture_for_everything_that_was_measured(
    evaluation: Evaluation, losses: list[tuple[int, float]], expected: list[str], tmp_path: Path
) -> None:
    paths = write_plots(evaluation, losses, tmp_path / "plots")
    assert [path.stem for path in paths] == expected
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    for path in paths:
        image = read_image(path)
        assert min(image.shape[:2]) > 400
        assert image[..., :3].std() > 0.05  # something is drawn


def test_the_pictures_show_the_tuned_scores(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    other = replace(evaluation, test_rows=evaluation.test_rows.assign(tuned_cosine=0.5))
    first, second = (write_plots(each, [], tmp_path / name) for each, name in ((evaluation, "a"), (other, "b")))
    for one, two in zip(first, second, strict=True):
        assert not np.array_equal(read_image(one), read_image(two)), one.name


@pytest.mark.parametrize("rows", [2, 20_000])
def test_few_and_many_pairs_can_be_drawn(rows: int, tmp_path: Path) -> None:
    assert len(write_plots(make_evaluation(rows), LOSSES[:1], tmp_path)) == 3


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    write_plots(make_evaluation(), LOSSES, tmp_path)
    assert plt.get_fignums() == before


def front_row(trial: int, value: float, p95_ms: float, *, front: bool = True, taken: bool = False) -> dict[str, object]:
    size = {"layers": trial or None, "dimensions": None, "precision": "auto", "bytes_per_vector": 1536.0}
    return {"trial": trial, "value": value, "p95_ms": p95_ms, "front": front, "taken": taken, **size}


def test_the_front_is_drawn_against_each_cost(tmp_path: Path) -> None:
    rows = [
        front_row(1, 0.7, 1.0), front_row(2, 0.8, 2.0, taken=True), front_row(3, 0.6, 4.0, front=False),
        front_row(0, 0.84, 8.0),
    ]  # fmt: skip
    costs = ["p95_ms", "bytes_per_vector"]

    def draw(name: str, costs: list[str], rows: list[dict[str, object]]) -> list[Path]:
        return write_front_plot(rows, "spearman", costs, tmp_path / name, limits={"p95_ms": 9.0}, policy="knee")

    paths = draw("both", costs, rows)
    assert [path.name for path in paths] == ["front.png", "front.svg"]
    assert paths[1].read_text().count("<svg") == 1
    both, one = read_image(paths[0]), read_image(draw("one", costs[:1], rows)[0])
    assert both[..., :3].std() > 0.05
    assert both.shape[1] > one.shape[1]  # a panel more
    moved = [dict(row, taken=row["trial"] == 1) for row in rows]
    assert not np.array_equal(read_image(draw("moved", costs, moved)[0]), both)


def test_a_front_of_one_trial_is_a_picture_too(tmp_path: Path) -> None:
    (png, _) = write_front_plot(
        [front_row(0, 0.8, 2.0, taken=True)], "spearman", ["p95_ms"], tmp_path, limits={}, policy="best-quality"
    )
    assert read_image(png)[..., :3].std() > 0.05
