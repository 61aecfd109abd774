"""Quality against cost: limits, the front, policies, and trials that are given up; nothing is trained or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from flows.core.front import MIN_PEERS
from flows.core.search import Candidate, Search
from flows.core.studies import open_study, study_name
from flows.errors import EkibenError, ParamsError, UnsupportedModelError
from flows.params import FloatRange, SearchSpace, TrainParams, TuneParams

SPACE = SearchSpace(
    base_model=["small"], layers=[None, 1, 2, 4], dimensions=[None, 64, 128], precision=["fp32", "int8"], steps=[30, 60]
)
BASE = TrainParams(base_model="small", steps=60, precision="fp32")
AMPLE_S = 1e6
WHOLE_LAYERS, WHOLE_DIM = 8, 256


class Scales:
    """Stands for the measurement: costs follow layers, dimensions and precision; says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, params: TrainParams) -> dict[str, float]:
        self.asked.append((params.layers, params.dimensions, params.max_tokens, params.precision))
        faster = 0.5 if params.precision == "int8" else 1.0
        return {
            "p95_ms": faster * (params.layers or WHOLE_LAYERS),
            "bytes_per_vector": 4.0 * (params.dimensions or WHOLE_DIM),
            "memory_mb": 100 * faster,
        }


def quality(params: TrainParams) -> float:
    """Give a stand-in for a training: a little is lost with each thing that makes a model cheaper."""
    lost = 0.2 / (params.layers or WHOLE_LAYERS) + 4 / (params.dimensions or WHOLE_DIM)
    return 0.9 - lost - (0.01 if params.precision == "int8" else 0.0) - abs(params.learning_rate - 4e-5) * 100


def open_search(
    storage: Path,
    *,
    measure: Any = None,
    base: TrainParams = BASE,
    space: SearchSpace = SPACE,
    min_speedup: float = 1.0,
    **changed: Any,
) -> Search:
    params = TuneParams(**{"trials": 12, "space": space, **changed})
    name = study_name(space, ["spearman", *params.costs], "d" * 32, base)
    measure = measure or Scales()
    return Search(storage, name=name, base=base, params=params, measure=measure, min_speedup=min_speedup)


def finish(search: Search, candidate: Candidate, value: float | None = None) -> None:
    score = quality(candidate.params) if value is None else value
    search.report(candidate, score, seconds=1.0, run_id=f"run{candidate.number}")


def run(search: Search) -> list[Candidate]:
    candidates = []
    while (candidate := search.next_candidate(AMPLE_S)) is not None:
        finish(search, candidate)
        candidates.append(candidate)
    return candidates


