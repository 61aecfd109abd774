"""The test set of a run, frozen: the rows that base model, candidate and champion are compared on. Core layer.

`keep_test` writes it beside the run's figures, once, at training; what comes later (int8, gates, rivals) reads it from
there and never splits anything anew. A run whose files are of an older version, or missing, says so by None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bentos.manifest import Calibration
from flows.core.dataset import Part
from flows.core.retrieval import Retrieval, pool_retrieval
from flows.params import PAIR_COLUMNS

if TYPE_CHECKING:
    from flows.core.evaluation import Evaluation

Array = npt.NDArray[np.float64]
EVALUATION_FOLDER = "evaluation"  # artifact folder of a run, which holds all these
TEST_ROWS_FILE = "test_rows.parquet"
TEST_RETRIEVAL_FILE = "test_retrieval.json"
TEST_QUERIES_FILE = "test_queries.parquet"
CALIBRATION_FILE = "calibration.json"
TEST_QUERIES = 300  # kept with a run, with the documents that were judged for them or ranked high
COSINE_COLUMNS = ("base_cosine", "tuned_cosine")
SAMPLE_SEED = 8


@dataclass(frozen=True)
class FrozenTest:
    """The test rows of a run, and what base and tuned model did on each when it was trained.

    The unit is the pair when there are pairs, and the query when there are none; `base` and `tuned` have one figure a
    unit: the cosine of the pair, or the nDCG@10 of the query.
    """

    part: Part  # its pairs may have further columns, by which they can be looked at in slices
    base: Array | None  # (units,); None when the run did not keep it
    tuned: Array | None  # (units,)

    @property
    def queries(self) -> list[str]:
        """Ids of the queries that have a relevant document, in the order of `Scores.per_query_ndcg`."""
        if self.part.retrieval is None:
            return []
        qrels = self.part.retrieval.qrels
        return [query for query in self.part.retrieval.queries if any(rel > 0 for rel in qrels[query].values())]

    @property
    def labels(self) -> Array | None:
        """The label of each pair, (units,); None when the units are queries."""
        return self.part.pairs["score"].to_numpy(np.float64) if self.part.has_pairs else None

    def __len__(self) -> int:
        return len(self.part.pairs) if self.part.has_pairs else len(self.queries)

    def limit(self, pairs: int) -> FrozenTest:
        """Return at most so many of the pairs, always the same ones; queries are few already."""
        if len(self.part.pairs) <= pairs:
            return self
        kept = np.sort(np.random.default_rng(SAMPLE_SEED).choice(len(self.part.pairs), pairs, replace=False))
        part = replace(self.part, pairs=self.part.pairs.iloc[kept].reset_index(drop=True))
        base, tuned = (None if values is None else values[kept] for values in (self.base, self.tuned))
        return FrozenTest(part, base, tuned)


def keep_test(test: Part, evaluation: Evaluation, folder: Path) -> None:
    """Write the test pairs, and a pool of the retrieval data that is as hard as all, with what both models did."""
    evaluation.test_rows.to_parquet(folder / TEST_ROWS_FILE, index=False)
    if test.retrieval is not None:
        rankings = [scores.nearest or {} for scores in (evaluation.base, evaluation.tuned)]
        pool = pool_retrieval(test.retrieval, rankings, queries=TEST_QUERIES)
        (folder / TEST_RETRIEVAL_FILE).write_text(json.dumps(asdict(pool), ensure_ascii=False), encoding="utf-8")
        table: dict[str, Any] = {"query": list(pool.queries)}
        for name, scores in (("base_ndcg", evaluation.base), ("tuned_ndcg", evaluation.tuned)):
            figures = [] if scores.per_query_ndcg is None else scores.per_query_ndcg.tolist()
            ndcg_of = dict(zip(scores.nearest or {}, figures, strict=True))
            table[name] = [ndcg_of[query] for query in pool.queries]
        pd.DataFrame(table).to_parquet(folder / TEST_QUERIES_FILE, index=False)


def read_test(folder: Path, metrics: Mapping[str, float]) -> Part | None:
    """Read what `keep_test` wrote, or None when a part that the run was scored on is missing: the run is older."""
    frozen = read_frozen(folder, metrics)
    if frozen is None:
        return None
    return replace(frozen.part, pairs=frozen.part.pairs[list(PAIR_COLUMNS)])


def read_frozen(folder: Path, metrics: Mapping[str, float]) -> FrozenTest | None:
    """Like `read_test`, with all columns of the pairs and what base and tuned model did on each unit."""
    path = folder / TEST_RETRIEVAL_FILE
    retrieval = Retrieval(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    if not (folder / TEST_ROWS_FILE).is_file() or ("eval/ndcg_at_10" in metrics and retrieval is None):
        return None
    rows = pd.read_parquet(folder / TEST_ROWS_FILE)
    cosines = [rows[name].to_numpy(np.float64) if name in rows else None for name in COSINE_COLUMNS]
    part = Part(rows.drop(columns=[name for name in COSINE_COLUMNS if name in rows]), retrieval)
    if part.has_pairs:
        return FrozenTest(part, *cosines)
    if retrieval is None:
        return None
    table = folder / TEST_QUERIES_FILE
    if not table.is_file():
        return FrozenTest(part, None, None)
    queries = pd.read_parquet(table).set_index("query")
    frozen = FrozenTest(part, None, None)
    kept = queries.loc[frozen.queries]
    return replace(frozen, base=kept["base_ndcg"].to_numpy(), tuned=kept["tuned_ndcg"].to_numpy())


def read_calibration(folder: Path) -> Calibration | None:
    """Read the map from cosine to score that the run fitted on dev; None when it had no pairs."""
    path = folder / CALIBRATION_FILE
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if raw is None else Calibration.model_validate(raw)
