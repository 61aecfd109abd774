"""What the candidates of a study cost: each architecture is measured once, for all its processes. Core layer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from flows.core.claims import claim
from flows.core.studies import name_architecture
from flows.errors import ParamsError, UnsupportedModelError
from flows.params import TrainParams

if TYPE_CHECKING:
    from optuna import Study

Costs = dict[str, float]
BY_PRECISION = {"p95_ms", "memory_mb"}  # costs that hang on the precision
UNUSABLE = "unusable"  # in place of the costs of an architecture: why there is no such model


class Prices:
    """The costs that a study has measured, kept with it, and a way to measure more."""

    def __init__(
        self,
        study: Study,
        wanted: Collection[str],
        measure: Callable[[TrainParams], Costs] | None,
        *,
        min_speedup: float,
    ) -> None:
        """Prepare; nothing is measured yet.

        Args:
            study: Where the figures are kept.
            wanted: Names of the costs that are needed.
            measure: Measures one candidate; None: nothing costs anything.
            min_speedup: `auto` is taken to be served in int8 when fp32 takes at least this many times as long.
        """
        self._study = study
        self._wanted = frozenset(wanted)
        self._measure = measure
        self._min_speedup = min_speedup

    def price(self, params: TrainParams) -> tuple[str, Costs]:
        """Return the precision that a candidate is taken to be served in, and what it costs in that.

        `auto` stays `auto` when no cost hangs on the precision.

        Raises:
            ParamsError, UnsupportedModelError: there is no such model.
        """
        if params.precision != "auto" or self._wanted.isdisjoint(BY_PRECISION):
            return params.precision, self.look_up(params)
        fp32 = self.look_up(params.model_copy(update={"precision": "fp32"}))
        try:
            int8 = self.look_up(params.model_copy(update={"precision": "int8"}))
        except UnsupportedModelError:
            return "fp32", fp32
        faster = fp32["p95_ms"] >= self._min_speedup * int8["p95_ms"]  # measured together with every other one
        return ("int8", int8) if faster else ("fp32", fp32)

    def look_up(self, params: TrainParams) -> Costs:
        """Return what an architecture costs; measure it when no process of the study has, so that its trials all agree.

        Raises:
            ParamsError, UnsupportedModelError: there is no such model.
        """
        if self._measure is None:
            return {}
        key = name_architecture(params)
        known = self._known(key)
        if known is None:
            with claim(self._study, f"{self._study.study_name}: {key}"):
                known = self._known(key)
                if known is None:
                    try:
                        known = dict(self._measure(params))
                    except (ParamsError, UnsupportedModelError) as error:
                        known = {UNUSABLE: str(error)}
                    self._study.set_user_attr(key, known)
        if UNUSABLE in known:
            raise UnsupportedModelError(known[UNUSABLE])
        return known

    def _known(self, key: str) -> dict[str, Any] | None:
        known: dict[str, Any] | None = self._study.user_attrs.get(key)
        return known if known is not None and (UNUSABLE in known or self._wanted <= known.keys()) else None
