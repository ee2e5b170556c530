"""Rate limits: how much a caller may still ask for, in a window that moves.

A `Window` counts in steps of one second, so its size is the same for one request a minute and for a million. It never
lets more than its limit pass in any 60 seconds (one step may be waited longer than needed), and what was booked can be
corrected, because an answer's tokens are known only at its end. A `Meter` is the windows of one caller, or of all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sagellm_gateway.keys import RateLimits
from sagellm_protocol import ResourceExhaustedError, UnavailableError

WINDOW_S = 60

Clock = Callable[[], float]


@dataclass(slots=True)
class _Step:
    second: int
    amount: int


class Window:
    """At most `limit` units in any `WINDOW_S` seconds. `clock` counts seconds."""

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._steps: deque[_Step] = deque()
        self._used = 0

    @property
    def remaining(self) -> int:
        """Units that may be booked now."""
        self._forget(self._clock())
        return max(0, self.limit - self._used)

    def wait_for(self, amount: int) -> float:
        """Seconds until `amount` units may be booked; 0 if they may be now. More than the limit waits for it all."""
        if self._used + amount <= self.limit:
            return 0.0  # whatever has left the window since then
        now = self._clock()
        self._forget(now)
        missing, wait = self._used + min(amount, self.limit) - self.limit, 0.0
        for step in self._steps:
            if missing <= 0:
                break
            missing -= step.amount
            wait = step.second + WINDOW_S + 1 - now
        return wait

    def book(self, amount: int) -> int:
        """Count `amount` units, whether they fit or not; returns the step to correct them by."""
        now = self._clock()
        second, steps = int(now), self._steps
        if not steps or steps[-1].second != second:
            self._forget(now)
            steps.append(_Step(second, 0))
        steps[-1].amount += amount
        self._used += amount
        return second

    def correct(self, second: int, change: int) -> None:
        """Add `change` to what was booked in a step; nothing if that has left the window."""
        for step in reversed(self._steps):
            if step.second == second:
                step.amount += change
                self._used += change
                return
            if step.second < second:
                return

    def figures(self) -> tuple[int, float]:
        """What `remaining` is, and seconds until nothing is booked any more."""
        now, steps = self._clock(), self._steps
        self._forget(now)
        reset_s = max(0.0, steps[-1].second + WINDOW_S + 1 - now) if steps else 0.0
        return max(0, self.limit - self._used), reset_s

    def _forget(self, now: float) -> None:
        steps = self._steps
        while steps and steps[0].second + WINDOW_S + 1 <= now:
            self._used -= steps.popleft().amount


class Meter:
    """What one caller has in work and has asked for lately. `who` is how messages call it."""

    def __init__(self, limits: RateLimits, who: str, *, is_total: bool = False, clock: Clock = time.monotonic) -> None:
        self.requests = None if limits.requests_per_minute is None else Window(limits.requests_per_minute, clock)
        self.tokens = None if limits.tokens_per_minute is None else Window(limits.tokens_per_minute, clock)
        self.max_concurrent = limits.max_concurrent
        self.num_running = 0
        self._who = who
        self._is_total = is_total

    @property
    def has_limits(self) -> bool:
        """Whether it counts anything that can be too much."""
        return any(limit is not None for limit in (self.requests, self.tokens, self.max_concurrent))

    def check(self) -> None:
        """Raise `ResourceExhaustedError` if one more request is too much now (`UnavailableError` for all together)."""
        if self.max_concurrent is not None and self.num_running >= self.max_concurrent:
            text = f"{self._who} may have {self.max_concurrent} requests in work at the same time; try again later"
            raise UnavailableError(text) if self._is_total else ResourceExhaustedError(text)
        if self.requests is not None:
            self._check(self.requests, 1, "requests")
        if self.tokens is not None:
            self._check(self.tokens, 1, "tokens")

    def check_tokens(self, amount: int) -> None:
        """Raise `ResourceExhaustedError` if so many tokens are too much now."""
        if self.tokens is not None:
            self._check(self.tokens, amount, "tokens")

    def enter(self) -> None:
        """Count a request in; `leave` counts it out of those in work."""
        self.num_running += 1
        if self.requests is not None:
            self.requests.book(1)

    def leave(self) -> None:
        """See `enter`."""
        self.num_running -= 1

    def _check(self, window: Window, amount: int, unit: str) -> None:
        wait = window.wait_for(amount)
        if wait > 0:
            raise ResourceExhaustedError(
                f"{self._who} may ask for {window.limit} {unit} a minute and has {window.remaining} left, this asks "
                f"for {amount}; try again in {wait:.0f} s",
                retry_after_s=wait,
            )
