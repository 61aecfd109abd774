"""A release that is never half done: killed at every step and given again, it ends as if nothing had happened.

Real processes, a real MLflow on SQLite, real stores and builds. Only the served measurement is answered at once.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bentos.aliases import read_aliases
from bentos.lunchbox import open_lunchbox
from bentos.manifest import read_manifest, sha256_file
from flows.core.boxes import check_box, find_box
from flows.core.history import read_history, was_done
from flows.core.packing import hash_manifest
from flows.core.release_lock import list_holders
from flows.core.tracking import Tracker
from flows.params import DataParams, EvaluateParams, TrainParams
from tests.flows.killing import Drive, run, start, steps_of
from tests.flows.support import write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.heavy, pytest.mark.timeout(3600)]

VOLATILE_TAGS = {"promoted_at", "manifest_sha256"}  # times and what was measured
LENIENT = {"min_gain": -2, "champion_margin": -2, "slice_max_drop": 2, "max_calibration_error": 1, "max_slowdown": 1e6}
RELEASE = json.dumps({"run": "2", "release": LENIENT | {"precision": "fp32"}})
AGAIN = json.dumps({"run": "1", "release": LENIENT | {"int8_max_loss": 0.5, "int8_min_speedup": 0.01}})
CHALLENGER = json.dumps({"run": "2", "release": LENIENT | {"precision": "fp32", "alias": "challenger"}})
ROLLBACK = json.dumps({"reason": "a test"})
PACKED = "attach_compat"  # the first step after the lunchbox is packed
OUTER = (  # have steps inside
    "carry_out",
    "keep_again",
    "keep_release",
    "install",
    "pack_lunchbox",
    "put_back",
    "stage_bento",
    "store_model",
)


@dataclass
class World:
    """A home with version 1 released and version 2 trained, that can be put back to just that."""

    home: Path
    pristine: dict[str, Path]  # name of a state -> copy of the home
    prefect_url: str
    logs: Path
    count: int = 0
    ends: dict[str, Any] = field(default_factory=dict)

    def reset(self, state: str) -> None:
        """Put the home back. The database stays the same file, with other content: MLflow keeps it open."""
        for path in self.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        ignore = shutil.ignore_patterns("mlflow.db*")
        shutil.copytree(self.pristine[state], self.home, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        with sqlite3.connect(self.pristine[state] / "mlflow.db") as source, sqlite3.connect(self.database) as target:
            source.backup(target)
        source.close(), target.close()

    def keep(self, state: str) -> None:
        self.pristine[state] = self.home.with_name(f"pristine-{state}")
        shutil.copytree(self.home, self.pristine[state], symlinks=True)

    def drive(self, flow: str, arguments: str, **more: Any) -> Drive:
        self.count += 1
        log = self.logs / f"{self.count}.log"
        return Drive(home=self.home, prefect_url=self.prefect_url, log=log, flow=flow, arguments=arguments, **more)

    def finish(self, flow: str, arguments: str) -> Drive:
        drive = self.drive(flow, arguments)
        code = run(drive)
        assert code == 0, drive.log.read_text()
        return drive

    @property
    def database(self) -> Path:
        return self.home / "mlflow.db"

    @property
    def tracker(self) -> Tracker:
        return Tracker(f"sqlite:///{self.database}", experiment="ekiben", model_name="ekiben")

    @property
    def bento_home(self) -> Path:
        return self.home / "bentoml"


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path, mlflow_template: Path, prefect_server: None
) -> World:
    from prefect.settings import PREFECT_API_URL

    folder = tmp_path_factory.mktemp("kills")
    home = folder / "home"
    home.mkdir()
    shutil.copy(mlflow_template, home / "mlflow.db")
    world = World(home, {}, str(PREFECT_API_URL.value()), folder / "logs")
    world.logs.mkdir()
    pairs = write_pairs(folder / "pairs.csv")
    for seed in (42, 7):
        train = TrainParams(
            base_model=str(tiny_model_path), steps=4, batch_size=8, max_tokens=32, learning_rate=1e-3, seed=seed
        )
        arguments = {
            "data": DataParams(pairs=str(pairs)).model_dump(),
            "train": train.model_dump(),
            "evaluate": EvaluateParams(bootstrap_samples=100).model_dump(),
        }
        world.finish("flows.train:train", json.dumps(arguments))
    world.finish("flows.release:release", RELEASE.replace('"run": "2"', '"run": "1"'))
    world.keep("one released")
    assert run(world.drive("flows.release:release", RELEASE, kill_at="attach_compat#4")) == -signal.SIGKILL
    world.keep("two packed")
    world.ends["release"] = (world.finish("flows.release:release", RELEASE), look(world))[1]
    world.keep("two released")
    return world


def look(world: World) -> dict[str, Any]:
    """Everything that a release leaves, without times and measured figures; whatever is there must be whole."""
    tracker = world.tracker
    runs = {}
    for release in tracker.versions():
        artifacts = sorted(list_artifacts(tracker, release.run_id))
        record = tracker.find_run(release.run_id)
        runs[release.version] = (artifacts, sorted(record.metrics), sorted(record.tags.items()))
    champion = tracker.champion()
    assert champion is not None
    acts = read_history(tracker)
    assert all(was_done(acts, champion.version).values())
    return {
        "versions": [
            (item.version, item.aliases, {k: v for k, v in item.tags.items() if k not in VOLATILE_TAGS})
            for item in tracker.versions()
        ],
        "history": [act.model_dump(exclude={"at", "by"}) for act in acts],
        "runs": runs,
        "aliases": {k: v.model_dump() for k, v in read_aliases(world.bento_home, "ekiben").items()},
        "bentos": look_into(world.bento_home / "bentos" / "ekiben"),
        "models": look_into(world.bento_home / "models" / "ekiben-model"),
        "boxes": look_into(world.home / "lunchboxes"),
        "left behind": [
            str(path.relative_to(world.home))
            for folder in ("lunchboxes", "staging", "bentoml/tmp")
            for path in (world.home / folder).glob(".*")
        ],
        "locks": [str(holder) for holder in list_holders(tracker)],
    }


def look_into(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            found[path.name] = path.read_text()
        else:
            found[path.name] = sorted(str(item.relative_to(path)) for item in path.rglob("*"))
    return found


def stamp_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file is written, and does not when it is read."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def list_artifacts(tracker: Tracker, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in tracker._client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from list_artifacts(tracker, run_id, item.path)
        else:
            yield item.path


def champion_loads(world: World, *allowed: str) -> str:
    """The champion's box is the released one, opens, and gives its canary's vectors; so does what the store serves."""
    tracker = world.tracker
    champion = tracker.champion()
    assert champion is not None
    assert champion.version in allowed
    expected = champion.tags["manifest_sha256"]
    pointer = read_aliases(world.bento_home, "ekiben")["champion"]
    stored = world.bento_home / "models" / "ekiben-model"
    own = stored / f"{champion.version}-{champion.run_id[:8]}"
    boxes = [find_box(tracker, champion, world.home / "lunchboxes"), own, stored / pointer.bento_version]
    for box in boxes:
        lunchbox = open_lunchbox(box)
        assert lunchbox.find_deviation(lunchbox.engine.embed(lunchbox.canary.texts)) is None
    assert hash_manifest(boxes[0]) == hash_manifest(boxes[1]) == expected
    for version in (own.name, pointer.bento_version):
        assert (world.bento_home / "bentos" / "ekiben" / version / "bento.yaml").is_file()
    latest = (world.bento_home / "bentos" / "ekiben" / "latest").read_text()
    assert latest.partition("-")[0] in allowed
    return champion.version


def kill_everywhere(
    world: World,
    state: str,
    flow: str,
    arguments: str,
    allowed: tuple[str, ...],
    *,
    later: str = "",
    kept: Mapping[str, str] | None = None,
) -> int:
    """Kill the flow before and after each of its steps, give it again each time, and compare the ends.

    Args:
        world: Where.
        state: That it starts from.
        flow: What is killed.
        arguments: Of the flow.
        allowed: Versions that may be champion in between; the last one is it at the end.
        later: State that the steps from `PACKED` on are tried from, as it leads to the same steps without the export.
        kept: What `read_files` of the new champion says all the time.

    Returns:
        How many steps there were.
    """
    world.reset(state)
    undisturbed = world.finish(flow, arguments)
    end = look(world)
    steps = steps_of(undisturbed.log.with_suffix(".steps"))
    first = steps.index(next(step for step in steps if step.startswith(PACKED))) if later else len(steps)
    points = [(state, step, after) for step in steps[:first] for after in (False, True)]
    if later:
        world.reset(later)
        again = steps_of(world.finish(flow, arguments).log.with_suffix(".steps"))
        from_there = again.index(next(step for step in again if step.startswith(PACKED)))
        assert [name_of(step) for step in again[from_there:]] == [name_of(step) for step in steps[first:]]
        points += [(later, step, after) for step in again[from_there:] for after in (False, True)]
    for number, (begin, step, after) in enumerate(points):
        # What is after a step is before the next one, unless the step ends inside another one.
        if after and number + 1 < len(points) and name_of(step) not in OUTER:
            continue
        world.reset(begin)
        drive = world.drive(flow, arguments, kill_at=step, after=after)
        where = f"killed {'after' if after else 'before'} {step}"
        assert run(drive) == -signal.SIGKILL, (where, drive.log.read_text())
        champion_loads(world, *allowed)
        assert kept is None or read_files(world, allowed[-1]) == kept, where
        world.finish(flow, arguments)
        assert look(world) == end, where
        champion_loads(world, allowed[-1])
        assert kept is None or read_files(world, allowed[-1]) == kept, where
    return len(steps)


def name_of(step: str) -> str:
    return step.partition("#")[0]


@pytest.mark.heavy
def test_a_release_that_is_killed_at_any_step_ends_like_an_undisturbed_one(world: World) -> None:
    steps = kill_everywhere(world, "one released", "flows.release:release", RELEASE, ("1", "2"), later="two packed")
    assert steps > 25


@pytest.mark.heavy
def test_a_challenger_that_is_killed_at_any_step_never_touches_the_champion(world: World) -> None:
    steps = kill_everywhere(world, "two packed", "flows.release:release", CHALLENGER, ("1",))
    assert steps > 25


def test_a_challenger_becomes_champion_without_a_touch_to_what_servers_have_seen(world: World) -> None:
    world.reset("two packed")
    world.finish("flows.release:release", CHALLENGER)
    tracker = world.tracker
    (challenger,) = (item for item in tracker.versions() if "challenger" in item.aliases)
    assert challenger.version == "2"
    assert champion_loads(world, "1") == "1"
    folder = world.bento_home / "models" / "ekiben-model" / f"2-{challenger.run_id[:8]}"
    before = stamp_files(folder)
    promoted = world.finish("flows.release:release", RELEASE)
    assert stamp_files(folder) == before
    assert not {"measure_bentos", "install"} & set(map(name_of, steps_of(promoted.log.with_suffix(".steps"))))
    champion_loads(world, "2")
    assert [act.kind for act in read_history(tracker)] == ["release", "challenger", "release"]
    end = world.ends["release"]
    assert look(world) | {"history": end["history"]} == end


@pytest.mark.heavy
def test_a_released_version_that_is_released_again_keeps_every_file_wherever_it_is_killed(world: World) -> None:
    """By other parameters, and beside another champion than the first time."""
    world.reset("two released")
    before = read_files(world, "1")
    assert len(before) > 10
    steps = kill_everywhere(world, "two released", "flows.release:release", AGAIN, ("2", "1"), kept=before)
    assert steps > 10


def read_files(world: World, version: str) -> dict[str, str]:
    """Every file of a version's box, in the home folder, the model store and the run -> its hash."""
    release = world.tracker.version(version)
    name = f"{version}-{release.run_id[:8]}"
    run = world.tracker._client.get_run(release.run_id).info.artifact_uri.removeprefix("file://")
    places = (world.home / "lunchboxes" / name, world.bento_home / "models" / "ekiben-model" / name)
    return {
        str(path): sha256_file(path) for place in (*places, Path(run) / "lunchbox") for path in sorted(place.iterdir())
    }


