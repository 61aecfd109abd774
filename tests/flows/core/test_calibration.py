from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.manifest import Calibration
from flows.core.calibration import MAX_KNOTS, calibration_error, fit_calibration, fit_threshold

COSINES = st.floats(-1, 1, width=32)
ROWS = st.lists(st.tuples(COSINES, st.floats(0, 1, width=32)), min_size=1, max_size=200)


def make_rows(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    cosines = random.uniform(-0.2, 1.0, rows)
    scores = np.clip(np.clip(cosines, 0, 1) ** 2 + random.normal(0, 0.15, rows), 0, 1)
    return cosines, scores


@given(rows=ROWS)
def test_calibration_is_monotone_in_range_and_small(rows: list[tuple[float, float]]) -> None:
    calibration = fit_calibration(*np.array(rows).T)
    assert 1 <= len(calibration.cosines) == len(calibration.scores) <= MAX_KNOTS
    assert (np.diff(calibration.cosines) > 0).all()
    scores = calibration.apply(np.linspace(-1, 1, 201))
    assert (np.diff(scores) >= 0).all()
    assert scores.min() >= 0
    assert scores.max() <= 1


@given(rows=ROWS)
def test_calibration_survives_the_manifest(rows: list[tuple[float, float]]) -> None:
    calibration = fit_calibration(*np.array(rows).T)
    again = Calibration.model_validate(json.loads(calibration.model_dump_json()))
    grid = np.linspace(-1, 1, 21)
    assert again.apply(grid).tolist() == calibration.apply(grid).tolist()


@given(cosine=COSINES, scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_calibration_of_one_cosine_is_the_mean_score(cosine: float, scores: list[float]) -> None:
    calibration = fit_calibration([cosine] * len(scores), scores)
    assert calibration.apply([-1.0, cosine, 1.0]) == pytest.approx(np.mean(scores), abs=1e-5)


def test_calibration_of_a_line_is_that_line() -> None:
    cosines = np.linspace(0, 1, 50)
    calibration = fit_calibration(cosines, cosines / 2)
    assert calibration.apply([0.0, 0.25, 0.33, 1.0]) == pytest.approx([0, 0.125, 0.165, 0.5], abs=1e-4)


def test_calibration_keeps_the_order_of_cosines_between_its_ends() -> None:
    cosines, scores = make_rows(500)
    calibration = fit_calibration(cosines, scores)
    inside = np.linspace(calibration.cosines[0], calibration.cosines[-1], 100)
    assert (np.diff(calibration.apply(inside)) > 0).all()


def test_calibration_of_many_rows_has_few_knots_and_a_smaller_error_than_the_cosine() -> None:
    cosines, scores = make_rows(50_000)
    calibration = fit_calibration(cosines, scores)
    fresh_cosines, fresh_scores = make_rows(5_000, seed=1)
    assert len(calibration.cosines) <= MAX_KNOTS
    calibrated = np.abs(calibration.apply(fresh_cosines) - fresh_scores).mean()
    assert calibrated < 0.8 * np.abs(fresh_cosines.clip(0, 1) - fresh_scores).mean()


def test_calibration_is_close_to_isotonic_regression() -> None:
    from sklearn.isotonic import IsotonicRegression

    cosines, scores = make_rows(2_000)
    isotonic = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(cosines, scores)
    grid = np.linspace(-0.2, 1, 200)
    assert np.abs(fit_calibration(cosines, scores).apply(grid) - isotonic.predict(grid)).mean() < 0.02


@given(rows=ROWS, positive_score=st.floats(0.1, 0.9), other=COSINES)
def test_no_other_threshold_is_right_more_often(
    rows: list[tuple[float, float]], positive_score: float, other: float
) -> None:
    cosines, scores = np.array(rows).T
    similar = scores >= positive_score

    def accuracy(threshold: float) -> float:
        return float(((cosines >= threshold) == similar).mean())

    assert accuracy(fit_threshold(cosines, scores, positive_score)) >= accuracy(other)


def test_threshold_lies_half_way_between_the_two_sides() -> None:
    assert fit_threshold([0.1, 0.3, 0.7, 0.9], [0.0, 0.2, 0.8, 1.0], 0.5) == pytest.approx(0.5)


def test_threshold_of_one_sided_labels_calls_all_pairs_alike() -> None:
    cosines = np.array([0.2, 0.6])
    assert (cosines >= fit_threshold(cosines, [0.9, 0.8], 0.5)).all()
    assert not (cosines >= fit_threshold(cosines, [0.1, 0.2], 0.5)).any()


def test_the_calibration_error_is_the_distance_of_means_over_bins() -> None:
    identity = Calibration(cosines=[0.0, 1.0], scores=[0.0, 1.0])
    cosines = np.repeat([0.2, 0.8], 30)
    assert calibration_error(identity, cosines, cosines) == pytest.approx(0.0)
    assert calibration_error(identity, cosines, np.repeat([0.3, 0.7], 30)) == pytest.approx(0.1)
    assert calibration_error(identity, cosines, np.repeat([0.3, 0.3], 30)) == pytest.approx((0.1 + 0.5) / 2)
    assert calibration_error(identity, cosines[20:40], np.full(20, 0.5)) == pytest.approx(0.0)  # too few for two bins
    assert calibration_error(identity, [], []) == 0.0


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=300))
def test_the_calibration_error_lies_between_nothing_and_the_mean_error(rows: list[tuple[float, float]]) -> None:
    cosines, scores = map(list, zip(*rows, strict=True))
    calibration = Calibration(cosines=[-1.0, 0.0, 1.0], scores=[0.0, 0.3, 1.0])
    mean_error = float(np.abs(calibration.apply(cosines) - np.asarray(scores)).mean())
    assert 0.0 <= calibration_error(calibration, cosines, scores) <= mean_error + 1e-9
