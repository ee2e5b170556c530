"""Scheduling policies: which waiting request gets the next free place. One file each.

Other distributions add theirs through the entry-point group `sagellm.scheduling_policies`, whose values are subclasses
of `SchedulingPolicy`. A built-in name can't be taken over, and nothing is imported before it is asked for.
"""

from __future__ import annotations

from sagellm_control_plane.plugins import load_class, names
from sagellm_control_plane.policies.base import (
    Destination,
    Key,
    PolicyContext,
    PolicyOptions,
    SchedulingPolicy,
    WaitingRequest,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "POLICIES",
    "Destination",
    "Key",
    "PolicyContext",
    "PolicyOptions",
    "SchedulingPolicy",
    "WaitingRequest",
    "get_policy",
    "list_policies",
]

ENTRY_POINT_GROUP = "sagellm.scheduling_policies"

POLICIES = {
    "adaptive": "sagellm_control_plane.policies.adaptive:AdaptivePolicy",
    "cost_optimized": "sagellm_control_plane.policies.cost_optimized:CostOptimizedPolicy",
    "fair": "sagellm_control_plane.policies.fair:FairPolicy",
    "fifo": "sagellm_control_plane.policies.fifo:FifoPolicy",
    "priority": "sagellm_control_plane.policies.priority:PriorityPolicy",
    "slo_aware": "sagellm_control_plane.policies.slo_aware:SloAwarePolicy",
}


def list_policies() -> list[str]:
    """Every name that `get_policy` takes, sorted."""
    return names(POLICIES, ENTRY_POINT_GROUP)


def get_policy(name: str) -> type[SchedulingPolicy]:
    """The policy `name`, to be made with a `PolicyContext`.

    Raises `InvalidArgumentError` for an unknown name, `UnavailableError` for one whose package can't be loaded.
    """
    return load_class(
        name,
        SchedulingPolicy,  # type: ignore[type-abstract]  # mypy sees a class that would be made
        POLICIES,
        ENTRY_POINT_GROUP,
        field="scheduling_policy",
    )
