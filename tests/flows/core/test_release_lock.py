"""One release at a time: who gets the lock, who takes over, and who finds out that he has lost it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from flows.core.processes import identify_process
from flows.core.release_lock import LOCK_SUFFIX, ReleaseLock, list_holders
from flows.core.tracking import Tracker
from flows.errors import ReleaseRaceError

ROOT = Path(__file__).parents[3]
NAME = f"ekiben{LOCK_SUFFIX}"
HOLD = """
import sys, time
from flows.core.release_lock import ReleaseLock
from flows.core.tracking import Tracker
lock = ReleaseLock(Tracker(sys.argv[1], experiment="ekiben", model_name="ekiben"), sys.argv[2])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


class Barrier(Protocol):
    """Of threads or of processes."""

    def wait(self, timeout: float | None = None) -> int: ...


def leave_behind(
    tracker: Tracker, *, name: str = NAME, age_s: float = 1000.0, host: str = "elsewhere", token: str = "t"
) -> None:
    """A lock whose holder is on another machine, so that nobody here can ask whether it lives."""
    tags = {
        "token": token,
        "what": "release of version 8",
        "who": "ana@elsewhere, process 7",
        "since": "2026-11-23T10:00:00+00:00",
        "beat": f"{time.time() - age_s:.3f}",
        "process": json.dumps(identify_process() | {"host": host, "namespace": "another boot"}),
    }
    assert tracker.claim(name, tags, description="")


def names(tracker: Tracker) -> list[str]:
    return [holder.name for holder in list_holders(tracker)]


def test_the_lock_says_who_holds_it_and_is_gone_afterwards(tracker: Tracker) -> None:
    with ReleaseLock(tracker, "release of version 3") as lock:
        lock.check()
        (holder,) = list_holders(tracker)
        assert str(holder).startswith("release of version 3 by ")
        assert f"process {os.getpid()}" in holder.who
    assert list_holders(tracker) == []
    assert tracker.versions() == []


def test_a_second_one_is_told_who_is_at_work(open_tracker: Callable[[], Tracker]) -> None:
    with ReleaseLock(open_tracker(), "release of version 3"):
        second = ReleaseLock(open_tracker(), "rollback")
        with pytest.raises(ReleaseRaceError, match=r"release of version 3 by .*process \d+ since"):
            second.acquire()
    second.acquire()
    second.release()
    assert names(open_tracker()) == []


def test_the_lock_is_given_back_after_an_error(tracker: Tracker) -> None:
    with pytest.raises(ZeroDivisionError), ReleaseLock(tracker, "release"):
        raise ZeroDivisionError
    assert names(tracker) == []


def test_a_killed_holder_of_this_machine_is_followed_at_once(open_tracker: Callable[[], Tracker]) -> None:
    tracker = open_tracker()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tracker.uri, "release of version 1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ReleaseRaceError):
        ReleaseLock(tracker, "release of version 2").acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(tracker) == [NAME]
    with ReleaseLock(tracker, "release of version 2") as lock:
        lock.check()
        assert names(tracker) == [f"{NAME}.2"]  # a new name; the old one is cleared away
    assert names(tracker) == []


def test_a_holder_elsewhere_is_believed_while_its_heart_beats(tracker: Tracker) -> None:
    leave_behind(tracker, age_s=30)
    with pytest.raises(ReleaseRaceError, match="ana@elsewhere"):
        ReleaseLock(tracker, "release").acquire()


@pytest.mark.parametrize("age_s", [1000, -1000], ids=["late clock", "early clock"])
def test_a_holder_elsewhere_whose_clock_is_wrong_is_believed_while_its_heart_beats(
    age_s: float, open_tracker: Callable[[], Tracker]
) -> None:
    tracker, other = open_tracker(), open_tracker()
    leave_behind(tracker, age_s=age_s)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            other.note_claim(NAME, "beat", f"{time.time() - age_s:.3f}")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ReleaseRaceError, match="ana@elsewhere"):
            ReleaseLock(tracker, "release", beat_s=0.1, watch_s=2.0).acquire()
    finally:
        ended.set()
        thread.join()


def test_a_holder_elsewhere_without_heartbeat_is_followed(tracker: Tracker) -> None:
    leave_behind(tracker)
    with ReleaseLock(tracker, "release", beat_s=0.1, watch_s=0.2) as lock:
        lock.check()
        assert names(tracker) == [f"{NAME}.2"]


def take(tracker: Tracker, start: Barrier, all_tried: Barrier) -> str:
    """Try to get the lock at the same time as others, and keep it until all have tried."""
    lock = ReleaseLock(tracker, "release", beat_s=0.1, watch_s=0.2)
    start.wait(120)
    try:
        lock.acquire()
    except ReleaseRaceError:
        all_tried.wait(120)
        return "told"
    lock.check()
    all_tried.wait(120)
    lock.check()
    lock.release()
    return "held"


