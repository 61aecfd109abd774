"""Everything that a vector goes back to, from whichever end one begins; what is missing is said as missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bentos.aliases import Pointer, write_alias
from bentos.manifest import Manifest, read_manifest, write_manifest
from flows.core.explain import explain
from flows.core.packing import hash_manifest
from flows.core.provenance import LOCK_FILE, lock_sha256
from flows.core.references import Places, find_local_box, find_subjects
from flows.core.tracking import Tracker
from flows.errors import NothingReleasedError
from flows.params import DataParams, TrainParams
from tests.factories import TINY_RUN_ID
from tests.flows.core.test_provenance import git
from tests.flows.core.test_recorded import record, write_pairs
from tests.flows.core.test_registry import log_empty_model

TAG = f"ekiben:1-{TINY_RUN_ID[:8]}"


@dataclass(frozen=True)
class Stage:
    """A repository, its data, and places that know nothing yet."""

    places: Places
    commit: str
    data: Path


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    repository = tmp_path / "repository"
    lock = repository / LOCK_FILE
    lock.parent.mkdir(parents=True)
    lock.write_text("numpy==1.0\n")
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "the code of then")
    places = Places(
        tracker=None,
        no_registry="no MLflow there",
        bento_home=tmp_path / "bentoml",
        lunchboxes=tmp_path / "lunchboxes",
        repository=repository,
        roots=(tmp_path / "data",),
        model_name="ekiben",
    )
    return Stage(places, git(repository, "rev-parse", "HEAD"), write_pairs(tmp_path / "data"))


def keep_box(stage: Stage, lunchbox: Path, *, built: bool = True, **changed: object) -> Manifest:
    """Put a lunchbox into the model store, with what is known of its origin, and a Bento beside it."""
    manifest = read_manifest(lunchbox)
    _, tags = record(stage.data.parent, None, pairs="pairs.csv")
    data = manifest.data.model_copy(update={"path": "pairs.csv", "md5": tags["data_md5"]})
    update = {"data": data, "git_commit": stage.commit, "lock_sha256": lock_sha256(stage.places.repository)} | changed
    manifest = manifest.model_copy(update=update)
    folder = stage.places.bento_home / "models" / "ekiben-model" / manifest.bento_version
    shutil.copytree(lunchbox, folder)
    write_manifest(folder, manifest)
    if built:
        bento = stage.places.bento_home / "bentos" / "ekiben" / manifest.bento_version
        bento.mkdir(parents=True)
        (bento / "bento.yaml").write_text(f"name: ekiben\nversion: {manifest.bento_version}\n")
    return manifest


def states(stage: Stage, reference: str = TAG) -> dict[str, str]:
    (chain,) = explain(reference, stage.places)
    return {link.name: link.state for link in chain.links}


def test_the_box_alone_knows_its_way_back(stage: Stage, tiny_lunchbox_path: Path) -> None:
    manifest = keep_box(stage, tiny_lunchbox_path, licence="apache-2.0")
    write_alias(
        stage.places.bento_home,
        "ekiben",
        "champion",
        Pointer(version="1", bento_version=manifest.bento_version, run_id="r", space_id=manifest.space_id),
    )
    references = [TAG, TAG.replace(":", "-model:"), manifest.bento_version, manifest.space_id, TINY_RUN_ID, "champion"]
    for reference in [*references, TINY_RUN_ID[:6]]:
        (chain,) = explain(reference, stage.places)
        assert chain.source == "box"
        assert chain.link("vectors").facts == {"X-Ekiben-Model": TAG, "X-Ekiben-Space": manifest.space_id}
    assert {link.name: link.state for link in chain.links} == {
        "vectors": "ok",
        "bento": "ok",
        "version": "unknown",
        "space": "ok",
        "run": "unknown",
        "gates": "unknown",
        "base_model": "ok",
        "data": "ok",
        "commit": "ok",
        "lock": "ok",
    }
    assert "the registry cannot be asked" in chain.link("version").said
    assert chain.link("version").facts == {"version": "1", "aliases_here": ["champion"]}
    assert chain.link("base_model").facts["licence"] == "apache-2.0"
    assert chain.link("commit").facts["subject"] == "the code of then"
    assert chain.link("run").facts["run_id"] == TINY_RUN_ID
    json.dumps(chain.as_json())


def test_what_is_not_as_it_was_is_told(stage: Stage, tiny_lunchbox_path: Path) -> None:
    manifest = keep_box(stage, tiny_lunchbox_path)
    box = find_local_box(TAG, stage.places)
    assert box is not None
    assert find_local_box("ekiben:9-00000000", stage.places) is None
    (box / "tokenizer.json").write_text("{}")
    write_pairs(stage.data.parent, "new")
    (stage.places.repository / LOCK_FILE).write_text("numpy==2.0\n")
    found = states(stage)
    assert {name: found[name] for name in ("bento", "data", "lock")} == dict.fromkeys(
        ("bento", "data", "lock"), "changed"
    )
    (chain,) = explain(TAG, stage.places)
    assert "tokenizer.json" in chain.link("bento").said
    assert f"expected {manifest.data.md5}" in chain.link("data").said
    stage.data.unlink()
    assert states(stage)["data"] == "missing"


@pytest.mark.parametrize(
    ("changed", "name", "state", "said"),
    [
        ({"git_commit": "f" * 40}, "commit", "missing", "is not in"),
        ({"git_commit": None}, "commit", "missing", "not recorded"),
        ({"lock_sha256": None}, "lock", "missing", "not recorded"),
        ({"built": False}, "bento", "missing", "is not in"),
        ({"built": False}, "vectors", "missing", "never released"),
    ],
)
def test_what_is_missing_is_said_and_nothing_guessed(
    stage: Stage, tiny_lunchbox_path: Path, changed: dict[str, object], name: str, state: str, said: str
) -> None:
    keep_box(stage, tiny_lunchbox_path, **changed)  # type: ignore[arg-type]
    (chain,) = explain(TAG, stage.places)
    link = next(link for link in chain.links if link.name == name)
    assert (link.state, said in link.said) == (state, True), link.said


def test_a_dirty_commit_is_not_the_code_that_ran(stage: Stage, tiny_lunchbox_path: Path) -> None:
    keep_box(stage, tiny_lunchbox_path, git_commit=f"{stage.commit}-dirty")
    (chain,) = explain(TAG, stage.places)
    assert chain.link("commit").state == "changed"
    assert chain.link("commit").facts["git_commit"] == stage.commit
    assert chain.link("commit").facts["dirty"] is True


def log_version(tracker: Tracker, stage: Stage, **tags: str) -> tuple[str, str]:
    """A training on the stage's data, registered; its run and version."""
    _, origin = record(stage.data.parent, None, pairs="pairs.csv")
    lock = lock_sha256(stage.places.repository) or ""
    run_id = tracker.start_run("train", tags=origin | {"git_commit": stage.commit, "lock_sha256": lock})
    tracker.log_params(run_id, {"data": DataParams(pairs="pairs.csv"), "train": TrainParams(base_model="a-base")})
    tracker.log_json(run_id, "data.json", {"root": str(stage.data.parent)})
    tracker.log_metrics(run_id, {"eval/spearman": 0.6, "base/spearman": 0.5})
    tracker.end_run(run_id)
    version = tracker.register(run_id, log_empty_model(tracker, run_id))
    tracker.set_version_tags(version, tags)
    return run_id, version


