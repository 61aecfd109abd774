"""Which candidates are handed out, in which order, and when the search ends; nothing is trained here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.core.search import MAX_DRAWS, Candidate, Search
from flows.core.studies import study_name
from flows.errors import EkibenError
from flows.params import FloatRange, SearchSpace, TrainParams, TuneParams

SPACE = SearchSpace(base_model=["small", "large"])
BASE = TrainParams(base_model="small", steps=60)
AMPLE_S = 1e6


def open_search(
    storage: Path | str, *, base: TrainParams = BASE, space: SearchSpace = SPACE, trials: int = 6, seed: int = 42
) -> Search:
    params = TuneParams(trials=trials, seed=seed, space=space, costs=[])
    return Search(storage, name=study_name(space, ["spearman"], "d" * 32, base), base=base, params=params)


def score(params: TrainParams) -> float:
    """Give a smooth stand-in for a training: best at learning rate 4e-5 and many steps."""
    return 0.8 - abs(params.learning_rate - 4e-5) * 1000 + params.steps / 10_000


def run(search: Search, *, at_most: int = 100, remaining_s: float = AMPLE_S) -> list[Candidate]:
    """Report trials until the search ends."""
    candidates: list[Candidate] = []
    while len(candidates) < at_most and (candidate := search.next_candidate(remaining_s)) is not None:
        search.report(candidate, score(candidate.params), seconds=10.0, run_id=f"run{candidate.number}")
        candidates.append(candidate)
    return candidates


def without_budget(candidates: list[Candidate]) -> list[dict[str, Any]]:
    return [candidate.params.model_dump(exclude={"max_minutes"}) for candidate in candidates]


@pytest.mark.parametrize(("lead", "winner"), [(0.0019, "run0"), (0.0021, "run1")])
def test_a_lead_within_the_noise_does_not_replace_the_base(tmp_path: Path, lead: float, winner: str) -> None:
    search = open_search(tmp_path / "journal.log")
    for value in (0.8, 0.8 + lead):
        candidate = search.next_candidate(AMPLE_S)
        assert candidate is not None
        search.report(candidate, value, seconds=1.0, run_id=f"run{candidate.number}")
    assert search.best().run_id == winner


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_runs_to_its_end_and_knows_its_best(tmp_path: Path, kind: str) -> None:
    storage = tmp_path / "journal.log" if kind == "journal" else f"sqlite:///{tmp_path}/studies.db"
    search = open_search(storage)
    candidates = run(search)
    assert len(candidates) == search.finished_trials == 6
    assert (search.ended_by, search.remaining_trials) == ("trials", 0)
    best = search.best()
    winner = max(candidates, key=lambda candidate: score(candidate.params))
    assert (best.number, best.run_id, best.value) == (winner.number, f"run{winner.number}", score(winner.params))
    assert best.params == winner.params
    again = open_search(storage)
    assert (again.resumed_trials, again.best()) == (6, best)
    assert again.next_candidate(AMPLE_S) is None


@pytest.mark.parametrize(
    "base",
    [
        BASE,
        BASE.model_copy(update={"steps": 5}),
        TrainParams(base_model="elsewhere", steps=5, batch_size=7, learning_rate=1e-3, loss="cosent", max_tokens=99),
    ],
    ids=["inside", "one value outside", "all outside"],
)
def test_the_first_candidate_is_the_base_wherever_it_lies(tmp_path: Path, base: TrainParams) -> None:
    search = open_search(tmp_path / "journal.log", base=base)
    first = search.next_candidate(0.0)  # whatever is left
    assert first == Candidate(0, base)
    search.report(first, 0.9, seconds=1.0, run_id="base")
    for candidate in run(search):
        assert candidate.params.steps in SPACE.steps
        assert candidate.params.base_model in SPACE.base_model
        assert candidate.params.loss in SPACE.loss
        assert 1e-5 <= candidate.params.learning_rate <= 8e-5
    assert search.best().params == base
    assert search.best().run_id == "base"


def test_what_the_space_does_not_vary_comes_from_the_base(tmp_path: Path) -> None:
    base = BASE.model_copy(update={"seed": 7, "freeze_embeddings": False, "distill_steps": 3, "max_minutes": 2.0})
    for candidate in run(open_search(tmp_path / "journal.log", base=base)):
        params = candidate.params
        assert (params.seed, params.freeze_embeddings, params.distill_steps, params.max_minutes) == (7, False, 3, 2.0)


def test_the_same_seed_draws_the_same_candidates(tmp_path: Path) -> None:
    first = without_budget(run(open_search(tmp_path / "a.log", trials=12)))
    assert without_budget(run(open_search(tmp_path / "b.log", trials=12))) == first
    assert without_budget(run(open_search(tmp_path / "c.log", trials=12, seed=1))) != first


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_a_study_in_two_calls_draws_what_it_would_have_drawn_in_one(
    tmp_path_factory: pytest.TempPathFactory, stop: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("studies")
    whole = run(open_search(folder / "one.log", trials=8, seed=seed))
    begun = run(open_search(folder / "two.log", trials=8, seed=seed), at_most=stop)
    resumed = open_search(folder / "two.log", trials=8, seed=seed)
    assert resumed.resumed_trials == stop
    assert without_budget(begun + run(resumed)) == without_budget(whole)


KILLED = """
import sys, time
from pathlib import Path
from flows.core.search import Search, study_name
from flows.params import SearchSpace, TrainParams, TuneParams

