"""Routing policies: which engine a request goes to. One file each.

Other distributions add theirs through the entry-point group `sagellm.routing_policies`, whose values are subclasses of
`RoutingPolicy`. A built-in name can't be taken over, and nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_control_plane.plugins import load_class, names
from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingContext, RoutingPolicy
else:  # it brings numpy, which those who only want the names do without
    __getattr__, __dir__ = lazy_exports(
        __name__, {".base": ("Choice", "RoutedRequest", "RoutingContext", "RoutingPolicy")}
    )

__all__ = [
    "ENTRY_POINT_GROUP",
    "ROUTERS",
    "Choice",
    "RoutedRequest",
    "RoutingContext",
    "RoutingPolicy",
    "get_router",
    "list_routers",
]

ENTRY_POINT_GROUP = "sagellm.routing_policies"

ROUTERS = {
    "adaptive": "sagellm_control_plane.routing.marginal_cost:MarginalCost",
    "cache_aware": "sagellm_control_plane.routing.cache_aware:CacheAware",
    "hash": "sagellm_control_plane.routing.hash:PrefixHash",
    "kv_overlap": "sagellm_control_plane.routing.kv_overlap:KVOverlap",
    "least_loaded": "sagellm_control_plane.routing.least_loaded:LeastLoaded",
    "lmetric": "sagellm_control_plane.routing.lmetric:LMetric",
    "marginal_cost": "sagellm_control_plane.routing.marginal_cost:MarginalCost",
    "power_of_two": "sagellm_control_plane.routing.power_of_two:PowerOfTwo",
    "prefix_aware": "sagellm_control_plane.routing.prefix_aware:PrefixAware",
    "random": "sagellm_control_plane.routing.random:RandomChoice",
    "round_robin": "sagellm_control_plane.routing.round_robin:RoundRobin",
    "session": "sagellm_control_plane.routing.session:SessionAffinity",
    "topology": "sagellm_control_plane.routing.topology:TopologyAware",
}


def list_routers() -> list[str]:
    """Every name that `get_router` takes, sorted."""
    return names(ROUTERS, ENTRY_POINT_GROUP)


def get_router(name: str) -> type[RoutingPolicy]:
    """The policy `name`, to be made with a `RoutingContext`.

    Raises `InvalidArgumentError` for an unknown name, `UnavailableError` for one whose package can't be loaded.
    """
    from sagellm_control_plane.routing.base import RoutingPolicy

    # mypy takes an abstract base for a class that would be made
    return load_class(name, RoutingPolicy, ROUTERS, ENTRY_POINT_GROUP, field="routing_policy")  # type: ignore[type-abstract]
