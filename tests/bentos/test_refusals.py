"""Versions that were refused: seldom tried again, at once when they change, and not by the next worker either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bentos.crew import Crew
from bentos.refusals import DIED, FIRST_WAIT_S, LONGEST_WAIT_S, Refusals
from bentos.siblings import name_process

TAG = "ekiben:2-12345678"


@pytest.fixture
def refusals(tmp_path: Path) -> Refusals:
    return Refusals(Crew(tmp_path))


def wait_s(refusals: Refusals) -> float:
    return float(refusals.describe()[0]["next_try_s"])


def test_nothing_is_refused_at_first(refusals: Refusals) -> None:
    assert refusals.read() == {}
    assert refusals.must_wait(TAG, "a", live=True) is None
    refusals.forgive(TAG)


def test_a_refused_version_waits_twice_as_long_each_time_until_it_changes(refusals: Refusals, tmp_path: Path) -> None:
    waits = []
    for attempt in range(1, 12):
        refusals.begin(TAG, "a")
        refusals.refuse(TAG, "wrong hash", "a")
        (described,) = refusals.describe()
        assert {"model": TAG, "reason": "wrong hash", "attempts": attempt}.items() <= described.items()
        waits.append(wait_s(refusals))
    assert waits == pytest.approx([min(FIRST_WAIT_S * 2**n, LONGEST_WAIT_S) for n in range(11)], abs=2)
    other = Refusals(Crew(tmp_path))  # another worker's
    refusal = other.must_wait(TAG, "a", live=True)
    assert refusal is not None
    assert refusal.reason == "wrong hash"
    assert other.must_wait(TAG, "b", live=True) is None
    other.refuse(TAG, "still wrong", "b")
    assert wait_s(other) == pytest.approx(FIRST_WAIT_S, abs=2)
    other.forgive(TAG)
    assert refusals.read() == {}


def test_a_version_that_is_being_tried_is_not_refused_unless_that_killed_the_worker(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        name = name_process(child.pid)
        assert name is not None
        Refusals(Crew(tmp_path, me=name)).begin(TAG, "a")
        ours = Refusals(Crew(tmp_path))
        assert ours.read() == {}
        child.kill()
        child.wait()
    assert ours.read()[TAG].reason == DIED
    assert ours.must_wait(TAG, "a", live=True) is not None
    assert wait_s(ours) == pytest.approx(FIRST_WAIT_S, abs=5)
    ours.begin(TAG, "a")
    ours.refuse(TAG, "it dies", "a")
    assert ours.read()[TAG].attempts == 2


def test_a_try_that_has_shown_nothing_leaves_what_was_known(refusals: Refusals) -> None:
    refusals.restore(TAG, refusals.begin(TAG, "a"))
    assert refusals.read() == {}
    refused = refusals.refuse(TAG, "wrong hash", "a")
    refusals.restore(TAG, refusals.begin(TAG, "a"))
    assert refusals.read() == {TAG: refused}


def test_a_refusal_by_hand_that_knows_no_files_leaves_those_that_were_noted(refusals: Refusals) -> None:
    refusals.refuse(TAG, "wrong hash", "a")
    refusals.refuse(TAG, "layout 9", "")
    refusal = refusals.must_wait(TAG, "a", live=True)
    assert refusal is not None
    assert (refusal.reason, refusal.attempts) == ("layout 9", 2)


def test_what_is_too_large_to_stand_beside_may_become_live(refusals: Refusals) -> None:
    refusals.refuse(TAG, "too large", "a", beside_only=True)
    assert refusals.must_wait(TAG, "a", live=True) is None
    assert refusals.must_wait(TAG, "a", live=False) is not None


def test_a_version_that_nobody_tries_any_more_is_forgotten(refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusals.refuse(TAG, "wrong hash", "a")
    monkeypatch.setattr("time.monotonic", lambda: refused.next_try + LONGEST_WAIT_S - 1)
    assert list(refusals.read()) == [TAG]
    monkeypatch.setattr("time.monotonic", lambda: refused.next_try + LONGEST_WAIT_S + 1)
    assert refusals.read() == {}
    assert refusals.describe() == []
