"""Routing policies: which engine a request goes to. One file each.

Other distributions add theirs through the entry-point group `sagellm.routing_policies`, whose values are subclasses of
`RoutingPolicy`. A built-in name can't be taken over, and nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_control_plane.plugins import Registry
from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingContext, RoutingPolicy
else:  # it brings numpy, which those who only want the names do without
    __getattr__, __dir__ = lazy_exports(
        __name__, {".base": ("Choice", "RoutedRequest", "RoutingContext", "RoutingPolicy")}
    )

__all__ = [
    "ROUTERS",
    "Choice",
    "RoutedRequest",
    "RoutingContext",
    "RoutingPolicy",
    "get_router",
    "list_routers",
]

ROUTERS = {
    "adaptive": "marginal_cost:MarginalCost",
    "cache_aware": "cache_aware:CacheAware",
    "hash": "hash:PrefixHash",
    "kv_overlap": "kv_overlap:KVOverlap",
    "least_loaded": "least_loaded:LeastLoaded",
    "lmetric": "lmetric:LMetric",
    "marginal_cost": "marginal_cost:MarginalCost",
    "power_of_two": "power_of_two:PowerOfTwo",
    "prefix_aware": "prefix_aware:PrefixAware",
    "random": "random:RandomChoice",
    "round_robin": "round_robin:RoundRobin",
    "session": "session:SessionAffinity",
    "topology": "topology:TopologyAware",
}

_registry: Registry[RoutingPolicy] = Registry(
    __name__, "base:RoutingPolicy", ROUTERS, group="sagellm.routing_policies", field="routing_policy"
)

list_routers = _registry.names
get_router = _registry.get
