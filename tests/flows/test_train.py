from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from flows.core.compat import PROBE_FILE
from flows.core.heldout import TEST_RETRIEVAL_FILE, read_test
from flows.core.lineage import trace_version
from flows.core.nearness import describe_nearness
from flows.core.probes import read_probe
from flows.core.processes import identify_process
from flows.core.recorded import VECTORS_FILE, read_json, read_recorded
from flows.core.tracking import open_tracker
from flows.errors import DataError, ParamsError
from flows.params import DataParams, EvaluateParams, TrainParams
from flows.settings import load_settings
from flows.stages import EVALUATION_FOLDER, PROCESS_TAG, load
from flows.train import train
from tests.factories import make_tiny_lunchbox
from tests.flows.support import mlflow_runs, write_profiles, write_retrieval

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_train_leaves_a_registered_version_with_everything_that_leads_back(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, tmp_path: Path
) -> None:
    table = pd.read_csv(str(data.pairs))
    table.assign(topic=[f"topic {row % 4}" for row in range(len(table))]).to_csv(str(data.pairs), index=False)
    os.utime(str(data.pairs), (1_700_000_000, 1_700_000_000))

    result = train(
        data=data.model_copy(update={"slice_columns": ["topic"]}), train=small_train, evaluate=small_evaluate
    )

    tracker = open_tracker(load_settings())
    run = tracker.find_run(result.run_id)
    lineage = trace_version(tracker, result.version)
    assert run.tags["data_time"] == "2023-11-14T22:13:20+00:00"
    assert run.metrics["data/leaked_share"] == 0
    assert "anchor" not in run.tags
    kept = tracker.download_artifact(result.run_id, EVALUATION_FOLDER, tmp_path / "kept")
    rows = pd.read_parquet(kept / "test_rows.parquet")
    assert set(rows["topic"]) == {f"topic {number}" for number in range(4)}
    probe = read_probe(kept / PROBE_FILE)
    assert probe is not None
    assert set(probe.queries) <= set(rows["text_a"])
    assert run.status == "FINISHED"
    assert lineage.run_id == result.run_id
    assert lineage.data_path == str(data.pairs)
    assert len(lineage.data_md5) == 32
    assert lineage.lock_sha256
    assert lineage.aliases == ()
    assert run.params["train.steps"] == "4"
    assert run.params["train.seed"] == "42"
    recorded = read_recorded(tracker, run)
    assert (recorded.exact, recorded.root) == (True, Path.cwd())
    assert recorded.params["data"]["slice_columns"] == ["topic"]
    assert recorded.params["train"] == small_train.model_dump()
    canary = read_json(tracker, run.run_id, VECTORS_FILE)
    assert canary is not None
    assert {len(vector) for vector in canary["vectors"]} == {32}
    for prefix in ("eval", "base"):
        for metric in ("mae", "accuracy", "spearman", "pearson"):
            assert f"{prefix}/{metric}" in run.metrics
    assert run.metrics["gain/low"] <= run.metrics["gain/spearman"] <= run.metrics["gain/high"]
    assert run.metrics["embedding_dim"] == 32
    plots = tracker.download_artifact(result.run_id, "plots", tmp_path)
    assert {path.name for path in plots.iterdir()} == {"score_scatter.png", "calibration.png", "training_curve.png"}
    model = SentenceTransformer(str(tracker.download_model(result.run_id, tmp_path / "model")))
    assert model.encode(["a chef"]).shape == (1, 32)
    assert model.max_seq_length == 32


