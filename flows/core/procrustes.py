"""The turn that brings one vector space closest to another: orthogonal Procrustes. Core layer, numbers only."""

from __future__ import annotations

import numpy as np

from bentos.vectors import FloatArray, Vectors, normalize

PRIOR_TEXTS = 1.0  # weight of "change nothing", in texts: it decides where the given ones say next to nothing
RIDGE = 0.01  # of the mean eigenvalue: keeps directions that hardly any text has out of the first guess
MAX_ROUNDS = 30  # of the iteration for a smaller old space; the cosines change by less than 0.001 after them
STILL = 1e-4  # change of W's largest entry below which it ends


def fit_map(new: FloatArray, old: FloatArray) -> Vectors:
    """Fit W so that each row of `new @ W` points where its row of `old` does, as nearly as all of them can.

    W is orthogonal when both spaces have as many dimensions, has orthonormal rows when the old one has more, and
    orthonormal columns when it has fewer. In the first two cases it keeps all lengths, and with unit vectors W = U V'
    of the singular value decomposition new' old = U S V' makes the sum of the cosines largest (Schönemann, 1966, "A
    generalized solution of the orthogonal Procrustes problem"). In the third it leaves something of each vector out, so
    that lengths change, and there is no closed form: see `_fit_narrower`. The means are not taken out: a cosine is
    measured from the origin, so that a turn about any other point would change what the cosines of the mapped vectors
    mean.

    Fewer texts than dimensions leave part of W open. There it is drawn to the identity by the weight of `PRIOR_TEXTS`:
    right for a model that was trained further, and as good as anything for all others.

    Args:
        new: (texts, dim of the new space).
        old: (texts, dim of the old space), of the same texts.

    Returns:
        float32 (dim of the new space, dim of the old space).

    Raises:
        ValueError: when there is no text, or the counts differ.
    """
    if len(new) != len(old) or not len(new):
        raise ValueError(f"{len(new)} new and {len(old)} old vectors: a map needs as many of both, and at least one")
    unit_new, unit_old = normalize(new.astype(np.float64)), normalize(old.astype(np.float64))
    nothing = np.eye(unit_new.shape[1], unit_old.shape[1])
    prior = PRIOR_TEXTS / min(nothing.shape) * nothing
    if nothing.shape[0] > nothing.shape[1]:
        matrix = _fit_narrower(unit_new, unit_old, prior)
    else:
        matrix = turn_to(unit_new.T @ unit_old + prior)
    return matrix.astype(np.float32)


def _fit_narrower(new: FloatArray, old: FloatArray, prior: FloatArray) -> FloatArray:
    """Fit W with orthonormal columns to unit vectors, from the ridge regression of `old` on `new` on.

    Each round first scales the rows of `new` so that mapped they have length 1, as only their direction counts, and
    then takes a step towards the least squares of new W = old: W becomes the matrix with orthonormal columns nearest to
    new' old + (l I - new' new) W, with l the largest eigenvalue of new' new, which never makes that fit worse
    (majorisation; Kiers, 1990, "Majorization as a tool for optimizing a class of matrix functions").
    """
    squares, products = new.T @ new, new.T @ old + prior
    ridge = RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
    matrix = turn_to(np.linalg.solve(squares + ridge, products))
    for _ in range(MAX_ROUNDS):
        lengths = np.linalg.norm(new @ matrix, axis=1, keepdims=True)
        scaled = np.divide(new, lengths, out=np.zeros_like(new), where=lengths > 1e-6)
        squares, products = scaled.T @ scaled, scaled.T @ old + prior
        largest = np.linalg.eigvalsh(squares)[-1]
        last, matrix = matrix, turn_to(products + largest * matrix - squares @ matrix)
        if np.abs(matrix - last).max() < STILL:
            break
    return matrix


def turn_to(products: FloatArray) -> FloatArray:
    """The matrix with orthonormal rows or columns that is nearest to `products` (Schönemann, 1966)."""
    left, _, right = np.linalg.svd(products, full_matrices=False)
    matrix: FloatArray = left @ right
    return matrix
