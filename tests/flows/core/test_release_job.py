"""Who is compared with whom, and under which terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bentos.manifest import Compat, read_manifest, write_manifest
from flows.core.boxes import MANIFEST_TAG, box_path
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


def test_the_champion_stays_releasable_when_the_one_before_is_gone_but_no_other_one_is(
    tracker: Tracker, open_it: Callable[..., Job]
) -> None:
    for _ in range(3):
        register_run(tracker)
    tracker.set_version_tags("2", {"replaces": "1"})
    tracker.set_alias("champion", "2")
    job = open_it("2")
    assert (job.champion, job.replaces) == (None, "1")
    assert "no comparison with version 1" in job.notes[0]
    with pytest.raises(NothingReleasedError, match="--run 2"):
        open_it("3")


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


def test_a_candidate_is_proven_just_as_it_was_released_beside_the_same_champion(
    tracker: Tracker, settings: FlowSettings, open_it: Callable[..., Job], pack: Callable[..., Path]
) -> None:
    box = pack(register_run(tracker))
    manifest = read_manifest(box)

    def is_proven() -> bool:
        return open_it("1").is_proven(manifest)

    assert not is_proven()
    store_model(box, manifest)
    bento = settings.bento_store_path / "bentos" / "ekiben" / manifest.bento_version
    bento.mkdir(parents=True)
    (bento / "bento.yaml").write_text(
        f"service: bentos.service:EmbeddingService\nname: ekiben\nversion: {manifest.bento_version}\n"
        "bentoml_version: 1.4.39\ncreation_time: '2026-11-23T10:04:44.834580+00:00'\n"
    )
    tracker.set_version_tags("1", {MANIFEST_TAG: hash_manifest(box)})
    assert not is_proven()
    tracker.set_version_tags("1", {"verdict": "passed"})
    assert is_proven()
    pack(register_run(tracker))
    tracker.set_alias("champion", "2")
    assert not is_proven()  # it was not compared with that one
    tracker.set_alias("champion", None)
    (bento / "bento.yaml").unlink()
    assert not is_proven()


def test_a_dry_run_works_on_a_copy(tracker: Tracker, open_it: Callable[..., Job], pack: Callable[..., Path]) -> None:
    box = pack(register_run(tracker))
    job = open_it("1", dry_run=True)
    assert job.box.is_relative_to(job.scratch)
    assert read_manifest(job.box) == read_manifest(box)
    (job.box / "tokenizer.json").write_text("{}")
    assert (box / "tokenizer.json").read_text() != "{}"
    assert not open_it("1", dry_run=False).box.is_relative_to(job.scratch)
