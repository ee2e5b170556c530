"""OpenAI-compatible HTTP in front of the control plane: `create_app(manager)` and the command `sage-gateway`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_gateway.app import create_app
else:
    __getattr__, __dir__ = lazy_exports(__name__, {".app": ("create_app",)})

__all__ = ["create_app"]
