"""How good a model is: figures on dev and test, for the base model and the tuned one on the same rows.

Core layer: numbers only. A model comes in as a function from texts to vectors, so nothing here knows torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from bentos.manifest import Calibration
from bentos.vectors import FloatArray, cosine_pairs, normalize
from flows.core.calibration import fit_calibration, fit_threshold
from flows.params import EvaluateParams

if TYPE_CHECKING:
    from flows.core.dataset import Dataset, Part
    from flows.core.retrieval import Retrieval

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]
Array = npt.NDArray[np.float64]
TOP = 10  # ranks that count in nDCG, MRR and recall
BOOTSTRAP_SEED = 20
_CORPUS_CHUNK = 8192  # documents scored at once against
_QUERY_CHUNK = 512  # this many queries: 16 MB of cosines
_BOOTSTRAP_CELLS = 2_000_000  # rows x resamples held at once


@dataclass(frozen=True)
class Scores:
    """One model on one part. Metric names carry no prefix; arrays are None when the part has no such data."""

    metrics: dict[str, float]
    cosines: Array | None = None  # (rows,)
    per_query_ndcg: Array | None = None  # (queries that have a relevant document,)
    nearest: dict[str, list[str]] | None = None  # query id -> ids of its `TOP` nearest documents; the same queries


@dataclass(frozen=True)
class Interval:
    """A figure and the interval it lies in with the confidence asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The base model and the tuned one on dev and on test, and what was fitted on dev."""

    base: Scores
    tuned: Scores
    base_dev: Scores
    tuned_dev: Scores
    calibration: Calibration | None  # of the tuned model; None without dev pairs
    base_calibration: Calibration | None
    decision_threshold: float | None  # of the tuned model; None without dev pairs
    primary_metric: str
    gain: Interval  # tuned - base of the primary metric on test
    test_rows: pd.DataFrame  # the test pairs, with all their columns, and base_cosine, tuned_cosine

    def flat_metrics(self) -> dict[str, float]:
        """Return every figure under the name it has in MLflow."""
        sections = {"eval": self.tuned, "base": self.base, "dev": self.tuned_dev, "base_dev": self.base_dev}
        flat = {f"{prefix}/{name}": value for prefix, part in sections.items() for name, value in part.metrics.items()}
        flat[f"gain/{self.primary_metric}"] = self.gain.value
        flat["gain/low"] = self.gain.low
        flat["gain/high"] = self.gain.high
        if self.decision_threshold is not None:
            flat["decision_threshold"] = self.decision_threshold
        return flat


def primary_metric(part: Part) -> str:
    """Return the metric that candidates are compared by: `spearman` when there are pairs, else `ndcg_at_10`."""
    return "spearman" if part.has_pairs else "ndcg_at_10"


def score_part(part: Part, encode: Encode, params: EvaluateParams, calibration: Calibration | None = None) -> Scores:
    """Score one model on one part.

    Pairs give `pearson` and `spearman` of cosine and label, `mae_uncalibrated` and `accuracy_uncalibrated` of the
    cosine itself (negative ones count as 0), and with a calibration `mae` and `accuracy` of the calibrated score.
    `accuracy` is the share of pairs whose error is below `params.tolerance`. Retrieval data give `ndcg_at_10`,
    `mrr_at_10` and `recall_at_10`, means over the queries that have a relevant document.
    """
    scores = _score_raw(part, _EncodeOnce(encode), params)
    return scores if calibration is None else _add_calibrated(scores, part, calibration, params)


def evaluate_model(dataset: Dataset, base: Encode, tuned: Encode, params: EvaluateParams) -> Evaluation:
    """Score both models on dev and test. Each gets its own calibration, fitted on its own dev cosines.

    The interval of the gain comes from a paired bootstrap: test rows (or queries) are drawn with replacement, the same
    ones for both models, and the difference is taken anew (Efron and Tibshirani, 1993, "An Introduction to the
    Bootstrap", percentile method). It does not cover the luck of the training seed.
    """
    base_dev, base_test, base_calibration = _score_model(dataset, base, params)
    tuned_dev, tuned_test, calibration = _score_model(dataset, tuned, params)
    threshold = None
    if tuned_dev.cosines is not None:
        threshold = fit_threshold(tuned_dev.cosines, dataset.dev.pairs["score"], params.positive_score)
    name = primary_metric(dataset.test)
    return Evaluation(
        base=base_test,
        tuned=tuned_test,
        base_dev=base_dev,
        tuned_dev=tuned_dev,
        calibration=calibration,
        base_calibration=base_calibration,
        decision_threshold=threshold,
        primary_metric=name,
        gain=bootstrap_gain(dataset.test, base_test, tuned_test, params),
        test_rows=dataset.test.pairs.assign(
            base_cosine=base_test.cosines if base_test.cosines is not None else np.empty(0),
            tuned_cosine=tuned_test.cosines if tuned_test.cosines is not None else np.empty(0),
        ),
    )


def _score_model(dataset: Dataset, encode: Encode, params: EvaluateParams) -> tuple[Scores, Scores, Calibration | None]:
    """Return one model's scores on dev and test, and its calibration. Encodes each distinct text once."""
    encode_once = _EncodeOnce(encode)
    dev, test = (_score_raw(part, encode_once, params) for part in (dataset.dev, dataset.test))
    if dev.cosines is None:
        return dev, test, None
    calibration = fit_calibration(dev.cosines, dataset.dev.pairs["score"])
    dev = _add_calibrated(dev, dataset.dev, calibration, params)
    return dev, _add_calibrated(test, dataset.test, calibration, params), calibration


def _score_raw(part: Part, encode: Encode, params: EvaluateParams) -> Scores:
    metrics: dict[str, float] = {}
    cosines = per_query_ndcg = nearest = None
    if part.has_pairs:
        cosines = _pair_cosines(part.pairs, encode)
        labels = part.pairs["score"].to_numpy(np.float64)
        metrics["pearson"] = float(_pearson(cosines, labels))
        metrics["spearman"] = float(_spearman(cosines, labels))
        metrics |= _errors(cosines.clip(0.0, 1.0), labels, params.tolerance, suffix="_uncalibrated")
    if part.retrieval is not None:
        per_query, nearest = _score_queries(part.retrieval, encode)
        per_query_ndcg = per_query["ndcg_at_10"]
        metrics |= {name: float(values.mean()) if len(values) else 0.0 for name, values in per_query.items()}
    return Scores(metrics, cosines, per_query_ndcg, nearest)


def _add_calibrated(scores: Scores, part: Part, calibration: Calibration, params: EvaluateParams) -> Scores:
    if scores.cosines is None:
        return scores
    labels = part.pairs["score"].to_numpy(np.float64)
    errors = _errors(calibration.apply(scores.cosines), labels, params.tolerance)
    return replace(scores, metrics=scores.metrics | errors)


def _errors(predicted: Array, labels: Array, tolerance: float, suffix: str = "") -> dict[str, float]:
    error = np.abs(predicted - labels)
    return {f"mae{suffix}": float(error.mean()), f"accuracy{suffix}": float((error < tolerance).mean())}


def _pair_cosines(pairs: pd.DataFrame, encode: Encode) -> Array:
    vectors = encode([*pairs["text_a"], *pairs["text_b"]])
    return cosine_pairs(vectors[: len(pairs)], vectors[len(pairs) :]).astype(np.float64)


def _pearson(a: Array, b: Array) -> Array:
    """Pearson correlation along the last axis; 0 where one side is constant, since nothing was shown then."""
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    correlation: Array = np.divide((a * b).sum(axis=-1), scale, out=np.zeros_like(scale), where=scale > 1e-12)
    return correlation


def _spearman(a: Array, b: Array) -> Array:
    """Spearman correlation along the last axis: Pearson of the ranks."""
    return _pearson(_rank(a), _rank(b))


def _rank(values: Array) -> Array:
    """Rank along the last axis, ties sharing their mean rank."""
    from scipy.stats import rankdata

    ranks: Array = rankdata(values, axis=-1)
    return ranks


def _score_queries(retrieval: Retrieval, encode: Encode) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """Rank the whole corpus by cosine for each query that has a relevant document, and score the first `TOP` ranks.

    nDCG has the relevance itself as gain and 1 / log2(rank + 1) as discount (Järvelin and Kekäläinen, 2002, "Cumulated
    gain-based evaluation of IR techniques"), as in trec_eval, BEIR and scikit-learn's `ndcg_score`; the ideal ranking
    holds all judged documents. MRR and recall count every document of relevance above 0 as relevant.
    """
    queries = [query for query in retrieval.queries if any(rel > 0 for rel in retrieval.qrels.get(query, {}).values())]
    names = ("ndcg_at_10", "mrr_at_10", "recall_at_10")
    if not queries:
        return {name: np.empty(0) for name in names}, {}
    ranked = _rank_corpus(retrieval, queries, encode)
    discounts = 1.0 / np.log2(np.arange(2, TOP + 2))
    figures = np.zeros((len(names), len(queries)))
    for row, query in enumerate(queries):
        relevances = retrieval.qrels[query]
        gains = np.array([max(relevances.get(document, 0.0), 0.0) for document in ranked[row]])
        ideal = np.sort([rel for rel in relevances.values() if rel > 0])[::-1]
        hits = np.flatnonzero(gains)
        figures[0, row] = gains @ discounts[: len(gains)] / (ideal[:TOP] @ discounts[: len(ideal)])
        figures[1, row] = 1.0 / (hits[0] + 1) if len(hits) else 0.0
        figures[2, row] = len(hits) / len(ideal)
    return dict(zip(names, figures, strict=True)), dict(zip(queries, ranked, strict=True))


def _rank_corpus(retrieval: Retrieval, queries: Sequence[str], encode: Encode) -> list[list[str]]:
    """Return the ids of the `TOP` nearest documents of each query, nearest first; chunk by chunk, so that it fits."""
    documents = list(retrieval.corpus)
    query_vectors = normalize(encode([retrieval.queries[query] for query in queries]))
    best_cosines: FloatArray = np.empty((len(queries), 0), dtype=np.float32)
    best_rows = np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(documents), _CORPUS_CHUNK):
        chunk = documents[start : start + _CORPUS_CHUNK]
        chunk_vectors = normalize(encode([retrieval.corpus[document] for document in chunk]))
        nearest = [
            _take_nearest(query_vectors[row : row + _QUERY_CHUNK] @ chunk_vectors.T)
            for row in range(0, len(queries), _QUERY_CHUNK)
        ]
        best_cosines = np.hstack([best_cosines, np.vstack([cosines for cosines, _ in nearest])])
        best_rows = np.hstack([best_rows, np.vstack([rows for _, rows in nearest]) + start])
        best_cosines, kept = _take_nearest(best_cosines)
        best_rows = np.take_along_axis(best_rows, kept, axis=1)
    return [[documents[row] for row in rows] for rows in best_rows]


