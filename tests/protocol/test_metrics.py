"""Metrics: defaults, aggregation, round trip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol import InvalidArgumentError, Metrics, Timestamps, wall_clock_epoch


def test_nothing_measured_is_zero_or_none() -> None:
    values = Metrics().model_dump()
    assert values.pop("itl_list") == []
    assert values.pop("spec_accept_rate") is None
    assert values.pop("timestamps") is None
    assert set(values.values()) == {0}


@pytest.mark.parametrize("field", ["ttft_ms", "evict_count", "error_rate", "kv_used_bytes"])
def test_figures_are_not_negative(field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{field} must be >= 0, got -1"):
        Metrics(**{field: -1})


def test_aggregate_of_nothing_is_nothing() -> None:
    assert Metrics.aggregate([]) == Metrics()


def test_aggregate_means_sums_and_maxima() -> None:
    first = Metrics(
        ttft_ms=10,
        prefix_hit_rate=1,
        evict_count=2,
        kv_used_tokens=5,
        peak_mem_mb=7,
        itl_list=[1.0],
        spec_accept_rate=0.5,
    )
    failed = Metrics(error_rate=1, evict_count=1, kv_used_tokens=9)
    both = Metrics.aggregate([first, failed])
    assert both.ttft_ms == 10, "a request without a first token has no share in the mean"
    assert both.error_rate == 0.5
    assert both.prefix_hit_rate == 0.5
    assert (both.evict_count, both.kv_used_tokens, both.peak_mem_mb) == (3, 9, 7)
    assert both.spec_accept_rate == 0.5
    assert both.itl_list == [1.0]
    assert both.throughput_tps == 0, "without timestamps there is no joint time"


def test_aggregate_throughput_is_all_tokens_over_the_joint_time() -> None:
    # Two processes: their monotonic clocks differ, the wall clock is the same.
    first = Metrics(throughput_tps=10, timestamps=Timestamps(queued_at=0, completed_at=2, epoch=1000))
    second = Metrics(throughput_tps=10, timestamps=Timestamps(queued_at=501, completed_at=504, epoch=500))
    both = Metrics.aggregate([first, second])
    assert both.timestamps == Timestamps(queued_at=0, completed_at=4, epoch=1000)
    assert both.throughput_tps == pytest.approx((20 + 30) / 4)


def test_timestamps_know_the_date() -> None:
    stamps = Timestamps(queued_at=1.5, completed_at=4.0, epoch=wall_clock_epoch())
    assert stamps.duration_s == 2.5
    assert stamps.epoch > 1e9
    assert Timestamps(queued_at=1).duration_s is None


figures = st.floats(0, 1e9)
moments = st.none() | st.floats(0, 1e6)
stamps = st.builds(
    Timestamps,
    queued_at=moments,
    scheduled_at=moments,
    executed_at=moments,
    first_token_at=moments,
    completed_at=moments,
    epoch=figures,
)
metrics = st.builds(
    Metrics,
    ttft_ms=figures,
    tpot_ms=figures,
    peak_mem_mb=figures,
    error_rate=st.floats(0, 1),
    kv_used_tokens=st.integers(0, 2**40),
    evict_count=st.integers(0, 99),
    spec_accept_rate=st.none() | st.floats(0, 1),
    itl_list=st.lists(figures, max_size=4),
    timestamps=st.none() | stamps,
)


@given(metrics)
def test_round_trip_through_json(item: Metrics) -> None:
    assert Metrics.model_validate_json(item.model_dump_json()) == item


@given(st.lists(metrics, max_size=4))
def test_aggregate_stays_within_what_was_measured(items: list[Metrics]) -> None:
    # Throughput needs durations that run forward; these random moments needn't.
    joint = Metrics.aggregate([item.model_copy(update={"timestamps": None}) for item in items])
    if items:
        assert joint.error_rate <= max(item.error_rate for item in items) + 1e-9
        assert joint.kv_used_tokens == max(item.kv_used_tokens for item in items)
    assert joint.evict_count == sum(item.evict_count for item in items)
    assert len(joint.itl_list) == sum(len(item.itl_list) for item in items)
