"""Cross-origin calls from browsers, where the settings allow them; see `CorsSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_FIGURES = (
    f"x-ratelimit-{figure}-{unit}" for figure in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
)
_EXPOSED = ("x-request-id", "request-id", "retry-after", "x-should-retry", *_FIGURES)


def allow_origins(app: ASGIApp, gateway: Gateway) -> ASGIApp:
    """`app` with the headers that let pages of the configured origins call it."""
    cors = gateway.settings.cors
    return CORSMiddleware(
        app,
        allow_origins=cors.allow_origins,
        allow_methods=("GET", "POST", "PATCH", "DELETE"),
        allow_headers=("*",),
        allow_credentials=cors.allow_credentials,
        expose_headers=_EXPOSED,
        max_age=cors.max_age_s,
    )
