from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from sagellm_benchmark.serve.arrivals import random_times, recorded_times
from sagellm_protocol import InvalidArgumentError


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_and_the_variation_that_are_asked_for(burstiness: float, variation: float) -> None:
    times = random_times(20_000, 50.0, burstiness=burstiness, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0
    assert min(gaps) >= 0
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) / mean == pytest.approx(variation, rel=0.05)  # 1 / sqrt(shape)


def test_times_repeat_with_their_seed() -> None:
    assert random_times(10, 3.0, seed=2) == random_times(10, 3.0, seed=2) != random_times(10, 3.0, seed=3)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert random_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf)])
def test_impossible_rates_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(InvalidArgumentError, match="above 0"):
        random_times(3, rate, burstiness=burstiness)


def test_recorded_times_begin_at_0_and_go_as_fast_as_they_should() -> None:
    assert recorded_times([5.0, 6.0, 9.0], speed=2.0) == [0.0, 0.5, 2.0]
    with pytest.raises(InvalidArgumentError, match="speed"):
        recorded_times([1.0], speed=0)
    with pytest.raises(InvalidArgumentError, match="no times"):
        recorded_times([1.0, None])
