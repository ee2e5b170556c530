"""Windows and meters: never more than the limit in any minute, whatever comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.keys import RateLimits
from sagellm_gateway.rates import WINDOW_S, Meter, Window
from sagellm_protocol import ResourceExhaustedError, UnavailableError


class Time:
    def __init__(self) -> None:
        self.now = 1000.5

    def __call__(self) -> float:
        return self.now


def test_a_window_fills_and_empties() -> None:
    time = Time()
    window = Window(10, time)
    window.book(6)
    assert (window.remaining, window.wait_for(4), window.wait_for(5) > 0) == (4, 0.0, True)
    time.now += 30
    window.book(4)
    assert window.remaining == 0
    assert window.wait_for(1) == pytest.approx(30.5)
    assert window.wait_for(7) == window.wait_for(1000) == pytest.approx(60.5)
    assert window.figures() == (window.remaining, pytest.approx(60.5))
    time.now += 30.5
    assert window.remaining == 6
    time.now += 100
    assert window.figures() == (10, 0.0)


def test_what_was_booked_can_be_corrected_while_it_counts() -> None:
    time = Time()
    window = Window(100, time)
    step = window.book(80)
    time.now += 10
    window.book(5)
    window.correct(step, -70)
    assert window.remaining == 85
    time.now += 55
    assert window.remaining == 95
    window.correct(step, 50)  # has left the window
    assert window.remaining == 95


@given(st.integers(1, 20), st.lists(st.tuples(st.floats(0, 40), st.integers(1, 25)), max_size=60))
def test_no_minute_has_more_than_the_limit(limit: int, calls: list[tuple[float, int]]) -> None:
    time, taken = Time(), []
    window = Window(limit, time)
    for pause, amount in calls:
        time.now += pause
        wait = window.wait_for(amount)
        assert 0 <= wait <= WINDOW_S + 1
        if wait == 0:
            window.book(min(amount, limit))
            taken.append((time.now, min(amount, limit)))
        else:
            time.now += wait
            assert window.wait_for(amount) == 0.0
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + WINDOW_S) <= limit


def test_a_window_stays_small() -> None:
    time = Time()
    window = Window(10**9, time)
    for _ in range(10_000):
        time.now += 0.1
        window.book(3)
    assert len(window._steps) <= WINDOW_S + 1


def test_a_meter_says_what_is_too_much_and_when_it_is_not() -> None:
    time = Time()
    meter = Meter(
        RateLimits(requests_per_minute=2, tokens_per_minute=10, max_concurrent=1), "the key 'ada'", clock=time
    )
    meter.check()
    meter.enter()
    with pytest.raises(ResourceExhaustedError, match="the key 'ada' may have 1 requests in work"):
        meter.check()
    meter.leave()
    meter.check_tokens(10)
    assert meter.tokens is not None
    meter.tokens.book(8)
    with pytest.raises(ResourceExhaustedError, match="10 tokens a minute and has 2 left, this asks for 3"):
        meter.check_tokens(3)
    meter.enter()
    meter.leave()
    with pytest.raises(ResourceExhaustedError, match="2 requests a minute") as caught:
        meter.check()
    time.now += caught.value.context["retry_after_s"]
    meter.check()


def test_all_together_are_turned_away_as_an_overload() -> None:
    meter = Meter(RateLimits(max_concurrent=1), "all callers together", is_total=True)
    meter.enter()
    with pytest.raises(UnavailableError):
        meter.check()
