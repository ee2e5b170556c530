"""Which parallel layout a model should have on given hardware: an analytic estimate, a search, and the reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_control_plane.planner.hardware import Cluster, Device, load_devices, parse_cluster
    from sagellm_control_plane.planner.model_costs import ModelCosts, read_model_costs
    from sagellm_control_plane.planner.roofline import Engine, Layout, Roofline
    from sagellm_control_plane.planner.search import Estimate, Objectives, Plan, make_plan
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".hardware": ("Cluster", "Device", "load_devices", "parse_cluster"),
            ".model_costs": ("ModelCosts", "read_model_costs"),
            ".roofline": ("Engine", "Layout", "Roofline"),
            ".search": ("Estimate", "Objectives", "Plan", "make_plan"),
        },
    )

__all__ = [
    "Cluster",
    "Device",
    "Engine",
    "Estimate",
    "Layout",
    "ModelCosts",
    "Objectives",
    "Plan",
    "Roofline",
    "load_devices",
    "make_plan",
    "parse_cluster",
    "read_model_costs",
]
