"""The history: what is kept, what counts as the same act, and what was carried through."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.core.history import PREFIX, Act, Kind, begin_act, find_begun, find_promotion, now, read_history, was_done
from flows.core.indexes import served_since
from flows.core.tracking import Tracker
from tests.flows.core.test_registry import register_run


def act(number: int, kind: Kind, version: str, replaces: str = "", **more: object) -> Act:
    return Act.model_validate(
        {"at": f"20261123T1000{number:08d}Z", "kind": kind, "version": version, "replaces": replaces, **more}
    )


def test_acts_are_read_back_in_the_order_of_their_times(tracker: Tracker) -> None:
    register_run(tracker)
    assert read_history(tracker) == []
    later, earlier = act(2, "rollback", "1", "2", reason="slow"), act(1, "release", "2", "1")
    for item in (later, earlier):
        assert begin_act(tracker, item).by  # who did it is filled in
    assert [(item.version, item.kind, item.reason) for item in read_history(tracker)] == [
        ("2", "release", ""),
        ("1", "rollback", "slow"),
    ]


def test_what_others_wrote_under_such_a_name_is_left_out(tracker: Tracker) -> None:
    register_run(tracker)
    for name in (f"{PREFIX}notes", f"{PREFIX}{now()}.release", "other"):
        tracker.set_model_tag(name, "no act")
    for number, at in enumerate(("2026-11-23", "")):
        text = json.dumps({"at": at, "kind": "release", "version": "1"})
        tracker.set_model_tag(f"{PREFIX}20261123T1000{number:08d}Z.release", text)
    assert read_history(tracker) == []


def test_an_act_that_is_repeated_keeps_its_first_time(tracker: Tracker) -> None:
    register_run(tracker)
    one = Act(at="", kind="release", version="2", replaces="1")
    first = begin_act(tracker, one)
    assert begin_act(tracker, one) == first
    back = begin_act(tracker, Act(at="", kind="rollback", version="1", replaces="2", reason="slow"))
    assert begin_act(tracker, back.model_copy(update={"at": "", "reason": " slow\n"})) == back
    other = begin_act(tracker, back.model_copy(update={"at": "", "reason": "wrong"}))  # the first was never done
    assert (other.reason, other.at > back.at) == ("wrong", True)
    assert list(was_done(read_history(tracker), "1").values()) == [True, False, True]
    again = begin_act(tracker, one)  # released anew, after a rollback: that is another act
    assert again.at > back.at
    assert [item.kind for item in read_history(tracker)] == ["release", "rollback", "rollback", "release"]


def test_a_long_reason_is_cut_to_what_a_tag_holds(tracker: Tracker) -> None:
    register_run(tracker)
    begun = begin_act(tracker, Act(at="", kind="refusal", version="2", reason="much too slow\n" * 1000))
    assert len(begun.reason) <= 2000
    assert read_history(tracker) == [begun]


@pytest.mark.parametrize(
    ("gates", "replaces", "same"), [(["quality"], "1", True), (["latency"], "1", False), (["quality"], "3", False)]
)
def test_a_refusal_is_the_same_while_gates_and_champion_are(gates: list[str], replaces: str, same: bool) -> None:
    history = [act(1, "release", "1"), act(2, "refusal", "2", "1", gates=["quality"], reason="0.71")]
    new = act(3, "refusal", "2", replaces, gates=gates, reason="0.72")
    assert (find_begun(history, new) == history[1]) is same


def test_a_challenger_in_between_does_not_make_a_release_another_one() -> None:
    history = [act(1, "release", "1"), act(2, "release", "2", "1"), act(3, "challenger", "3", "2")]
    assert find_begun(history, act(4, "release", "2", "1")) == history[1]


# A champion's life: each step is (kind, target, whether it was carried through).
STEPS = st.lists(st.tuples(st.sampled_from(["release", "rollback"]), st.integers(1, 5), st.booleans()), max_size=12)


def live(steps: Sequence[tuple[Kind, int, bool]]) -> tuple[list[Act], str, list[str]]:
    """Play the steps; return the history, the champion, and every champion in turn."""
    history: list[Act] = []
    champion, line = "", []
    for number, (kind, target, carried_through) in enumerate(steps):
        if str(target) == champion:
            continue
        history.append(act(number, kind, str(target), champion))
        if carried_through:
            champion = str(target)
            line.append(champion)
    return history, champion, line


@given(STEPS)
def test_what_was_carried_through_follows_from_what_came_after(steps: list[tuple[Kind, int, bool]]) -> None:
    history, champion, line = live(steps)
    done = was_done(history, champion)
    assert [item.version for item in history if done[item.at]] == line


@given(STEPS)
def test_the_champion_came_by_the_last_act_that_was_carried_through(steps: list[tuple[Kind, int, bool]]) -> None:
    history, champion, line = live(steps)
    found = find_promotion(history, champion)
    assert (found is None) == (not line)
    if found is not None:
        done = was_done(history, champion)
        assert (found.version, found.at) == (champion, [act.at for act in history if done[act.at]][-1])
    assert find_promotion(history, "9") is None  # moved by hand


@given(STEPS, st.integers(1, 5))
def test_who_served_since_is_everybody_after_the_last_time(steps: list[tuple[Kind, int, bool]], target: int) -> None:
    history, champion, line = live(steps)
    if not champion or champion == str(target):
        return
    since = served_since(history, str(target), champion)
    assert since[0] == champion
    assert str(target) not in since
    assert len(set(since)) == len(since)
    last = len(line) - line[::-1].index(str(target)) if str(target) in line else 0
    assert set(since) == set(line[last:])


def test_after_a_rollback_the_answer_is_about_the_time_before_it() -> None:
    history = [act(1, "release", "1"), act(2, "release", "2", "1"), act(3, "release", "3", "2")]
    before = served_since(history, "1", "3")
    assert before == ["3", "2"]
    assert served_since([*history, act(4, "rollback", "1", "3")], "1", "1") == before
    assert served_since([*history, act(4, "rollback", "1", "3")], "1", "3") == before  # killed before it was done
    assert served_since([], "1", "2") == ["2"]  # an alias moved by hand
