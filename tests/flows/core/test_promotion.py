"""Moving the aliases: the order, what a kill leaves, what a repetition puts right, and who was quicker."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bentos.aliases import alias_path, read_aliases
from flows.core import promotion
from flows.core.history import Act, Kind, read_history, was_done
from flows.core.promotion import carry_out, find_differences, mirror_aliases
from flows.core.release_lock import ReleaseLock, list_holders
from flows.core.tracking import Tracker
from flows.errors import EkibenError, NothingReleasedError, ReleaseRaceError
from tests.flows.core.test_registry import aliases, register_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def lock(tracker: Tracker) -> Iterator[ReleaseLock]:
    with ReleaseLock(tracker, "a test") as lock:
        yield lock


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "bentoml"


@pytest.fixture
def move(tracker: Tracker, lock: ReleaseLock, home: Path) -> Callable[..., Act]:
    """A release, or what else is asked for, as the flows do it."""

    def move(version: str, replaces: str = "", kind: Kind = "release", previous: str | None = None) -> Act:
        act = Act(at="", kind=kind, version=version, replaces=replaces)
        tags = {"space_id": f"s{version}", "bento_tag": f"ekiben:{version}"}
        return carry_out(tracker, lock, act, tags=tags, previous=replaces if previous is None else previous, home=home)

    return move


def pointed(home: Path) -> dict[str, str]:
    return {alias: pointer.version for alias, pointer in read_aliases(home, "ekiben").items()}


def test_the_old_champion_is_previous_and_recorded(tracker: Tracker, home: Path, move: Callable[..., Act]) -> None:
    for _ in range(3):
        register_run(tracker)
    first = move("1")
    assert aliases(tracker) == pointed(home) == {"champion": "1"}
    assert {"replaces": "", "promoted_at": first.time}.items() <= tracker.version("1").tags.items()
    move("2", "1")
    third = move("3", "2")
    assert aliases(tracker) == pointed(home) == {"champion": "3", "previous": "2"}
    assert tracker.version("3").tags["replaces"] == "2"
    assert tracker.version("3").tags["promoted_at"] == third.time
    assert [(act.kind, act.version, act.replaces) for act in read_history(tracker)] == [
        ("release", "1", ""),
        ("release", "2", "1"),
        ("release", "3", "2"),
    ]
    pointer = read_aliases(home, "ekiben")["champion"]
    assert pointer.run_id == tracker.version("3").run_id
    assert pointer.bento_version == f"3-{pointer.run_id[:8]}"
    assert pointer.space_id == "s3"


def test_a_champion_that_is_released_again_stays_where_it_is(
    tracker: Tracker, home: Path, move: Callable[..., Act]
) -> None:
    for _ in range(2):
        register_run(tracker)
    move("1")
    done = move("2", "1")
    alias_path(home, "ekiben").unlink()  # killed before it was written
    assert move("2", "1").at == done.at
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}
    assert len(read_history(tracker)) == 2


def test_a_rollback_goes_to_what_was_recorded_and_further_only_when_asked(
    tracker: Tracker, home: Path, move: Callable[..., Act]
) -> None:
    for _ in range(3):
        register_run(tracker)
    move("1"), move("2", "1"), move("3", "2")
    move("2", "3", "rollback", previous="1")
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}
    assert tracker.version("2").tags["replaces"] == "1"  # as when it was released
    move("1", "2", "rollback", previous="")
    assert aliases(tracker) == pointed(home) == {"champion": "1"}


def test_a_challenger_takes_no_other_place_and_is_none_once_it_is_champion(
    tracker: Tracker, home: Path, move: Callable[..., Act]
) -> None:
    for _ in range(2):
        register_run(tracker)
    move("1")
    move("2", "1", "challenger")
    assert aliases(tracker) == pointed(home) == {"champion": "1", "challenger": "2"}
    assert "promoted_at" not in tracker.version("2").tags
    move("2", "1")
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("kind", ["release", "rollback", "challenger"])
def test_who_looked_at_another_champion_is_told_and_changes_nothing(
    kind: Kind, tracker: Tracker, move: Callable[..., Act]
) -> None:
    for _ in range(3):
        register_run(tracker)
    move("1")
    before = tracker.versions(), tracker.model_tags()
    with pytest.raises(ReleaseRaceError, match=r"was version 2 when version 3 was compared.*is version 1 now"):
        move("3", "2", kind)
    assert (tracker.versions(), tracker.model_tags()) == before


def test_a_champion_moved_by_hand_at_the_last_moment_is_seen(
    tracker: Tracker, move: Callable[..., Act], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        register_run(tracker)
    move("1")
    set_alias = tracker.set_alias

    def interfere(alias: str, version: str | None) -> None:
        set_alias(alias, version)
        if alias == "previous":
            set_alias("champion", "3")

    monkeypatch.setattr(tracker, "set_alias", interfere)
    with pytest.raises(ReleaseRaceError, match="version 3 now"):
        move("2", "1")
    assert aliases(tracker)["champion"] == "3"


def test_a_lock_that_is_lost_at_the_last_moment_stops_the_alias(
    tracker: Tracker, lock: ReleaseLock, move: Callable[..., Act], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        register_run(tracker)
    move("1")
    set_version_tags = tracker.set_version_tags

    def lose(version: str, tags: dict[str, object]) -> None:
        set_version_tags(version, tags)
        for name in tracker.claims("ekiben-release-lock"):
            tracker.unclaim(name)

    monkeypatch.setattr(tracker, "set_version_tags", lose)
    with pytest.raises(ReleaseRaceError, match="stood still"):
        move("2", "1")
    assert aliases(tracker)["champion"] == "1"


def test_an_unknown_version_changes_no_alias(tracker: Tracker, move: Callable[..., Act]) -> None:
    register_run(tracker)
    move("1")
    with pytest.raises(NothingReleasedError):
        move("7", "1")
    assert aliases(tracker) == {"champion": "1"}


WRITES = ("set_model_tag", "set_version_tags", "set_alias", "write_alias", "point_latest")


@pytest.mark.parametrize(
    "kind",
    ["release", pytest.param("rollback", marks=pytest.mark.slow), pytest.param("challenger", marks=pytest.mark.slow)],
)
def test_whatever_write_fails_the_champion_stands_and_a_repetition_ends_the_same(
    kind: Kind, tracker: Tracker, home: Path, move: Callable[..., Act], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write in turn is the last one that gets through, once with and once without its effect."""
    for _ in range(3):
        register_run(tracker)
    for version, replaces in (("1", ""), ("2", "1"), ("3", "2")):
        move(version, replaces)
    target = {"release": ("1", "3"), "rollback": ("2", "3", "rollback", "1"), "challenger": ("1", "3", "challenger")}
    tracker.set_alias("challenger", "2")
    stop = Stop()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*given: Any, **named: Any) -> Any:
            stop.writes += 1
            if stop.is_now and not stop.after:
                raise OSError("no space left on device")
            result = real(*given, **named)
            if stop.is_now:
                raise OSError("no space left on device")
            return result

        return write

    for name in WRITES:
        place: Any = tracker if hasattr(tracker, name) else promotion
        monkeypatch.setattr(place, name, counting(getattr(place, name)))

    def state() -> Any:
        tags = [(item.version, item.tags, item.aliases) for item in tracker.versions()]
        acts = [act.model_dump(exclude={"at", "by"}) for act in read_history(tracker)]
        return tags, acts, pointed(home)

    start = aliases(tracker)
    ends: list[Any] = []
    for stop.at, stop.after in product(range(1, 20), (False, True)):
        stop.writes = 0
        try:
            move(*target[kind])
        except OSError:
            stopped = True
            assert aliases(tracker)["champion"] in ("3", "3" if kind == "challenger" else target[kind][0])
        else:
            stopped = False
        stop.at = 0
        move(*target[kind])
        ends.append(comparable(state()))
        if not stopped:
            break
        for alias in ("champion", "previous", "challenger"):  # as it was before
            tracker.set_alias(alias, start.get(alias))
        mirror_aliases(tracker, home)
        for name in sorted(name for name in tracker.model_tags() if name.startswith("history."))[3:]:
            tracker._client.delete_registered_model_tag("ekiben", name)
    assert len(ends) > 10
    assert all(end == ends[-1] for end in ends)  # the last one was never disturbed


