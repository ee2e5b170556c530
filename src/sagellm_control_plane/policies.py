"""Scheduling policies: which waiting request gets the next free place. One function and one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sagellm_protocol import InvalidArgumentError, Request


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request in the queue. Times are seconds of the manager's clock."""

    request: Request
    arrival_time: float
    num_expected_tokens: int  # prompt + most output tokens
    sequence_number: int


Key = tuple[float, ...]
Policy = Callable[[WaitingRequest], Key]


def fifo(waiting: WaitingRequest) -> Key:
    """In order of arrival."""
    return (waiting.arrival_time, waiting.sequence_number)


def priority(waiting: WaitingRequest) -> Key:
    """By priority, equals in order of arrival."""
    return (int(waiting.request.priority), *fifo(waiting))


def slo_aware(waiting: WaitingRequest) -> Key:
    """Earliest deadline first; requests without one come last."""
    slo = waiting.request.slo
    limits = [] if slo is None else [limit for limit in (slo.ttft_ms, slo.deadline_ms) if limit is not None]
    due = waiting.arrival_time + min(limits) / 1e3 if limits else float("inf")
    return (due, *fifo(waiting))


def cost_optimized(waiting: WaitingRequest) -> Key:
    """Shortest expected work first, which keeps the mean latency lowest."""
    return (waiting.num_expected_tokens, *fifo(waiting))


def adaptive(waiting: WaitingRequest) -> Key:
    """Priority first, then the earliest deadline, then arrival."""
    return (int(waiting.request.priority), *slo_aware(waiting))


POLICIES: dict[str, Policy] = {
    "adaptive": adaptive,
    "cost_optimized": cost_optimized,
    "fifo": fifo,
    "priority": priority,
    "slo_aware": slo_aware,
}


def get_policy(name: str) -> Policy:
    """The policy registered as `name`."""
    if name not in POLICIES:
        raise InvalidArgumentError(
            f"unknown scheduling_policy {name!r}; choose one of {', '.join(POLICIES)}", field="scheduling_policy"
        )
    return POLICIES[name]


def next_request(policy: Policy, waiting: Sequence[WaitingRequest]) -> WaitingRequest:
    """The request that the policy serves first."""
    return min(waiting, key=policy)
