"""A circuit breaker: an engine whose requests fail gets none for a while, then a few to try.

After Michael Nygard, *Release It!*: closed (all pass), open (none), half-open (one now and then, whose
outcome decides).
"""

from __future__ import annotations

from collections import deque

from sagellm_control_plane.clock import Clock
from sagellm_control_plane.lifecycle_config import BreakerConfig
from sagellm_protocol.model import ProtocolEnum

_MAX_OUTCOMES = 64


class BreakerState(ProtocolEnum):
    """What a breaker lets through: all, none, or a trial now and then."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Judges one engine by the outcomes it is told."""

    def __init__(self, config: BreakerConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=_MAX_OUTCOMES)
        self._open_until: float | None = None  # None: closed
        self._pause_s = config.open_s
        self._next_trial_at = 0.0
        self._num_successes = 0  # of trials, in a row

    @property
    def state(self) -> BreakerState:
        """At this moment; open becomes half-open by the passing of time."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self.is_open else BreakerState.HALF_OPEN

    @property
    def is_open(self) -> bool:
        """Whether the state is open."""
        return self._open_until is not None and self._clock.now() < self._open_until

    @property
    def allows(self) -> bool:
        """Whether a request may pass now."""
        if self._open_until is None:
            return True
        now = self._clock.now()
        return now >= self._open_until and now >= self._next_trial_at

    def enter(self) -> None:
        """A request passes. Behind a half-open breaker the next one has to wait."""
        if self._open_until is not None:
            self._next_trial_at = self._clock.now() + self._config.trial_interval_s

    def record(self, is_ok: bool) -> None:
        """A request or a probe ended well, or failed through the engine's fault."""
        if self._open_until is None:
            self._outcomes.append((self._clock.now(), is_ok))
            if not is_ok and self._has_failed_too_often():
                self._open()
        elif not self.is_open:  # while open, what ends now began before: no news
            self._judge_trial(is_ok)

    def reset(self) -> None:
        """Forget everything: closed."""
        self._outcomes.clear()
        self._open_until = None
        self._pause_s = self._config.open_s
        self._num_successes = 0

    def _has_failed_too_often(self) -> bool:
        since = self._clock.now() - self._config.window_s
        recent = [is_ok for at, is_ok in self._outcomes if at >= since]
        num_failures = recent.count(False)
        return num_failures >= self._config.failures_to_open and 2 * num_failures >= len(recent)

    def _judge_trial(self, is_ok: bool) -> None:
        if not is_ok:
            self._pause_s = min(2 * self._pause_s, self._config.max_open_s)
            self._open()
            return
        self._num_successes += 1
        if self._num_successes >= self._config.successes_to_close:
            self.reset()

    def _open(self) -> None:
        self._open_until = self._clock.now() + self._pause_s
        self._next_trial_at = self._open_until
        self._num_successes = 0
