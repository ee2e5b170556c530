"""Scheduling policies: which waiting request gets the next free place. One file each.

Other distributions add theirs through the entry-point group `sagellm.scheduling_policies`, whose values are subclasses
of `SchedulingPolicy`. A built-in name can't be taken over, and nothing is imported before it is asked for.
"""

from __future__ import annotations

from sagellm_control_plane.plugins import Registry
from sagellm_control_plane.policies.base import (
    Destination,
    Key,
    PolicyContext,
    PolicyOptions,
    SchedulingPolicy,
    WaitingRequest,
)

__all__ = [
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

POLICIES = {
    "adaptive": "adaptive:AdaptivePolicy",
    "cost_optimized": "cost_optimized:CostOptimizedPolicy",
    "fair": "fair:FairPolicy",
    "fifo": "fifo:FifoPolicy",
    "priority": "priority:PriorityPolicy",
    "slo_aware": "slo_aware:SloAwarePolicy",
}

_registry: Registry[SchedulingPolicy] = Registry(
    __name__, "base:SchedulingPolicy", POLICIES, group="sagellm.scheduling_policies", field="scheduling_policy"
)

list_policies = _registry.names
get_policy = _registry.get
