"""The same calls against a real MLflow server, which keeps the artifacts itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from bentos.aliases import read_aliases
from bentos.manifest import DataVersion
from flows.core.history import Act, read_history
from flows.core.promotion import carry_out
from flows.core.release_lock import ReleaseLock, list_holders
from flows.core.tracking import Tracker
from flows.errors import NothingReleasedError, ReleaseRaceError
from tests.registry import run_mlflow

TEXTS = ["the quick brown fox", "a train station"]


@pytest.fixture(scope="module")
def server(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_mlflow(mlflow_template, tmp_path_factory.mktemp("mlflow-server")) as uri:
        yield uri


@pytest.mark.slow
def test_a_run_goes_to_a_server_and_its_model_comes_back(server: str, tiny_model_path: Path, tmp_path: Path) -> None:
    tracker = Tracker(server, experiment="over http", model_name="ekiben", artifact_root=tmp_path / "unused")
    with pytest.raises(NothingReleasedError):
        tracker.version("champion")
    model = SentenceTransformer(str(tiny_model_path), device="cpu")
    data = DataVersion(path="data/pairs.csv", md5="d" * 32, revision=None)

    parent = tracker.start_run("tune")
    run_id = tracker.start_run(
        "trial", parent_run_id=parent, tags={"primary_metric": "spearman", "data_md5": data.md5, "git_commit": "abc"}
    )
    tracker.log_params(run_id, {"train": {"steps": 60}, "long": "x" * 9000})
    model_id = tracker.log_model(run_id, model, example=TEXTS)
    dataset = tracker.log_dataset(run_id, data, context="training")
    tracker.log_metrics(run_id, {"dev/spearman": 0.8}, model_id=model_id, dataset=dataset)
    version = tracker.register(run_id, model_id)
    assert tracker.register(run_id, model_id) == version == "1"
    act = Act(at="", kind="release", version=version, space_id="s")
    for _ in range(2):
        with ReleaseLock(tracker, "release of version 1") as lock:
            with pytest.raises(ReleaseRaceError, match="release of version 1"):
                ReleaseLock(tracker, "rollback").acquire()
            carry_out(tracker, lock, act, tags={"bento_tag": "b", "space_id": "s"}, previous="", home=tmp_path)
    assert list_holders(tracker) == []
    assert [(item.version, item.kind) for item in read_history(tracker)] == [("1", "release")]
    assert read_aliases(tmp_path, "ekiben")["champion"].run_id == run_id
    tracker.end_run(run_id)

    champion = tracker.champion()
    assert champion is not None
    assert (champion.version, champion.run_id, champion.aliases) == ("1", run_id, ("champion",))
    assert champion.tags["bento_tag"] == "b"
    assert tracker.version(run_id[:8]) == tracker.best_version() == champion
    record = tracker.find_run(run_id)
    assert (record.status, record.metrics, record.params["train.steps"]) == ("FINISHED", {"dev/spearman": 0.8}, "60")
    assert tracker.download_artifact(run_id, "long_params.json", tmp_path).is_file()
    loaded = SentenceTransformer(str(tracker.download_model(run_id, tmp_path / "models")), device="cpu")
    np.testing.assert_array_equal(loaded.encode(TEXTS), model.encode(TEXTS))
    assert not (tmp_path / "unused").exists()
