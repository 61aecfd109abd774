"""From cosine to score: a monotone map and a decision threshold, both fitted on dev only.

Core layer: numpy and scipy, no models, no files. The map is `bentos.manifest.Calibration`, so the server applies the
same one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bentos.manifest import Calibration

Array = npt.NDArray[np.float64]
MAX_KNOTS = 64
MAX_BINS, ROWS_A_BIN = 10, 30  # of the calibration error
_DIGITS = 6  # of what is stored: far below what a label is worth, and short in the manifest


def fit_calibration(cosines: npt.ArrayLike, scores: npt.ArrayLike) -> Calibration:
    """Fit the monotone map from cosine to score that is closest to `scores` in the least squares sense.

    Isotonic regression gives a staircase. Each of its steps becomes one knot at the step's mean cosine and mean score,
    and straight lines join the knots: centred isotonic regression (Oron and Flournoy, 2017, "Centered isotonic
    regression: point and interval estimation for dose-response studies"). So two cosines between the outermost knots
    keep their order instead of becoming equal.

    Args:
        cosines: Cosine of each dev pair, -1..1, shape (rows,), at least one row.
        scores: Label of each dev pair, 0..1, shape (rows,).

    Returns:
        At most `MAX_KNOTS` knots: cosines strictly increasing, scores not decreasing, scores in 0..1.
    """
    from scipy.optimize import isotonic_regression

    x, row = np.unique(np.asarray(cosines, dtype=np.float64), return_inverse=True)
    weights = np.bincount(row)
    means = np.bincount(row, weights=np.asarray(scores, dtype=np.float64)) / weights
    staircase = isotonic_regression(means, weights=weights)
    starts = staircase.blocks[:-1]
    rows = np.add.reduceat(weights, starts)
    centres, levels = _merge_to(MAX_KNOTS, np.add.reduceat(x * weights, starts) / rows, staircase.x[starts], rows)
    centres, first = np.unique(centres.round(_DIGITS), return_index=True)
    return Calibration(cosines=centres.tolist(), scores=levels[first].round(_DIGITS).clip(0.0, 1.0).tolist())


def fit_threshold(cosines: npt.ArrayLike, scores: npt.ArrayLike, positive_score: float) -> float:
    """Return the cosine at or above which two texts count as similar: the one that is right on most dev pairs.

    Args:
        cosines: Cosine of each dev pair, shape (rows,), at least one row.
        scores: Label of each dev pair, shape (rows,).
        positive_score: Labels at or above it count as similar.

    Returns:
        A cosine half-way between two neighbouring pairs; the middle one when several thresholds are equally right.
        All labels on one side give the lowest (or just above the highest) cosine.
    """
    x = np.asarray(cosines, dtype=np.float64)
    similar = np.asarray(scores, dtype=np.float64) >= positive_score
    values, of_row = np.unique(x, return_inverse=True)
    positives = np.bincount(of_row, weights=similar)
    negatives = np.bincount(of_row) - positives
    # Threshold i calls values[i:] similar: right are the negatives below it and the positives from it on.
    right = np.append(0.0, np.cumsum(negatives)) + np.append(np.cumsum(positives[::-1])[::-1], 0.0)
    candidates = np.concatenate([values[:1], (values[:-1] + values[1:]) / 2, [np.nextafter(values[-1], 2.0)]])
    best = np.flatnonzero(right == right.max())
    return float(candidates[best[(len(best) - 1) // 2]])


def calibration_error(calibration: Calibration, cosines: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return how far calibrated scores are from labels on the whole: 0 when a score of 0.7 means labels of 0.7.

    Rows are sorted by their calibrated score and cut into up to `MAX_BINS` bins of about equally many rows; the error
    is the mean over rows of the distance between a bin's mean score and its mean label (the expected calibration error
    of Naeini et al., 2015, with equal-mass bins). A bin has `ROWS_A_BIN` rows or more, or is the only one: smaller ones
    would measure the spread of the labels.

    Args:
        calibration: The map from cosine to score.
        cosines: Cosine of each pair, shape (rows,); no row gives 0.
        scores: Label of each pair, 0..1, shape (rows,).
    """
    predicted = calibration.apply(cosines)
    labels = np.asarray(scores, dtype=np.float64)
    if len(predicted) == 0:
        return 0.0
    order = np.argsort(predicted, kind="stable")
    bins = np.array_split(order, max(1, min(MAX_BINS, len(order) // ROWS_A_BIN)))
    return float(sum(abs((predicted[rows] - labels[rows]).sum()) for rows in bins) / len(order))


def _merge_to(knots: int, centres: Array, levels: Array, rows: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Merge neighbouring steps into at most `knots` groups of about equally many rows, each at its rows' means."""
    if len(centres) <= knots:
        return centres, levels
    middle = (np.cumsum(rows) - rows / 2) / rows.sum()
    group = np.unique((middle * knots).astype(int), return_inverse=True)[1]
    weight = np.bincount(group, weights=rows)
    return np.bincount(group, weights=centres * rows) / weight, np.bincount(group, weights=levels * rows) / weight
