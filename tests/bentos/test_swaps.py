"""A version comes to all workers, or to none: several workers' shelves in one process, with real models.

Each worker has the name of a process of its own, so that it can die.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bentos.crew import Coming, Crew, Item, Plan
from bentos.errors import BusyError, IncompleteLoadError, LunchboxError, NoRoomError, RefusedVersionError
from bentos.manifest import read_manifest
from bentos.observer import Observer, Version
from bentos.settings import ServeSettings
from bentos.shelf import Shelf
from bentos.siblings import name_process
from bentos.swaps import Swaps
from bentos.worker import Worker
from tests.serving import copy_lunchbox

SOON_S = 60.0
LARGE_MB = 400.0


class Notes(Observer):
    """Writes down what it hears of swaps and versions."""

    def __init__(self) -> None:
        self.swaps: list[str] = []
        self.versions: list[Version] = []

    def record_swap(self, result: str) -> None:
        self.swaps.append(result)

    def set_versions(self, versions: object) -> None:
        self.versions = list(versions)  # type: ignore[call-overload]


@dataclass
class Station:
    """One worker, as a server's process would hold it."""

    crew: Crew
    shelf: Shelf
    worker: Worker
    swaps: Swaps
    notes: Notes
    task: asyncio.Task[None] | None = None

    @property
    def live(self) -> str:
        return self.shelf.live.manifest.tag

    @property
    def loaded(self) -> set[str]:
        return {encoder.manifest.tag for encoder in self.shelf.encoders()}


@dataclass
class Site:
    """The workers of one server."""

    folder: Path
    items: dict[str, Item]
    children: list[subprocess.Popen[bytes]]
    stations: list[Station] = field(default_factory=list)

    async def open(self, *, first: str = "1", settings: ServeSettings | None = None) -> Station:
        """Start one more worker."""
        name = name_process(self.children[len(self.stations)].pid)
        settings = settings or ServeSettings(threads=1)
        crew, shelf, notes = Crew(self.folder, me=name), Shelf(), Notes()
        worker = Worker(crew, shelf, settings, notes)
        station = Station(crew, shelf, worker, Swaps(crew, settings, notes), notes)
        self.stations.append(station)
        await worker.join(lambda: self.items[first], lambda: self.items["1"])
        station.task = asyncio.create_task(worker.run())
        return station

    async def kill(self, station: Station) -> None:
        """End a worker as SIGKILL would."""
        child = self.children[self.stations.index(station)]
        child.kill()
        child.wait()
        if station.task is not None:
            station.task.cancel()
            await asyncio.gather(station.task, return_exceptions=True)

    def tag(self, version: str) -> str:
        return self.items[version].tag


@pytest.fixture
def site(tmp_path: Path, tiny_lunchbox_path: Path, successor_path: Path) -> Iterator[Site]:
    third = copy_lunchbox(tiny_lunchbox_path, tmp_path / "3", version="3", run_id="3" * 32)
    paths = {"1": tiny_lunchbox_path, "2": successor_path, "3": third}
    items = {version: Item(tag=read_manifest(path).tag, path=path) for version, path in paths.items()}
    (tmp_path / "crew").mkdir()
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        children = [stack.enter_context(subprocess.Popen(command)) for _ in range(3)]
        for child in children:
            stack.callback(child.kill)
        yield Site(tmp_path / "crew", items, children)


@contextlib.asynccontextmanager
async def opened(site: Site, workers: int = 2, settings: ServeSettings | None = None) -> AsyncIterator[list[Station]]:
    try:
        for _ in range(workers):
            await site.open(settings=settings)
        yield site.stations
    finally:
        for station in site.stations:
            if station.task is not None:
                station.task.cancel()
            await station.shelf.stop()


async def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def soon(seconds: float = SOON_S) -> float:
    return time.monotonic() + seconds


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 2 * SOON_S)

    asyncio.run(main())


