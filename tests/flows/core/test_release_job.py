"""Who is compared with whom, and under which terms."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bentos.errors import LunchboxError
from bentos.manifest import Compat, read_manifest, write_manifest
from flows.core.boxes import MANIFEST_TAG, box_path
from flows.core.history import Act, begin_act
from flows.core.lineage import trace_version
from flows.core.packing import hash_manifest, store_model
from flows.core.registry import Release
from flows.core.release_job import Job, find_replaced, open_job
from flows.core.release_lock import ReleaseLock
from flows.core.tracking import Tracker
from flows.errors import NothingReleasedError, ParamsError
from flows.params import ReleaseParams
from flows.settings import FlowSettings, load_settings
from tests.flows.core.test_registry import register_run
from tests.serving import bento_home, copy_lunchbox


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[FlowSettings]:
    settings = load_settings(tmp_path / "home")
    with bento_home(settings.bento_store_path):
        yield settings


@pytest.fixture
def pack(tracker: Tracker, settings: FlowSettings, tiny_lunchbox_path: Path) -> Callable[..., Path]:
    """A version with a lunchbox in the home folder."""

    def pack(release: Release, *earlier: Release) -> Path:
        settings.lunchboxes_path.mkdir(parents=True, exist_ok=True)
        to = box_path(settings.lunchboxes_path, release)
        box = copy_lunchbox(tiny_lunchbox_path, to, version=release.version, run_id=release.run_id)
        relations = [
            Compat(kind="compatible", version=item.version, tag=f"ekiben:{item.version}", space_id=f"s{item.version}")
            for item in earlier
        ]
        if relations:
            update = {"compat": relations[0], "earlier": relations[1:]}
            write_manifest(box, read_manifest(box).model_copy(update=update))
        return box

    return pack


@pytest.fixture
def open_it(tracker: Tracker, settings: FlowSettings, tmp_path: Path) -> Callable[..., Job]:
    def open_it(version: str, params: ReleaseParams | None = None, *, dry_run: bool = False) -> Job:
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        lock = None if dry_run else ReleaseLock(tracker, "a test")
        candidate = trace_version(tracker, version)
        return open_job(tracker, settings, params or ReleaseParams(), candidate, scratch, lock)

    return open_it


def test_the_first_one_is_compared_with_none(tracker: Tracker, open_it: Callable[..., Job]) -> None:
    register_run(tracker)
    job = open_it("1")
    assert (job.replaces, job.champion, job.earlier) == ("", None, ())


def test_a_candidate_is_compared_with_the_champion_and_those_whose_indexes_it_can_be_asked_about(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    one, two, three, _ = (register_run(tracker) for _ in range(4))
    pack(one), pack(three, two, one)  # the box of version 2 is gone
    tracker.set_alias("champion", "3")
    job = open_it("4")
    assert job.replaces == "3"
    assert job.champion is not None
    assert (job.champion.version, job.champion.tag) == ("3", f"ekiben:3-{three.run_id[:8]}")
    assert [rival.version for rival in job.earlier] == ["1"]
    assert "no comparison with the space of ekiben:2" in job.notes[0]


def test_the_champion_is_compared_with_the_one_that_it_has_replaced(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    one, two = register_run(tracker), register_run(tracker)
    pack(one), pack(two)
    tracker.set_version_tags("2", {"replaces": "1"})
    tracker.set_alias("champion", "2")
    job = open_it("2")
    assert job.champion is not None
    assert job.champion.version == job.replaces == "1"


def test_a_lost_lunchbox_of_the_champion_or_of_the_one_before_ends_no_release(
    tracker: Tracker, open_it: Callable[..., Job]
) -> None:
    for _ in range(3):
        register_run(tracker)
    tracker.set_version_tags("2", {"replaces": "1"})
    tracker.set_alias("champion", "2")
    job = open_it("2")
    assert (job.champion, job.replaces) == (None, "1")
    assert "no comparison with version 1" in job.notes[0]
    tracker.set_version_tags("2", {"space_id": "5" * 16})
    job = open_it("3")  # what it means is the gates' affair
    assert job.champion is not None
    assert (job.champion.tag, job.champion.version, job.champion.space_id) == (
        f"ekiben:2-{tracker.version('2').run_id[:8]}",
        "2",
        "5" * 16,
    )
    assert "the lunchbox of version 2 of 'ekiben' cannot be found whole" in job.champion.problem
    assert "no comparison with version 2" in job.notes[0]


def test_what_an_older_ekiben_released_is_taken_from_the_alias(tracker: Tracker) -> None:
    for _ in range(3):
        register_run(tracker)
    tracker.set_alias("champion", "3")
    assert find_replaced(tracker, tracker.version("3")) is None
    tracker.set_alias("previous", "2")
    replaced = find_replaced(tracker, tracker.version("3"))
    assert replaced is not None
    assert replaced.version == "2"
    tracker.set_alias("previous", "3")  # killed between its two aliases
    assert find_replaced(tracker, tracker.version("3")) is None


def test_the_champion_is_no_challenger(tracker: Tracker, open_it: Callable[..., Job]) -> None:
    register_run(tracker)
    tracker.set_alias("champion", "1")
    with pytest.raises(ParamsError, match="version 1 is the champion"):
        open_it("1", ReleaseParams(alias="challenger"))


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [("int8", "auto", "int8"), ("int8", "fp32", "fp32"), ("auto", "auto", "auto"), (None, "auto", "auto")],
)
def test_the_precision_is_the_trainings_unless_the_release_asks_for_one(
    trained: str | None, asked: str, expected: str, tracker: Tracker, open_it: Callable[..., Job]
) -> None:
    release = register_run(tracker)
    if trained is not None:
        tracker.log_params(release.run_id, {"train": {"precision": trained}})
    assert open_it("1", ReleaseParams.model_validate({"precision": asked})).params.precision == expected


def release_as_packed(tracker: Tracker, version: str, box: Path) -> None:
    tracker.set_version_tags(version, {MANIFEST_TAG: hash_manifest(box), "verdict": "passed"})


def test_a_released_version_is_taken_with_the_box_that_it_was_released_with(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    one, two = register_run(tracker), register_run(tracker)
    box = pack(two, one)
    assert not open_it("2").is_released
    store_model(box, read_manifest(box))
    release_as_packed(tracker, "2", box)
    job = open_it("2")
    assert job.is_released
    assert job.box == box
    assert job.earlier == ()  # its relations are in its box
    write_manifest(box, read_manifest(box).model_copy(update={"created_at": "2031-01-01T00:00:00+00:00"}))
    stored = open_it("2").box  # what somebody packed again is not it
    assert stored != box
    assert hash_manifest(stored) == tracker.version("2").tags[MANIFEST_TAG]
    write_manifest(stored, read_manifest(box))
    with pytest.raises(NothingReleasedError, match=r"is not packed anew: put it back to .*lunchboxes"):
        open_it("2")


@pytest.mark.parametrize("asked", ["auto", "fp32", "int8"])
def test_a_released_version_serves_the_precision_that_it_was_released_with(
    asked: str, tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    release_as_packed(tracker, "1", pack(register_run(tracker)))
    params = ReleaseParams.model_validate({"precision": asked})
    if asked != "int8":
        assert open_it("1", params).is_released
        return
    with pytest.raises(ParamsError, match=r"released with fp32, and a released version does not change.*train again"):
        open_it("1", params)


def test_the_relation_to_a_rival_that_cannot_be_loaded_is_breaking_and_says_why(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    one, two = register_run(tracker), register_run(tracker)
    pack(one), pack(two)
    tracker.set_alias("champion", "1")
    job = open_it("2")
    assert job.champion is not None
    theirs, ours = job.champion.box / "manifest.json", job.box / "manifest.json"
    before = theirs.read_text()
    theirs.write_text("no manifest")
    compat, adapter = job.relate_to(job.champion)
    assert (compat.kind, compat.version, adapter) == ("breaking", "1", None)
    assert "nothing could be measured" in compat.reason
    theirs.write_text(before)
    ours.write_text("no manifest")  # that is the candidate's own fault
    with pytest.raises(LunchboxError):
        job.relate_to(job.champion)


def test_earlier_champions_are_others_and_of_spaces_of_their_own(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    one, two, three = (register_run(tracker) for _ in range(3))
    for item in (one, two):
        pack(item)
    pack(three, two, one, one)
    tracker.set_alias("champion", "3")
    assert [rival.version for rival in open_it("2").earlier] == ["1"]


def test_a_version_that_a_rollback_has_left_is_known_until_it_is_champion_again(
    tracker: Tracker, open_it: Callable[..., Job]
) -> None:
    for _ in range(3):
        register_run(tracker)

    def move(kind: str, version: str, replaces: str) -> None:
        begin_act(tracker, Act.model_validate({"at": "", "kind": kind, "version": version, "replaces": replaces}))
        tracker.set_alias("champion", version)

    move("release", "1", "")
    move("release", "2", "1")
    assert open_it("2").left_by is None
    move("rollback", "1", "2")
    left_by = open_it("2").left_by
    assert left_by is not None
    assert (left_by.version, left_by.replaces) == ("1", "2")
    assert open_it("1").left_by is None
    move("release", "3", "1")
    assert open_it("2").left_by == left_by
    assert open_it("1").left_by is None  # a release took its place
    move("rollback", "2", "3")  # forward again
    assert open_it("2").left_by is None
    assert open_it("3").left_by is not None


def test_a_dry_run_works_on_a_copy(tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]) -> None:
    box = pack(register_run(tracker))
    job = open_it("1", dry_run=True)
    assert job.box.is_relative_to(job.scratch)
    assert read_manifest(job.box) == read_manifest(box)
    (job.box / "tokenizer.json").write_text("{}")
    assert (box / "tokenizer.json").read_text() != "{}"
    assert not open_it("1", dry_run=False).box.is_relative_to(job.scratch)
    assert job.log.is_relative_to(job.scratch)


def test_a_dry_run_beside_a_release_at_work_goes_on_without_its_box(
    tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(register_run(tracker))

    def race(_source: Path, to: Path) -> None:
        to.mkdir()
        (to / "manifest.json").write_text("{}")
        raise shutil.Error([("one", "two", "No such file or directory")])

    monkeypatch.setattr("flows.core.release_job.shutil.copytree", race)
    assert not open_it("1", dry_run=True).box.exists()
