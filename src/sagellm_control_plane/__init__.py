"""The control plane: engines behind one door, scheduling and routing policies over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_control_plane.config import ParallelismConfig, PDSeparationConfig
    from sagellm_control_plane.manager import ControlPlaneManager
    from sagellm_control_plane.types import (
        ControlPlaneMetrics,
        EngineInfo,
        EngineState,
        ExecutionInstance,
        ExecutionInstanceType,
        RequestType,
    )
    from sagellm_core.config import BackendConfig, EngineConfig
    from sagellm_protocol import RequestPriority
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".config": ("ParallelismConfig", "PDSeparationConfig"),
            ".manager": ("ControlPlaneManager",),
            ".types": (
                "ControlPlaneMetrics",
                "EngineInfo",
                "EngineState",
                "ExecutionInstance",
                "ExecutionInstanceType",
                "RequestType",
            ),
            "sagellm_core.config": ("BackendConfig", "EngineConfig"),
            "sagellm_protocol": ("RequestPriority",),
        },
    )

__all__ = [
    "BackendConfig",
    "ControlPlaneManager",
    "ControlPlaneMetrics",
    "EngineConfig",
    "EngineInfo",
    "EngineState",
    "ExecutionInstance",
    "ExecutionInstanceType",
    "PDSeparationConfig",
    "ParallelismConfig",
    "RequestPriority",
    "RequestType",
]
