"""The load of the near future: several simple models run side by side, and the one that was right of late is believed.

Each model forecasts so many steps ahead at every observation and is judged by its forecasts that have come due, by the
sum of their errors (over the same values that ranks as the mean absolute percentage error does, and survives zeros).
Another model takes over only when it is clearly better.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_MEMORY = 64  # forecasts that a model is judged by
_CLEARLY = 0.9  # of the believed model's error: what another must stay below to take over
_MIN_JUDGED = 5


class LoadModel(Protocol):
    """Forecasts a series of values >= 0 taken at even steps."""

    name: str

    def observe(self, value: float) -> None:
        """The next value."""
        ...

    def predict(self, num_steps: int) -> float:
        """The value `num_steps` after the last one."""
        ...


class Constant:
    """It stays as it is."""

    name = "constant"

    def __init__(self) -> None:
        self._value = 0.0

    def observe(self, value: float) -> None:
        self._value = value

    def predict(self, num_steps: int) -> float:
        return self._value


class MovingAverage:
    """It goes back to its mean of late."""

    name = "moving_average"

    def __init__(self, window: int = 12) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> None:
        self._values.append(value)

    def predict(self, num_steps: int) -> float:
        return sum(self._values) / len(self._values) if self._values else 0.0


class Holt:
    """A level and a trend, both smoothed (C. Holt, 1957); the trend is damped, so that it does not run away."""

    name = "holt"

    def __init__(self, alpha: float = 0.4, beta: float = 0.15, damping: float = 0.95) -> None:
        self._alpha, self._beta, self._damping = alpha, beta, damping
        self._level: float | None = None
        self._trend = 0.0

    def observe(self, value: float) -> None:
        if self._level is None:
            self._level = value
            return
        before = self._level
        ahead = before + self._damping * self._trend
        self._level = ahead + self._alpha * (value - ahead)
        self._trend = self._beta * (self._level - before) + (1 - self._beta) * self._damping * self._trend

    def predict(self, num_steps: int) -> float:
        if self._level is None:
            return 0.0
        reach = self._damping * (1 - self._damping**num_steps) / (1 - self._damping)
        return max(0.0, self._level + reach * self._trend)


class Kalman:
    """A level and a trend, weighed by how much noise there is (R. Kalman, 1960)."""

    name = "kalman"

    def __init__(self, level_noise: float = 1.0, trend_noise: float = 0.1, value_noise: float = 10.0) -> None:
        self._noise = np.diag([level_noise, trend_noise])
        self._value_noise = value_noise
        self._move = np.array([[1.0, 1.0], [0.0, 1.0]])
        self._state = np.zeros(2)
        self._covariance = np.eye(2) * 1e3

    def observe(self, value: float) -> None:
        self._state = self._move @ self._state
        self._covariance = self._move @ self._covariance @ self._move.T + self._noise
        gain = self._covariance[:, 0] / (self._covariance[0, 0] + self._value_noise)
        self._state = self._state + gain * (value - self._state[0])
        self._covariance = self._covariance - np.outer(gain, self._covariance[0])

    def predict(self, num_steps: int) -> float:
        return max(0.0, float(self._state[0] + num_steps * self._state[1]))


class Seasonal:
    """As it was a season ago (a day, say), at today's level; as it is, while no season is over."""

    name = "seasonal"

    def __init__(self, period: int) -> None:
        self._period = period
        self._values: deque[float] = deque(maxlen=2 * period)

    def observe(self, value: float) -> None:
        self._values.append(value)

    def predict(self, num_steps: int) -> float:
        values = self._values
        if len(values) <= self._period:
            return values[-1] if values else 0.0
        now = len(values) - 1
        then = values[now + (num_steps - 1) % self._period + 1 - self._period]
        width = max(1, min(self._period // 24, len(values) - self._period))
        today = sum(values[now - i] for i in range(width))
        that_day = sum(values[now - i - self._period] for i in range(width))
        return then * (today / that_day) if that_day > 0 else then


class _Judge:
    """How right one model was, `horizon` steps ahead."""

    def __init__(self, model: LoadModel, horizon: int) -> None:
        self.model = model
        self._horizon = horizon
        self._due: deque[float] = deque(maxlen=horizon)
        self.errors: deque[float] = deque(maxlen=_MEMORY)  # observed - forecast

    def observe(self, value: float) -> None:
        if len(self._due) == self._horizon:
            self.errors.append(value - self._due[0])
        self.model.observe(value)
        self._due.append(self.model.predict(self._horizon))

    def look_ahead(self, horizon: int) -> None:
        self._horizon = horizon
        self._due = deque(maxlen=horizon)

    @property
    def error(self) -> float:
        return sum(map(abs, self.errors)) / max(1, len(self.errors))


class Forecaster:
    """Believes the model that was right of late. `horizon` is how many steps ahead its forecasts are meant for."""

    def __init__(
        self, horizon: int = 1, *, models: Sequence[LoadModel] | None = None, period: int | None = None
    ) -> None:
        if models is None:
            models = [Constant(), MovingAverage(), Holt(), Kalman()]
            if period is not None:
                models.append(Seasonal(period))
        self._horizon = max(1, horizon)
        self._judges = [_Judge(model, self._horizon) for model in models]
        self._believed = self._judges[0]

    @property
    def model(self) -> str:
        """The name of the model that is believed."""
        return self._believed.model.name

    def look_ahead(self, horizon: int) -> None:
        """Forecast so many steps ahead from now on."""
        if horizon != self._horizon:
            self._horizon = horizon
            for judge in self._judges:
                judge.look_ahead(horizon)

    def observe(self, value: float) -> None:
        """The next value of the series."""
        for judge in self._judges:
            judge.observe(value)
        if len(self._believed.errors) >= _MIN_JUDGED:
            best = min(self._judges, key=lambda judge: judge.error)
            if best.error < _CLEARLY * self._believed.error:
                self._believed = best

    def mean(self) -> float:
        """What is expected at the horizon."""
        return self._believed.model.predict(self._horizon)

    def quantile(self, share: float) -> float:
        """What will not be exceeded with this probability, as far as the errors of late tell; at least the mean."""
        errors = self._believed.errors
        if len(errors) < _MIN_JUDGED:
            return self.mean()
        return self.mean() + max(0.0, float(np.quantile(errors, share)))
