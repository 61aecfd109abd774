"""Following an alias: what it names is served, whatever fails leaves what is served as it is, and is said."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bentos.aliases import Pointer, alias_path, write_alias
from bentos.crew import Crew, Item
from bentos.errors import IncompleteLoadError, NotReadyError, RegistryError
from bentos.follow import Follower
from bentos.manifest import read_manifest
from bentos.observer import Observer
from bentos.refusals import Refusals
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from bentos.sources import LocalSource, point_at
from bentos.swaps import Swaps
from bentos.worker import Worker
from tests.serving import copy_lunchbox

SOON_S = 60.0


class FlakySource(LocalSource):
    """The local source, when it can be reached."""

    problem: RegistryError | None = None  # of the registry
    fetch_problem: RegistryError | None = None
    looks = 0
    remembered: tuple[tuple[str, Pointer], ...] = ()
    memory_problem: OSError | None = None

    def remember(self, alias: str, pointer: Pointer) -> None:
        if self.memory_problem is not None:
            raise self.memory_problem
        self.remembered += ((alias, pointer),)

    def look(self, alias: str) -> Pointer | None:
        self.looks += 1
        if self.problem is not None:
            raise self.problem
        return super().look(alias)

    def fetch(self, pointer: Pointer) -> Path:
        if self.fetch_problem is not None:
            raise self.fetch_problem
        return super().fetch(pointer)


class Notes(Observer):
    followed: tuple[float | None, int] = (None, 0)

    def set_followed(self, seen_at: float | None, failures: int) -> None:
        self.followed = (seen_at, failures)


@dataclass
class Stage:
    """A server of one worker, with version 1 live, and a store with versions 1 to 3."""

    home: Path
    shelf: Shelf
    crew: Crew
    swaps: Swaps
    source: FlakySource
    follower: Follower
    refusals: Refusals
    notes: Notes

    @property
    def live(self) -> str:
        return self.shelf.live.manifest.version

    @property
    def loaded(self) -> list[str]:
        return sorted(encoder.manifest.version for encoder in self.shelf.encoders())

    def box(self, version: str) -> Path:
        (path,) = (self.home / "models" / "ekiben-model").glob(f"{version}-*")
        return path

    def point(self, version: str, alias: str = "champion") -> None:
        write_alias(self.home, "ekiben", alias, point_at(read_manifest(self.box(version))))

    async def load_by_hand(self, version: str, *, live: bool = True) -> None:
        item = Item(tag=read_manifest(self.box(version)).tag, path=self.box(version))
        await self.swaps.bring(item, live=live, until=time.monotonic() + SOON_S, pinned=not live)


@pytest.fixture
def home(tmp_path: Path, tiny_lunchbox_path: Path, successor_path: Path) -> Path:
    store = tmp_path / "home" / "models" / "ekiben-model"
    for path in (tiny_lunchbox_path, successor_path):
        shutil.copytree(path, store / read_manifest(path).bento_version)
    copy_lunchbox(tiny_lunchbox_path, store / "3-33333333", version="3", run_id="3" * 32)
    return tmp_path / "home"


@pytest.fixture
def on_stage(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test on a stage; settings of the server may be given."""
    monkeypatch.setattr("bentos.swaps.FLIP_AFTER_S", 0.05)

    @contextlib.asynccontextmanager
    async def open_stage(alias: str, live: bool) -> AsyncIterator[Stage]:
        settings = ServeSettings(threads=1, follow="champion", follow_every_s=0.02)
        (tmp_path / "crew").mkdir(exist_ok=True)
        crew, shelf, notes = Crew(tmp_path / "crew"), Shelf(), Notes()
        worker, swaps, refusals = Worker(crew, shelf, settings, notes), Swaps(crew, settings, notes), Refusals(crew)
        source = FlakySource(home, "ekiben")
        follower = Follower(alias, source, crew, swaps, refusals, settings, notes, live=live)
        stage = Stage(home, shelf, crew, swaps, source, follower, refusals, notes)
        shelf.followed = alias if live else None
        first = Item(tag=read_manifest(stage.box("1")).tag, path=stage.box("1"))
        await worker.join(lambda: first, lambda: first)
        task = asyncio.create_task(worker.run())
        try:
            yield stage
        finally:
            task.cancel()
            await shelf.stop()

    def run(test: Callable[[Stage], Awaitable[None]], *, alias: str = "champion", live: bool = True) -> None:
        async def main() -> None:
            async with open_stage(alias, live) as stage:
                await asyncio.wait_for(test(stage), 2 * SOON_S)

        asyncio.run(main())

    return run


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_the_version_that_the_alias_names_is_served_and_follows_it(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        await stage.follower.look()
        assert stage.live == "1"
        assert stage.follower.describe()["error"].endswith("has no alias 'champion' yet")
        for version in "12":
            stage.point(version)
            await stage.follower.look()
            assert stage.live == version
            described = stage.follower.describe()
            assert described["points_to"] == read_manifest(stage.box(version)).tag
            assert (described["error"], described["failures"], described["doing"]) == (None, 0, None)
            assert described["seen_s_ago"] < 60
        stage.follower.observe()
        assert stage.notes.followed[0] == pytest.approx(time.time(), abs=60)
        await wait_until(lambda: stage.loaded == ["2"])

    on_stage(test)


def test_what_is_served_is_remembered_once_for_a_start_without_the_registry(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        for version in "1122":
            stage.point(version)
            await stage.follower.look()
        stage.source.memory_problem = OSError("no space left")
        stage.point("3")
        await stage.follower.look()
        assert stage.live == "3", "a full disk is no reason to stay behind"
        assert stage.follower.describe()["failures"] == 0
        assert [(alias, pointer.version) for alias, pointer in stage.source.remembered] == [
            ("champion", "1"),
            ("champion", "2"),
        ]

    on_stage(test)


def test_a_version_that_was_loaded_by_hand_stays_until_the_alias_moves(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        stage.point("2")
        await stage.follower.look()
        await stage.load_by_hand("1")
        for _ in range(3):
            await stage.follower.look()
        assert stage.live == "1"
        stage.point("3")
        await stage.follower.look()
        assert stage.live == "3"

    on_stage(test)


def test_a_version_that_stands_beside_only_changes_its_place(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        await stage.load_by_hand("2", live=False)
        second = stage.shelf.choose("model", "2")
        stage.point("2")
        await stage.follower.look()
        assert stage.shelf.live is second

    on_stage(test)


def test_a_bad_version_is_refused_and_not_tried_again_before_it_changes(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        path = stage.box("2") / "model.fp32.onnx"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"\0")
        stage.point("2")
        tag = read_manifest(stage.box("2")).tag
        for _ in range(4):
            await stage.follower.look()
            assert stage.live == "1"
        refusal = stage.refusals.read()[tag]
        assert refusal.attempts == 1
        assert "model.fp32.onnx" in refusal.reason
        assert f"{tag} is refused: " in stage.follower.describe()["error"]
        assert stage.loaded == ["1"]
        path.write_bytes(good)
        await stage.follower.look()
        assert stage.live == "2"
        assert stage.refusals.read() == {}
        assert stage.follower.describe()["error"] is None

    on_stage(test)


def test_a_bad_version_is_tried_again_after_a_while(
    on_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bentos.refusals.FIRST_WAIT_S", 0.01)

    async def test(stage: Stage) -> None:
        (stage.box("2") / "certificate.json").write_bytes(b"{")
        stage.point("2")
        for _ in range(2):
            await stage.follower.look()
            await asyncio.sleep(0.1)
        (refusal,) = stage.refusals.read().values()
        assert refusal.attempts == 2
        assert stage.live == "1"

    on_stage(test)


def test_the_alias_may_leave_a_refused_version_behind(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        (stage.box("2") / "canary.json").unlink()
        stage.point("2")
        await stage.follower.look()
        stage.point("3")
        await stage.follower.look()
        assert stage.live == "3"
        assert stage.refusals.read() == {}, "nobody asks for it any more"

    on_stage(test)


def test_requests_that_name_the_alias_are_answered_whatever_becomes_of_its_version(
    on_stage: Callable[..., None],
) -> None:
    async def test(stage: Stage) -> None:
        (stage.box("2") / "canary.json").unlink()
        stage.point("2")
        await stage.follower.look()
        await wait_until(lambda: "champion" in stage.shelf.aliases)
        assert stage.shelf.choose("model", "champion").manifest.version == "1"
        stage.point("3")
        looking = asyncio.create_task(stage.follower.look())
        seen = set()
        while not looking.done():
            seen.add(stage.shelf.choose("model", "champion").manifest.version)
            await asyncio.sleep(0.005)
        await looking
        assert seen <= {"1", "3"}
        await wait_until(lambda: stage.shelf.choose("model", "champion").manifest.version == "3")

    on_stage(test)


def test_what_took_the_place_of_a_version_that_could_not_be_loaded_makes_room_for_it_again(
    on_stage: Callable[..., None],
) -> None:
    async def test(stage: Stage) -> None:
        stage.point("2")
        await stage.follower.look()
        assert stage.live == "2"
        first, second = (Item(tag=read_manifest(stage.box(v)).tag, path=stage.box(v)) for v in "12")
        fallen_back = {"live": first, "at": 0.0, "instead_of": second.tag}  # as the worker does when it starts anew
        stage.crew.change_plan(lambda plan: plan.model_copy(update=fallen_back))
        await wait_until(lambda: stage.live == "1")
        await stage.follower.look()
        assert stage.live == "2"
        plan = stage.crew.read_plan()
        assert plan is not None
        assert plan.instead_of is None

    on_stage(test)


@pytest.mark.parametrize(
    "problem", [IncompleteLoadError("a worker is slow"), NotReadyError("no space left"), OSError("no space left")]
)
def test_what_is_not_the_versions_fault_is_not_held_against_it(
    problem: Exception, on_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise problem

    async def test(stage: Stage) -> None:
        stage.point("2")
        with monkeypatch.context() as patch:
            patch.setattr(stage.swaps, "bring", fail)
            await stage.follower.look()
        assert stage.refusals.read() == {}
        assert str(problem) in stage.follower.describe()["error"]
        assert stage.follower.describe()["failures"] == 1
        await stage.follower.look()
        assert stage.live == "2"
        assert stage.follower.describe()["error"] is None

    on_stage(test)


def test_following_goes_on_when_the_office_could_not_be_taken(
    on_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stage: Stage) -> None:
        stage.point("2")
        take, calls = stage.crew.take, []

        def take_late(role: str) -> object:
            calls.append(role)
            if len(calls) < 3:
                raise OSError("too many open files")
            return take(role)

        monkeypatch.setattr(stage.crew, "take", take_late)
        task = asyncio.create_task(stage.follower.run())
        await wait_until(lambda: stage.live == "2")
        task.cancel()

    on_stage(test)


def test_a_registry_that_cannot_be_reached_is_said_and_asked_again(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        stage.point("2")
        stage.source.problem = RegistryError("the registry is away")
        for failures in (1, 2):
            await stage.follower.look()
            described = stage.follower.describe()
            assert (described["error"], described["failures"]) == ("the registry is away", failures)
        assert stage.live == "1"
        stage.source.problem = None
        stage.source.fetch_problem = RegistryError("the disk is full")
        await stage.follower.look()
        assert stage.follower.describe()["error"] == "the disk is full"
        assert stage.follower.describe()["failures"] == 3
        assert stage.refusals.read() == {}, "nothing is known against the version"
        stage.source.fetch_problem = None
        await stage.follower.look()
        assert stage.live == "2"
        assert stage.follower.describe()["failures"] == 0

    on_stage(test)


def test_a_file_of_aliases_that_cannot_be_read_is_said(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        stage.point("2")
        path = alias_path(stage.home, "ekiben")
        good = path.read_text()
        path.write_text("{")
        await stage.follower.look()
        assert "is not JSON" in stage.follower.describe()["error"]
        path.write_text(good)
        await stage.follower.look()
        assert stage.live == "2"

    on_stage(test)


def test_one_worker_looks_for_all_and_another_goes_on_when_it_ends(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        stage.point("1")
        second = FlakySource(stage.home, "ekiben")
        settings = ServeSettings(follow_every_s=0.02)
        parts = (Crew(stage.crew.folder), stage.swaps, stage.refusals, settings, Observer())
        other = Follower("champion", second, *parts)
        tasks = [asyncio.create_task(follower.run()) for follower in (stage.follower, other)]
        await wait_until(lambda: stage.source.looks > 2)
        assert second.looks == 0
        assert other.describe() == stage.follower.describe()
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        await wait_until(lambda: second.looks > 2)
        looks = stage.source.looks
        await asyncio.sleep(0.1)
        assert stage.source.looks == looks
        tasks[1].cancel()

    on_stage(test)


def test_requests_may_name_the_other_aliases(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        stage.point("1")
        stage.point("2", alias="challenger")
        await stage.follower.look()
        await stage.load_by_hand("2", live=False)
        await wait_until(lambda: "challenger" in stage.shelf.aliases)
        assert stage.shelf.choose("model", "challenger").manifest.version == "2"

    on_stage(test)


def test_the_version_to_be_shadowed_is_brought_and_taken_away(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        await stage.follower.look()
        assert stage.loaded == ["1"]
        for version in "23":
            stage.point(version, alias="challenger")
            await stage.follower.look()
            await wait_until(lambda version=version: stage.loaded == sorted(["1", version]))
            assert stage.live == "1"
        write_alias(stage.home, "ekiben", "challenger", None)
        await stage.follower.look()
        await wait_until(lambda: stage.loaded == ["1"])

    on_stage(test, alias="challenger", live=False)


def test_a_version_may_be_shadowed_by_its_number(on_stage: Callable[..., None]) -> None:
    async def test(stage: Stage) -> None:
        await stage.follower.look()
        await wait_until(lambda: stage.loaded == ["1", "2"])

    on_stage(test, alias="v2", live=False)
