"""The test rows of a run: what is kept comes back, and older runs say what they lack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.manifest import Calibration, DataVersion
from flows.core.dataset import Dataset, Part
from flows.core.evaluation import evaluate_model, score_part
from flows.core.heldout import (
    TEST_QUERIES_FILE,
    TEST_RETRIEVAL_FILE,
    TEST_ROWS_FILE,
    FrozenTest,
    keep_test,
    read_calibration,
    read_frozen,
    read_test,
)
from flows.core.retrieval import Retrieval
from flows.params import EvaluateParams

PARAMS = EvaluateParams(bootstrap_samples=100)


def encode_as(seed: int):
    def encode(texts):
        rows = [np.random.default_rng([seed, *map(ord, text)]).normal(size=8) for text in texts]
        return np.asarray(rows, dtype=np.float32)

    return encode


def make_part(rows: int = 20, retrieval: Retrieval | None = None, **columns: object) -> Part:
    score = np.random.default_rng(0).uniform(size=rows)
    pairs = {"text_a": [f"a{n}" for n in range(rows)], "text_b": [f"b{n}" for n in range(rows)], "score": score}
    return Part(pd.DataFrame(pairs | columns), retrieval)


def make_retrieval(queries: int = 30) -> Retrieval:
    names = {f"q{n}": f"query {n}" for n in range(queries)}
    qrels = {query: ({f"d{n}": 1.0} if n % 5 else {}) for n, query in enumerate(names)}
    return Retrieval({f"d{n}": f"document {n}" for n in range(200)}, names, qrels)


def keep(part: Part, folder: Path) -> tuple[dict[str, float], Part]:
    dataset = Dataset(part, part, part, DataVersion(path="x", md5="0" * 32), {}, ())
    evaluation = evaluate_model(dataset, encode_as(1), encode_as(2), PARAMS)
    keep_test(part, evaluation, folder)
    return evaluation.flat_metrics(), part


def test_pairs_come_back_with_their_columns_and_both_models_cosines(tmp_path: Path) -> None:
    metrics, part = keep(make_part(language=["de", "fr"] * 10), tmp_path)
    frozen = read_frozen(tmp_path, metrics)
    assert frozen is not None
    assert frozen.part.pairs["language"].tolist() == ["de", "fr"] * 10
    assert list(frozen.part.pairs) == ["text_a", "text_b", "score", "language"]
    assert frozen.tuned == pytest.approx(score_part(part, encode_as(2), PARAMS).cosines)
    assert frozen.base == pytest.approx(score_part(part, encode_as(1), PARAMS).cosines)
    assert frozen.labels == pytest.approx(part.pairs["score"])
    plain = read_test(tmp_path, metrics)
    assert plain is not None
    assert list(plain.pairs) == ["text_a", "text_b", "score"]


def test_queries_come_back_with_both_models_ndcg_which_the_pool_gives_again(tmp_path: Path) -> None:
    metrics, part = keep(make_part(0, make_retrieval()), tmp_path)
    frozen = read_frozen(tmp_path, metrics)
    assert frozen is not None
    assert frozen.labels is None
    assert len(frozen) == len(frozen.queries) == 24  # those that have a relevant document
    assert len(frozen.part.retrieval.corpus) < 200
    for values, seed in ((frozen.base, 1), (frozen.tuned, 2)):
        assert values == pytest.approx(score_part(frozen.part, encode_as(seed), PARAMS).per_query_ndcg)
        assert values == pytest.approx(score_part(part, encode_as(seed), PARAMS).per_query_ndcg)


@pytest.mark.parametrize("name", [TEST_ROWS_FILE, TEST_RETRIEVAL_FILE])
def test_a_run_that_kept_only_a_part_has_none(tmp_path: Path, name: str) -> None:
    metrics, _ = keep(make_part(20, make_retrieval()), tmp_path)
    assert read_frozen(tmp_path, metrics) is not None
    (tmp_path / name).unlink()
    assert read_frozen(tmp_path, metrics) is None
    assert read_test(tmp_path, metrics) is None


def test_an_older_run_kept_no_figures_of_its_queries(tmp_path: Path) -> None:
    metrics, _ = keep(make_part(0, make_retrieval()), tmp_path)
    (tmp_path / TEST_QUERIES_FILE).unlink()
    frozen = read_frozen(tmp_path, metrics)
    assert frozen is not None
    assert (frozen.base, frozen.tuned, len(frozen)) == (None, None, 24)


@given(rows=st.integers(1, 60), most=st.integers(1, 60))
def test_a_limit_keeps_rows_and_figures_together(rows: int, most: int) -> None:
    part = make_part(rows)
    values = np.arange(rows, dtype=np.float64)
    limited = FrozenTest(part, values, None).limit(most)
    assert len(limited) == min(rows, most)
    assert limited.base is not None
    assert limited.part.pairs["text_a"].tolist() == [f"a{int(value)}" for value in limited.base]
    assert limited.base.tolist() == sorted(limited.base)
    assert limited.tuned is None


def test_the_calibration_of_a_run_without_pairs_is_none(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert read_calibration(tmp_path) is None
    path.write_text("null")
    assert read_calibration(tmp_path) is None
    path.write_text('{"cosines": [0, 1], "scores": [0.1, 0.9]}')
    assert read_calibration(tmp_path) == Calibration(cosines=[0, 1], scores=[0.1, 0.9])
