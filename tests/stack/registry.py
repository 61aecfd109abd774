"""What MLflow's registry says, read over HTTP as the flows' user."""

from __future__ import annotations

from typing import Any

import httpx

from tests.stack.native import NativeStack

NAME = "ekiben"


def ask_mlflow(stack: NativeStack, path: str, **parameters: str) -> httpx.Response:
    """GET of MLflow's REST interface."""
    worker = stack["worker"].environment
    return httpx.get(
        f"{stack.url('mlflow', 5000)}/api/2.0/mlflow/{path}",
        params=parameters,
        auth=(worker["MLFLOW_TRACKING_USERNAME"], worker["MLFLOW_TRACKING_PASSWORD"]),
        timeout=60,
    )


def champion(stack: NativeStack) -> str | None:
    """The Bento tag that the registry calls champion."""
    answer = ask_mlflow(stack, "registered-models/alias", name=NAME, alias="champion")
    if answer.status_code != 200:
        return None
    return str({tag["key"]: tag["value"] for tag in answer.json()["model_version"]["tags"]}["bento_tag"])


def read_versions(stack: NativeStack) -> dict[str, str]:
    """Every version of the model, with the run that made it."""
    found = ask_mlflow(stack, "model-versions/search", filter=f"name='{NAME}'", max_results="200")
    found.raise_for_status()
    return {version["version"]: version["run_id"] for version in found.json().get("model_versions", [])}


def read_runs(stack: NativeStack) -> dict[str, str]:
    """Every run of the experiment, with its status."""
    number = ask_mlflow(stack, "experiments/get-by-name", experiment_name=NAME).json()["experiment"]["experiment_id"]
    worker = stack["worker"].environment
    found: list[dict[str, Any]] = httpx.post(
        f"{stack.url('mlflow', 5000)}/api/2.0/mlflow/runs/search",
        json={"experiment_ids": [number], "max_results": 1000},
        auth=(worker["MLFLOW_TRACKING_USERNAME"], worker["MLFLOW_TRACKING_PASSWORD"]),
        timeout=60,
    ).json()["runs"]
    return {run["info"]["run_id"]: run["info"]["status"] for run in found}
