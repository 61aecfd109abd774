"""The search for parameters: which candidate is tried next, and which one is given up. Core layer.

`Search` knows nothing about training: it hands out candidates and takes their scores, so that it can be killed at any
moment and go on with what the study's storage holds. Several processes may work on one study at the same time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.claims import claim
from flows.core.front import TRIAL, as_cheap, is_hopeless
from flows.core.prices import Prices
from flows.core.standings import (
    BASE,
    BROKEN,
    CHECKS,
    COSTS,
    HOPELESS,
    INFEASIBLE,
    PARAMS,
    PRECISION,
    RUN_ID,
    SECONDS,
    SKIPPED,
    VALUE,
    Best,
    Costs,
    Standings,
)
from flows.core.studies import (
    REASON,
    close_stale_trials,
    heartbeat,
    make_sampler,
    only_value,
    plain_study_errors,
    quiet_optuna,
    sign_trial,
    study_name,
    suggest,
    to_distributions,
    trial_state,
    values_inside,
)
from flows.errors import ParamsError, UnsupportedModelError
from flows.params import TrainParams, TuneParams

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Best", "Candidate", "Search", "study_name"]

MAX_DRAWS = 20  # unusable draws in a row (known, too long, too dear) before the search gives up
COST_MARGIN = 1.1  # a trial is started when this times its predicted duration is left


@dataclass(frozen=True)
class Candidate:
    """Parameters to try, the number of their trial, and what they will cost in serving."""

    number: int
    params: TrainParams
    costs: Costs = field(default_factory=dict)
    precision: str = "auto"  # that these are the costs of; `auto` when none hangs on it


class Search(Standings):
    """One study: hands out candidates within a budget, and remembers their scores."""

    def __init__(
        self,
        storage: str | Path,
        *,
        name: str,
        base: TrainParams,
        params: TuneParams,
        measure: Callable[[TrainParams], Costs] | None = None,
        min_speedup: float = 1.0,
    ) -> None:
        """Open the study, go on with it when it exists, and close the trials of processes that are gone.

        Args:
            storage: Database URL, or path of a journal file.
            name: From `study_name`.
            base: The first candidate, known to be good, so that a study never ends below it; gives later candidates
                whatever the space does not vary.
            params: Budget, seed, space, costs, limits of cost, and policy.
            measure: Says what a candidate will cost in serving: at least the costs and what is limited. Asked once for
                each architecture and study; of the precision `auto`, for fp32 and for int8. May raise ParamsError or
                UnsupportedModelError: there is no such model.
            min_speedup: `auto` is taken to be served in int8 when fp32 takes at least this many times as long.

        Raises:
            ParamsError: the storage cannot be opened.
        """
        super().__init__(storage, name=name, params=params)
        self.ended_by = ""  # why `next_candidate` gave None: "trials", "budget", "limits", "exhausted" or "policy"
        self._base = base
        self._prices = Prices(self._study, {*self._costs, *self._limits}, measure, min_speedup=min_speedup)
        distributions = to_distributions(params.space)
        # What has a single choice is no question: a study keeps, and its sampler sees, only what it may choose.
        self._given = {name: only_value(each) for name, each in distributions.items() if each.single()}
        self._distributions = {name: each for name, each in distributions.items() if name not in self._given}
        self._base_inside = values_inside(base, self._distributions)
        self._running: dict[int, tuple[Trial, ExitStack]] = {}
        self._started = 0
        close_stale_trials(self._study)
        self.resumed_trials = self.finished_trials

    @property
    def remaining_trials(self) -> int:
        """Trials that this call may still start; those that other processes are busy with count as done."""
        left = self._params.trials - self._done - len(self._trials("RUNNING"))
        return max(0, min(left, self._params.trials - self._started))

    @property
    def _done(self) -> int:
        return self.finished_trials + self.hopeless_trials + self.broken_trials

    @property
    def others_at_work(self) -> int:
        """Trials that other processes are busy with."""
        close_stale_trials(self._study)
        return sum(trial.number not in self._running for trial in self._trials("RUNNING"))

    @plain_study_errors
    def next_candidate(self, remaining_s: float) -> Candidate | None:
        """Draw the next parameters to try.

        The first one is the base, however long it takes. Later ones are drawn until one is new and fits into the time
        that is left; their `max_minutes` is cut to it. What would cost more in serving than the limits allow is noted,
        so that the sampler keeps away from it, and never handed out. When the policy names a trial, the user has made
        his choice: nothing is tried any more.

        Args:
            remaining_s: What is left of the budget, in seconds.

        Returns:
            A candidate, to be answered with `report`, `give_up` or `fail`; None when the search has ended (see
            `ended_by`).

        Raises:
            ParamsError, UnsupportedModelError: there is no such model as the base asks for.
        """
        deadline = time.monotonic() + remaining_s
        close_stale_trials(self._study)
        if self._params.policy.startswith(TRIAL):
            self.ended_by = "policy"
            return None
        why = "exhausted"
        for _ in range(MAX_DRAWS):
            if self.remaining_trials == 0:
                self.ended_by = "trials"
                return None
            is_first = not self._base_was_tried()
            if not is_first and time.monotonic() >= deadline:
                self.ended_by = "budget"
                return None
            trial, params = self._draw(as_base=is_first)
            base = bool(trial.user_attrs.get(BASE))
            if self._is_superfluous(trial.number, base=base):
                self._skip(trial, "another process was faster")
            elif not base and self._is_known(trial.number, params):
                self._skip(trial, "already tried")
            elif not base and not self._fits(params, deadline):
                self._skip(trial, "would take longer than what is left")
                why = "budget"
            elif not self._admit(trial, params, base=base):
                why = "limits" if why == "exhausted" else why
            elif base:
                return self._start(trial, params)
            else:
                left_s = max(1.0, deadline - time.monotonic())
                return self._start(
                    trial, params.model_copy(update={"max_minutes": min(params.max_minutes, left_s / 60)})
                )
        self.ended_by = why
        return None

    @plain_study_errors
    def check(self, candidate: Candidate, number: int, value: float) -> bool:
        """Note how a candidate does at a check in the middle of its training; return whether to give it up.

        It is hopeless when it is clearly behind the median of the trials that cost as much or less, at the same check
        (`is_hopeless`). The base never is.

        Args:
            candidate: From `next_candidate`.
            number: Of the check, 1, 2, ...
            value: Its dev metric now.
        """
        if not math.isfinite(value):
            return False  # the training will say what is wrong
        trial, _ = self._running[candidate.number]
        trial.set_user_attr(CHECKS, {**trial.user_attrs.get(CHECKS, {}), str(number): value})
        mine = self._objectives(candidate.costs)
        peers = [
            other.user_attrs[CHECKS][str(number)]
            for other in [*self._trials("COMPLETE"), *self._hopeless()]
            if str(number) in other.user_attrs.get(CHECKS, {})
            and as_cheap(self._objectives(other.user_attrs[COSTS]), mine)
        ]
        return not trial.user_attrs.get(BASE) and is_hopeless(value, peers)

    @plain_study_errors
    def reprice(self, candidate: Candidate, precision: str) -> Candidate:
        """Note that a candidate would be served in `precision`, not in what it was priced in; return it with that."""
        costs = self._prices.look_up(candidate.params.model_copy(update={"precision": precision}))
        trial, _ = self._running[candidate.number]
        trial.set_user_attr(COSTS, costs)
        trial.set_user_attr(PRECISION, precision)
        return replace(candidate, costs=costs, precision=precision)

    @plain_study_errors
    def report(
        self, candidate: Candidate, value: float, *, seconds: float, run_id: str, stopped_early: bool = False
    ) -> None:
        """Tell the study how a candidate did.

        Args:
            candidate: From `next_candidate`.
            value: Its score, the higher the better; one that is not a number makes the trial fail, for good.
            seconds: How long it took.
            run_id: The run that holds it.
            stopped_early: It was cut off by its time budget. Such a trial does not count as finished, and is only
                chosen when none is.
        """
        if not math.isfinite(value):
            self.fail(candidate, f"its score is {value}", again=0)
            return
        trial = self._end(candidate.number, {VALUE: value, SECONDS: seconds, RUN_ID: run_id})
        if stopped_early:
            trial.set_user_attr(REASON, "stopped by its time budget")
            self._study.tell(trial, state=trial_state("PRUNED"))
        else:
            self._study.tell(trial, [value, *self._objectives(candidate.costs)])

    @plain_study_errors
    def give_up(self, candidate: Candidate, *, seconds: float, run_id: str) -> str:
        """Tell the study that a candidate was ended by `check`; return why.

        It counts among the trials of the study, and is never chosen.
        """
        checks = self._running[candidate.number][0].user_attrs[CHECKS]
        number = max(checks, key=int)
        reason = f"given up at check {number} with {checks[number]:.4f}: clearly behind what is as cheap"
        attrs = {SECONDS: seconds, RUN_ID: run_id, HOPELESS: True, REASON: reason}
        self._study.tell(self._end(candidate.number, attrs), state=trial_state("PRUNED"))
        return reason

    @plain_study_errors
    def fail(self, candidate: Candidate, reason: str, *, again: int | None = None) -> None:
        """Tell the study that a candidate could not be trained or scored.

        Args:
            candidate: From `next_candidate`.
            reason: What went wrong.
            again: How often the same parameters may be tried again after such a failure. Then they count as tried, and
                the trial among those of the study. 0: they fail the same way each time. None: it was not their fault.
        """
        trial = self._end(candidate.number, {REASON: reason[:500]})
        if again is not None:
            mine = trial.user_attrs[PARAMS]
            failed = [other.user_attrs for other in self._trials("FAIL") if REASON in other.user_attrs]
            if sum(attrs.get(PARAMS) == mine for attrs in failed) >= again:
                trial.set_user_attr(BROKEN, True)
        self._study.tell(trial, state=trial_state("FAIL"))

    @contextmanager
    def alone(self, what: str, *, wait: bool = True) -> Iterator[bool]:
        """Do what is called `what` in one process of the study at a time.

        Args:
            what: Its name.
            wait: For the others; else it yields false while one of them is at it.
        """
        with claim(self._study, f"{self.name}: {what}", wait=wait) as is_ours:
            yield is_ours

    def _base_was_tried(self) -> bool:
        """Whether the base is being trained, was trained, cannot be, or is too dear as the limits are now."""
        if any(trial.user_attrs.get(BASE) for trial in self._broken()):
            return True
        return any(
            trial.state == trial_state("RUNNING") or RUN_ID in trial.user_attrs or self._excess(trial)
            for trial in self._trials("COMPLETE", "PRUNED", "RUNNING")
            if trial.user_attrs.get(BASE)
        )

    def _draw(self, *, as_base: bool) -> tuple[Trial, TrainParams]:
        if as_base and not self._trials("WAITING"):
            self._study.enqueue_trial(self._base_inside, user_attrs={BASE: True})
        with quiet_optuna():
            # A small budget must not be spent on chance.
            self._study.sampler = make_sampler(self._params.seed, min(10, max(4, self._params.trials // 3)))
            trial = self._study.ask()
            sign_trial(trial)
            # Of the base, what lies outside the space is not told to the sampler: it must not draw it again.
            is_base = trial.user_attrs.get(BASE)
            known = self._base_inside if is_base else self._distributions
            values = {name: suggest(trial, name, self._distributions[name]) for name in known}
        params = self._base.model_copy(update=values if is_base else self._given | values)
        trial.set_user_attr(PARAMS, params.model_dump(mode="json"))
        return trial, params

    def _is_superfluous(self, number: int, *, base: bool) -> bool:
        """Whether processes that drew at the same moment have the base, or all trials that were left, already."""
        earlier = [trial for trial in self._trials("RUNNING") if trial.number < number]
        if base and any(trial.user_attrs.get(BASE) for trial in earlier):
            return True
        return len(earlier) + self._done >= self._params.trials

    def _is_known(self, number: int, params: TrainParams) -> bool:
        wanted = params.model_dump(mode="json")
        known = [*self._trials("COMPLETE", "RUNNING"), *self._hopeless(), *self._broken()]
        return any(trial.user_attrs.get(PARAMS) == wanted for trial in known if trial.number != number)

    def _fits(self, params: TrainParams, deadline: float) -> bool:
        return (self.predict_seconds(params) or 0.0) * COST_MARGIN <= deadline - time.monotonic()

    def _admit(self, trial: Trial, params: TrainParams, *, base: bool) -> bool:
        """Whether the candidate may be trained: there is such a model, and it is within the limits of cost."""
        try:
            precision, costs = self._prices.price(params)
        except (ParamsError, UnsupportedModelError) as error:
            if base:
                self._skip(trial, str(error))
                raise
            self._reject(trial, {"there is no such model": 1.0}, str(error))
            return False
        except BaseException as error:
            self._skip(trial, str(error))
            raise
        trial.set_user_attr(COSTS, costs)
        trial.set_user_attr(PRECISION, precision)
        excess = self._excess(trial)
        if excess:
            self._reject(trial, self._constraints(costs), "; ".join(excess))
        else:
            _constrain(trial, self._constraints(costs))
        return not excess

    def _constraints(self, costs: Costs) -> dict[str, float]:
        return {name: costs[name] / limit - 1 for name, limit in self._limits.items() if name in costs}

    def _reject(self, trial: Trial, constraints: Mapping[str, float], reason: str) -> None:
        _constrain(trial, constraints)
        trial.set_user_attr(INFEASIBLE, True)
        trial.set_user_attr(REASON, reason[:500])
        self._study.tell(trial, state=trial_state("PRUNED"))

    def _skip(self, trial: Trial, why: str) -> None:
        # Failed, not pruned: the sampler leaves failed trials out, but would take pruned ones for bad parameters.
        trial.set_user_attr(SKIPPED, why[:500])
        self._study.tell(trial, state=trial_state("FAIL"))

    def _start(self, trial: Trial, params: TrainParams) -> Candidate:
        stack = ExitStack()
        stack.enter_context(heartbeat(self._study, trial))
        self._running[trial.number] = (trial, stack)
        self._started += 1
        return Candidate(trial.number, params, trial.user_attrs[COSTS], trial.user_attrs[PRECISION])

    def _end(self, number: int, attrs: Mapping[str, Any]) -> Trial:
        trial, stack = self._running.pop(number)
        stack.close()
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        return trial


def _constrain(trial: Trial, constraints: Mapping[str, float]) -> None:
    """Tell the sampler how far a trial is from what is allowed; 0 or less is feasible."""
    with quiet_optuna():
        for name, value in constraints.items():
            trial.set_constraint(name, value)
