"""What a study holds so far: its trials, their costs, the front, and the one that the policy takes. Core layer.

The half of a search that only reads. Limits of cost and the policy are applied to what was measured, whenever it is
asked for, so a study may be looked at under others than it was made with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.forecast import Forecast
from flows.core.front import TRIAL, Point, choose, pareto_front
from flows.core.processes import identify_process, is_alive
from flows.core.studies import OWNER, REASON, open_study, plain_study_errors, trial_state
from flows.errors import EkibenError, ParamsError
from flows.params import TrainParams, TuneParams

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# User attributes of a trial. Optuna's own parameters hold only what the space varies.
PARAMS = "params"
BASE = "base"
VALUE = "value"  # of a trial with a final score
SECONDS = "seconds"
RUN_ID = "run_id"
COSTS = "costs"
PRECISION = "precision"  # that the costs, and the final score, are of
CHECKS = "checks"  # number of the check -> dev metric
SKIPPED = "skipped"  # drawn, never started
INFEASIBLE = "infeasible"  # likewise, since there is no such model or it would cost too much
HOPELESS = "hopeless"  # given up in the middle
BROKEN = "broken"  # failed, and would fail again

Costs = dict[str, float]


@dataclass(frozen=True)
class Best:
    """The trial that the policy takes, of those so far."""

    number: int
    params: TrainParams
    value: float
    run_id: str
    costs: Costs = field(default_factory=dict)


class Standings:
    """The trials of one study, as they stand."""

    def __init__(self, storage: str | Path, *, name: str, params: TuneParams) -> None:
        """Open the study, or create it.

        Args:
            storage: Database URL, or path of a journal file.
            name: From `study_name`.
            params: Costs, limits of cost, and policy.

        Raises:
            ParamsError: the storage cannot be opened.
        """
        self.name = name
        self._params = params
        self._costs = tuple(dict.fromkeys(params.costs))
        self._limits = params.cost_limits
        self._study = open_study(storage, name=name, costs=len(self._costs))

    @property
    def finished_trials(self) -> int:
        """Trials that were trained to their end and scored, in all calls."""
        return len(self._trials("COMPLETE"))

    @property
    def hopeless_trials(self) -> int:
        """Trials that were given up in the middle, in all calls."""
        return len(self._hopeless())

    @property
    def broken_trials(self) -> int:
        """Trials that failed by themselves and would fail again, in all calls."""
        return len(self._broken())

    def best(self) -> Best:
        """The trial that the policy takes.

        Raises:
            ParamsError: every candidate costs more than the limits allow, or the policy names a trial that is not
                there.
            EkibenError: none was scored yet.
        """
        best = self.best_or_none()
        if best is not None:
            return best
        dear = [trial.user_attrs[REASON] for trial in self._trials("PRUNED") if INFEASIBLE in trial.user_attrs]
        dear += ["; ".join(self._excess(trial)) for trial in self._trials("COMPLETE")]
        if dear:
            raise ParamsError(
                f"no trial of study {self.name} is within the limits of cost (of {len(dear)}, the last: {dear[-1]}): "
                "raise the limit, or give tune.space smaller models (layers, dimensions, precision)"
            )
        broken = self._broken()
        if broken:
            raise EkibenError(
                f"no trial of study {self.name} was scored; {len(broken)} failed and would fail again (the last: "
                f"{broken[-1].user_attrs[REASON]}): correct the base parameters or the space, or raise tune.trials"
            )
        raise EkibenError(f"no trial of study {self.name} was scored; look at why they failed, then run it again")

    @plain_study_errors
    def best_or_none(self) -> Best | None:
        """Like `best`, None when no trial was scored yet.

        Raises:
            ParamsError: the policy names a trial that is not there.
        """
        for state in ("COMPLETE", "PRUNED"):
            scored = self._scored(state)
            if scored:
                points = [self._point(trial) for trial in scored.values()]
                chosen = choose(points, self._params.policy, min_improvement=self._params.min_improvement)
                attrs = scored[chosen.number].user_attrs
                return Best(
                    chosen.number, TrainParams(**attrs[PARAMS]), attrs[VALUE], attrs[RUN_ID], attrs.get(COSTS, {})
                )
        if self._params.policy.startswith(TRIAL):
            raise ParamsError(
                f"tune.policy asks for {self._params.policy}, but the study {self.name} has no finished trial within "
                "its limits of cost: run it with another policy first, and look at its front"
            )
        return None

    @plain_study_errors
    def front(self) -> list[Point]:
        """The finished trials that no other one beats in quality and cost together, cheapest first."""
        return pareto_front(self.finished())

    @plain_study_errors
    def finished(self) -> list[Point]:
        """The trials that were trained to their end and are within the limits of cost, cheapest first."""
        points = [self._point(trial) for trial in self._scored("COMPLETE").values()]
        return sorted(points, key=lambda point: (point.log_cost, point.quality, point.number))

    @plain_study_errors
    def run_ids(self, *, of_others: bool = True) -> dict[int, str]:
        """Number of a trial that was trained, to its end or not -> its run.

        Args:
            of_others: Also those of other processes that still live.
        """
        trained = [trial for trial in self._trials("COMPLETE", "PRUNED") if RUN_ID in trial.user_attrs]
        return {trial.number: trial.user_attrs[RUN_ID] for trial in trained if of_others or not _is_of_other(trial)}

    @plain_study_errors
    def rows(self) -> list[dict[str, Any]]:
        """One row a trial, for a table: number, state, whether on the front, value, costs, seconds, run, params, note.

        Of the parameters only those that the space may vary; of the precision `auto`, what it was priced and scored in.
        """
        front = {point.number for point in self.front()}
        varied = type(self._params.space).model_fields
        rows = []
        for trial in self._study.get_trials(deepcopy=False):
            attrs = trial.user_attrs
            if SKIPPED in attrs or PARAMS not in attrs:
                continue  # drawn, never started
            state = "infeasible" if INFEASIBLE in attrs else trial.state.name.lower()
            row = {"trial": trial.number, "state": state, "front": trial.number in front, VALUE: attrs.get(VALUE)}
            row |= {cost: attrs.get(COSTS, {}).get(cost) for cost in dict.fromkeys([*self._costs, *self._limits])}
            row |= {name: attrs.get(name) for name in (SECONDS, RUN_ID)}
            row |= {name: attrs[PARAMS][name] for name in varied}
            row[PRECISION] = attrs.get(PRECISION, row[PRECISION])
            rows.append(row | {"note": attrs.get(REASON, "the base" if attrs.get(BASE) else "")})
        return rows

    def predict_seconds(self, params: TrainParams) -> float | None:
        """How long a trial with `params` will take, by those that were trained; None before the first."""
        forecast = Forecast()
        for trial in self._trials("COMPLETE", "PRUNED"):
            if VALUE in trial.user_attrs:
                # The wall clock also saw loading and scoring. (What was cut off would have taken at least as long.)
                wall_s = trial.duration.total_seconds() if trial.duration else 0.0
                seconds = max(trial.user_attrs.get(SECONDS, 0.0), wall_s)
                forecast.learn(TrainParams(**trial.user_attrs[PARAMS]), seconds)
        return forecast.predict(params)

    def _trials(self, *states: str) -> list[FrozenTrial]:
        wanted = tuple(trial_state(state) for state in states)
        trials: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=wanted)
        return trials

    def _hopeless(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials("PRUNED") if HOPELESS in trial.user_attrs]

    def _broken(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials("FAIL") if BROKEN in trial.user_attrs]

    def _scored(self, state: str) -> dict[int, FrozenTrial]:
        """Trials with a final score whose costs are within the limits, as these are now."""
        trials = [trial for trial in self._trials(state) if VALUE in trial.user_attrs]
        return {trial.number: trial for trial in trials if not self._excess(trial)}

    def _point(self, trial: FrozenTrial) -> Point:
        attrs = trial.user_attrs
        return Point(trial.number, attrs[VALUE], self._objectives(attrs.get(COSTS, {})), bool(attrs.get(BASE)))

    def _objectives(self, costs: Costs) -> tuple[float, ...]:
        """The costs that are minimised, in their order."""
        return tuple(costs[name] for name in self._costs)

    def _excess(self, trial: FrozenTrial) -> list[str]:
        """What costs more than allowed, or was never measured, each with its figures."""
        costs: Costs = trial.user_attrs.get(COSTS, {})
        excess = []
        for name, limit in self._limits.items():
            if name not in costs:
                cure = f"name it in tune.costs, which begins a new study, or leave out tune.max_{name}"
                excess.append(f"{name} was never measured, allowed {limit:g}; {cure}")
            elif costs[name] > limit:
                excess.append(f"{name} {costs[name]:g}, allowed {limit:g} (tune.max_{name})")
        return excess


def _is_of_other(trial: FrozenTrial) -> bool:
    owner, ours = trial.user_attrs.get(OWNER), identify_process()
    return owner is not None and (owner["host"], owner["pid"]) != (ours["host"], ours["pid"]) and is_alive(owner)