def test_the_registry_knows_the_rest_of_the_way(tracker: Tracker, stage: Stage) -> None:
    run_id, version = log_version(tracker, stage, space_id="5" * 16, compat="breaking", compat_space_id="4" * 16)
    tag = f"ekiben:{version}-{run_id[:8]}"
    tracker.set_version_tags(version, {"bento_tag": tag, "verdict": "passed", "replaces": "0"})
    rows = [{"gate": "quality", "verdict": "passed", "reason": "a gain"}]
    tracker.log_json(run_id, "release/gates.json", {"verdict": "passed", "gates": rows})
    stage = replace(stage, places=replace(stage.places, tracker=tracker, no_registry=""))

    for reference in (tag, version, f"v{version}", "latest", run_id, run_id[:6], "5" * 16):
        (chain,) = explain(reference, stage.places)
        assert (chain.source, chain.link("run").facts["run_id"]) == ("registry", run_id)
    assert {link.name: link.state for link in chain.links} == dict.fromkeys(
        (link.name for link in chain.links), "ok"
    ) | {"bento": "missing"}, "its Bento was built elsewhere"
    assert chain.link("space").facts["compat"] == "breaking"
    assert chain.link("run").facts["params"]["train.base_model"] == "a-base"
    assert chain.link("run").facts["metrics"] == {"eval/spearman": 0.6, "base/spearman": 0.5}
    assert chain.link("gates").facts["gates"] == rows
    assert "not recorded" in chain.link("base_model").said, "nobody wrote down the licence"
    assert chain.link("version").facts["replaces"] == "0"


