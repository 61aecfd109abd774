"""The head that gives a model its number of dimensions: one linear map, put before the scaling to length 1.

Core layer. A head is a plain `Dense` module without bias and activation, so the model loads in plain
sentence-transformers and exports like any other. Which smaller numbers of dimensions were trained beside the full one
is written into the transformer's `config.json`, under the key that other servers (vLLM) read as well.

It starts as the first dimensions. Starting from the principal axes of the training texts' vectors was tried and lost:
with all-MiniLM-L6-v2 at 128 dimensions, 60 steps on 960 rows of STS-B, Spearman on 500 others was 0.844, where cutting
a model that was trained whole gave 0.857.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flows.core.models import get_transformer
from flows.core.procrustes import turn_to
from flows.errors import ParamsError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from bentos.vectors import FloatArray

NESTED_KEY = "matryoshka_dimensions"
MIN_NESTED = 16  # dimensions; fewer hold too little to be worth a request


def nest_dims(dimensions: int) -> tuple[int, ...]:
    """The numbers of dimensions that are trained together: the full one, its half, a quarter, ... while they are even.

    An even number is what the angle loss needs.
    """
    dims = [dimensions]
    while dims[-1] % 4 == 0 and dims[-1] // 2 >= MIN_NESTED:
        dims.append(dims[-1] // 2)
    return tuple(dims)


def read_nested_dims(model: SentenceTransformer) -> tuple[int, ...]:
    """The smaller numbers of dimensions that the model was trained for, largest first; empty for most models."""
    config = getattr(get_transformer(model), "config", None)
    named = getattr(config, NESTED_KEY, None) or ()
    dim = model.get_embedding_dimension() or 0
    return tuple(sorted({int(each) for each in named if 0 < int(each) < dim}, reverse=True))


def note_nested_dims(model: SentenceTransformer, dims: tuple[int, ...]) -> None:
    """Write into the model for which numbers of dimensions it was trained; none takes away what a base model says."""
    transformer = get_transformer(model)
    if transformer is None:
        return
    if dims:
        setattr(transformer.config, NESTED_KEY, sorted(dims, reverse=True))
    elif hasattr(transformer.config, NESTED_KEY):
        delattr(transformer.config, NESTED_KEY)


def attach_head(model: SentenceTransformer, dimensions: int, name: str) -> SentenceTransformer:
    """Return `model` with a head that keeps its first `dimensions`; its modules are shared, not copied.

    Raises:
        ParamsError: when the model has fewer dimensions than that; `name` is what messages call it.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    width = model.get_embedding_dimension() or 0
    if dimensions > width:
        raise ParamsError(
            f"train.dimensions is {dimensions}, but {name} has vectors of {width} dimensions: set {width} or less"
        )
    head = Dense(width, dimensions, bias=False, activation_function=None, init_weight=torch.eye(dimensions, width))
    modules = list(model)
    modules.insert(len(modules) - (type(modules[-1]) is Normalize), head)
    return SentenceTransformer(
        modules=modules,
        device=str(model.device),
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        model_card_data=model.model_card_data,
    )


def set_head(model: SentenceTransformer, weight: FloatArray) -> None:
    """Give the head that `attach_head` made the `weight` (dimensions, width)."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    head = next(module for module in reversed(list(model)) if isinstance(module, Dense))
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(weight))


def nearest_axes(vectors: FloatArray, targets: FloatArray) -> FloatArray:
    """The map with orthonormal rows that brings `vectors` nearest to `targets`.

    From Schönemann (1966), "A generalized solution of the orthogonal Procrustes problem".

    Args:
        vectors: Unit vectors (texts, width).
        targets: Unit vectors (texts, dimensions), dimensions at most `width`.

    Returns:
        (dimensions, width).
    """
    return turn_to(targets.astype(np.float64).T @ vectors.astype(np.float64))
