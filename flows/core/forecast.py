"""How long a trial will take, by those that were trained before it. Core layer, pure."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from flows.params import TrainParams


@dataclass
class Forecast:
    """Seconds for each unit of work, by model: base model and layers kept."""

    rates: dict[tuple[str, int | None], list[float]] = field(default_factory=dict)

    def learn(self, params: TrainParams, seconds: float) -> None:
        """Take note of a trial that was trained to its end."""
        self.rates.setdefault((params.base_model, params.layers), []).append(seconds / _work(params))

    def predict(self, params: TrainParams) -> float | None:
        """Seconds that a trial will take; None when nothing was learned yet.

        Trials of the same model are the measure; without one, the slowest of the same base model, then of all.
        """
        if not self.rates:
            return None
        typical = {model: statistics.median(rates) for model, rates in self.rates.items()}
        same = (params.base_model, params.layers)
        if same in typical:
            return _work(params) * typical[same]
        kin = [rate for (base_model, _), rate in typical.items() if base_model == params.base_model]
        return _work(params) * max(kin or typical.values())


def _work(params: TrainParams) -> float:
    # Attention aside, work grows with the tokens that are really there: between "all texts shorter than the cap" (no
    # growth) and "all longer" (linear) the square root is a fair middle.
    steps = params.steps + (params.distill_steps if params.layers is not None else 0)
    return steps * params.batch_size * math.sqrt(params.max_tokens)