def test_versions_that_share_a_space_are_all_told(tracker: Tracker, stage: Stage) -> None:
    runs = [log_version(tracker, stage, space_id="5" * 16)[0] for _ in range(2)]
    chains = explain("5" * 16, replace(stage.places, tracker=tracker))
    assert [chain.link("run").facts["run_id"] for chain in chains] == runs[::-1]
    assert chains[0].link("space").facts["shared_with_versions"] == ["1"]


def test_a_run_that_was_never_registered_is_found_by_its_beginning(tracker: Tracker, stage: Stage) -> None:
    places = replace(stage.places, tracker=tracker)
    log_version(tracker, stage)
    trial = tracker.start_run("trial 3", parent_run_id="p" * 32, tags={"git_commit": "e" * 40})
    (chain,) = explain(trial[:8], places)
    assert chain.source == "run"
    missing = ("vectors", "bento", "version", "space", "gates", "commit", "lock", "data", "base_model")
    assert {name: chain.link(name).state for name in missing} == dict.fromkeys(missing, "missing")  # type: ignore[arg-type]
    assert "running" in chain.link("run").said


def test_a_beginning_of_several_runs_is_not_enough(
    tracker: Tracker, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = replace(stage.places, tracker=tracker)
    runs = [tracker.start_run("train") for _ in range(17)]  # 16 digits: two begin alike
    beginning = next(run[:1] for run in runs if sum(other[:1] == run[:1] for other in runs) > 1)
    monkeypatch.setattr("flows.core.references.MIN_PREFIX_LENGTH", 1)
    with pytest.raises(NothingReleasedError, match="runs begin with"):
        find_subjects(beginning, places)


@pytest.mark.parametrize("reference", ["ekiben:7-00000000", "nope", "", "5" * 16, "9"])
def test_what_nobody_knows_is_told_with_where_was_looked(
    tracker: Tracker, stage: Stage, tiny_lunchbox_path: Path, reference: str
) -> None:
    keep_box(stage, tiny_lunchbox_path)
    with pytest.raises(NothingReleasedError, match=r"neither in the registry \(no MLflow there\) nor in the BentoML"):
        find_subjects(reference, stage.places)
    log_version(tracker, stage)
    with pytest.raises(NothingReleasedError, match=r"there is no version .* of 'ekiben'; there are 1-"):
        find_subjects(reference, replace(stage.places, tracker=tracker))


def test_registry_and_box_that_contradict_each_other_are_told(
    open_tracker: Callable[[], Tracker], stage: Stage, tiny_lunchbox_path: Path
) -> None:
    tracker = open_tracker()
    run_id, version = log_version(tracker, stage, space_id="5" * 16)
    manifest = keep_box(stage, tiny_lunchbox_path, run_id=run_id, version=version)
    tracker.set_version_tags(version, {"bento_tag": manifest.tag})
    (chain,) = explain(version, replace(stage.places, tracker=tracker))
    assert chain.notes == (f"space: the registry says {'5' * 16}, the lunchbox {manifest.space_id}",)


def test_the_box_that_was_released_is_told_from_one_that_was_packed_anew(
    tracker: Tracker, stage: Stage, tiny_lunchbox_path: Path
) -> None:
    run_id, version = log_version(tracker, stage, space_id="5" * 16)
    manifest = keep_box(stage, tiny_lunchbox_path, run_id=run_id, version=version)
    places = replace(stage.places, tracker=tracker)
    stored = find_local_box(manifest.tag, places)
    assert stored is not None
    tracker.set_version_tags(version, {"bento_tag": manifest.tag, "manifest_sha256": hash_manifest(stored)})
    assert explain(version, places)[0].link("bento").state == "ok"

    shutil.copytree(stored, places.lunchboxes / manifest.bento_version)
    write_manifest(stored, manifest.model_copy(update={"created_at": "later"}))
    assert explain(version, places)[0].link("bento").state == "ok", "the home folder has the one that was released"
    shutil.rmtree(places.lunchboxes)
    assert "packed anew" in explain(version, places)[0].link("bento").said