space = SearchSpace(base_model=["small", "large"])
base = TrainParams(base_model="small", steps=60)
search = Search(
    Path(sys.argv[1]), name=study_name(space, ["spearman"], "d" * 32, base), base=base,
    params=TuneParams(trials=6, seed=42, space=space, costs=[]),
)
for number in range(int(sys.argv[2])):
    candidate = search.next_candidate(1e6)
    search.report(candidate, 0.5 + number / 100, seconds=10.0, run_id=f"killed{number}")
search.next_candidate(1e6)
sys.stdout.write("training\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.parametrize("finished", [0, 2])
def test_a_study_killed_during_a_trial_goes_on(tmp_path: Path, finished: int) -> None:
    journal = tmp_path / "journal.log"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(journal), str(finished)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "training\n"
        alive = open_search(journal)
        assert alive.remaining_trials == 6 - finished - 1  # its process is alive: hands off
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

    search = open_search(journal)
    assert search.resumed_trials == finished
    assert [row["state"] for row in search.rows()] == ["complete"] * finished + ["fail"]
    if finished:
        assert search.best().run_id == f"killed{finished - 1}"
    candidates = run(search)
    assert search.finished_trials == 6
    assert len(candidates) == 6 - finished
    if not finished:
        assert candidates[0].params == BASE  # the killed one was the base: it is due again


def test_another_space_is_another_study(tmp_path: Path) -> None:
    run(open_search(tmp_path / "journal.log"))
    other = open_search(tmp_path / "journal.log", space=SPACE.model_copy(update={"steps": [10, 20]}))
    assert other.resumed_trials == 0
    assert other.next_candidate(AMPLE_S) == Candidate(0, BASE)


def test_a_trial_that_cannot_fit_is_not_started(tmp_path: Path) -> None:
    space = SearchSpace(base_model=["small"], steps=[30, 10_000], batch_size=[16], max_tokens=[128])
    search = open_search(tmp_path / "journal.log", space=space, trials=8)
    first = search.next_candidate(100.0)
    assert first is not None
    search.report(first, 0.8, seconds=60.0, run_id="base")  # a second a step
    later = run(search, remaining_s=100.0)
    assert later
    assert {candidate.params.steps for candidate in later} == {30}
    assert [row["trial"] for row in search.rows()] == [0, *(candidate.number for candidate in later)]


def test_the_search_ends_by_its_budget(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    first = search.next_candidate(100.0)
    assert first is not None
    search.report(first, 0.8, seconds=3600.0, run_id="base")
    assert search.next_candidate(60.0) is None
    assert search.ended_by == "budget"
    assert len(search._study.trials) == 1 + MAX_DRAWS  # a bounded number of draws
    assert search.next_candidate(-1.0) is None
    assert len(search._study.trials) == 1 + MAX_DRAWS  # and none at all when nothing is left
    assert search.next_candidate(AMPLE_S) is not None  # with more time the study goes on


def test_a_later_trial_may_take_what_is_left_at_most(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    first = search.next_candidate(1.0)
    assert first is not None
    assert first.params.max_minutes == BASE.max_minutes  # the first one always runs
    search.report(first, 0.8, seconds=1.0, run_id="base")
    second = search.next_candidate(120.0)
    assert second is not None
    assert 1.9 < second.params.max_minutes <= 2.0  # the draw took its part
    search.report(second, 0.9, seconds=1.0, run_id="second")
    assert search.best().params == second.params.model_copy(update={"max_minutes": BASE.max_minutes})


def test_the_duration_is_predicted_per_base_model(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", space=SPACE.model_copy(update={"base_model": ["large"]}))
    assert search.predict_seconds(BASE) is None
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    search.report(first, 0.8, seconds=60.0, run_id="base")
    assert search.predict_seconds(BASE) == pytest.approx(60.0)
    assert search.predict_seconds(BASE.model_copy(update={"steps": 120})) == pytest.approx(120.0)
    large = BASE.model_copy(update={"base_model": "large"})
    assert search.predict_seconds(large) == pytest.approx(60.0)  # nothing better is known
    second = search.next_candidate(AMPLE_S)
    assert second is not None
    search.report(second, 0.8, seconds=900.0, run_id="large")
    assert search.predict_seconds(BASE) == pytest.approx(60.0)
    assert search.predict_seconds(second.params) == pytest.approx(900.0)


def test_the_same_parameters_are_not_trained_twice(tmp_path: Path) -> None:
    space = SearchSpace(
        base_model=["small"],
        learning_rate=FloatRange(low=2e-5, high=2e-5),
        steps=[30, 60],
        batch_size=[16],
        max_tokens=[64, 128],
    )
    search = open_search(tmp_path / "journal.log", space=space, trials=50)
    candidates = run(search)
    assert len(candidates) == 4  # all there are
    assert len({candidate.params.model_dump_json() for candidate in candidates}) == 4
    assert search.ended_by == "exhausted"


def test_a_trial_that_was_cut_off_is_chosen_only_when_nothing_else_is_there(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    search.report(first, 0.99, seconds=10.0, run_id="cut", stopped_early=True)
    assert (search.best().run_id, search.best().value, search.finished_trials) == ("cut", 0.99, 0)
    second = search.next_candidate(AMPLE_S)
    assert second is not None
    assert second.params != BASE  # the base had its turn
    search.report(second, 0.5, seconds=10.0, run_id="whole")
    assert (search.best().run_id, search.finished_trials) == ("whole", 1)
    assert [(row["state"], row["value"]) for row in search.rows()] == [("pruned", 0.99), ("complete", 0.5)]


def test_trials_that_are_all_cut_off_do_not_go_on_for_ever(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=3)
    for _ in range(3):
        candidate = search.next_candidate(AMPLE_S)
        assert candidate is not None
        search.report(candidate, 0.5, seconds=10.0, run_id=f"run{candidate.number}", stopped_early=True)
    assert search.next_candidate(AMPLE_S) is None
    assert search.ended_by == "trials"


def test_a_failed_trial_is_recorded_and_does_not_count(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=2)
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    search.fail(first, "out of memory")
    with pytest.raises(EkibenError, match="no trial of study"):
        search.best()
    assert search.best_or_none() is None
    again = search.next_candidate(AMPLE_S)
    assert again is not None
    assert again.params == BASE  # still due
    search.report(again, float("nan"), seconds=1.0, run_id="x")
    assert [(row["state"], row["note"]) for row in search.rows()] == [
        ("fail", "out of memory"),
        ("fail", "its score is nan"),
    ]
    assert open_search(tmp_path / "journal.log", trials=2).resumed_trials == 0


def test_what_would_fail_again_counts_as_tried_and_others_have_their_turn(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=4)
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    search.fail(first, "training diverged", again=0)
    second = search.next_candidate(AMPLE_S)
    assert second is not None
    assert second.params.model_copy(update={"max_minutes": BASE.max_minutes}) != BASE
    search.report(second, float("nan"), seconds=1.0, run_id="x")
    assert (search.finished_trials, search.broken_trials, search.remaining_trials) == (0, 2, 2)
    with pytest.raises(EkibenError, match=r"2 failed and would fail again \(the last: its score is nan\): correct the"):
        search.best()
    third = search.next_candidate(AMPLE_S)
    assert third is not None
    search.report(third, 0.5, seconds=1.0, run_id="third")
    assert search.best().run_id == "third"

    again = open_search(tmp_path / "journal.log", trials=4)
    assert len(run(again)) == 1
    assert again.ended_by == "trials"
    tried = [row for row in again.rows() if row["trial"] in (0, second.number)]
    assert [row["state"] for row in tried] == ["fail", "fail"]


def test_the_same_parameters_are_not_drawn_again_after_a_failure_for_good(tmp_path: Path) -> None:
    space = SearchSpace(
        base_model=["small"], learning_rate=FloatRange(low=2e-5, high=2e-5), steps=[30, 60], batch_size=[16],
        max_tokens=[128],
    )  # fmt: skip
    search = open_search(tmp_path / "journal.log", space=space, trials=50)
    handed_out = []
    while (candidate := search.next_candidate(AMPLE_S)) is not None:
        handed_out.append(candidate.params.steps)
        search.fail(candidate, "training diverged", again=0)
    assert handed_out == [60, 30]
    assert search.ended_by == "exhausted"


def test_what_ran_out_of_memory_is_tried_once_more(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=9)
    tried = []
    for _ in range(3):
        candidate = search.next_candidate(AMPLE_S)
        assert candidate is not None
        tried.append(candidate.params.model_copy(update={"max_minutes": BASE.max_minutes}) == BASE)
        search.fail(candidate, "out of memory", again=1)
    assert tried == [True, True, False]
    assert search.broken_trials == 1


def test_of_equal_scores_the_first_wins(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=3)
    while (candidate := search.next_candidate(AMPLE_S)) is not None:
        search.report(candidate, 0.7, seconds=1.0, run_id=f"run{candidate.number}")
    assert search.best().params == BASE


def test_the_table_has_a_row_a_trial(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=2)
    run(search)
    first, second = search.rows()
    assert first == {
        "trial": 0, "state": "complete", "front": first["value"] >= second["value"], "value": score(BASE),
        "seconds": 10.0, "run_id": "run0", "base_model": "small", "learning_rate": 2e-5, "steps": 60, "batch_size": 16,
        "loss": "auto", "max_tokens": 128, "layers": None, "dimensions": None, "precision": "auto", "note": "the base",
    }  # fmt: skip
    assert (second["trial"], second["note"]) == (1, "")


def test_a_trial_that_another_process_has_closed_is_our_error(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    candidate = search.next_candidate(AMPLE_S)
    assert candidate is not None
    import optuna

    search._study.tell(candidate.number, state=optuna.trial.TrialState.FAIL)
    with pytest.raises(EkibenError, match="run the same command again"):
        search.report(candidate, 0.5, seconds=1.0, run_id="x")


def test_two_searches_at_the_same_time_share_the_trials(tmp_path: Path) -> None:
    one, two = open_search(tmp_path / "journal.log", trials=3), open_search(tmp_path / "journal.log", trials=3)
    a, b, c = one.next_candidate(AMPLE_S), two.next_candidate(AMPLE_S), one.next_candidate(AMPLE_S)
    assert a is not None
    assert b is not None
    assert c is not None
    assert a.params == BASE
    assert len({a.number, b.number, c.number}) == 3
    assert two.next_candidate(AMPLE_S) is None  # the rest is being worked on
    assert two.ended_by == "trials"


def test_importing_the_search_does_not_import_optuna() -> None:
    code = "import sys, flows.core.search; sys.exit('optuna' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
