"""The search for parameters: which candidate is tried next, and which one is best. Core layer.

`Search` knows nothing about training: it hands out candidates and takes their scores, so that it can be killed at any
moment and go on with what the study's storage holds.
"""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.studies import (
    REASON,
    close_stale_trials,
    heartbeat,
    open_study,
    plain_study_errors,
    quiet_optuna,
    sign_trial,
    study_name,
    suggest,
    to_distributions,
    values_inside,
)
from flows.errors import EkibenError
from flows.params import TrainParams, TuneParams

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

__all__ = ["Best", "Candidate", "Search", "study_name"]

MAX_DRAWS = 20  # unusable draws in a row (already tried, or too long for what is left) before the search gives up
COST_MARGIN = 1.1  # a trial is started when this times its predicted duration is left
# User attributes of a trial. Optuna's own parameters hold only what the space varies.
PARAMS = "params"
BASE = "base"
VALUE = "value"
SECONDS = "seconds"
RUN_ID = "run_id"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Candidate:
    """Parameters to try, and the number of their trial."""

    number: int
    params: TrainParams


@dataclass(frozen=True)
class Best:
    """The trial with the highest score so far."""

    number: int
    params: TrainParams
    value: float
    run_id: str


class Search:
    """One study: hands out candidates within a budget, and remembers their scores."""

    def __init__(self, storage: str | Path, *, name: str, base: TrainParams, params: TuneParams) -> None:
        """Open the study, go on with it when it exists, and close the trials of processes that are gone.

        Args:
            storage: Database URL, or path of a journal file.
            name: From `study_name`.
            base: The first candidate, known to be good, so that a study never ends below it; gives later candidates
                whatever the space does not vary.
            params: Budget, seed and space.

        Raises:
            ParamsError: the storage cannot be opened.
        """
        self.name = name
        self.ended_by = ""  # why `next_candidate` gave None: "trials", "budget" or "exhausted"
        self._base = base
        self._params = params
        self._distributions = to_distributions(params.space)
        self._base_inside = values_inside(base, self._distributions)
        self._study = open_study(storage, name=name)
        self._running: dict[int, tuple[Trial, ExitStack]] = {}
        self._started = 0
        close_stale_trials(self._study)
        self.resumed_trials = self.finished_trials

    @property
    def finished_trials(self) -> int:
        """Trials that were trained to their end and scored, in all calls."""
        return len(self._trials("COMPLETE"))

    @property
    def remaining_trials(self) -> int:
        """Trials that this call may still start; those that other processes are busy with count as done."""
        left = self._params.trials - self.finished_trials - len(self._trials("RUNNING"))
        return max(0, min(left, self._params.trials - self._started))

    @plain_study_errors
    def next_candidate(self, remaining_s: float) -> Candidate | None:
        """Draw the next parameters to try.

        The first one is the base, whatever it costs. Later ones are drawn until one is new and fits into the time that
        is left; their `max_minutes` is cut to it.

        Args:
            remaining_s: What is left of the budget, in seconds.

        Returns:
            A candidate, to be answered with `report` or `fail`; None when the search has ended (see `ended_by`).
        """
        close_stale_trials(self._study)
        too_long = False
        for _ in range(MAX_DRAWS):
            if self.remaining_trials == 0:
                self.ended_by = "trials"
                return None
            is_first = not self._base_was_tried()
            if not is_first and remaining_s <= 0:
                self.ended_by = "budget"
                return None
            trial, params = self._draw(as_base=is_first)
            if trial.user_attrs.get(BASE):
                return self._start(trial, params)
            if self._is_known(trial.number, params):
                self._skip(trial, "already tried")
            elif (self.predict_seconds(params) or 0.0) * COST_MARGIN > remaining_s:
                self._skip(trial, "would take longer than what is left")
                too_long = True
            else:
                minutes = min(params.max_minutes, remaining_s / 60)
                return self._start(trial, params.model_copy(update={"max_minutes": minutes}))
        self.ended_by = "budget" if too_long else "exhausted"
        return None

    @plain_study_errors
    def report(
        self, candidate: Candidate, value: float, *, seconds: float, run_id: str, stopped_early: bool = False
    ) -> None:
        """Tell the study how a candidate did.

        Args:
            candidate: From `next_candidate`.
            value: Its score, the higher the better; one that is not a number makes the trial fail.
            seconds: How long it took.
            run_id: The run that holds it.
            stopped_early: It was cut off by its time budget. Such a trial does not count as finished, and is only
                chosen when none is.
        """
        if not math.isfinite(value):
            self.fail(candidate, f"its score is {value}")
            return
        trial = self._end(candidate.number)
        for name, content in ((VALUE, value), (SECONDS, seconds), (RUN_ID, run_id)):
            trial.set_user_attr(name, content)
        if stopped_early:
            trial.set_user_attr(REASON, "stopped by its time budget")
            self._study.tell(trial, state=_state("PRUNED"))
        else:
            self._study.tell(trial, value)

    @plain_study_errors
    def fail(self, candidate: Candidate, reason: str) -> None:
        """Tell the study that a candidate could not be trained or scored."""
        trial = self._end(candidate.number)
        trial.set_user_attr(REASON, reason[:500])
        self._study.tell(trial, state=_state("FAIL"))

    def best(self) -> Best:
        """The trial with the highest score; the base, unless another one is clearly above it.

        Raises:
            EkibenError: none was scored yet.
        """
        best = self.best_or_none()
        if best is None:
            raise EkibenError(f"no trial of study {self.name} was scored; look at why they failed, then run it again")
        return best

    @plain_study_errors
    def best_or_none(self) -> Best | None:
        """Like `best`, None when no trial was scored yet.

        Another trial beats the base by `TuneParams.min_improvement` or not at all: on a small dev set the highest of
        many scores is often only the luckiest.
        """
        for state in ("COMPLETE", "PRUNED"):
            scored = [trial for trial in self._trials(state) if RUN_ID in trial.user_attrs]
            if scored:
                chosen = max(scored, key=lambda trial: (trial.user_attrs[VALUE], -trial.number))
                base = next((trial for trial in scored if trial.user_attrs.get(BASE)), chosen)
                if chosen.user_attrs[VALUE] < base.user_attrs[VALUE] + self._params.min_improvement:
                    chosen = base
                attrs = chosen.user_attrs
                return Best(chosen.number, TrainParams(**attrs[PARAMS]), attrs[VALUE], attrs[RUN_ID])
        return None

    @plain_study_errors
    def rows(self) -> list[dict[str, Any]]:
        """One row a trial, for a table: number, state, value, seconds, run, the varied parameters, and a note."""
        rows = []
        for trial in self._study.get_trials(deepcopy=False):
            attrs = trial.user_attrs
            if SKIPPED in attrs or PARAMS not in attrs:
                continue  # drawn, never started
            row = {"trial": trial.number, "state": trial.state.name.lower()}
            row |= {name: attrs.get(name) for name in (VALUE, SECONDS, RUN_ID)}
            row |= {name: attrs[PARAMS][name] for name in self._distributions}
            rows.append(row | {"note": attrs.get(REASON, "the base" if attrs.get(BASE) else "")})
        return rows

    def predict_seconds(self, params: TrainParams) -> float | None:
        """How long a trial with `params` will take, by the finished ones; None before the first.

        Trials of the same base model are the measure; without one, the slowest base model so far.
        """
        rates: dict[str, list[float]] = {}
        measured = [trial for trial in self._trials("COMPLETE", "PRUNED") if PARAMS in trial.user_attrs]
        for trial in measured:
            tried = TrainParams(**trial.user_attrs[PARAMS])
            # The wall clock also saw loading and scoring. (What was cut off would have taken at least as long.)
            wall_s = trial.duration.total_seconds() if trial.duration else 0.0
            rate = max(trial.user_attrs.get(SECONDS, 0.0), wall_s) / _cost(tried)
            rates.setdefault(tried.base_model, []).append(rate)
        if not rates:
            return None
        typical = {model: statistics.median(values) for model, values in rates.items()}
        return _cost(params) * typical.get(params.base_model, max(typical.values()))

    def _trials(self, *states: str) -> list[FrozenTrial]:
        wanted = tuple(_state(state) for state in states)
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=wanted)
        return trials

    def _base_was_tried(self) -> bool:
        return any(trial.user_attrs.get(BASE) for trial in self._trials("COMPLETE", "PRUNED", "RUNNING"))

    def _draw(self, *, as_base: bool) -> tuple[Trial, TrainParams]:
        if as_base and not self._trials("WAITING"):
            self._study.enqueue_trial(self._base_inside, user_attrs={BASE: True})
        with quiet_optuna():
            self._study.sampler = self._make_sampler()
            trial = self._study.ask()
            sign_trial(trial)
            # Of the base, what lies outside the space is not told to the sampler: it must not draw it again.
            known = self._base_inside if trial.user_attrs.get(BASE) else self._distributions
            values = {name: suggest(trial, name, self._distributions[name]) for name in known}
        params = self._base.model_copy(update=values)
        trial.set_user_attr(PARAMS, params.model_dump(mode="json"))
        return trial, params

    def _make_sampler(self) -> Any:
        import optuna

        # A seed of its own for each trial: after a restart the draws go on as without it, instead of beginning again.
        drawn = len(self._study.get_trials(deepcopy=False))
        return optuna.samplers.TPESampler(
            seed=(self._params.seed * 1_000_003 + drawn) % 2**32,
            n_startup_trials=min(10, max(4, self._params.trials // 3)),  # a small budget must not be spent on chance
        )

    def _is_known(self, number: int, params: TrainParams) -> bool:
        wanted = params.model_dump(mode="json")
        known = self._trials("COMPLETE", "RUNNING")
        return any(trial.user_attrs.get(PARAMS) == wanted for trial in known if trial.number != number)

    def _skip(self, trial: Trial, why: str) -> None:
        # Failed, not pruned: the sampler leaves failed trials out, but would take pruned ones for bad parameters.
        trial.set_user_attr(SKIPPED, why)
        self._study.tell(trial, state=_state("FAIL"))

    def _start(self, trial: Trial, params: TrainParams) -> Candidate:
        stack = ExitStack()
        stack.enter_context(heartbeat(self._study, trial))
        self._running[trial.number] = (trial, stack)
        self._started += 1
        return Candidate(trial.number, params)

    def _end(self, number: int) -> Trial:
        trial, stack = self._running.pop(number)
        stack.close()
        return trial


def _cost(params: TrainParams) -> float:
    # Attention aside, work grows with the tokens that are really there: between "all texts shorter than the cap" (no
    # growth) and "all longer" (linear) the square root is a fair middle.
    return params.steps * params.batch_size * math.sqrt(params.max_tokens)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