@dataclass
class Stop:
    """Which write is the last one, and whether it gets through."""

    at: int = 0
    after: bool = False
    writes: int = 0

    @property
    def is_now(self) -> bool:
        return self.writes == self.at


def comparable(state: Any) -> Any:
    """Without the times."""
    versions, acts, pointers = state
    timeless = [({k: v for k, v in tags.items() if k != "promoted_at"}, names) for _, tags, names in versions]
    return timeless, acts, pointers


def test_an_act_that_was_killed_before_its_alias_is_known_as_not_done(
    tracker: Tracker, move: Callable[..., Act], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        register_run(tracker)
    move("1")
    set_alias = tracker.set_alias

    def die(alias: str, version: str | None) -> None:
        if alias == "champion":
            raise EkibenError("killed")
        set_alias(alias, version)

    monkeypatch.setattr(tracker, "set_alias", die)
    with pytest.raises(EkibenError, match="killed"):
        move("2", "1")
    assert list(was_done(read_history(tracker), "1").values()) == [True, False]
    monkeypatch.undo()
    move("2", "1")
    assert list(was_done(read_history(tracker), "2").values()) == [True, True]


def test_what_this_machine_says_otherwise_is_named(tracker: Tracker, home: Path, move: Callable[..., Act]) -> None:
    for _ in range(2):
        register_run(tracker)
    assert find_differences(tracker, home) == []
    move("1")
    assert find_differences(tracker, home) == []
    tracker.set_version_tags("2", {"space_id": "s2"})
    tracker.set_alias("champion", "2")
    assert find_differences(tracker, home) == ["champion is version 1 there and version 2 in the registry"]
    mirror_aliases(tracker, home)
    assert find_differences(tracker, home) == []
    alias_path(home, "ekiben").write_text("{")
    assert "is not JSON" in find_differences(tracker, home)[0]


@pytest.mark.parametrize("content", ["{", '{"layout": 2, "aliases": {}}', "\x00"])
def test_an_alias_file_that_nobody_understands_is_written_anew_by_the_next_act(
    content: str, tracker: Tracker, home: Path, move: Callable[..., Act]
) -> None:
    for _ in range(2):
        register_run(tracker)
    move("1")
    alias_path(home, "ekiben").write_text(content)
    move("2", "1")
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}
    alias_path(home, "ekiben").write_text(content)
    move("2", "1")  # the same command again puts it right as well
    assert pointed(home) == {"champion": "2", "previous": "1"}


