"""Sessions: conversations that the gateway keeps. The API is in `sagellm_gateway.routes.sessions`."""

from __future__ import annotations

from sagellm_gateway.sessions.service import Sessions
from sagellm_gateway.sessions.session import Session, SessionHead, SessionSettings

__all__ = ["Session", "SessionHead", "SessionSettings", "Sessions"]
