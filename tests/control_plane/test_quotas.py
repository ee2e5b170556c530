"""Quotas of tenants: reserved at the door, settled at the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.quotas import QuotaConfig, Quotas, TenantQuota
from sagellm_protocol import ResourceExhaustedError


def quotas(**limits: int) -> Quotas:
    return Quotas(QuotaConfig(default=TenantQuota(**limits)))


def test_a_tenant_has_so_many_requests_in_work() -> None:
    made = quotas(max_concurrent=2)
    first = made.reserve("a", 10, 0.0)
    made.reserve("a", 10, 0.0)
    with pytest.raises(ResourceExhaustedError, match="'a' may have 2 requests in work") as error:
        made.reserve("a", 10, 0.0)
    assert error.value.context["field"] == "tenant"
    made.reserve("b", 10, 0.0)
    made.settle(first, 10, 1.0)
    made.settle(first, 10, 1.0)
    made.reserve("a", 10, 1.0)
    assert made.num_active("a") == 2


def test_tokens_are_reserved_and_settled() -> None:
    made = quotas(tokens_per_minute=600)
    first = made.reserve("a", 500, 0.0)
    with pytest.raises(ResourceExhaustedError, match="has 100 left, this needs about 200; try again in 10 s") as error:
        made.reserve("a", 200, 0.0)
    assert error.value.context["retry_after_s"] == pytest.approx(10)
    made.settle(first, 100, 0.0)
    made.reserve("a", 500, 0.0)
    made.reserve("a", 100, 10.0)


def test_an_answer_that_was_longer_than_expected_is_paid_later() -> None:
    made = quotas(tokens_per_minute=600)
    made.settle(made.reserve("a", 100, 0.0), 900, 0.0)
    with pytest.raises(ResourceExhaustedError, match="has 0 left"):
        made.reserve("a", 1, 20.0)
    made.reserve("a", 1, 31.0)


def test_a_request_above_a_minute_passes_when_the_minute_is_whole() -> None:
    made = quotas(tokens_per_minute=600)
    made.reserve("a", 5000, 0.0)
    with pytest.raises(ResourceExhaustedError):
        made.reserve("a", 1, 60.0)


def test_a_tenant_may_have_a_quota_of_its_own() -> None:
    config = QuotaConfig(default=TenantQuota(max_concurrent=1), tenants={"big": TenantQuota(max_concurrent=3)})
    made = Quotas(config)
    for _ in range(3):
        made.reserve("big", 1, 0.0)
    assert made.num_active("big") == 3
    assert made.num_active("nobody") == 0


def test_tenants_that_are_gone_are_forgotten() -> None:
    made = quotas(tokens_per_minute=60)
    for number in range(20_000):
        made.settle(made.reserve(f"tenant-{number}", 10, number * 0.1), 10, number * 0.1)
    assert len(made._accounts) < 5000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 300), st.integers(0, 300)), max_size=60))
def test_no_more_is_let_through_than_the_quota_allows(calls: list[tuple[float, int, int]]) -> None:
    made, now, used = quotas(tokens_per_minute=600), 0.0, 0
    for gap, expected, actual in calls:
        now += gap
        try:
            reservation = made.reserve("t", expected, now)
        except ResourceExhaustedError:
            continue
        used += min(expected, actual)
        made.settle(reservation, min(expected, actual), now)
    assert used <= 600 + now * 10 + 1e-6
    assert made.num_active("t") == 0
