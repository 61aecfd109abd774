"""Runs in a real MLflow on SQLite: what is written can be read back, and nothing depends on an active run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from sentence_transformers import SentenceTransformer

from bentos.manifest import DataVersion
from flows.core.tracking import Tracker, open_tracker
from flows.errors import EkibenError, NothingReleasedError
from flows.params import Params
from flows.settings import FlowSettings

DATA = DataVersion(path="s3://bucket/folder/pairs.parquet", md5="0123456789abcdef0123456789abcdef", revision="v1.2")
TEXTS = ["the quick brown fox", "a train station"]


def raw_client(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracker.uri, tracker.uri)


@pytest.fixture(scope="module")
def tiny_model(tiny_model_path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_model_path), device="cpu")


def test_the_settings_say_where_the_runs_are(tmp_path: Path) -> None:
    settings = FlowSettings(home=tmp_path / "home")
    tracker = open_tracker(settings)
    run_id = tracker.start_run("train")
    tracker.log_params(run_id, {"long": "x" * 1000})
    assert tracker.uri == settings.mlflow_uri
    assert [path.name for path in settings.artifact_root.rglob("*.json")] == ["long_params.json"]


def test_a_trial_is_nested_below_its_study(tracker: Tracker) -> None:
    parent = tracker.start_run("tune", tags={"git_commit": "abc123"})
    child = tracker.start_run("trial 1", parent_run_id=parent)
    client = raw_client(tracker)
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(parent).data.tags["mlflow.source.git.commit"] == "abc123"
    assert "mlflow.parentRunId" not in client.get_run(parent).data.tags


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_status(tracker: Tracker, status: Any) -> None:
    run_id = tracker.start_run("train")
    assert tracker.find_run(run_id).status == "RUNNING"
    tracker.end_run(run_id, status)
    assert tracker.find_run(run_id).status == status


def test_params_become_dotted_names(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    tracker.log_params(run_id, dict(Params()))
    tracker.log_params(run_id, {"data_notes": ["a", "b"], "empty": {}, "commit": None})
    params = tracker.find_run(run_id).params
    assert params["train.learning_rate"] == "2e-05"
    assert params["train.layers"] == "null"
    assert params["train.freeze_embeddings"] == "true"
    assert params["tune.space.learning_rate.high"] == "8e-05"
    assert params["tune.space.batch_size"] == "[16, 32, 64]"
    assert params["data_notes"] == '["a", "b"]'
    assert params["empty"] == "{}"


def test_a_long_parameter_is_cut_and_kept_in_full_as_an_artifact(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start_run("train")
    template = "{title} " * 2000
    tracker.log_params(run_id, {"data": {"profile_template": template}, **{f"p{i}": i for i in range(250)}})
    params = tracker.find_run(run_id).params
    assert len(params) == 251
    assert params["data.profile_template"].endswith("...")
    assert template in tracker.download_artifact(run_id, "long_params.json", tmp_path).read_text()


def test_undefined_metrics_are_left_out_and_named(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    tracker.log_metrics(run_id, {"eval/mae": 0.5, "eval/pearson": float("nan"), "ndcg@10": 1.0, "x": float("inf")})
    record = tracker.find_run(run_id)
    assert record.metrics == {"eval/mae": 0.5, "ndcg_at_10": 1.0}
    assert record.tags["undefined_metrics"] == "eval/pearson, x"


def test_a_curve_keeps_every_step(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    points = [(step, 1 / (step + 1)) for step in range(1500)]
    tracker.log_curve(run_id, "train/loss", points)
    assert tracker.metric_history(run_id, "train/loss") == points
    assert tracker.metric_history(run_id, "unknown") == []


def test_metrics_are_linked_to_the_model_and_to_the_data(tracker: Tracker, tiny_model: SentenceTransformer) -> None:
    run_id = tracker.start_run("train")
    dataset = tracker.log_dataset(run_id, DATA, context="training")
    assert dataset == ("pairs.parquet", DATA.md5)
    model_id = tracker.log_model(run_id, tiny_model, example=TEXTS)
    tracker.log_metrics(run_id, {"eval/spearman": 0.84}, model_id=model_id, dataset=dataset)

    client = raw_client(tracker)
    run = client.get_run(run_id)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == dataset
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training", "data_rev": "v1.2"}
    assert run.data.metrics == {"eval/spearman": 0.84}
    found = client.search_logged_models(
        [run.info.experiment_id],
        filter_string="metrics.`eval/spearman` > 0.8",
        datasets=[{"dataset_name": dataset[0], "dataset_digest": dataset[1]}],
    )
    assert [model.model_id for model in found] == [model_id]


def test_a_logged_model_comes_back_with_the_same_vectors(
    tracker: Tracker, tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    run_id = tracker.start_run("train")
    tracker.log_params(run_id, {"train": {"steps": 60}})
    model_id = tracker.log_model(run_id, tiny_model, example=TEXTS)
    path = tracker.download_model(run_id, tmp_path / "models")
    loaded = SentenceTransformer(str(path), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), tiny_model.encode(TEXTS))

    logged = raw_client(tracker).get_logged_model(model_id)
    assert (str(logged.status), logged.name, logged.source_run_id) == ("READY", "model", run_id)
    assert logged.params == {"train.steps": "60"}
    assert tracker.find_run(run_id).tags["model_id"] == model_id


def test_the_stored_model_is_a_complete_mlflow_model(
    tracker: Tracker, tiny_model: SentenceTransformer, tmp_path: Path
) -> None:
    run_id = tracker.start_run("train")
    model_id = tracker.log_model(run_id, tiny_model, example=TEXTS)
    location = raw_client(tracker).get_logged_model(model_id).artifact_location
    folder = mlflow.artifacts.download_artifacts(location, dst_path=str(tmp_path))
    described = mlflow.models.Model.load(folder)
    assert {"sentence_transformers", "python_function"} <= set(described.flavors)
    assert (described.model_id, described.run_id) == (model_id, run_id)
    assert described.signature is not None
    assert described.load_input_example(folder) == TEXTS
    requirements = Path(folder, "requirements.txt").read_text().split()
    assert any(line.startswith("sentence-transformers==") for line in requirements)
    assert not [line for line in requirements if "+" in line]  # no local builds such as 2.13.0+cpu


def test_logging_stays_out_of_a_foreign_active_run(tracker: Tracker, tiny_model: SentenceTransformer) -> None:
    mine = tracker.start_run("train")
    mlflow.set_tracking_uri(tracker.uri)
    try:
        with mlflow.start_run() as foreign:
            tracker.log_model(mine, tiny_model, example=TEXTS)
            tracker.log_metrics(mine, {"a": 1.0})
            active = mlflow.active_run()
            assert active is not None
            assert active.info.run_id == foreign.info.run_id
    finally:
        mlflow.set_tracking_uri(None)
    client = raw_client(tracker)
    assert client.get_run(mine).data.metrics == {"a": 1.0}
    untouched = client.get_run(foreign.info.run_id)
    assert untouched.data.metrics == {}
    assert not untouched.outputs.model_outputs


def test_logging_in_another_thread_makes_no_second_run(tracker: Tracker, tiny_model: SentenceTransformer) -> None:
    mine = tracker.start_run("train")
    seen: list[object] = []

    def log_everything() -> None:
        seen.append(tracker.log_model(mine, tiny_model, example=TEXTS))
        tracker.log_metrics(mine, {"a": 1.0})
        seen.append(mlflow.active_run())

    thread = threading.Thread(target=log_everything)
    thread.start()
    thread.join()
    client = raw_client(tracker)
    assert seen == [client.get_run(mine).data.tags["model_id"], None]
    experiment = client.get_experiment_by_name("ekiben")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [mine]


def test_a_run_without_a_complete_model_says_so(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start_run("train")
    with pytest.raises(NothingReleasedError, match="no complete model"):
        tracker.download_model(run_id, tmp_path)
    with pytest.raises(AttributeError):
        tracker.log_model(run_id, object(), example=TEXTS)  # type: ignore[arg-type]
    with pytest.raises(NothingReleasedError, match="no complete model"):
        tracker.download_model(run_id, tmp_path)


def test_folders_go_up_and_files_come_back(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start_run("train")
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "calibration.png").write_bytes(b"png")
    tracker.log_folder(run_id, plots, to="plots")
    tracker.log_folder(run_id, plots)
    copy = tracker.download_artifact(run_id, "plots/calibration.png", tmp_path / "back")
    assert copy.read_bytes() == b"png"
    assert tracker.download_artifact(run_id, "calibration.png", tmp_path / "back").read_bytes() == b"png"
    with pytest.raises(NothingReleasedError, match=r"no artifact 'plots/x.png'; there are: plots/calibration.png"):
        tracker.download_artifact(run_id, "plots/x.png", tmp_path / "back")


def test_a_run_of_another_experiment_is_read_back(tracker: Tracker) -> None:
    run_id = tracker.start_run("train", tags={"data_md5": "d"})
    tracker.set_tags(run_id, {"primary_metric": "spearman", "nothing": None})
    elsewhere = Tracker(tracker.uri, experiment="another", model_name="ekiben")
    record = elsewhere.find_run(run_id)
    assert (record.run_id, record.name) == (run_id, "train")
    assert record.tags == {"data_md5": "d", "primary_metric": "spearman"}


def test_an_unknown_run_is_refused(tracker: Tracker) -> None:
    with pytest.raises(NothingReleasedError, match="find_run"):
        tracker.find_run("0" * 32)


@pytest.mark.parametrize(
    "ask",
    [
        lambda tracker: tracker.end_run("0" * 32),
        lambda tracker: tracker.log_params("0" * 32, {"a": 1}),
        lambda tracker: tracker.log_params("not a run id!", {"a": 1}),
        lambda tracker: tracker.log_metrics("0" * 32, {"a": 1.0}),
        lambda tracker: tracker.log_dataset("0" * 32, DATA, context="training"),
        lambda tracker: tracker.download_artifact("0" * 32, "a", Path("nowhere")),
        lambda tracker: tracker.download_model("0" * 32, Path("nowhere")),
        lambda tracker: tracker.register("0" * 32, "m-0"),
        lambda tracker: tracker.set_version_tags("1", {"a": 1}),
    ],
)
def test_no_error_of_mlflow_gets_out(tracker: Tracker, ask: Callable[[Tracker], object]) -> None:
    with pytest.raises(EkibenError, match=r"^MLflow, ") as caught:
        ask(tracker)
    assert "\n" not in str(caught.value)


def test_a_parameter_is_never_changed_in_silence(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    tracker.log_params(run_id, {"steps": 60})
    tracker.log_params(run_id, {"steps": 60})
    with pytest.raises(EkibenError, match="steps"):
        tracker.log_params(run_id, {"steps": 90})
