"""Who finds whom: nearest documents of queries, and how much of it stays when the vectors change. Core layer, pure.

Everywhere a ranking is an array (queries, ranks) of document rows, nearest first, and a result is one figure a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bentos.vectors import FloatArray, cosine_matrix

Ranking = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]

TOP = 10
LEAST_SHARE = 10  # documents for each rank that is looked at, so that chance finds a tenth at most
BOOTSTRAP_SAMPLES = 2000
BOOTSTRAP_SEED = 20
CONFIDENCE = 0.95


def choose_ranks(documents: int) -> int:
    """How many ranks to look at: `TOP`, or fewer where chance alone would find more than a tenth of them."""
    return max(1, min(TOP, documents // LEAST_SHARE))


def similarities(queries: FloatArray, documents: FloatArray, same: npt.NDArray[np.bool_]) -> Array:
    """Cosines (queries, documents); a document with the query's own text counts as infinitely far: it is no finding.

    Args:
        queries: (queries, dim).
        documents: (documents, dim).
        same: (queries, documents) where both are one text.
    """
    cosines = cosine_matrix(queries.astype(np.float64), documents.astype(np.float64))
    nearness: Array = np.where(same, -np.inf, cosines)
    return nearness


def rank(cosines: Array, ranks: int) -> Ranking:
    """The rows of the `ranks` nearest documents of each query, nearest first; equal ones in the order of the rows."""
    order: Ranking = np.argsort(-cosines, axis=1, kind="stable")[:, :ranks]
    return order


def share_found(found: Ranking, wanted: Ranking) -> Array:
    """(queries,) The share of the wanted documents that were found: recall, or overlap where neither side is right."""
    hits = (found[:, :, None] == wanted[:, None, :]).any(axis=1)
    shares: Array = hits.mean(axis=1)
    return shares


def similarity_kept(found: Ranking, cosines: Array) -> Array:
    """(queries,) How near the found documents are to the query, from any document, 0, to the nearest ones, 1.

    Nearness is what `cosines` (queries, documents) says: that of the model whose index it is. Unlike the share that
    was found it forgives a change of places among documents that are as near, and only that.
    """
    finite = np.where(np.isfinite(cosines), cosines, np.nan)
    ground = np.nanmean(finite, axis=1)
    best = np.take_along_axis(finite, rank(cosines, found.shape[1]), axis=1).mean(axis=1)
    near = np.take_along_axis(finite, found, axis=1).mean(axis=1)
    span = best - ground
    kept: Array = np.divide(near - ground, span, out=np.ones_like(span), where=span > 1e-9)
    return kept


def ndcg(found: Ranking, relevances: Mapping[int, Mapping[int, float]]) -> Array:
    """(judged queries,) nDCG of each query that has a relevant document, as in `flows.core.evaluation`.

    Args:
        found: (queries, ranks).
        relevances: query row -> document row -> relevance above 0.
    """
    ranks = found.shape[1]
    discounts = 1.0 / np.log2(np.arange(2, ranks + 2))
    figures = []
    for query, relevance in relevances.items():
        gains = np.array([relevance.get(int(document), 0.0) for document in found[query]])
        ideal = np.sort(list(relevance.values()))[::-1][:ranks]
        figures.append(gains @ discounts / (ideal @ discounts[: len(ideal)]))
    return np.array(figures, dtype=np.float64)


def low_end(values: Array, of: Array | None = None) -> float:
    """Low end of the bootstrap interval of a mean, or of the ratio of two means over the same queries.

    Queries are drawn with replacement (Efron and Tibshirani, 1993, "An Introduction to the Bootstrap", percentile
    method), `CONFIDENCE` of the resamples lie between both ends.
    """
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = random.integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    figures = values[drawn].mean(axis=1)
    if of is not None:
        whole = of[drawn].mean(axis=1)
        figures = np.divide(figures, whole, out=np.ones_like(figures), where=whole > 0)
    return float(np.quantile(figures, (1.0 - CONFIDENCE) / 2))


def group_judgements(
    judgements: Sequence[tuple[int, int, float]], same: npt.NDArray[np.bool_]
) -> dict[int, dict[int, float]]:
    """Query row -> document row -> relevance, without documents that are the query itself."""
    relevances: dict[int, dict[int, float]] = {}
    for query, document, relevance in judgements:
        if not same[query, document]:
            relevances.setdefault(query, {})[document] = relevance
    return relevances
