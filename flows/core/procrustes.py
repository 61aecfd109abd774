"""The turn that brings one vector space closest to another: orthogonal Procrustes. Core layer, numbers only."""

from __future__ import annotations

import numpy as np

from bentos.vectors import FloatArray, Vectors, normalize

PRIOR_TEXTS = 1.0  # weight of "change nothing", in texts: it decides where the given ones say next to nothing
MAX_ROUNDS = 200  # of the iteration for a smaller old space; some dozens are usual
STILL = 1e-5  # change of W's largest entry below which it ends


def fit_map(new: FloatArray, old: FloatArray) -> Vectors:
    """Fit W so that `normalize(new) @ W` comes closest to `normalize(old)`: least squares.

    W is orthogonal when both spaces have as many dimensions, has orthonormal rows when the old one has more, and
    orthonormal columns when it has fewer. In the first two cases W = U V' of the singular value decomposition new' old
    = U S V' (Schönemann, 1966, "A generalized solution of the orthogonal Procrustes problem"). In the third, what W
    leaves out counts too and there is no closed form: the same step is repeated on new' old + (l I - new' new) W, with
    l the largest eigenvalue of new' new, which never makes the fit worse (majorisation; Kiers, 1990, "Majorization as
    a tool for optimizing a class of matrix functions"). The means are not taken out: a cosine is measured from the
    origin, so that a turn about any other point would change what the cosines of the mapped vectors mean.

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
    products = unit_new.T @ unit_old
    products += PRIOR_TEXTS / min(products.shape) * np.eye(*products.shape)
    matrix = _turn_to(products)
    if matrix.shape[0] > matrix.shape[1]:
        squares = unit_new.T @ unit_new
        slack = np.linalg.eigvalsh(squares)[-1] * np.eye(len(squares)) - squares
        for _ in range(MAX_ROUNDS):
            last, matrix = matrix, _turn_to(products + slack @ matrix)
            if np.abs(matrix - last).max() < STILL:
                break
    return matrix.astype(np.float32)


def _turn_to(products: FloatArray) -> FloatArray:
    """The matrix with orthonormal rows or columns that is nearest to `products`."""
    left, _, right = np.linalg.svd(products, full_matrices=False)
    matrix: FloatArray = left @ right
    return matrix
