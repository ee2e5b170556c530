from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_benchmark import timing
from sagellm_benchmark.timing import Summary

# Two requests: first tokens after 1 and 2 s, then one token a second each, five tokens each.
TIMES = [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]]


def test_rates() -> None:
    assert timing.first_token_times(TIMES) == [1.0, 2.0]
    assert timing.times_per_token(TIMES) == [1.0, 1.0]
    assert timing.gaps(TIMES) == [1.0] * 8
    assert timing.duration(TIMES) == 6.0
    assert timing.output_rate(TIMES) == pytest.approx(10 / 6)
    assert timing.prefill_rate(TIMES, input_len=8) == 8.0


def test_decode_rate_counts_only_the_time_when_all_decode() -> None:
    # From 2 s (the second's first token) to 5 s (the first's last): three tokens of each.
    assert timing.decode_rate(TIMES) == 2.0


def test_decode_rate_is_unknown_without_such_a_time() -> None:
    assert timing.decode_rate([[1.0], [2.0]]) is None
    assert timing.decode_rate([[1.0, 2.0], [3.0, 4.0]]) is None


def test_single_tokens_have_no_time_per_token() -> None:
    assert timing.times_per_token([[1.0]]) == []
    assert timing.gaps([[1.0]]) == []


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_summary_is_ordered_and_bounded(values: list[float]) -> None:
    summary = Summary.of(values)
    assert min(values) == summary.min <= summary.p50 <= summary.p90 <= summary.p99 <= summary.max == max(values)
    assert summary.min - 1e-6 <= summary.mean <= summary.max + 1e-6


def test_percentiles_are_linear_between_neighbours() -> None:
    assert timing.percentile([0.0, 10.0], 0.5) == 5.0
    assert timing.percentile([0.0, 1.0, 2.0, 3.0], 0.9) == pytest.approx(2.7)
    assert timing.percentile([7.0], 0.99) == 7.0