@pytest.mark.heavy
def test_a_rollback_that_is_killed_at_any_step_ends_like_an_undisturbed_one(world: World) -> None:
    steps = kill_everywhere(world, "two released", "flows.rollback:rollback", ROLLBACK, ("2", "1"))
    assert steps >= 8
    world.finish("flows.rollback:rollback", ROLLBACK)  # given twice it stays where it is
    assert champion_loads(world, "1") == "1"


@pytest.mark.heavy
def test_a_rollback_builds_again_what_the_store_has_lost_and_can_be_killed_at_it(world: World) -> None:
    world.reset("two released")
    one = next((world.bento_home / "bentos" / "ekiben").glob("1-*"))
    for path in (one, world.bento_home / "models" / "ekiben-model" / one.name, world.home / "lunchboxes" / one.name):
        shutil.rmtree(path)  # only the artifacts of the run are left
    shutil.rmtree(world.pristine.setdefault("one lost", world.home.with_name("pristine-one lost")), ignore_errors=True)
    world.keep("one lost")
    steps = kill_everywhere(world, "one lost", "flows.rollback:rollback", ROLLBACK, ("2", "1"))
    assert steps >= 15


@pytest.mark.heavy
def test_a_release_that_is_killed_at_any_moment_ends_like_an_undisturbed_one(world: World) -> None:
    """Not only between steps: in the middle of a copy, an upload or a transaction, too."""
    rng = random.Random(11)
    world.reset("one released")
    started = time.monotonic()
    world.finish("flows.release:release", RELEASE)
    seconds = time.monotonic() - started
    end = look(world)
    killed = 0
    for _ in range(12):
        world.reset("one released")
        process = start(world.drive("flows.release:release", RELEASE))
        process.join(rng.uniform(0.2, 0.95) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        champion_loads(world, "1", "2")
        world.finish("flows.release:release", RELEASE)
        assert look(world) == end
        champion_loads(world, "2")
    assert killed >= 6


# One of each kind: packing, the box, staging, the store, MLflow's artifacts, the registry, this machine.
FULL_AT = ("pack_lunchbox", "put_folder", "replace_files", "stage_bento", "install", "log_folder", "write_alias")
GONE_AT = ("Tracker.claim", "Tracker.log_metrics", "Tracker.log_folder", "Tracker.set_model_tag", "Tracker.set_alias")


@pytest.mark.heavy
@pytest.mark.parametrize(("how", "names"), [("disk full", FULL_AT), ("no registry", GONE_AT)])
def test_when_the_disk_is_full_or_the_registry_gone_the_champion_stands(
    how: str, names: tuple[str, ...], world: World
) -> None:
    world.reset("one released")
    undisturbed = world.finish("flows.release:release", RELEASE)
    end = look(world)
    steps = steps_of(undisturbed.log.with_suffix(".steps"))
    for name in names:
        step = next(step for step in steps if step.partition("#")[0].endswith(name))
        world.reset("one released")
        drive = world.drive("flows.release:release", RELEASE, kill_at=step, how=how)
        assert run(drive) == 1, drive.log.read_text()
        said = drive.log.read_text().strip().splitlines()[-1]
        assert ("No space left on device" if how == "disk full" else "connection refused") in said
        assert list_holders(world.tracker) == []
        champion_loads(world, "1", "2") if name == "write_alias" else champion_loads(world, "1")
        world.finish("flows.release:release", RELEASE)
        assert look(world) == end, step


def test_of_two_releases_at_once_one_wins_and_the_other_says_so(world: World) -> None:
    world.reset("one released")
    go = world.logs / "go"
    first = world.drive("flows.release:release", RELEASE, pause_at="pack_lunchbox", go=go)
    second = world.drive("flows.release:release", RELEASE.replace('"run": "2"', '"run": "1"'))
    process = start(first)
    deadline = time.monotonic() + 300
    tracker = world.tracker
    while not list_holders(tracker) and time.monotonic() < deadline:
        time.sleep(0.1)
    before = tracker.versions()
    assert run(second) == 4
    said = second.log.read_text().strip().splitlines()[-1]
    assert said.startswith("ReleaseRaceError: another release or rollback is at work (release of version 2 by ")
    assert f"process {process.pid}" in said
    assert tracker.versions() == before
    go.touch()
    process.join(300)
    assert process.exitcode == 0, first.log.read_text()
    assert look(world) == world.ends["release"]


def test_two_releases_started_together_end_in_one_champion(world: World) -> None:
    world.reset("one released")
    drives = [world.drive("flows.release:release", RELEASE) for _ in range(2)]
    processes = [start(drive) for drive in drives]
    for process in processes:
        process.join(600)
    codes = sorted(process.exitcode or 0 for process in processes)
    assert codes in ([0, 4], [0, 0]), [drive.log.read_text() for drive in drives]  # the second may come after the first
    assert look(world) == world.ends["release"]


def test_a_champion_that_changes_meanwhile_is_not_overwritten(world: World) -> None:
    """The gates have compared with version 1; somebody moves the alias by hand before the release has come so far."""
    world.reset("two released")
    world.tracker.set_alias("champion", "1")
    go = world.logs / "go on"
    drive = world.drive("flows.release:release", RELEASE, pause_at="begin_act", go=go)
    process = start(drive)
    steps = drive.log.with_suffix(".steps")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (steps.is_file() and "begin_act" in steps.read_text()):
        time.sleep(0.1)
    world.tracker.set_alias("champion", None)
    go.touch()
    process.join(300)
    assert process.exitcode == 4
    assert "another one was quicker: the champion was version 1" in drive.log.read_text()
    assert world.tracker.champion() is None
    kept = read_aliases(world.bento_home, "ekiben")
    assert kept["champion"].version == "2"  # nothing was written to this machine either


def test_the_artifacts_of_the_run_hold_the_whole_box(world: World, tmp_path: Path) -> None:
    world.reset("two released")
    champion = world.tracker.champion()
    assert champion is not None
    fetched = world.tracker.download_artifact(champion.run_id, "lunchbox", tmp_path)
    check_box(fetched, champion, champion.tags["manifest_sha256"])
    assert read_manifest(fetched).compat is not None
