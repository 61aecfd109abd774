"""What a run was made with comes back as it was, or says what is missing; data are what their MD5 says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.dataset import read_data
from flows.core.edge_texts import CANARY_TEXTS
from flows.core.recorded import (
    PARAMS_FILE,
    Recorded,
    embed_canary,
    is_local,
    look_for_data,
    read_json,
    read_recorded,
    recorded_version,
    unflatten,
)
from flows.core.tracking import Tracker, _flatten
from flows.errors import InputError
from flows.params import DataParams, EvaluateParams, Params, TrainParams

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text != "null"
)
data_params = st.builds(
    DataParams,
    pairs=st.none() | texts,
    data_rev=st.none() | st.sampled_from(["1234567", "1e5", "main", "true"]),
    columns=st.dictionaries(st.sampled_from(["text_a", "text_b", "score"]), texts),
    profile_template=st.none() | texts,
    score_max=st.floats(1, 100),
    split_seed=st.integers(0, 10**6),
    slice_columns=st.lists(texts, max_size=3),
)
train_params = st.builds(
    TrainParams,
    base_model=texts,
    learning_rate=st.floats(1e-9, 1e-2),
    steps=st.integers(1, 10**5),
    layers=st.none() | st.integers(1, 12),
    freeze_embeddings=st.booleans(),
)


@given(data=data_params, train=train_params)
def test_parameters_come_back_from_the_texts_of_mlflow(data: DataParams, train: TrainParams) -> None:
    sections = {"data": data, "train": train, "evaluate": EvaluateParams()}
    found = unflatten(_flatten(sections) | {"model_name": "a copy for people"})
    assert {name: dict(section) for name, section in found.items()} == {
        name: section.model_dump(mode="json") for name, section in sections.items()
    }


def test_every_parameter_of_every_section_survives() -> None:
    assert Params.model_validate(unflatten(_flatten(dict(Params())))) == Params()


def log_training(tracker: Tracker, *, exact: bool, template: str = "{title}", parent: str | None = None) -> str:
    sections: dict[str, Any] = {"train": TrainParams(steps=7), "evaluate": EvaluateParams()}
    if parent is None:
        sections = {"data": DataParams(pairs="pairs.csv", profile_template=template)} | sections
    run_id = tracker.start_run("train", parent_run_id=parent)
    tracker.log_params(run_id, sections)
    if exact:
        tracker.log_json(run_id, PARAMS_FILE, {name: part.model_dump(mode="json") for name, part in sections.items()})
    tracker.log_json(run_id, "data.json", {"files": {"pairs": "a" * 32}, "root": "/somewhere"})
    return run_id


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_tells_its_parameters_however_long(tracker: Tracker, *, exact: bool) -> None:
    template = "{title} " * 200  # longer than MLflow keeps
    recorded = read_recorded(tracker, tracker.find_run(log_training(tracker, exact=exact, template=template)))
    assert recorded.exact is exact
    assert recorded.params["data"] == DataParams(pairs="pairs.csv", profile_template=template).model_dump()
    assert recorded.params["train"] == TrainParams(steps=7).model_dump()
    assert (recorded.files, recorded.root) == ({"pairs": "a" * 32}, Path("/somewhere"))


def test_a_trial_has_the_data_of_its_study_and_a_study_is_no_training(tracker: Tracker) -> None:
    study = tracker.start_run("tune")
    tracker.log_params(study, {"data": DataParams(pairs="study.csv"), "train": TrainParams(), "tune": {"trials": 2}})
    trial = tracker.find_run(log_training(tracker, exact=True, parent=study))
    assert trial.parent_run_id == study
    recorded = read_recorded(tracker, trial)
    assert recorded.params["data"]["pairs"] == "study.csv"
    assert recorded.params["train"]["steps"] == 7
    assert "tune" not in recorded.params
    with pytest.raises(InputError, match="is a study"):
        read_recorded(tracker, tracker.find_run(study))
    assert read_recorded(tracker, tracker.find_run(study), or_study=True).params["data"]["pairs"] == "study.csv"


def test_a_run_of_something_else_is_told(tracker: Tracker) -> None:
    run_id = tracker.start_run("other")
    with pytest.raises(InputError, match="holds no data and train parameters"):
        read_recorded(tracker, tracker.find_run(run_id))
    assert read_json(tracker, run_id, "nothing.json") is None


def write_pairs(folder: Path, word: str = "old", name: str = "pairs.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("text_a,text_b,score\n" + "".join(f"{word} {i},b {i},0.5\n" for i in range(9)))
    return folder / name


def record(folder: Path, root: Path | None, **data: Any) -> tuple[Recorded, dict[str, str]]:
    """What a training in `folder` would have recorded."""
    raw = read_data(DataParams(**data), root=folder)
    tags = {"data_path": raw.version.path, "data_md5": raw.version.md5, "data_rev": raw.version.revision or ""}
    return Recorded({"data": DataParams(**data).model_dump()}, True, raw.files, root), tags


def test_data_are_found_where_they_were_or_below_another_root(tmp_path: Path) -> None:
    write_pairs(tmp_path / "then")
    recorded, tags = record(tmp_path / "then", tmp_path / "then", pairs="pairs.csv")
    (sight,) = look_for_data(recorded, recorded_version(tags), roots=[tmp_path / "now"])
    assert sight.found
    assert sight.place == str(tmp_path / "then" / "pairs.csv")
    assert sight.params is not None
    assert sight.params.pairs == sight.place, "absolute: the rebuild runs in another folder"

    (tmp_path / "then").rename(tmp_path / "now")
    gone, found = look_for_data(recorded, recorded_version(tags), roots=[tmp_path / "now"])
    assert "there is no file" in gone.problem
    assert found.found


def test_changed_data_are_named_with_both_md5s(tmp_path: Path) -> None:
    write_pairs(tmp_path), write_pairs(tmp_path, name="test.csv")
    recorded, tags = record(tmp_path, tmp_path, pairs="pairs.csv", test="test.csv")
    write_pairs(tmp_path, "new", name="test.csv")
    (sight,) = look_for_data(recorded, recorded_version(tags), roots=[tmp_path], commit="f" * 40)
    assert not sight.found
    assert sight.problem == f"found md5 {sight.md5}, expected {tags['data_md5']} (test differ)"


def test_data_that_changed_since_are_found_at_the_commit_of_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout.strip()

    git("init", "--quiet")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("")
    write_pairs(tmp_path / "data")
    git("add", "--all")
    git("commit", "--quiet", "-m", "then")
    commit = git("rev-parse", "HEAD")
    recorded, tags = record(tmp_path, tmp_path, pairs="data/pairs.csv")
    write_pairs(tmp_path / "data", "new")

    changed, found = look_for_data(recorded, recorded_version(tags), roots=[], commit=commit)
    assert "found md5" in changed.problem
    assert found.found
    assert found.params is not None
    assert found.params.data_rev == commit
    assert commit in found.place


@pytest.mark.parametrize(
    ("address", "local"), [("pairs.csv", True), ("file:///a/b.csv", True), ("s3://b/c.csv", False)]
)
def test_only_local_data_are_looked_at_for_nothing(address: str, *, local: bool) -> None:
    assert is_local(Recorded({"data": DataParams(pairs=address).model_dump()}, True, {}, None)) is local


def test_canary_vectors_keep_what_a_float32_holds() -> None:
    vectors = np.random.default_rng(0).normal(size=(len(CANARY_TEXTS), 8)).astype(np.float32)
    kept = json.loads(json.dumps(embed_canary(lambda _texts: vectors)))
    assert kept["texts"] == list(CANARY_TEXTS)
    np.testing.assert_allclose(np.asarray(kept["vectors"], dtype=np.float32), vectors, rtol=1e-6)
