"""A server that follows a real MLflow server: versions come over HTTP, under load, and outlive the registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from bentos.engine import Engine
from bentos.manifest import MANIFEST_FILE, Manifest, read_manifest
from tests.bentos.served import Served, open_server
from tests.bentos.traffic import Traffic, find_wrong
from tests.registry import run_mlflow
from tests.serving import copy_lunchbox

pytestmark = pytest.mark.slow
TEXTS = ["bread and milk", "a fast train", "the quick brown fox", "a window of the house"] * 5


@dataclass(frozen=True)
class Released:
    """A version as a release leaves it in MLflow."""

    box: Path
    manifest: Manifest


def put(client: MlflowClient, experiment: str, box: Path, version: str, folder: Path) -> Released:
    """Register a box as the next version, with its files among the artifacts of its run and its tags."""
    run = client.create_run(experiment)
    copied = copy_lunchbox(box, folder / f"box-{version}", version=version, run_id=run.info.run_id)
    client.log_artifacts(run.info.run_id, str(copied), "lunchbox")
    made = client.create_model_version("ekiben", source=f"runs:/{run.info.run_id}/lunchbox", run_id=run.info.run_id)
    assert made.version == version
    manifest = read_manifest(copied)
    for key, value in {"space_id": manifest.space_id, "bento_tag": manifest.tag}.items():
        client.set_model_version_tag("ekiben", version, key, value)
    return Released(copied, manifest)


def wait_for(served: Served, condition: Callable[[dict[str, object]], bool]) -> dict[str, object]:
    return served.wait(lambda info: condition(info["following"]))


def test_versions_come_from_mlflow_under_load_and_stay_when_it_is_gone(
    built_home: Path,
    tiny_lunchbox_path: Path,
    successor_path: Path,
    manifest: Manifest,
    mlflow_template: Path,
    tmp_path: Path,
) -> None:
    home = Path(shutil.copytree(built_home, tmp_path / "home", symlinks=True))
    with run_mlflow(mlflow_template, tmp_path / "mlflow") as uri:
        client = MlflowClient(uri)
        experiment = client.create_experiment("swaps")
        client.create_registered_model("ekiben")
        one = put(client, experiment, tiny_lunchbox_path, "1", tmp_path)
        two = put(client, experiment, successor_path, "2", tmp_path)
        client.set_registered_model_alias("ekiben", "champion", "1")
        vectors = {each.manifest.tag: Engine(each.box, each.manifest).embed(TEXTS) for each in (one, two)}
        with open_server(home, tmp_path / "cwd", manifest.tag, workers=2, MLFLOW_TRACKING_URI=uri) as served:
            served.wait_live(one.manifest.tag)
            served.wait_known()
            with Traffic(served.server.url, TEXTS, connections=4, models=(None, "champion")) as traffic:
                for target in (two, one, two):
                    client.set_registered_model_alias("ekiben", "champion", target.manifest.version)
                    served.wait_live(target.manifest.tag)
                by_hand = served.load("1")
                assert by_hand.status_code == 200, by_hand.text
                assert by_hand.json()["model"] == one.manifest.tag
                served.wait_live(one.manifest.tag)
                assert served.load("champion").json()["model"] == two.manifest.tag
                assert served.load("7").json()["error"]["code"] == "unknown_model"
            assert find_wrong(traffic.shots, vectors) == []
            assert {shot.model for shot in traffic.shots} == set(vectors)
            info = served.info()
            assert (info["following"]["source"], info["following"]["points_to"]) == (uri, two.manifest.tag)
            assert {each["path"] for each in info["models"]} == {
                str(home / "ekiben" / two.manifest.tag.replace(":", "-"))
            }
    # the registry has ended; a server that is started now has what was fetched, and says what it cannot see
    with open_server(home, tmp_path / "cwd", manifest.tag, workers=1, MLFLOW_TRACKING_URI=uri) as served:
        following = wait_for(served, lambda following: following["failures"] != 0)
        assert "cannot be used" in str(following["following"]["error"])  # type: ignore[index]
        assert served.info()["live"] == two.manifest.tag
        answer = served.client.post("/encode", json={"texts": TEXTS[:1]})
        assert answer.status_code == 200
        expected = vectors[two.manifest.tag][:1]
        np.testing.assert_allclose(answer.json()["embeddings"], expected, atol=1e-5)
        assert (home / "ekiben" / two.manifest.tag.replace(":", "-") / MANIFEST_FILE).is_file()
