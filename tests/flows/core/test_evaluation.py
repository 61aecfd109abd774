from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score

from bentos.manifest import Calibration, DataVersion
from flows.core import evaluation
from flows.core.dataset import Dataset, Part
from flows.core.evaluation import Encode, Interval, evaluate_model, primary_metric, score_part
from flows.core.retrieval import Retrieval
from flows.params import EvaluateParams

PARAMS = EvaluateParams(bootstrap_samples=200)
NO_PAIRS = pd.DataFrame(
    {"text_a": pd.Series(dtype=str), "text_b": pd.Series(dtype=str), "score": pd.Series(dtype=float)}
)
PAIR_METRICS = {"pearson", "spearman", "mae_uncalibrated", "accuracy_uncalibrated"}
RETRIEVAL_METRICS = {"ndcg_at_10", "mrr_at_10", "recall_at_10"}


def encode_angles(texts: Sequence[str]) -> np.ndarray:
    """Place a text that is a number of degrees at that angle on the unit circle: cosines can be written by hand."""
    angles = np.radians([float(text) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def encode_noisy(noise: float, seed: int = 0) -> Encode:
    """Return `encode_angles` with every text moved by up to `noise` degrees, always the same way."""

    def encode(texts: Sequence[str]) -> np.ndarray:
        moves = [np.random.default_rng([seed, round(float(text) * 1000)]).uniform(-noise, noise) for text in texts]
        return encode_angles([str(float(text) + move) for text, move in zip(texts, moves, strict=True)])

    return encode


def make_pairs(degrees: Sequence[float], scores: Sequence[float]) -> Part:
    texts = [str(value) for value in degrees]
    return Part(pd.DataFrame({"text_a": ["0"] * len(texts), "text_b": texts, "score": np.asarray(scores, float)}))


def make_random_part(rows: int, seed: int) -> Part:
    random = np.random.default_rng(seed)
    degrees = random.uniform(5, 85, rows).round(2)
    return make_pairs(degrees, np.clip(np.cos(np.radians(degrees)) ** 2, 0, 1))


def make_retrieval(corpus: Sequence[float], qrels: dict[str, dict[str, float]]) -> Part:
    documents = {f"d{index}": str(degrees) for index, degrees in enumerate(corpus)}
    return Part(NO_PAIRS, Retrieval(documents, {query: query for query in qrels}, qrels))


def make_dataset(dev: Part, test: Part) -> Dataset:
    return Dataset(train=dev, dev=dev, test=test, version=DataVersion(path="x", md5="0" * 32), files={}, notes=())


def test_pair_metrics_are_what_one_computes_by_hand() -> None:
    part = make_pairs([0, 60, 90, 180], [1.0, 0.6, 0.3, 0.0])  # cosines 1, 0.5, 0, -1
    metrics = score_part(part, encode_angles, PARAMS).metrics
    assert metrics["mae_uncalibrated"] == pytest.approx((0 + 0.1 + 0.3 + 0) / 4)
    assert metrics["accuracy_uncalibrated"] == pytest.approx(3 / 4)
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics.keys() == PAIR_METRICS


@given(st.lists(st.tuples(st.integers(0, 180), st.integers(0, 4)), min_size=3, max_size=40))
def test_correlations_equal_those_of_scipy(rows: list[tuple[int, int]]) -> None:
    part = make_pairs([degrees for degrees, _ in rows], [level / 4 for _, level in rows])
    scores = score_part(part, encode_angles, PARAMS)
    labels = part.pairs["score"].to_numpy()
    if np.ptp(scores.cosines) < 1e-6 or np.ptp(labels) == 0:
        assert scores.metrics["spearman"] == pytest.approx(0.0, abs=1e-6)
    else:
        assert scores.metrics["pearson"] == pytest.approx(stats.pearsonr(scores.cosines, labels).statistic, abs=1e-6)
        assert scores.metrics["spearman"] == pytest.approx(stats.spearmanr(scores.cosines, labels).statistic, abs=1e-6)


def test_calibrated_errors_use_the_calibration() -> None:
    part = make_pairs([60, 90], [0.9, 0.2])
    calibration = Calibration(cosines=[0.0, 0.5], scores=[0.2, 0.8])
    metrics = score_part(part, encode_angles, PARAMS, calibration).metrics
    assert metrics["mae"] == pytest.approx(0.05)
    assert metrics["accuracy"] == 1.0
    assert metrics["accuracy_uncalibrated"] == 0.0


def test_constant_vectors_score_zero_instead_of_nan() -> None:
    part = make_random_part(20, seed=0)
    found = evaluate_model(
        make_dataset(part, part), lambda texts: np.ones((len(texts), 2), np.float32), encode_angles, PARAMS
    )
    assert found.base.metrics["spearman"] == 0.0
    assert np.isfinite(list(found.flat_metrics().values())).all()


@settings(deadline=None)
@given(st.data())
def test_ndcg_equals_that_of_scikit_learn(data: st.DataObject) -> None:
    corpus = data.draw(st.lists(st.integers(0, 1800), min_size=2, max_size=40, unique=True))
    grades = data.draw(st.lists(st.sampled_from([0, 0, 0.2, 0.5, 1, 3]), min_size=len(corpus), max_size=len(corpus)))
    if not any(grades):
        grades[0] = 1
    qrels = {"0": {f"d{index}": grade for index, grade in enumerate(grades) if grade > 0}}
    part = make_retrieval([value / 10 for value in corpus], qrels)
    found = score_part(part, encode_angles, PARAMS).metrics["ndcg_at_10"]
    expected = ndcg_score([grades], [[-value for value in corpus]], k=10)  # the nearer to 0 degrees, the higher
    assert found == pytest.approx(expected, abs=1e-6)


def test_retrieval_metrics_are_what_one_computes_by_hand() -> None:
    corpus = [10 * rank for rank in range(1, 16)]  # the query at 0 degrees ranks d0, d1, d2, ...
    part = make_retrieval(corpus, {"0": {"d2": 1.0, "d4": 1.0, "d12": 1.0}, "155": {"d14": 1.0}})
    scores = score_part(part, encode_angles, PARAMS)
    first = (1 / np.log2(4) + 1 / np.log2(6)) / (1 + 1 / np.log2(3) + 1 / np.log2(4))
    assert scores.per_query_ndcg == pytest.approx([first, 1.0])
    assert scores.metrics["mrr_at_10"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores.metrics["recall_at_10"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores.metrics.keys() == RETRIEVAL_METRICS
    assert scores.nearest is not None
    assert scores.nearest["0"] == [f"d{rank}" for rank in range(10)]
    assert scores.nearest["155"][0] == "d14"


def test_queries_without_a_relevant_document_do_not_count() -> None:
    part = make_retrieval([0, 10, 90], {"0": {"d0": 1.0}, "50": {}})
    scores = score_part(part, encode_angles, PARAMS)
    assert scores.per_query_ndcg == pytest.approx([1.0])


def test_ranking_in_chunks_equals_ranking_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    corpus = random.permutation(np.arange(0, 180, 0.25))
    qrels = {str(query): {f"d{row}": 1.0 for row in random.choice(len(corpus), 5)} for query in range(0, 180, 7)}
    part = make_retrieval(corpus, qrels)
    at_once = score_part(part, encode_angles, PARAMS)
    monkeypatch.setattr(evaluation, "_CORPUS_CHUNK", 7)
    monkeypatch.setattr(evaluation, "_QUERY_CHUNK", 4)
    assert score_part(part, encode_angles, PARAMS).metrics == at_once.metrics


def test_a_corpus_of_100_000_documents_is_ranked() -> None:
    vectors = np.random.default_rng(0).normal(size=(100_000, 16)).astype(np.float32)
    part = make_retrieval(range(100_000), {str(row): {f"d{row}": 1.0} for row in (5, 50_000, 99_990)})
    metrics = score_part(part, lambda texts: vectors[[int(text) for text in texts]], PARAMS).metrics
    assert metrics == {"ndcg_at_10": 1.0, "mrr_at_10": 1.0, "recall_at_10": 1.0}


def test_evaluation_compares_both_models_on_the_same_rows() -> None:
    dev, test = make_random_part(120, seed=1), make_random_part(150, seed=2)
    found = evaluate_model(make_dataset(dev, test), encode_noisy(25), encode_noisy(5), PARAMS)
    assert found.primary_metric == "spearman"
    assert found.gain.value == pytest.approx(found.tuned.metrics["spearman"] - found.base.metrics["spearman"])
    assert 0 < found.gain.low <= found.gain.value <= found.gain.high
    assert list(found.test_rows.columns) == ["text_a", "text_b", "score", "base_cosine", "tuned_cosine"]
    assert found.test_rows["tuned_cosine"].tolist() == found.tuned.cosines.tolist()
    assert found.calibration != found.base_calibration
    flat = found.flat_metrics()
    calibrated = PAIR_METRICS | {"mae", "accuracy"}
    expected = {f"{section}/{name}" for section in ("eval", "base", "dev", "base_dev") for name in calibrated}
    assert flat.keys() == expected | {"gain/spearman", "gain/low", "gain/high", "decision_threshold"}
    assert flat["eval/mae"] < flat["eval/mae_uncalibrated"]


def test_calibration_and_threshold_come_from_dev_only() -> None:
    dev = make_random_part(60, seed=1)
    first = evaluate_model(make_dataset(dev, make_random_part(30, seed=2)), encode_noisy(9), encode_angles, PARAMS)
    second = evaluate_model(make_dataset(dev, make_random_part(30, seed=3)), encode_noisy(9), encode_angles, PARAMS)
    assert first.calibration == second.calibration
    assert first.decision_threshold == second.decision_threshold


def test_the_same_model_gains_exactly_nothing() -> None:
    part = make_random_part(40, seed=0)
    found = evaluate_model(make_dataset(part, part), encode_angles, encode_angles, PARAMS)
    assert found.gain == Interval(0.0, 0.0, 0.0)


def test_retrieval_alone_is_compared_by_ndcg() -> None:
    corpus = np.arange(0, 180, 2)
    qrels = {str(query + 0.5): {f"d{query // 2}": 1.0} for query in range(0, 180, 6)}
    part = make_retrieval(corpus, qrels)
    found = evaluate_model(make_dataset(part, part), encode_noisy(20), encode_angles, PARAMS)
    assert primary_metric(part) == found.primary_metric == "ndcg_at_10"
    assert found.gain.low > 0
    assert (found.calibration, found.decision_threshold, len(found.test_rows)) == (None, None, 0)
    expected = {f"{section}/{name}" for section in ("eval", "base", "dev", "base_dev") for name in RETRIEVAL_METRICS}
    assert found.flat_metrics().keys() == expected | {"gain/ndcg_at_10", "gain/low", "gain/high"}


def test_bootstrap_is_repeatable_and_covers_the_spread_of_fresh_samples() -> None:
    dev = make_random_part(60, seed=0)

    def find_gain(seed: int) -> Interval:
        dataset = make_dataset(dev, make_random_part(80, seed=seed))
        return evaluate_model(dataset, encode_noisy(30), encode_noisy(20, seed=1), PARAMS).gain

    gains = [find_gain(seed) for seed in range(1, 25)]
    assert gains[0] == find_gain(1)
    truth = np.mean([gain.value for gain in gains])
    assert sum(gain.low <= truth <= gain.high for gain in gains) >= 19  # 95 % of 24 is 22.8


def test_bootstrap_in_chunks_equals_bootstrap_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(make_random_part(30, seed=0), make_random_part(40, seed=1))
    at_once = evaluate_model(dataset, encode_noisy(20), encode_angles, PARAMS).gain
    monkeypatch.setattr(evaluation, "_BOOTSTRAP_CELLS", 100)
    assert evaluate_model(dataset, encode_noisy(20), encode_angles, PARAMS).gain == at_once


def test_each_distinct_text_is_encoded_once_a_model() -> None:
    seen: Counter[str] = Counter()

    def encode(texts: Sequence[str]) -> np.ndarray:
        seen.update(texts)
        return encode_angles(texts)

    pairs = make_random_part(30, seed=0)
    part = Part(pairs.pairs, make_retrieval([0, 10, 20], {"0": {"d0": 1.0}}).retrieval)
    evaluate_model(make_dataset(part, part), encode_angles, encode, PARAMS)
    assert set(seen.values()) == {1}
