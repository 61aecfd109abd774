from __future__ import annotations

import pytest

from flows.core.forecast import Forecast
from flows.params import TrainParams

SMALL = TrainParams(base_model="small", steps=60, distill_steps=40)


def test_nothing_is_known_before_the_first_trial() -> None:
    assert Forecast().predict(SMALL) is None


def test_the_same_model_is_the_measure_and_the_slowest_kin_where_there_is_none() -> None:
    forecast = Forecast()
    forecast.learn(SMALL, 60.0)
    forecast.learn(SMALL.model_copy(update={"base_model": "large"}), 600.0)
    assert forecast.predict(SMALL.model_copy(update={"steps": 120})) == pytest.approx(120.0)
    assert forecast.predict(SMALL.model_copy(update={"max_tokens": 32})) == pytest.approx(30.0)
    assert forecast.predict(SMALL.model_copy(update={"base_model": "unknown"})) == pytest.approx(600.0)
    cut = SMALL.model_copy(update={"layers": 2})
    assert forecast.predict(cut) == pytest.approx(100.0)  # as the whole one, and its distillation
    forecast.learn(cut, 50.0)
    assert forecast.predict(cut) == pytest.approx(50.0)
    assert forecast.predict(SMALL) == pytest.approx(60.0)
    assert forecast.predict(SMALL.model_copy(update={"layers": 1})) == pytest.approx(100.0)


def test_one_odd_trial_does_not_make_the_forecast() -> None:
    forecast = Forecast()
    for seconds in (60.0, 62.0, 900.0):
        forecast.learn(SMALL, seconds)
    assert forecast.predict(SMALL) == pytest.approx(62.0)
