"""The ledger: whatever is booked is booked out again, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sagellm_control_plane.fleet import Booking, Fleet, prefill_attention
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_protocol import InvalidArgumentError

LEDGER = ("num_requests", "num_queued", "queued_tokens", "queued_attention", "num_decoding", "kv_tokens", "held_tokens")


def sums(fleet: Fleet) -> dict[str, float]:
    return {name: float(getattr(fleet, name).sum()) for name in LEDGER}


def test_a_booking_goes_from_the_queue_to_decoding_and_out() -> None:
    fleet = Fleet()
    row = fleet.add("a", capacity=4)
    booking = Booking(100, num_cached_tokens=40, num_sequences=2)
    fleet.grant(row, booking)
    assert sums(fleet) == {
        "num_requests": 1,
        "num_queued": 1,
        "queued_tokens": 60,
        "queued_attention": 60 * 40 + 60 * 60 / 2,
        "num_decoding": 0,
        "kv_tokens": 0,
        "held_tokens": 100,
    }
    fleet.advance(booking, 2)
    fleet.advance(booking, 3)
    assert sums(fleet) == {
        "num_requests": 1,
        "num_queued": 0,
        "queued_tokens": 0,
        "queued_attention": 0,
        "num_decoding": 2,
        "kv_tokens": 205,
        "held_tokens": 105,
    }
    fleet.end(booking)
    assert not any(sums(fleet).values())


def test_attention_is_the_same_however_the_prefill_is_cut() -> None:
    chunks = [(40, 25), (65, 30), (95, 5)]  # context before, tokens
    assert sum(p * (context + p / 2) for context, p in chunks) == prefill_attention(100, 60)


def test_a_booking_of_an_engine_that_left_touches_nobody_else() -> None:
    fleet = Fleet()
    booking = Booking(10)
    row = fleet.add("a")
    fleet.grant(row, booking)
    fleet.remove(row)
    assert fleet.add("b") == row
    fleet.grant(row, Booking(7))
    before = sums(fleet)
    fleet.advance(booking, 5)
    fleet.end(booking)
    assert sums(fleet) == before


def test_rows_grow_and_are_used_again() -> None:
    fleet = Fleet()
    rows = [fleet.add(f"engine-{i}", price=i, group="z/h") for i in range(200)]
    assert sorted(rows) == list(range(200))
    assert [fleet.engine_id(row) for row in fleet.rows()] == [fleet.engine_id(row) for row in range(200)]
    assert fleet.price[fleet.row_of("engine-150")] == 150
    fleet.remove(fleet.row_of("engine-3"))
    assert len(fleet) == 199
    with pytest.raises(KeyError):
        fleet.row_of("engine-3")
    with pytest.raises(InvalidArgumentError, match="'engine-4' has a row already"):
        fleet.add("engine-4")


def test_coefficients_are_those_last_learned() -> None:
    fleet = Fleet()
    row = fleet.add("a")
    assert fleet.c0[row] > 0, "a cold engine has an estimate"
    fleet.set_coefficients(row, StepCoefficients(1, 2, 3, 4, 5))
    assert [column[row] for column in (fleet.c0, fleet.a, fleet.q, fleet.k, fleet.b)] == [1, 2, 3, 4, 5]


class Ledger(RuleBasedStateMachine):
    """Any history of engines and bookings, against sums made anew from the bookings alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.live: dict[Booking, int] = {}
        self.stale: list[Booking] = []
        self.num_added = 0

    @rule()
    def add(self) -> None:
        self.fleet.add(f"engine-{self.num_added}")
        self.num_added += 1

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if rows := self.fleet.rows().tolist():
            row = data.draw(st.sampled_from(rows))
            self.fleet.remove(row)
            gone = [booking for booking, where in self.live.items() if where == row]
            self.stale += gone
            for booking in gone:
                del self.live[booking]

    @rule(data=st.data(), prompt=st.integers(1, 10**6), sequences=st.integers(1, 8))
    def grant(self, data: st.DataObject, prompt: int, sequences: int) -> None:
        if rows := self.fleet.rows().tolist():
            booking = Booking(prompt, data.draw(st.integers(0, prompt - 1)), sequences)
            row = data.draw(st.sampled_from(rows))
            self.fleet.grant(row, booking)
            self.live[booking] = row

    @rule(data=st.data(), num_tokens=st.integers(0, 5000))
    def advance(self, data: st.DataObject, num_tokens: int) -> None:
        if bookings := [*self.live, *self.stale]:
            self.fleet.advance(data.draw(st.sampled_from(bookings)), num_tokens)

    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        if bookings := [*self.live, *self.stale]:
            self.fleet.first_token(data.draw(st.sampled_from(bookings)))

    @rule(data=st.data(), twice=st.booleans())
    def end(self, data: st.DataObject, twice: bool) -> None:
        if bookings := [*self.live, *self.stale]:
            booking = data.draw(st.sampled_from(bookings))
            self.fleet.end(booking)
            if twice:
                self.fleet.end(booking)
            self.live.pop(booking, None)

    @invariant()
    def columns_are_the_sums_of_their_bookings(self) -> None:
        expected = {name: np.zeros(self.fleet.size) for name in LEDGER}
        for booking, row in self.live.items():
            waits = not booking.is_decoding
            expected["num_requests"][row] += 1
            expected["num_queued"][row] += waits
            expected["queued_tokens"][row] += waits * booking.num_uncached_tokens
            expected["queued_attention"][row] += waits * booking.attention
            expected["held_tokens"][row] += booking.num_prompt_tokens + booking.num_tokens
            if booking.is_decoding:
                expected["num_decoding"][row] += booking.num_sequences
                expected["kv_tokens"][row] += booking.num_prompt_tokens * booking.num_sequences + booking.num_tokens
        for name in LEDGER:
            np.testing.assert_array_equal(getattr(self.fleet, name), expected[name], name)

    def teardown(self) -> None:
        for booking in self.live:
            self.fleet.end(booking)
        assert not any(sums(self.fleet).values())


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