def test_a_study_of_quality_and_cost_ends_with_a_front(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    candidates = run(search)
    assert len(candidates) == search.finished_trials == 12
    assert candidates[0].params == BASE
    assert search._study.directions == [
        optuna.study.StudyDirection.MAXIMIZE,
        *[optuna.study.StudyDirection.MINIMIZE] * 2,
    ]
    front = search.front()
    assert len(front) >= 3
    assert front[-1].log_cost > front[0].log_cost
    # Optuna, which was told the same values, finds the same front.
    assert {point.number for point in front} == {trial.number for trial in search._study.best_trials}
    rows = {row["trial"]: row for row in search.rows()}
    assert {number for number, row in rows.items() if row["front"]} == {point.number for point in front}
    for candidate in candidates:
        row = rows[candidate.number]
        assert (row["p95_ms"], row["bytes_per_vector"]) == (
            candidate.costs["p95_ms"],
            candidate.costs["bytes_per_vector"],
        )
        assert "memory_mb" not in row  # was not asked for
    assert [point.number for point in search.finished()] == [
        number for number, _ in sorted(rows.items(), key=lambda item: (point_cost(item[1]), item[1]["value"], item[0]))
    ]


def point_cost(row: dict[str, Any]) -> float:
    product: float = row["p95_ms"] * row["bytes_per_vector"]
    return product


def test_an_architecture_is_measured_once_in_a_study_and_its_trials_cost_the_same(tmp_path: Path) -> None:
    scales = Scales()
    narrow = {"layers": [None, 2], "dimensions": [None], "precision": ["auto"], "max_tokens": [128]}
    space = SPACE.model_copy(update=narrow)
    run(open_search(tmp_path / "journal.log", measure=scales, space=space, trials=8))
    assert len(scales.asked) == 4  # `auto` in both precisions
    assert set(scales.asked) == {(layers, None, 128, name) for layers in (2, None) for name in ("fp32", "int8")}

    class Other(Scales):
        def __call__(self, params: TrainParams) -> dict[str, float]:
            raise AssertionError("the study knows it")

    resumed = open_search(tmp_path / "journal.log", measure=Other(), space=space, trials=12)
    assert resumed.resumed_trials == 8
    assert len(run(resumed)) == 4


def test_each_policy_takes_its_trial_and_another_one_needs_no_new_trial(tmp_path: Path) -> None:
    run(open_search(tmp_path / "journal.log"))
    taken = {}
    for policy in ("best-quality", "cheapest-within 10", "cheapest-within 100", "knee"):
        search = open_search(tmp_path / "journal.log", policy=policy)
        assert search.next_candidate(AMPLE_S) is None
        taken[policy] = search.best()
        assert taken[policy].number in {point.number for point in search.front()}
        assert taken[policy].run_id == f"run{taken[policy].number}"
        assert taken[policy].value == pytest.approx(quality(taken[policy].params))
    assert taken["best-quality"].value >= taken["cheapest-within 10"].value >= 0.9 * taken["best-quality"].value
    cheapest = open_search(tmp_path / "journal.log").finished()[0]
    assert taken["cheapest-within 100"].number == cheapest.number


def test_a_trial_that_was_asked_for_by_number_ends_the_study(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", trials=3)
    run(search)
    last = search.rows()[-1]["trial"]
    chosen = open_search(tmp_path / "journal.log", trials=12, policy=f"trial {last}")
    assert chosen.next_candidate(AMPLE_S) is None
    assert chosen.ended_by == "policy"
    assert chosen.best().number == last
    with pytest.raises(ParamsError, match="trial 99"):
        open_search(tmp_path / "journal.log", trials=12, policy="trial 99").best()


def test_a_trial_by_number_of_a_study_that_has_none_is_refused_at_once(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", policy="trial 0")
    assert search.next_candidate(AMPLE_S) is None
    with pytest.raises(ParamsError, match="run it with another policy first"):
        search.best_or_none()


def test_what_is_over_a_limit_is_never_handed_out_and_marked_for_the_sampler(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", max_p95_ms=2.0, max_bytes_per_vector=512)
    candidates = run(search)
    assert candidates
    for candidate in candidates:
        assert candidate.costs["p95_ms"] <= 2.0
        assert candidate.costs["bytes_per_vector"] <= 512
    infeasible = [row for row in search.rows() if row["state"] == "infeasible"]
    assert infeasible[0]["trial"] == 0  # the base, which the user gave, is no exception
    assert "p95_ms 8, allowed 2 (tune.max_p95_ms)" in infeasible[0]["note"]
    assert "bytes_per_vector 1024, allowed 512" in infeasible[0]["note"]
    assert all(row["value"] is None and row["run_id"] is None for row in infeasible)
    marked = {trial.number: trial.constraints for trial in search._study.trials if trial.constraints}
    assert marked[0] == {"p95_ms": 3.0, "bytes_per_vector": 1.0}
    assert {number for number, found in marked.items() if max(found.values()) > 0} == {
        row["trial"] for row in infeasible
    }
    assert search.best().number in {candidate.number for candidate in candidates}


def test_a_limit_that_nothing_meets_is_an_error_with_figures(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", max_p95_ms=0.1)
    assert search.next_candidate(AMPLE_S) is None
    assert search.ended_by == "limits"
    with pytest.raises(ParamsError, match=r"within the limits of cost .*p95_ms .*, allowed 0\.1"):
        search.best()


def test_another_limit_is_the_same_study_seen_otherwise(tmp_path: Path) -> None:
    whole = open_search(tmp_path / "journal.log")
    run(whole)
    cheap = open_search(tmp_path / "journal.log", max_p95_ms=2.0)
    assert cheap.name == whole.name
    assert cheap.best().costs["p95_ms"] <= 2.0
    assert {point.number for point in cheap.front()} <= {point.number for point in whole.front()}
    with pytest.raises(ParamsError, match=r"within the limits of cost"):
        open_search(tmp_path / "journal.log", max_p95_ms=0.01).best()

    limited = open_search(tmp_path / "other.log", max_p95_ms=2.0, trials=2)
    assert run(limited)[0].params != BASE
    due = open_search(tmp_path / "other.log", trials=3).next_candidate(AMPLE_S)
    assert due is not None
    assert (due.params, due.costs) == (BASE, Scales()(BASE))  # which is within the wider limits


def test_an_architecture_that_there_is_not_is_left_out_and_the_study_goes_on(tmp_path: Path) -> None:
    class Picky(Scales):
        def __call__(self, params: TrainParams) -> dict[str, float]:
            if params.layers == 4:
                raise UnsupportedModelError("small has 3 layers")
            return super().__call__(params)

    search = open_search(tmp_path / "journal.log", measure=Picky())
    assert {candidate.params.layers for candidate in run(search)} <= {None, 1, 2}
    refused = [row for row in search.rows() if row["state"] == "infeasible"]
    assert {row["note"] for row in refused} == {"small has 3 layers"}

    wrong = BASE.model_copy(update={"layers": 4})
    with pytest.raises(UnsupportedModelError, match="small has 3 layers"):
        open_search(tmp_path / "other.log", measure=Picky(), base=wrong).next_candidate(AMPLE_S)


def test_a_measurement_that_fails_ends_the_call_and_the_next_one_measures_again(tmp_path: Path) -> None:
    def fail(params: TrainParams) -> dict[str, float]:
        raise EkibenError("out of memory")

    with pytest.raises(EkibenError, match="out of memory"):
        open_search(tmp_path / "journal.log", measure=fail).next_candidate(AMPLE_S)
    search = open_search(tmp_path / "journal.log")
    assert search.remaining_trials == 12
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    assert first.params == BASE


def test_values_of_other_directions_cannot_be_mixed_in(tmp_path: Path) -> None:
    run(open_search(tmp_path / "journal.log", trials=2))
    for costs in ([], ["p95_ms"], ["bytes_per_vector", "p95_ms"], ["p95_ms", "bytes_per_vector", "memory_mb"]):
        assert open_search(tmp_path / "journal.log", costs=costs).resumed_trials == 0
    open_study(tmp_path / "journal.log", name="ours", costs=1)
    with pytest.raises(ParamsError, match="directions maximize, minimize, not maximize"):
        open_study(tmp_path / "journal.log", name="ours")


def one_price() -> SearchSpace:
    """Return a space in which all candidates cost the same, but for those in int8, which are cheaper."""
    return SearchSpace(base_model=["small"], max_tokens=[128], precision=["fp32", "int8"])


def check_all(search: Search, value: float, at: int = 1) -> Candidate:
    candidate = search.next_candidate(AMPLE_S)
    assert candidate is not None
    assert not search.check(candidate, at, value)
    return candidate


def next_of(search: Search, precision: str) -> Candidate:
    """Draw until there is a candidate of this precision; the others fail."""
    while True:
        candidate = search.next_candidate(AMPLE_S)
        assert candidate is not None
        if candidate.params.precision == precision:
            return candidate
        search.fail(candidate, "not wanted")


def test_a_trial_that_is_clearly_behind_what_is_as_cheap_is_given_up(tmp_path: Path) -> None:
    base = BASE.model_copy(update={"precision": "fp32"})
    search = open_search(tmp_path / "journal.log", base=base, space=one_price(), trials=100)
    for number in range(MIN_PEERS):
        candidate = next_of(search, "fp32")
        assert not search.check(candidate, 1, 0.80 + number / 100)  # fewer peers than it takes
        finish(search, candidate, 0.85)
    worse = next_of(search, "fp32")
    assert search.check(worse, 1, 0.79)  # the median is 0.81
    assert "check 1 with 0.7900" in search.give_up(worse, seconds=1.0, run_id="worse")
    close = next_of(search, "fp32")
    assert not search.check(close, 1, 0.795)
    assert not search.check(close, 2, 0.10)  # nobody else was looked at then
    finish(search, close, 0.86)
    cheaper = next_of(search, "int8")
    assert not search.check(cheaper, 1, 0.10)  # none of the others is as cheap
    finish(search, cheaper, 0.20)
    dearer = next_of(search, "fp32")
    assert search.check(dearer, 1, 0.10)  # cheaper ones count among its peers
    search.fail(dearer, "killed")

    assert search.hopeless_trials == 1
    row = next(row for row in search.rows() if row["trial"] == worse.number)
    assert (row["state"], row["value"], row["front"]) == ("pruned", None, False)
    assert search.best().value == 0.86
    assert worse.number not in {point.number for point in search.finished()}
    assert search.run_ids()[worse.number] == "worse"


def test_the_base_is_never_given_up(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", space=one_price(), trials=100)
    first = search.next_candidate(AMPLE_S)
    assert first is not None
    search.fail(first, "killed")
    for _ in range(MIN_PEERS + 1):
        other = search._study.ask({})
        other.set_user_attr("checks", {"1": 0.9})
        other.set_user_attr("costs", {"p95_ms": 0.1, "bytes_per_vector": 1.0})
        search._study.tell(other, [0.9, 0.1, 1.0])
    assert not search.check(check_base(search), 1, 0.0)


def check_base(search: Search) -> Candidate:
    candidate = search.next_candidate(AMPLE_S)
    assert candidate is not None
    assert candidate.params == BASE
    return candidate


def test_trials_that_were_given_up_count_so_a_study_comes_to_its_end(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", space=one_price(), trials=5)
    handed_out = 0
    while (candidate := search.next_candidate(AMPLE_S)) is not None:
        handed_out += 1
        search.check(candidate, 1, 0.5)
        if handed_out > 3:
            search.give_up(candidate, seconds=1.0, run_id=f"run{candidate.number}")
        else:
            finish(search, candidate)
    assert handed_out == 5
    assert (search.finished_trials, search.hopeless_trials, search.ended_by) == (3, 2, "trials")
    again = open_search(tmp_path / "journal.log", space=one_price(), trials=5)
    assert again.next_candidate(AMPLE_S) is None


def test_what_was_given_up_is_not_tried_again(tmp_path: Path) -> None:
    space = SearchSpace(
        base_model=["small"], learning_rate=FloatRange(low=2e-5, high=2e-5), steps=[30, 60], batch_size=[16],
        max_tokens=[128], precision=["fp32"],
    )  # fmt: skip
    search = open_search(tmp_path / "journal.log", space=space, trials=50)
    handed_out = []
    while (candidate := search.next_candidate(AMPLE_S)) is not None:
        handed_out.append(candidate.params.steps)
        search.check(candidate, 1, 0.5)
        search.give_up(candidate, seconds=1.0, run_id=f"run{candidate.number}")
    assert handed_out == [60, 30]
    assert search.ended_by == "exhausted"


def test_a_score_of_a_check_that_is_no_number_decides_nothing(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log")
    candidate = check_all(search, float("nan"))
    finish(search, candidate)
    assert search._study.trials[0].state == TrialState.COMPLETE


AUTO = BASE.model_copy(update={"precision": "auto"})


def first_of(search: Search) -> Candidate:
    candidate = search.next_candidate(AMPLE_S)
    assert candidate is not None
    return candidate


def test_auto_costs_what_would_be_served_and_a_trial_that_misses_int8_costs_what_fp32_does(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", base=AUTO, min_speedup=1.1)
    first = first_of(search)
    assert (first.precision, first.costs["p95_ms"]) == ("int8", WHOLE_LAYERS / 2)
    finish(search, search.reprice(first, "fp32"), 0.8)
    row = search.rows()[0]
    assert (row["precision"], row["p95_ms"], row["value"]) == ("fp32", WHOLE_LAYERS, 0.8)
    assert search.front()[0].costs == (WHOLE_LAYERS, 4.0 * WHOLE_DIM)
    assert search.best().costs["p95_ms"] == WHOLE_LAYERS
    assert search.best().params == AUTO  # a release decides it anew


def test_auto_is_fp32_where_int8_is_no_faster_or_cannot_be_made(tmp_path: Path) -> None:
    slow = first_of(open_search(tmp_path / "slow.log", base=AUTO, min_speedup=2.1))
    assert (slow.precision, slow.costs["p95_ms"]) == ("fp32", WHOLE_LAYERS)

    class OnlyFp32(Scales):
        def __call__(self, params: TrainParams) -> dict[str, float]:
            if params.precision == "int8":
                raise UnsupportedModelError("nothing to quantize")
            return super().__call__(params)

    only = first_of(open_search(tmp_path / "only.log", base=AUTO, measure=OnlyFp32()))
    assert (only.precision, only.costs["p95_ms"]) == ("fp32", WHOLE_LAYERS)


def test_where_no_cost_hangs_on_the_precision_auto_stays_auto(tmp_path: Path) -> None:
    scales = Scales()
    first = first_of(open_search(tmp_path / "journal.log", base=AUTO, measure=scales, costs=["bytes_per_vector"]))
    assert first.precision == "auto"
    assert [asked[-1] for asked in scales.asked] == ["auto"]


def test_a_trial_whose_fp32_is_over_the_limit_is_not_taken(tmp_path: Path) -> None:
    search = open_search(tmp_path / "journal.log", base=AUTO, max_p95_ms=5.0)
    first = first_of(search)
    finish(search, search.reprice(first, "fp32"), 0.99)
    assert search.finished() == []
    with pytest.raises(ParamsError, match=r"p95_ms 8, allowed 5"):
        search.best()


def test_a_limit_on_what_was_never_measured_is_not_kept(tmp_path: Path) -> None:
    run(open_search(tmp_path / "journal.log", costs=[], measure=lambda params: {}, trials=2))
    limited = open_search(tmp_path / "journal.log", costs=[], max_bytes_per_vector=1, trials=2)
    assert limited.resumed_trials == 2
    assert limited.best_or_none() is None
    with pytest.raises(ParamsError, match=r"bytes_per_vector was never measured, allowed 1; name it in tune\.costs"):
        limited.best()
