"""Arithmetic on vectors, the same in certification, evaluation and serving."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
Vectors = npt.NDArray[np.float32]  # as the engine gives them: (texts, dim)
EPSILON = 1e-12  # as torch.nn.functional.normalize


def normalize(vectors: FloatArray) -> FloatArray:
    """Scale each row of `vectors` (n, dim) to length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: FloatArray = vectors / np.maximum(norms, EPSILON)
    return unit


def cosine_matrix(a: FloatArray, b: FloatArray) -> FloatArray:
    """Cosine of every row of `a` (n, dim) with every row of `b` (m, dim): (n, m), in -1..1."""
    return np.clip(normalize(a) @ normalize(b).T, -1.0, 1.0)


def cosine_pairs(a: FloatArray, b: FloatArray) -> FloatArray:
    """Cosine of each row of `a` (n, dim) with the same row of `b`: (n,), in -1..1."""
    cosines: FloatArray = np.einsum("ij,ij->i", normalize(a), normalize(b))
    return np.clip(cosines, -1.0, 1.0)


def truncate_dimensions(vectors: FloatArray, dimensions: int) -> FloatArray:
    """Keep the first `dimensions` columns and scale to length 1 again."""
    return normalize(vectors[..., :dimensions])