def test_a_version_becomes_the_live_one_in_all_workers_at_one_instant_and_the_old_one_leaves(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert (one.live, two.live) == (site.tag("1"), site.tag("1"))
            answer = await two.swaps.bring(site.items["2"], live=True, until=soon())
            pids = sorted(child.pid for child in site.children[:2])
            assert answer["model"] == site.tag("2")
            assert (sorted(answer["workers"]["done"]), answer["workers"]["missing"]) == (pids, [])
            assert (one.live, two.live) == (site.tag("2"), site.tag("2"))
            assert two.notes.swaps == ["done"]
            for station in (one, two):
                await wait_until(lambda station=station: len(station.shelf.copies()) == 1)
                assert station.loaded == {site.tag("2")}
                await wait_until(lambda station=station: [v.live for v in station.notes.versions] == [True])
            plan = one.crew.read_plan()
            assert plan is not None
            assert (plan.coming, plan.beside) == (None, ())

    run(test)


def test_nobody_flips_before_all_are_ready_and_then_all_do_at_the_same_time(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as stations:
            swap = asyncio.create_task(stations[0].swaps.bring(site.items["2"], live=True, until=soon()))
            seen: set[tuple[str, ...]] = set()
            while not swap.done():
                now = tuple(station.live for station in stations)
                ready = [station.shelf.find(site.tag("2")) is not None for station in stations]
                if site.tag("2") in now:
                    assert all(ready)
                seen.add(now)
                await asyncio.sleep(0.001)
            assert seen <= {(site.tag("1"),) * 2, (site.tag("2"),) * 2}

    run(test)


def test_a_version_that_one_worker_cannot_load_is_refused_by_all(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert two.task is not None
            two.task.cancel()  # it is slow
            path = Path(shutil.copytree(site.items["2"].path, site.folder / "altered"))
            swap = asyncio.create_task(
                one.swaps.bring(Item(tag=site.tag("2"), path=path), live=True, until=soon(), pinned=False)
            )
            await wait_until(lambda: one.shelf.find(site.tag("2")) is not None)
            (path / "tokenizer.json").write_bytes(b"altered since")
            two.task = asyncio.create_task(two.worker.run())
            with pytest.raises(RefusedVersionError, match=r"tokenizer\.json in .* was altered") as caught:
                await swap
            done, bad = (child.pid for child in site.children[:2])
            workers = caught.value.details["workers"]
            assert (workers["done"], list(workers["failed"]), workers["missing"]) == ([done], [str(bad)], [])
            assert "was altered" in caught.value.details["reason"]
            for station in (one, two):
                await wait_until(lambda station=station: station.shelf.tags() == [site.tag("1")])
                assert station.live == site.tag("1")
            assert one.notes.swaps == ["refused"]

            await one.swaps.bring(site.items["2"], live=True, until=soon())  # when it is well again
            assert (one.live, two.live) == (site.tag("2"), site.tag("2"))

    run(test)


def test_a_worker_that_is_too_slow_keeps_all_from_it_and_is_named(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert two.task is not None
            two.task.cancel()
            with pytest.raises(IncompleteLoadError, match=str(site.children[1].pid)) as caught:
                await one.swaps.bring(site.items["2"], live=True, until=soon(3))
            assert caught.value.details["workers"]["missing"] == [site.children[1].pid]
            await wait_until(lambda: one.shelf.tags() == [site.tag("1")])
            assert one.notes.swaps == ["incomplete"]
            two.task = asyncio.create_task(two.worker.run())
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert (one.live, two.live) == (site.tag("2"), site.tag("2"))

    run(test)


def test_a_dead_worker_is_not_waited_for_and_its_successor_takes_what_is_live(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            await site.kill(two)
            answer = await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert answer["workers"]["done"] == [site.children[0].pid]
            await one.swaps.bring(site.items["3"], live=False, until=soon(), pinned=True)
            three = await site.open()
            assert three.live == site.tag("2")
            assert three.loaded == one.loaded == {site.tag("2"), site.tag("3")}

    run(test)


def test_a_worker_that_dies_while_it_loads_is_not_waited_for(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert two.task is not None
            two.task.cancel()
            swap = asyncio.create_task(one.swaps.bring(site.items["2"], live=True, until=soon()))
            await wait_until(lambda: one.shelf.find(site.tag("2")) is not None)
            await site.kill(two)
            assert (await swap)["workers"]["done"] == [site.children[0].pid]
            assert one.live == site.tag("2")

    run(test)


def test_a_worker_that_comes_in_the_middle_of_a_swap_takes_part_in_it(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert two.task is not None
            two.task.cancel()
            swap = asyncio.create_task(one.swaps.bring(site.items["2"], live=True, until=soon()))
            await wait_until(lambda: one.shelf.find(site.tag("2")) is not None)
            three = await site.open()
            assert three.live == site.tag("1")
            two.task = asyncio.create_task(two.worker.run())
            answer = await swap
            assert sorted(answer["workers"]["done"]) == sorted(child.pid for child in site.children)
            assert {one.live, two.live, three.live} == {site.tag("2")}

    run(test)


def test_when_the_leader_of_a_swap_dies_nothing_comes_of_it_and_the_next_one_can_lead(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert one.task is not None
            one.task.cancel()
            swap = asyncio.create_task(one.swaps.bring(site.items["2"], live=True, until=soon()))
            await wait_until(lambda: two.shelf.find(site.tag("2")) is not None)
            before = one.crew.read_plan()
            assert before is not None
            await site.kill(one)
            swap.cancel()  # in a test the leader's last words cannot be kept from being written: they are taken back
            await asyncio.gather(swap, return_exceptions=True)
            two.crew.change_plan(lambda _: before)
            three = await site.open()
            assert three.shelf.tags() == [site.tag("1")], "nobody waits for what is coming"
            await two.swaps.bring(site.items["3"], live=True, until=soon())
            assert {two.live, three.live} == {site.tag("3")}
            for station in (two, three):
                await wait_until(lambda station=station: station.shelf.tags() == [site.tag("3")])

    run(test)


def test_swaps_take_turns(site: Site) -> None:
    async def test() -> None:
        async with opened(site) as (one, two):
            assert two.task is not None
            two.task.cancel()
            first = asyncio.create_task(one.swaps.bring(site.items["2"], live=True, until=soon()))
            await wait_until(lambda: one.shelf.find(site.tag("2")) is not None)
            with pytest.raises(BusyError, match=f"{site.tag('2')} is being loaded") as caught:
                await two.swaps.bring(site.items["3"], live=True, until=soon(0.2))
            assert caught.value.details == {"model": site.tag("2"), "retry_after_s": 5}
            second = asyncio.create_task(two.swaps.bring(site.items["3"], live=True, until=soon()))
            two.task = asyncio.create_task(two.worker.run())
            await asyncio.gather(first, second)
            assert (one.live, two.live) == (site.tag("3"), site.tag("3"))
            assert two.notes.swaps == ["busy", "done"]

    run(test)


def test_a_version_that_is_there_need_not_be_loaded(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            first = one.shelf.live
            await one.swaps.bring(site.items["1"], live=True, until=soon())
            await one.swaps.bring(site.items["1"], live=False, until=soon(), pinned=True)
            assert one.shelf.live is first
            await one.swaps.bring(site.items["2"], live=False, until=soon(), pinned=True)
            second = one.shelf.choose("model", "2")
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert one.shelf.live is second
            assert one.shelf.choose("model", "1") is first, "it was asked for beside the live one, so it stays"
            await one.swaps.bring(site.items["1"], live=True, until=soon())
            assert one.shelf.live is first
            assert one.shelf.choose("model", "2") is second

    run(test)


def test_what_stands_beside_is_bounded_and_the_least_recently_used_leaves(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            for version in "23":
                await one.swaps.bring(site.items[version], live=False, until=soon(), pinned=True)
            await make_large(one, site.tag("2"), site.tag("3"))
            one.shelf.choose("model", "2")
            await wait_until(lambda: _used_last(one.crew) == site.tag("2"))
            narrow = Swaps(one.crew, ServeSettings(shelf_mb=int(1.5 * LARGE_MB)), Observer())
            plan = one.crew.change_plan(lambda plan: narrow._place(site.items["1"], plan, live=True))
            kept = narrow._fit(list(plan.beside))
            assert [item.tag for item in kept] == [site.tag("2")]

    run(test)


async def make_large(station: Station, *tags: str) -> None:
    """Let versions take so much memory that it counts; tiny models take next to none."""
    for tag in tags:
        copy = station.shelf.find(tag)
        assert copy is not None
        copy.memory_mb = LARGE_MB
    await wait_until(lambda: all(station.crew.reports()[0].holdings[tag].memory_mb == LARGE_MB for tag in tags))


def _used_last(crew: Crew) -> str:
    beside = {tag: held.used_at for tag, held in crew.reports()[0].holdings.items() if held.role == "beside"}
    return max(beside, key=beside.__getitem__)


def test_a_version_that_is_too_large_to_stand_beside_may_still_be_the_live_one(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1, settings=ServeSettings(threads=1, shelf_mb=0)) as (one,):
            with pytest.raises(RefusedVersionError, match="EKIBEN_SHELF_MB allows 0") as caught:
                await one.swaps.bring(site.items["2"], live=False, until=soon(), pinned=True)
            assert caught.value.details["workers"] == {"done": [], "failed": {}, "missing": []}
            assert one.loaded == {site.tag("1")}
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert one.live == site.tag("2")

    run(test)


def test_a_shadow_takes_no_place_from_what_was_asked_for(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            await one.swaps.bring(site.items["2"], live=False, until=soon(), pinned=True)
            await make_large(one, site.tag("2"))
            narrow = Swaps(one.crew, ServeSettings(shelf_mb=int(LARGE_MB)), one.notes)
            with pytest.raises(NoRoomError, match="are not taken by versions that were asked for"):
                await narrow.bring(site.items["3"], live=False, until=soon())
            assert one.loaded == {site.tag("1"), site.tag("2")}
            await wait_until(lambda: site.tag("3") not in one.shelf.tags())
            one.shelf.choose("model", "1")
            await narrow.bring(site.items["3"], live=False, until=soon(), pinned=True)  # by hand it may
            await wait_until(lambda: one.loaded == {site.tag("1"), site.tag("3")})
            assert one.notes.swaps[-2:] == ["refused", "done"]

    run(test)


def test_a_version_that_one_worker_has_lost_becomes_live_in_all_or_in_none(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bentos.worker.RETRY_S", 600.0)

    async def test() -> None:
        path = Path(shutil.copytree(site.items["2"].path, site.folder / "box"))
        site.items["2"] = Item(tag=site.tag("2"), path=path)
        async with opened(site, workers=1) as (one,):
            await one.swaps.bring(site.items["2"], live=False, until=soon(), pinned=True)
            path.rename(site.folder / "away")
            two = await site.open()
            assert two.loaded == {site.tag("1")}
            with pytest.raises(RefusedVersionError, match="this is not a lunchbox"):
                await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert (one.live, two.live) == (site.tag("1"), site.tag("1"))
            (site.folder / "away").rename(path)
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            assert (one.live, two.live) == (site.tag("2"), site.tag("2"))

    run(test)


def test_what_was_brought_for_the_shadow_leaves_when_it_is_dropped(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            await one.swaps.bring(site.items["2"], live=False, until=soon())
            await one.swaps.bring(site.items["3"], live=False, until=soon(), pinned=True)
            for version in "1239":
                one.swaps.drop(site.items.get(version, Item(tag="ekiben:9-x", path=Path())).tag)
            await wait_until(lambda: one.loaded == {site.tag("1"), site.tag("3")})
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            await one.swaps.bring(site.items["1"], live=True, until=soon())
            await wait_until(lambda: one.loaded == {site.tag("1"), site.tag("3")})

    run(test)


# --- how a server begins


def test_a_server_whose_first_choice_is_broken_begins_with_its_own_version(site: Site) -> None:
    async def test() -> None:
        site.items["2"] = Item(tag=site.tag("2"), path=site.folder / "nothing")
        try:
            one = await site.open(first="2")
            two = await site.open(first="2")
            assert (one.live, two.live) == (site.tag("1"), site.tag("1"))
        finally:
            await asyncio.gather(*(station.shelf.stop() for station in site.stations))

    run(test)


def test_a_worker_that_cannot_load_what_others_serve_is_not_ready_and_tries_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bentos.worker.RETRY_S", 0.3)

    async def test() -> None:
        path = Path(shutil.copytree(site.items["2"].path, site.folder / "box"))
        site.items["2"] = Item(tag=site.tag("2"), path=path)
        async with opened(site, workers=1) as (one,):
            await one.swaps.bring(site.items["2"], live=True, until=soon())
            path.rename(site.folder / "away")
            two = await site.open()
            assert "this is not a lunchbox" in two.shelf.refusal
            assert two.shelf.encoders() == []
            assert one.live == site.tag("2")
            (site.folder / "away").rename(path)
            await wait_until(lambda: two.shelf.encoders() != [])
            assert two.live == site.tag("2")

    run(test)


def test_a_server_without_any_version_says_why_and_takes_its_own_once_it_is_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bentos.worker.RETRY_S", 0.3)
    own: list[Item] = []

    def find() -> Item:
        if not own:
            raise LunchboxError("the model is not in the store")
        return own[0]

    async def test() -> None:
        crew, shelf = Crew(site.folder), Shelf()
        worker = Worker(crew, shelf, ServeSettings(threads=1), Observer())
        await worker.join(find, find)
        assert shelf.refusal == "the model is not in the store"
        task = asyncio.create_task(worker.run())
        await asyncio.sleep(0.5)
        own.append(site.items["1"])
        await wait_until(lambda: shelf.encoders() != [])
        assert shelf.live.manifest.tag == site.tag("1")
        task.cancel()
        await shelf.stop()

    run(test)


def test_a_folder_that_holds_another_version_than_it_should_is_refused(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            wrong = Item(tag=site.tag("3"), path=site.items["2"].path)
            with pytest.raises(RefusedVersionError, match=f"holds {site.tag('2')}, not {site.tag('3')}"):
                await one.swaps.bring(wrong, live=True, until=soon())
            assert one.shelf.tags() == [site.tag("1")]

    run(test)


def test_what_is_coming_for_somebody_dead_is_not_loaded(site: Site) -> None:
    async def test() -> None:
        async with opened(site, workers=1) as (one,):
            coming = Coming(item=site.items["2"], attempt=99, by="1-1")
            one.crew.change_plan(lambda plan: plan.model_copy(update={"coming": coming}))
            await wait_until(lambda: (one.crew.read_plan() or Plan()).coming is None)
            await asyncio.sleep(0.3)
            assert one.shelf.tags() == [site.tag("1")]

    run(test)
