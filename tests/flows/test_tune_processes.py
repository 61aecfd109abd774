"""Two `ekiben tune` commands on one study: homes of their own, one database of the study, one MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.support import write_pairs

EKIBEN = str(Path(sys.executable).with_name("ekiben"))
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_commands_work_on_one_study_and_release_one_winner(
    tmp_path: Path, tiny_model_path: Path, mlflow_template: Path
) -> None:
    from mlflow import MlflowClient

    pairs = write_pairs(tmp_path / "pairs.csv")
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    arguments = ["tune", "--pairs", str(pairs), "--json"]
    # So many steps that a trial takes seconds: neither is done with all six before the other has begun.
    for assignment in (
        f"train.base_model={tiny_model_path}",
        f"tune.space.base_model=[{tiny_model_path}]",
        "train.steps=500",
        "train.max_tokens=32",
        "train.distill_steps=5",
        "tune.space.steps=[500, 501, 502, 503]",
        "tune.space.max_tokens=[32]",
        "tune.space.layers=[null, 1]",
        "tune.trials=6",
        "tune.minutes=20",
        "tune.policy=knee",
    ):
        arguments += ["--set", assignment]
    commands = []
    for number in range(2):
        own = {key: value for key, value in os.environ.items() if not key.startswith(("BENTOML_", "PREFECT_"))}
        own |= {
            "EKIBEN_HOME": str(tmp_path / f"home{number}"),
            "EKIBEN_STUDY_STORAGE": f"sqlite:///{tmp_path}/studies.db",
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }
        said = (tmp_path / f"stderr{number}").open("w")
        commands.append(
            subprocess.Popen([EKIBEN, *arguments], cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=said, text=True)
        )
    answers = [command.communicate(timeout=1500)[0] for command in commands]
    for number, command in enumerate(commands):
        assert command.returncode == 0, (tmp_path / f"stderr{number}").read_text()
    results = [json.loads(answer.splitlines()[-1]) for answer in answers]

    assert results[0]["study"] == results[1]["study"]
    assert results[0]["trials"] == results[1]["trials"]
    assert len({result["version"] for result in results}) == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [version.run_id for version in client.search_model_versions("")] == [results[0]["run_id"]]
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    trials = [run for run in runs if run.info.run_name.startswith("trial")]
    assert len(trials) == results[0]["finished_trials"] + results[0]["hopeless_trials"] == 6
    assert len({run.data.tags["mlflow.parentRunId"] for run in trials}) == 2  # both have trained
