"""A rebuild is planned from what a run recorded, made by its own commit, and compared with what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from flows.core.dataset import read_data
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.provenance import find_commit
from flows.core.recorded import DATA_FILE, PARAMS_FILE, VECTORS_FILE, embed_canary
from flows.core.reproduce import Plan, Rebuilt, compare, plan_rebuild, rebuild
from flows.core.tracking import RunRecord, Tracker
from flows.core.training import make_encode
from flows.errors import DataError, EkibenError, InputError
from flows.params import DataParams, EvaluateParams, TrainParams
from tests.factories import make_tiny_model
from tests.flows.core.test_provenance import git
from tests.flows.core.test_recorded import write_pairs

# The `train` command of a commit: it does what ours does with its options, as far as a rebuild relies on it. The run is
# written without MLflow, whose import takes seconds.
PROGRAM = """
import hashlib, json, pathlib, shutil, sqlite3, subprocess, sys, time
import yaml
options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=False))
params = yaml.safe_load(open(options["--params"]))
print("[fit] at work", params["train"]["steps"], file=sys.stderr)
if params["train"]["steps"] == 13:
    print("error: train.stepps is not a parameter", file=sys.stderr)
    sys.exit(2)
home = pathlib.Path(options["--home"])
shutil.copy("TEMPLATE", home / "mlflow.db")
here = pathlib.Path(__file__).parent
commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
md5 = hashlib.md5(open(params["data"]["pairs"], "rb").read()).hexdigest()
run_id, now = "0123456789abcdef" * 2, int(time.time() * 1000)
columns = "run_uuid, name, status, lifecycle_stage, start_time, end_time, experiment_id, artifact_uri, user_id"
row = (run_id, "train", "FINISHED", "active", now, now, 0, (home / "artifacts").as_uri(), "me")
with sqlite3.connect(home / "mlflow.db") as database:
    database.execute(f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    for tag in dict(git_commit=commit, data_md5=md5, base_model=params["train"]["base_model"]).items():
        database.execute("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", (*tag, run_id))
print(json.dumps(dict(run_id=run_id)))
"""
Log = Callable[..., RunRecord]


@pytest.fixture
def repository(tmp_path: Path, mlflow_template: Path) -> Path:
    folder = tmp_path / "repository"
    for package in ("flows", "bentos"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("")
    (folder / "flows" / "__main__.py").write_text(PROGRAM.replace("TEMPLATE", str(mlflow_template)))
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "the code of then")
    return folder


@pytest.fixture
def log(tracker: Tracker, tmp_path: Path, repository: Path) -> Log:
    """Return a function that logs a run as a training in `tmp_path/data` would have."""
    root = tmp_path / "data"
    write_pairs(root)

    def log_run(train: dict[str, Any] | None = None, **tags: str) -> RunRecord:
        data = DataParams(pairs="pairs.csv")
        raw = read_data(data, root=root)
        sections = {"data": data, "train": TrainParams(**{"steps": 3, **(train or {})}), "evaluate": EvaluateParams()}
        origin = {"git_commit": git(repository, "rev-parse", "HEAD"), "data_md5": raw.version.md5, "data_path": "x.csv"}
        run_id = tracker.start_run("train", tags=origin | tags)
        tracker.log_params(run_id, sections)
        tracker.log_json(run_id, PARAMS_FILE, {name: part.model_dump(mode="json") for name, part in sections.items()})
        tracker.log_json(run_id, DATA_FILE, {"files": raw.files, "root": str(root)})
        tracker.end_run(run_id)
        return tracker.find_run(run_id)

    return log_run


def plan(tracker: Tracker, run: RunRecord, repository: Path, *, boxes: dict[str, Path] | None = None) -> Plan:
    return plan_rebuild(tracker, run, repository=repository, roots=[], find_box=(boxes or {}).get)


def test_a_plan_says_what_may_make_a_difference(tracker: Tracker, log: Log, repository: Path) -> None:
    assert plan(tracker, log(), repository).notes == ()
    run = log(git_commit=git(repository, "rev-parse", "HEAD") + "-dirty")
    tracker.log_metrics(run.run_id, {"train/steps_done": 2.0})
    dirty, early = plan(tracker, tracker.find_run(run.run_id), repository).notes
    assert "working tree differed" in dirty
    assert "after 2 of 3 steps" in early
    assert "ended as KILLED" in plan(tracker, replace(log(), status="KILLED"), repository).notes[0]


def test_a_commit_that_is_unknown_or_not_here_is_told(tracker: Tracker, log: Log, repository: Path) -> None:
    with pytest.raises(InputError, match="recorded no commit"):
        plan(tracker, log(git_commit=""), repository)
    with pytest.raises(InputError, match=f"commit {'a' * 40} of run .* is not in .*git fetch"):
        plan(tracker, log(git_commit="a" * 40 + "-dirty"), repository)


def test_data_that_changed_or_are_gone_are_told_with_md5s(
    tracker: Tracker, log: Log, repository: Path, tmp_path: Path
) -> None:
    run = log()
    write_pairs(tmp_path / "data", "new")
    with pytest.raises(DataError, match=rf"md5 {run.tags['data_md5']}\) are not here .* found md5 [0-9a-f]{{32}}, exp"):
        plan(tracker, run, repository)
    (tmp_path / "data" / "pairs.csv").unlink()
    with pytest.raises(DataError, match=r"there is no file .*pairs\.csv.*--data-root"):
        plan(tracker, run, repository)


def test_a_run_near_a_champion_needs_its_lunchbox(
    tracker: Tracker, log: Log, repository: Path, tmp_path: Path, tiny_lunchbox_path: Path
) -> None:
    run = log({"anchor_weight": 1.0}, anchor="ekiben:2-abcdef01")
    with pytest.raises(InputError, match="kept near ekiben:2-abcdef01"):
        plan(tracker, run, repository)
    with pytest.raises(InputError, match="is not whole: no manifest"):
        plan(tracker, run, repository, boxes={"ekiben:2-abcdef01": tmp_path})
    near = plan(tracker, run, repository, boxes={"ekiben:2-abcdef01": tiny_lunchbox_path})
    assert near.anchor_box == tiny_lunchbox_path
    assert plan(tracker, log({"anchor_weight": 1.0}), repository).anchor_box is None, "there was no champion yet"


def test_a_rebuild_runs_the_code_of_the_commit_on_the_same_data(
    tracker: Tracker, log: Log, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "base").mkdir()
    run = log({"base_model": "base"})
    (repository / "flows" / "__main__.py").write_text("raise SystemExit('the code of now')")
    git(repository, "commit", "--quiet", "--all", "-m", "the code of now")
    lines: list[str] = []
    (tmp_path / "scratch").mkdir()
    planned = plan(tracker, run, repository)

    rebuilt = rebuild(planned, tmp_path / "scratch", environment="here", say=lines.append)

    assert rebuilt.run.tags["git_commit"] == run.tags["git_commit"]
    assert rebuilt.run.tags["data_md5"] == run.tags["data_md5"]
    assert rebuilt.run.tags["base_model"] == str(tmp_path / "data" / "base"), "a folder as the run meant it"
    assert rebuilt.code == tmp_path / "scratch" / "checkout"
    assert "  [fit] at work 3" in lines
    assert len(tracker.match_runs(rebuilt.run.run_id)) == 0, "nothing of it is in our MLflow"


def test_a_rebuild_that_fails_quotes_the_commits_own_words(
    tracker: Tracker, log: Log, repository: Path, tmp_path: Path
) -> None:
    planned = plan(tracker, log({"steps": 13}), repository)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(EkibenError, match=r"exit code 2: error: train\.stepps is not a parameter .*own command"):
        rebuild(planned, tmp_path / "scratch", environment="here", say=lambda _line: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> dict[str, SentenceTransformer]:
    other = make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)
    narrow = make_tiny_model(tmp_path_factory.mktemp("narrow") / "model", dense_dim=16)
    paths = {"same": tiny_model_path, "other": other, "narrow": narrow}
    return {name: SentenceTransformer(str(path), device="cpu") for name, path in paths.items()}


def planned(run: RunRecord, repository: Path) -> Plan:
    commit = find_commit(repository, git(repository, "rev-parse", "HEAD"))
    assert commit is not None
    sight: Any = type("Sight", (), {"place": "pairs.csv", "md5": "m"})()
    return Plan(run, {}, repository, commit, sight, None, ("a doubt",))


def rebuilt_as(tracker: Tracker, model: SentenceTransformer, **metrics: float) -> Rebuilt:
    run_id = tracker.start_run("rebuilt")
    tracker.log_model(run_id, model, example=["a"])
    tracker.log_metrics(run_id, metrics)
    return Rebuilt(tracker, tracker.find_run(run_id), "here", Path("checkout"), 1.0, ())


def test_vectors_and_metrics_are_compared_with_the_recorded_ones(
    tracker: Tracker, models: dict[str, SentenceTransformer], repository: Path, tmp_path: Path
) -> None:
    run_id = tracker.start_run("train")
    tracker.log_model(run_id, models["same"], example=["a"])
    tracker.log_metrics(run_id, {"eval/spearman": 0.5, "train/seconds": 9.0})
    (tmp_path / "own_texts.json").write_text(json.dumps(["a user's own text", CANARY_TEXTS[0]]))
    tracker._client.log_artifact(run_id, str(tmp_path / "own_texts.json"), "evaluation")
    recorded = planned(tracker.find_run(run_id), repository)

    again = rebuilt_as(tracker, models["same"], **{"eval/spearman": 0.6, "train/seconds": 1.0})
    result = compare(recorded, tracker, again, tmp_path / "a", wanted_cosine=0.999)
    assert result.reproduced
    assert (result.texts, result.max_difference) == (len(CANARY_TEXTS) + 1, 0.0)
    assert (result.min_cosine, result.mean_cosine) == (1.0, 1.0)
    assert result.vectors_of == "the model in MLflow"
    assert result.metrics == {"eval/spearman": (0.5, 0.6)}
    assert result.notes == ("a doubt",)
    assert result.as_json()["reproduced"] is True

    another = compare(recorded, tracker, rebuilt_as(tracker, models["other"]), tmp_path / "b", wanted_cosine=0.999)
    assert not another.reproduced
    assert another.min_cosine is not None
    assert another.min_cosine < 0.999
    with pytest.raises(EkibenError, match="the recorded vectors have 32 dimensions, the rebuilt ones 16"):
        compare(recorded, tracker, rebuilt_as(tracker, models["narrow"]), tmp_path / "c", wanted_cosine=0.999)


def test_a_run_without_its_model_is_compared_by_the_vectors_that_it_kept(
    tracker: Tracker, models: dict[str, SentenceTransformer], repository: Path, tmp_path: Path
) -> None:
    again = rebuilt_as(tracker, models["same"])
    nothing = planned(tracker.find_run(tracker.start_run("lost")), repository)
    result = compare(nothing, tracker, again, tmp_path / "a", wanted_cosine=0.999)
    assert not result.reproduced, "nothing to compare with is no proof"
    assert "kept neither its model nor any vector" in result.notes[-1]

    kept = embed_canary(make_encode(models["same"], 8))
    trial = tracker.start_run("trial that lost")
    tracker.log_json(trial, VECTORS_FILE, kept)
    result = compare(planned(tracker.find_run(trial), repository), tracker, again, tmp_path / "b", wanted_cosine=0.999)
    assert result.reproduced
    assert (result.vectors_of, result.texts) == (VECTORS_FILE, len(CANARY_TEXTS))

    released = tracker.start_run("released, its model deleted")
    wrong = np.ones_like(kept["vectors"]).tolist()
    canary = {"texts": kept["texts"], "vectors": wrong, "other_precisions": {"fp32": kept["vectors"]}}
    tracker.log_json(released, "release/canary.json", canary)
    result = compare(
        planned(tracker.find_run(released), repository), tracker, again, tmp_path / "c", wanted_cosine=0.999
    )
    assert result.reproduced, "fp32 with fp32"
    assert result.vectors_of == "release/canary.json"
    shutil.rmtree(tmp_path / "c")
