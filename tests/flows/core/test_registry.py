"""Versions, aliases, and what a reference to a version means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy
from mlflow import MlflowClient

from flows.core.registry import Release, clean_name, clean_tags
from flows.core.tracking import Tracker
from flows.errors import EkibenError, NothingReleasedError, ParamsError


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


def execute(database: sqlalchemy.Engine, statement: str) -> None:
    with database.begin() as connection:
        connection.execute(sqlalchemy.text(statement))


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


def test_the_first_promotion_leaves_no_previous(tracker: Tracker) -> None:
    register_run(tracker)
    assert tracker.champion() is None
    tracker.promote("1", tags={"bento_tag": "ekiben:1-abc"})
    assert aliases(tracker) == {"champion": "1"}
    champion = tracker.champion()
    assert champion is not None
    assert champion.tags["bento_tag"] == "ekiben:1-abc"


def test_promoting_keeps_the_old_champion_as_previous(tracker: Tracker) -> None:
    for _ in range(3):
        register_run(tracker)
    tracker.promote("1", tags={})
    tracker.promote("2", tags={})
    assert aliases(tracker) == {"champion": "2", "previous": "1"}
    tracker.promote("3", tags={})
    assert aliases(tracker) == {"champion": "3", "previous": "2"}


def test_promoting_the_champion_again_changes_no_alias(tracker: Tracker) -> None:
    for _ in range(2):
        register_run(tracker)
    tracker.promote("1", tags={})
    tracker.promote("2", tags={})
    tracker.promote("champion", tags={"note": "again"})
    assert aliases(tracker) == {"champion": "2", "previous": "1"}
    assert tracker.version("2").tags["note"] == "again"


def test_a_promotion_that_breaks_off_between_its_aliases_can_be_completed(tracker: Tracker) -> None:
    for _ in range(3):
        register_run(tracker)
    tracker.promote("1", tags={})
    tracker.promote("2", tags={})
    database = sqlalchemy.create_engine(tracker.uri)
    for event in ("INSERT", "UPDATE"):
        execute(
            database,
            f"CREATE TRIGGER no_{event} BEFORE {event} ON registered_model_aliases WHEN NEW.alias = 'champion' "
            "BEGIN SELECT RAISE(ABORT, 'the power is gone'); END",
        )
    with pytest.raises(EkibenError, match="the power is gone"):
        tracker.promote("3", tags={})
    assert aliases(tracker) == {"champion": "2", "previous": "2"}  # the way back was written first
    for event in ("INSERT", "UPDATE"):
        execute(database, f"DROP TRIGGER no_{event}")
    tracker.promote("3", tags={})
    assert aliases(tracker) == {"champion": "3", "previous": "2"}


def test_promoting_an_unknown_version_changes_nothing(tracker: Tracker) -> None:
    register_run(tracker)
    tracker.promote("1", tags={})
    with pytest.raises(NothingReleasedError):
        tracker.promote("7", tags={"bento_tag": "x"})
    assert aliases(tracker) == {"champion": "1"}


def test_every_form_of_a_reference_finds_its_version(tracker: Tracker) -> None:
    one, two, three = (register_run(tracker) for _ in range(3))
    tracker.promote("1", tags={})
    tracker.promote("2", tags={})
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
    tracker.promote("1", tags={})
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
