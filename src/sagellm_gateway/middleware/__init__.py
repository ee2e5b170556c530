"""What every call passes on its way to a route and back, outermost first.

Each is a plain ASGI callable made of `(app, gateway)`: no response object, no extra task, microseconds a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from sagellm_gateway.middleware.auth import KeyCheck, OriginCheck
from sagellm_gateway.middleware.context import CallContext
from sagellm_gateway.middleware.cors import allow_origins
from sagellm_gateway.middleware.log import AccessLog
from sagellm_gateway.middleware.metrics import HttpMetrics
from sagellm_gateway.middleware.rates import RateCheck
from sagellm_gateway.middleware.tracing import Traces
from sagellm_gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

Middleware = Callable[[ASGIApp, "Gateway"], ASGIApp]


def chain(app: ASGIApp, gateway: Gateway) -> ASGIApp:
    """`app` behind the middlewares that the gateway's settings ask for."""
    for middleware in reversed(list(_middlewares(gateway.settings))):
        app = middleware(app, gateway)
    return app


def _middlewares(settings: GatewaySettings) -> Iterator[Middleware]:
    yield HttpMetrics
    if settings.tracing.endpoint is not None:
        yield Traces
    # Around the others, so that a page of another origin can read refusals, too.
    if settings.cors.allow_origins:
        yield allow_origins
    if settings.log.access != "off":
        yield AccessLog
    yield CallContext
    yield KeyCheck if settings.auth.keys else OriginCheck
    yield RateCheck