DIE = """
import os, signal, sys
from pathlib import Path
from flows.core.history import Act
from flows.core.promotion import carry_out
from flows.core.release_lock import ReleaseLock
from flows.core.tracking import Tracker
uri, home, when = sys.argv[1:]
tracker = Tracker(uri, experiment="ekiben", model_name="ekiben")
set_alias = tracker.set_alias
def die(alias, version):
    if alias == "champion" and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    set_alias(alias, version)
    if alias == "champion":
        os.kill(os.getpid(), signal.SIGKILL)
tracker.set_alias = die
act = Act(at="", kind="release", version="2", replaces="1")
with ReleaseLock(tracker, "release of version 2") as lock:
    carry_out(tracker, lock, act, tags={"space_id": "s2"}, previous="1", home=Path(home))
"""


@pytest.mark.parametrize(("when", "champion"), [("before", "1"), ("after", "2")])
def test_a_process_that_is_killed_at_the_alias_is_followed_by_one_that_completes_it(
    when: str, champion: str, open_tracker: Callable[[], Tracker], home: Path
) -> None:
    tracker = open_tracker()
    for version in ("1", "2"):
        register_run(tracker)
        tracker.set_version_tags(version, {"space_id": f"s{version}"})
    with ReleaseLock(tracker, "release of version 1") as lock:
        first = Act(at="", kind="release", version="1")
        carry_out(tracker, lock, first, tags={}, previous="", home=home)
    killed = subprocess.run([sys.executable, "-c", DIE, tracker.uri, str(home), when], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert aliases(tracker)["champion"] == champion
    assert pointed(home) == {"champion": "1"}
    assert len(list_holders(tracker)) == 1
    act = Act(at="", kind="release", version="2", replaces="1")
    with ReleaseLock(tracker, "release of version 2") as lock:  # the holder is dead: nobody waits
        carry_out(tracker, lock, act, tags={"space_id": "s2"}, previous="1", home=home)
    assert aliases(tracker) == pointed(home) == {"champion": "2", "previous": "1"}
    assert [item.version for item in read_history(tracker)] == ["1", "2"]
    assert list_holders(tracker) == []
