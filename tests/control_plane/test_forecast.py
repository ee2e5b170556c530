"""Forecasts of load: each model where it is at home, and the choice between them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.forecast import Constant, Forecaster, Holt, Kalman, LoadModel, MovingAverage, Seasonal


def feed(model: LoadModel, values: list[float]) -> LoadModel:
    for value in values:
        model.observe(value)
    return model


def test_each_model_at_home() -> None:
    assert feed(Constant(), [1, 5, 3]).predict(7) == 3
    assert feed(MovingAverage(4), [100, 1, 2, 3, 4]).predict(7) == 2.5
    ramp = [2.0 * i for i in range(200)]
    assert feed(Kalman(), ramp).predict(10) == pytest.approx(418, rel=0.02)
    assert 398 < feed(Holt(), ramp).predict(10) <= 418, "its trend is damped"
    day = [10 + 8 * math.sin(2 * math.pi * i / 48) for i in range(48)]
    louder = [2 * value for value in day]
    season = feed(Seasonal(48), day + louder[:20])
    assert season.predict(6) == pytest.approx(louder[25], rel=0.02), "yesterday's shape at today's level"
    assert season.predict(48 + 6) == pytest.approx(louder[25], rel=0.02)
    assert feed(Seasonal(48), [3, 4]).predict(5) == 4


@pytest.mark.parametrize(
    ("series", "right"),
    [
        ([50.0 + 3 * i for i in range(150)], {"kalman", "holt"}),
        ([50 + 20 * math.sin(2 * math.pi * i / 50) for i in range(300)], {"seasonal"}),
    ],
    ids=["a ramp", "waves"],
)
def test_the_right_model_is_believed(series: list[float], right: set[str]) -> None:
    forecaster = Forecaster(6, period=50)
    for value in series:
        forecaster.observe(value)
    assert forecaster.model in right


def test_noise_is_averaged_and_the_quantile_holds() -> None:
    rng = random.Random(3)
    forecaster, num_above, num = Forecaster(3), 0, 0
    pending: list[float] = []
    for step in range(800):
        value = rng.gauss(100, 15)
        if step > 100:
            num += 1
            num_above += value > pending[-3]
        forecaster.observe(value)
        pending.append(forecaster.quantile(0.9))
    assert forecaster.model == "moving_average"
    assert forecaster.mean() == pytest.approx(100, abs=12)
    assert 0.04 < num_above / num < 0.18, "a tenth should lie above"


def test_a_longer_look_ahead() -> None:
    forecaster = Forecaster(2)
    for value in range(100):
        forecaster.observe(float(value))
    near = forecaster.mean()
    forecaster.look_ahead(20)
    for value in range(100, 200):
        forecaster.observe(float(value))
    assert near == pytest.approx(101, abs=1)
    assert forecaster.mean() == pytest.approx(219, abs=6)


@given(st.lists(st.floats(0, 1e6), max_size=80), st.integers(1, 10), st.none() | st.integers(2, 20))
def test_forecasts_are_finite_and_never_negative(series: list[float], horizon: int, period: int | None) -> None:
    forecaster = Forecaster(horizon, period=period)
    for value in series:
        forecaster.observe(value)
        assert 0 <= forecaster.mean() <= forecaster.quantile(0.9) < math.inf
