"""Versions, aliases, and what a reference to a version means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from flows.core.registry import Release, clean_name, clean_tags
from flows.core.tracking import Tracker
from flows.errors import NothingReleasedError, ParamsError


def register_run(tracker: Tracker, *, spearman: float | None = None, data_md5: str = "d" * 32) -> Release:
    """A finished run with a (file-less) logged model, registered."""
    run_id = tracker.start_run("train", tags={"primary_metric": "spearman", "data_md5": data_md5})
    if spearman is not None:
        tracker.log_metrics(run_id, {"dev/spearman": spearman})
    version = tracker.register(run_id, log_empty_model(tracker, run_id))
    tracker.end_run(run_id)
    return tracker.version(version)


def log_empty_model(tracker: Tracker, run_id: str) -> str:
    client = raw_client(tracker)
    experiment = client.get_experiment_by_name(tracker.experiment)
    return str(client.create_logged_model(experiment.experiment_id, name="model", source_run_id=run_id).model_id)


def raw_client(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracker.uri, tracker.uri)


def aliases(tracker: Tracker) -> dict[str, str]:
    return {alias: release.version for release in tracker.versions() for alias in release.aliases}


def test_a_version_carries_its_run_and_tags(tracker: Tracker) -> None:
    run_id = tracker.start_run("train")
    model_id = log_empty_model(tracker, run_id)
    version = tracker.register(run_id, model_id)
    tracker.set_version_tags(version, {"git_commit": "abc", "data_rev": None, "space_id": "s"})
    release = tracker.version(version)
    assert (release.version, release.run_id, release.aliases) == ("1", run_id, ())
    assert release.tags == {"git_commit": "abc", "space_id": "s", "run_id": run_id, "model_id": model_id}
    assert release.created_at.endswith("+00:00")


def test_registering_a_run_twice_gives_the_same_version(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    run_id = tracker.start_run("train")
    old, new = log_empty_model(tracker, run_id), log_empty_model(tracker, run_id)
    first = tracker.register(run_id, old)
    second = open_tracker().register(run_id, new)
    assert (first, second, len(tracker.versions())) == ("1", "1", 1)
    assert tracker.version("1").tags["model_id"] == new


def test_registering_goes_on_where_it_was_killed(tracker: Tracker) -> None:
    client = raw_client(tracker)
    run_id = tracker.start_run("train")
    model_id = log_empty_model(tracker, run_id)
    client.create_registered_model("ekiben")  # killed after this step
    assert tracker.versions() == []
    # Killed after the version was made, before tags and links.
    client.create_model_version("ekiben", "file:///nowhere", run_id=run_id)
    assert tracker.register(run_id, model_id) == "1"
    assert len(tracker.versions()) == 1
    assert tracker.version("1").tags["model_id"] == model_id
    assert '"version": 1' in client.get_logged_model(model_id).tags["mlflow.modelVersions"]


def test_registering_needs_no_process_wide_tracking_address(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert register_run(tracker).version == "1"


def test_an_alias_names_one_version_or_nothing(tracker: Tracker) -> None:
    for _ in range(2):
        register_run(tracker)
    tracker.set_alias("champion", None)
    assert aliases(tracker) == {}
    assert tracker.champion() is None
    tracker.set_alias("champion", "1")
    tracker.set_alias("champion", "2")
    tracker.set_alias("previous", "1")
    assert aliases(tracker) == {"champion": "2", "previous": "1"}
    assert tracker.champion() == tracker.version("2")
    tracker.set_alias("previous", None)
    assert aliases(tracker) == {"champion": "2"}


def test_the_registered_model_has_tags_of_its_own(tracker: Tracker) -> None:
    assert tracker.model_tags() == {}
    register_run(tracker)
    tracker.set_model_tag("history.x", "{}")
    assert tracker.model_tags() == {"history.x": "{}"}


def test_a_name_can_be_taken_once(tracker: Tracker) -> None:
    assert tracker.claim("ekiben-x", {"token": "a"}, description="for a test")
    assert not tracker.claim("ekiben-x", {"token": "b"}, description="for a test")
    assert tracker.claims("ekiben-") == {"ekiben-x": {"token": "a"}}
    assert tracker.note_claim("ekiben-x", "beat", "1")
    assert tracker.claims("ekiben-")["ekiben-x"] == {"token": "a", "beat": "1"}
    tracker.unclaim("ekiben-x")
    tracker.unclaim("ekiben-x")
    assert tracker.claims("ekiben-") == {}
    assert not tracker.note_claim("ekiben-x", "beat", "2")


def test_every_form_of_a_reference_finds_its_version(tracker: Tracker) -> None:
    one, two, three = (register_run(tracker) for _ in range(3))
    tracker.set_alias("previous", "1")
    tracker.set_alias("champion", "2")
    meanings = {
        "1": "1",
        "v2": "2",
        "champion": "2",
        "previous": "1",
        "latest": "3",
        f"ekiben:1-{one.run_id[:8]}": "1",
        f"2-{two.run_id[:8]}": "2",
        f" 3-{three.run_id} ": "3",
        three.run_id: "3",
        three.run_id[:12]: "3",
        three.run_id[:12].upper(): "3",
        "ekiben:champion": "2",
    }
    assert {ref: tracker.version(ref).version for ref in meanings} == meanings


@pytest.mark.parametrize(
    "ref", ["4", "v4", "v", "challenger", "", "-", "1-", "1-ffffffffffff", "latest-1", "ekiben:", "12345", "other:1"]
)
def test_an_unknown_reference_lists_what_there_is(tracker: Tracker, ref: str) -> None:
    release = register_run(tracker)
    tracker.set_alias("champion", "1")
    with pytest.raises(NothingReleasedError) as caught:
        tracker.version(ref)
    assert f"1-{release.run_id[:8]} (champion)" in str(caught.value)


def test_the_number_in_a_tag_must_fit_its_run(tracker: Tracker) -> None:
    one, _ = register_run(tracker), register_run(tracker)
    with pytest.raises(NothingReleasedError):
        tracker.version(f"2-{one.run_id[:8]}")


def test_before_the_first_version_the_message_says_how_to_make_one(tracker: Tracker) -> None:
    assert tracker.versions() == []
    assert tracker.champion() is None
    for ask in (lambda: tracker.version("champion"), tracker.best_version):
        with pytest.raises(NothingReleasedError, match="ekiben train"):
            ask()


def test_the_best_version_has_the_highest_primary_metric_on_dev(tracker: Tracker) -> None:
    for value in (0.80, 0.90, 0.85):
        register_run(tracker, spearman=value)
    register_run(tracker)  # never scored
    assert tracker.best_version().version == "2"


def test_scores_are_compared_on_the_same_data_only(tracker: Tracker) -> None:
    register_run(tracker, spearman=0.99, data_md5="a" * 32)
    register_run(tracker, spearman=0.70, data_md5="b" * 32)
    register_run(tracker, spearman=0.60, data_md5="b" * 32)
    assert tracker.best_version().version == "2"
    register_run(tracker, data_md5="c" * 32)  # never scored
    with pytest.raises(NothingReleasedError, match="there are 4-"):
        tracker.best_version()


def test_of_equal_versions_the_oldest_is_best(tracker: Tracker) -> None:
    for _ in range(2):
        register_run(tracker, spearman=0.9)
    assert tracker.best_version().version == "1"


def test_a_deleted_experiment_is_named_with_its_cure(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    client = raw_client(tracker)
    client.delete_experiment(client.get_experiment_by_name("ekiben").experiment_id)
    with pytest.raises(ParamsError, match="mlflow experiments restore"):
        open_tracker()


def test_names_and_tags_take_the_form_that_mlflow_accepts() -> None:
    assert clean_name("dev_cosine_ndcg@10") == "dev_cosine_ndcg_at_10"
    assert clean_name("a=b,c") == "a_b_c"
    assert clean_tags({"a": None, "b": 3, "c?": "x" * 9000}) == {"b": "3", "c_": "x" * 5000}