def test_a_retrain_stays_near_the_champion_and_says_how_near(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    anchored = small_train.model_copy(update={"anchor_weight": 50.0, "steps": 12})

    first = train(data=data, train=anchored, evaluate=small_evaluate)  # there is no champion yet

    assert "anchor" not in tracker.find_run(first.run_id).tags
    tag = f"{first.version}-{first.run_id[:8]}"
    box = settings.lunchboxes_path / tag  # of a model in another space, as if the first run had ended there
    make_tiny_lunchbox(box, version=first.version, run_id=first.run_id, seed=3)
    tracker._client.set_registered_model_alias(settings.model_name, "champion", first.version)

    results = [
        train(data=data, train=params, evaluate=small_evaluate)
        for params in (anchored, anchored.model_copy(update={"anchor_weight": 0.01}))
    ]
    runs = [tracker.find_run(result.run_id) for result in results]

    assert [run.tags["anchor"] for run in runs] == [f"ekiben:{tag}"] * 2
    near, far = (run.metrics["anchor/same_text_cosine"] for run in runs)
    assert far < near <= 1
    assert describe_nearness(results[1].metrics) == (
        f"kept near version {first.version}: same-text cosine {far:.4f} on dev, weight 0.01 (train.anchor_weight)"
    )
    assert describe_nearness(results[1].metrics) == describe_nearness(runs[1].metrics)
    state = train(
        data=data,
        train=anchored.model_copy(update={"dimensions": 16}),
        evaluate=small_evaluate,
        return_state=True,
    )
    with pytest.raises(ParamsError, match=f"stay near ekiben:{tag}, whose vectors have 32 dimensions"):
        state.result()


def test_a_smaller_student_is_trained_and_kept(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, tmp_path: Path
) -> None:
    smaller = small_train.model_copy(update={"layers": 1, "distill_steps": 6, "dimensions": 16})

    result = train(data=data, train=smaller, evaluate=small_evaluate)

    tracker = open_tracker(load_settings())
    assert [step for step, _ in tracker.metric_history(result.run_id, "train/distill_loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in tracker.metric_history(result.run_id, "train/loss")] == [1, 2, 3, 4]
    assert result.metrics["eval/spearman"] == tracker.find_run(result.run_id).metrics["eval/spearman"]
    model = SentenceTransformer(str(tracker.download_model(result.run_id, tmp_path / "model")))
    assert model.encode(["a chef"]).shape == (1, 16)
    assert model.transformers_model.config.num_hidden_layers == 1


def test_a_failed_training_ends_red_in_prefect_and_in_mlflow(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    impossible = small_train.model_copy(update={"loss": "multiple_negatives_ranking"})

    state = train(data=data, train=impossible, evaluate=small_evaluate, return_state=True)

    assert state.is_failed()
    with pytest.raises(ParamsError, match="needs retrieval data"):
        state.result()
    tracker = open_tracker(load_settings())
    assert [run.info.status for run in mlflow_runs()] == ["FAILED"]
    assert tracker.versions() == []


def test_bad_data_stops_before_any_run_is_opened(
    tmp_path: Path, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("text_a,text_b,score\na,b,7\n")

    with pytest.raises(DataError, match="score"):
        train(data=DataParams(pairs=str(file)), train=small_train, evaluate=small_evaluate)

    assert mlflow_runs() == []


def test_profiles_and_judgements_become_pairs_and_are_counted(
    tmp_path: Path, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    profiles, judgements = write_profiles(tmp_path)
    data = DataParams(
        profiles=str(profiles), judgements=str(judgements), profile_template="{title} knows {skills}", min_eval_rows=8
    )

    result = train(data=data, train=small_train, evaluate=small_evaluate)

    metrics = open_tracker(load_settings()).find_run(result.run_id).metrics
    assert metrics["num_profiles"] == 40
    assert metrics["avg_profile_length"] > len(" knows ")
    assert "eval/spearman" in metrics


def test_retrieval_data_are_scored_by_ranking(
    tmp_path: Path, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    data = DataParams(retrieval=str(write_retrieval(tmp_path / "beir")), min_eval_rows=4)

    result = train(data=data, train=small_train, evaluate=small_evaluate)

    assert result.primary_metric == "ndcg_at_10"
    run = open_tracker(load_settings()).find_run(result.run_id)
    assert run.tags["loss"] == "multiple_negatives_ranking"
    assert {"eval/ndcg_at_10", "eval/mrr_at_10", "eval/recall_at_10", "gain/ndcg_at_10"} <= run.metrics.keys()

    kept = open_tracker(load_settings()).download_artifact(result.run_id, EVALUATION_FOLDER, tmp_path / "kept")
    test = read_test(kept, run.metrics)
    assert test is not None
    assert test.retrieval is not None
    assert not test.has_pairs
    assert {name for judged in test.retrieval.qrels.values() for name in judged} <= test.retrieval.corpus.keys()
    (kept / TEST_RETRIEVAL_FILE).unlink()
    assert read_test(kept, run.metrics) is None  # as in runs that were made before it was kept


def test_the_run_holds_what_was_done_to_the_data(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams, tmp_path: Path
) -> None:
    result = train(data=data, train=small_train, evaluate=small_evaluate)
    file = open_tracker(load_settings()).download_artifact(result.run_id, "data.json", tmp_path / "fetched")
    facts = json.loads(file.read_text())
    assert facts["files"] == {"pairs": hashlib.md5(Path(str(data.pairs)).read_bytes()).hexdigest()}
    assert "Split dev and test off" in " ".join(facts["notes"])


def test_the_progress_of_a_fit_is_an_artifact_in_prefect(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    from prefect.client.orchestration import get_client

    train(data=data, train=small_train, evaluate=small_evaluate)

    with get_client(sync_client=True) as client:
        wanted = {"artifacts": {"key": {"any_": ["fit"]}}, "sort": "UPDATED_DESC", "limit": 1}
        (artifact,) = client._client.post("/artifacts/filter", json=wanted).json()
    assert artifact["type"] == "progress"
    assert artifact["data"] == 100.0
    assert "step 4 of 4" in artifact["description"]


def test_runs_of_a_killed_process_are_closed_by_the_next_one(
    data: DataParams, small_train: TrainParams, small_evaluate: EvaluateParams
) -> None:
    settings = load_settings()
    tracker = open_tracker(settings)
    gone = identify_process() | {"started": 0.0}  # our process id, but of an earlier process
    orphan = tracker.start_run("trial 7", tags={PROCESS_TAG: json.dumps(gone)})
    at_work = tracker.start_run("trial 8", tags={PROCESS_TAG: json.dumps(identify_process())})
    (settings.runs_path / orphan).mkdir(parents=True)

    train(data=data, train=small_train, evaluate=small_evaluate)

    assert tracker.find_run(orphan).status == "KILLED"
    assert tracker.find_run(at_work).status == "RUNNING"
    assert not (settings.runs_path / orphan).exists()


@pytest.mark.parametrize(("error", "tries"), [(ConnectionError("reset by peer"), 3), (DataError("no such column"), 1)])
def test_only_trouble_on_the_way_to_the_data_is_tried_again(
    error: Exception, tries: int, monkeypatch: pytest.MonkeyPatch, data: DataParams
) -> None:
    calls = []

    def read(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr("flows.stages.read_data", read)
    with pytest.raises(type(error)):
        load.with_options(retry_delay_seconds=0)(data)
    assert len(calls) == tries