def _take_nearest(cosines: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the `TOP` largest of each row, largest first, and their columns."""
    columns = np.argpartition(-cosines, min(TOP, cosines.shape[1]) - 1, axis=1)[:, :TOP]
    columns.sort(axis=1)  # equal cosines keep the order of the corpus
    values = np.take_along_axis(cosines, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(columns, order, axis=1)


def bootstrap_gain(test: Part, base: Scores, tuned: Scores, params: EvaluateParams) -> Interval:
    """Return what `tuned` has more than `base` of the primary metric, with the interval of a paired bootstrap."""
    name = primary_metric(test)
    value = tuned.metrics[name] - base.metrics[name]
    if base.cosines is not None and tuned.cosines is not None:
        labels = test.pairs["score"].to_numpy(np.float64)
        found = bootstrap_difference(base.cosines, tuned.cosines, labels, params)
    elif base.per_query_ndcg is not None and tuned.per_query_ndcg is not None:
        found = bootstrap_difference(base.per_query_ndcg, tuned.per_query_ndcg, None, params)
    else:
        return Interval(value, value, value)
    return replace(found, value=value)


def unit_metric(values: Array, labels: Array | None) -> float:
    """Return the primary metric of some units: Spearman of cosines and labels, or the mean of per-query figures.

    Args:
        values: (units,) the cosine of each pair, or the nDCG@10 of each query.
        labels: (units,) the label of each pair; None for queries.
    """
    if len(values) == 0:
        return 0.0
    return float(values.mean() if labels is None else _spearman(values, labels))


def bootstrap_difference(theirs: Array, ours: Array, labels: Array | None, params: EvaluateParams) -> Interval:
    """Return `unit_metric` of `ours` minus that of `theirs`, with the interval of a paired bootstrap.

    Units are drawn with replacement, the same ones for both; `theirs`, `ours` and `labels` are (units,). No unit at
    all, and two models that are equal in each unit, differ by exactly nothing.
    """
    value = unit_metric(ours, labels) - unit_metric(theirs, labels)
    size = len(ours)
    if size == 0:
        return Interval(value, value, value)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    step = max(1, _BOOTSTRAP_CELLS // size)
    gains: list[Array] = []
    for start in range(0, params.bootstrap_samples, step):
        drawn = random.integers(size, size=(min(step, params.bootstrap_samples - start), size))
        if labels is None:
            gains.append((ours - theirs)[drawn].mean(axis=1))
        else:
            ranks = _rank(labels[drawn])
            gains.append(_pearson(_rank(ours[drawn]), ranks) - _pearson(_rank(theirs[drawn]), ranks))
    tail = (1.0 - params.confidence) / 2
    low, high = np.quantile(np.concatenate(gains), [tail, 1.0 - tail])
    return Interval(value, float(low), float(high))


class _EncodeOnce:
    """An `Encode` that remembers the vector of every text it has seen."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._vector_of: dict[str, npt.NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if text not in self._vector_of]
        if new:
            self._vector_of.update(zip(new, self._encode(new), strict=True))
        return np.stack([self._vector_of[text] for text in texts])
