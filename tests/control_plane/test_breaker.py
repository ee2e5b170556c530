"""The circuit breaker, on a clock that is moved by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.breaker import BreakerState, CircuitBreaker
from sagellm_control_plane.lifecycle_config import BreakerConfig


class HandClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, delay_s: float, /) -> None:
        raise AssertionError("a breaker waits for nobody")

    def call_later(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError("a breaker plans nothing")


CONFIG = BreakerConfig(failures_to_open=3, window_s=10, open_s=5, max_open_s=15, trial_interval_s=1)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def breaker(clock: HandClock) -> CircuitBreaker:
    return CircuitBreaker(CONFIG, clock)


def fail(breaker: CircuitBreaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.record(False)


def test_it_opens_after_failures_that_are_at_least_half(breaker: CircuitBreaker) -> None:
    for is_ok in (True, True, True, True, False, False, False):
        breaker.record(is_ok)
    assert breaker.state is BreakerState.CLOSED, "3 of 7 failed"
    breaker.record(False)
    assert breaker.state is BreakerState.OPEN, "4 of 8 failed"
    assert not breaker.allows


def test_old_failures_do_not_count(breaker: CircuitBreaker, clock: HandClock) -> None:
    fail(breaker, 2)
    clock.time += 11
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 1)
    assert breaker.state is BreakerState.OPEN


def test_trials_come_one_by_one_and_close_it(breaker: CircuitBreaker, clock: HandClock) -> None:
    fail(breaker)
    clock.time += 4.9
    assert not breaker.allows
    clock.time += 0.1
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.allows
    breaker.enter()
    assert not breaker.allows, "the next trial waits a second"
    clock.time += 1
    assert breaker.allows
    breaker.record(True)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.record(True)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED, "what was before is forgotten"


def test_a_failed_trial_opens_it_for_twice_as_long(breaker: CircuitBreaker, clock: HandClock) -> None:
    fail(breaker)
    for pause in (5, 10, 15, 15):
        clock.time += pause - 0.1
        assert breaker.state is BreakerState.OPEN
        breaker.record(True)  # began before it opened
        clock.time += 0.1
        assert breaker.state is BreakerState.HALF_OPEN
        breaker.record(True)
        breaker.record(False)
        assert breaker.state is BreakerState.OPEN


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from(["enter", "ok", "fail"])), max_size=60))
def test_it_never_locks_an_engine_out_for_ever(events: list[tuple[float, str]]) -> None:
    clock = HandClock()
    breaker = CircuitBreaker(CONFIG, clock)
    for delay, what in events:
        clock.time += delay
        if what == "enter":
            if breaker.allows:
                breaker.enter()
        else:
            breaker.record(what == "ok")
        if breaker.state is BreakerState.OPEN:
            assert not breaker.allows
        if breaker.state is BreakerState.CLOSED:
            assert breaker.allows
    clock.time += CONFIG.max_open_s + CONFIG.trial_interval_s
    assert breaker.allows