def take_apart(uri: str, start: Barrier, all_tried: Barrier, said: multiprocessing.Queue[str]) -> None:
    said.put(take(Tracker(uri, experiment="ekiben", model_name="ekiben"), start, all_tried))


@pytest.mark.parametrize("stale", [False, True], ids=["free", "left behind"])
def test_of_many_takers_just_one_wins(stale: bool, open_tracker: Callable[[], Tracker]) -> None:
    if stale:
        leave_behind(open_tracker())
    takers = [open_tracker() for _ in range(4)]
    start, all_tried = threading.Barrier(4), threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda tracker: take(tracker, start, all_tried), takers))
    assert sorted(said) == ["held", "told", "told", "told"]
    assert names(takers[0]) == []


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True], ids=["free", "left behind"])
def test_of_many_processes_just_one_wins(stale: bool, tracker: Tracker) -> None:
    if stale:
        leave_behind(tracker)
    context = multiprocessing.get_context("spawn")
    said: multiprocessing.Queue[str] = context.Queue()
    start, all_tried = context.Barrier(4), context.Barrier(4)
    takers = [context.Process(target=take_apart, args=(tracker.uri, start, all_tried, said)) for _ in range(4)]
    for taker in takers:
        taker.start()
    assert sorted(said.get(timeout=240) for _ in takers) == ["held", "told", "told", "told"]
    for taker in takers:
        taker.join()
    assert names(tracker) == []


def test_who_was_asleep_too_long_finds_out_before_he_writes(open_tracker: Callable[[], Tracker]) -> None:
    sleeper = ReleaseLock(open_tracker(), "release of version 1", beat_s=1000)  # never beats
    sleeper.acquire()
    other = open_tracker()
    other.note_claim(NAME, "beat", "1.0")
    other.note_claim(NAME, "process", "{}")  # on another machine
    with ReleaseLock(other, "release of version 2", watch_s=0.1):
        with pytest.raises(ReleaseRaceError, match="stood still"):
            sleeper.check()
        sleeper.release()  # takes nothing away from the other one
        assert names(other) == [f"{NAME}.2"]


def test_a_lock_that_comes_back_during_a_takeover_is_not_taken_away(
    open_tracker: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suspect ends well after all, and a third one begins, just before the taker makes its own name."""
    tracker, other = open_tracker(), open_tracker()
    leave_behind(tracker)
    third = ReleaseLock(other, "release of version 9")
    claim = tracker.claim
    names_made: list[str] = []

    def claim_late(name: str, tags: dict[str, str], *, description: str) -> bool:
        names_made.append(name)
        if len(names_made) == 1:
            other.unclaim(NAME)
            third.acquire()
        return claim(name, tags, description=description)

    monkeypatch.setattr(tracker, "claim", claim_late)
    with pytest.raises(ReleaseRaceError, match="release of version 9"):
        ReleaseLock(tracker, "release of version 2", beat_s=0.1, watch_s=0.1).acquire()
    third.check()
    third.release()
    assert names(tracker) == []


@pytest.mark.parametrize("stale", [False, True], ids=["free", "left behind"])
def test_a_lock_whose_first_answer_was_lost_is_ours(
    stale: bool, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a POST again after a broken connection; the second one finds what the first one made."""
    if stale:
        leave_behind(tracker)
    claim = tracker.claim

    def claim_twice(name: str, tags: dict[str, str], *, description: str) -> bool:
        assert claim(name, tags, description=description)
        return claim(name, tags, description=description)

    monkeypatch.setattr(tracker, "claim", claim_twice)
    with ReleaseLock(tracker, "release", beat_s=0.1, watch_s=0.1) as lock:
        lock.check()
        monkeypatch.undo()
        with pytest.raises(ReleaseRaceError, match="release by"):
            ReleaseLock(tracker, "rollback").acquire()
    assert names(tracker) == []


def test_a_heartbeat_goes_on_while_the_lock_is_held(tracker: Tracker) -> None:
    with ReleaseLock(tracker, "release", beat_s=0.05):
        first = list_holders(tracker)[0].beat
        deadline = time.monotonic() + 30
        while list_holders(tracker)[0].beat == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list_holders(tracker)[0].beat > first


def test_other_models_locks_are_their_own(open_tracker: Callable[[], Tracker]) -> None:
    ours = open_tracker()
    theirs = Tracker(ours.uri, experiment="ekiben", model_name="ekiben-release-lock.x")
    with ReleaseLock(ours, "release"), ReleaseLock(theirs, "release"):
        assert names(ours) == [NAME]
