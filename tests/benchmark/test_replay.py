"""What `benchmarks/replay.py` reads from noisy shares of objectives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from replay import highest_rate, together


def test_the_rate_is_found_between_those_that_were_tried() -> None:
    assert highest_rate({26: 0.97, 32: 0.92, 38: 0.88}) == pytest.approx(35)
    assert highest_rate({38: 0.88, 26: 0.97, 32: 0.90}) == pytest.approx(32)


def test_one_run_that_was_disturbed_does_not_decide() -> None:
    """The share at 32 is as much too low as the one at 38 is too high."""
    assert highest_rate({26: 0.96, 32: 0.89, 38: 0.93, 44: 0.85}) == pytest.approx(38 + 6 * 0.01 / 0.06)
    assert highest_rate({26: 0.96, 32: 0.80, 38: 0.91, 44: 0.70}) == pytest.approx(26 + 6 * 0.06 / 0.105)


def test_beyond_what_was_tried_nothing_is_claimed() -> None:
    assert highest_rate({10: 0.99, 20: 0.95}) == 20
    assert highest_rate({10: 0.8, 20: 0.5}) == 0


def test_a_round_that_gave_up_counts_as_it_ended() -> None:
    rounds = [{26: 0.9, 32: 0.6}, {26: 0.95, 32: 0.9, 38: 0.8}, {26: 0.92, 32: 0.7, 38: 0.5}]
    assert together(rounds) == {26: 0.92, 32: 0.7, 38: 0.6}
