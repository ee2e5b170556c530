"""sageLLM: an LLM inference engine that answers on the first command and serves on CPUs and accelerators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_control_plane.manager import ControlPlaneManager
    from sagellm_core.config import BackendConfig, EngineConfig
    from sagellm_core.version import __version__
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "sagellm_control_plane.manager": ("ControlPlaneManager",),
            "sagellm_core.config": ("BackendConfig", "EngineConfig"),
            "sagellm_core.version": ("__version__",),
        },
    )

__all__ = ["BackendConfig", "ControlPlaneManager", "EngineConfig", "__version__"]
