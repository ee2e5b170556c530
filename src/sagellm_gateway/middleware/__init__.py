"""What every call passes on its way to a route and back.

Plain ASGI callables made of `(app, gateway)`, the outermost first: `CallContext` says who calls and notes how it went;
traces and CORS are there only where the settings ask for them; `Door` lets a call in or says why not. None makes a task
or an object of the answer, and what isn't configured costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from sagellm_gateway.middleware.context import CallContext
from sagellm_gateway.middleware.cors import allow_origins
from sagellm_gateway.middleware.door import Door
from sagellm_gateway.middleware.tracing import Traces

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway


def chain(app: ASGIApp, gateway: Gateway) -> ASGIApp:
    """`app` behind the middlewares that the gateway's settings ask for."""
    app = Door(app, gateway)
    # Around the door, so that a page of another origin can read refusals, too.
    if gateway.settings.cors.allow_origins:
        app = allow_origins(app, gateway)
    if gateway.tracing is not None:
        app = Traces(app, gateway)
    return CallContext(app, gateway)
