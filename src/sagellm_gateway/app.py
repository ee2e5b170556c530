"""The gateway: the OpenAI API and its neighbours over a `ControlPlaneManager`.

FastAPI holds the routes, their documents and what is rarely called. Calls whose path has no variables don't go through
its routing and dependency machinery: they are looked up in a table and answered directly, which halves the cost of a
call. Every failure is an error body with the status of its code; a client that goes away aborts its request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from sagellm_control_plane import ControlPlaneManager
from sagellm_core.answers import Answers
from sagellm_core.engine_metrics import EngineCollector
from sagellm_core.http import error_answer, install_error_handlers, unexpected_error
from sagellm_core.version import __version__
from sagellm_gateway.chat import ChatService
from sagellm_gateway.routes import ROUTERS
from sagellm_protocol import SageLLMError

logger = logging.getLogger(__name__)

Endpoint = Callable[[HttpRequest], Awaitable[HttpResponse]]


class Gateway(FastAPI):
    """The application; starts the manager's engines with the server and stops them at the end.

    `default_model` answers requests that name no model or the model `default`; without it any engine does.
    """

    def __init__(self, manager: ControlPlaneManager, *, default_model: str | None = None) -> None:
        super().__init__(title="sageLLM gateway", version=__version__, lifespan=_lifespan)
        self.manager = manager
        self.default_model = default_model or "default"
        self.created = int(time.time())
        self.collector = EngineCollector()
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)
        self.answers = Answers(manager.execute_request, manager.stream_request, self.collector)
        self.chat = ChatService(self)
        install_error_handlers(self)
        for router in ROUTERS:
            self.include_router(router)
        self._direct: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for router in ROUTERS
            for route in router.routes
            if isinstance(route, APIRoute) and not route.param_convertors
            for method in route.methods or ()
        }
        self._outermost: ASGIApp = self._dispatch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "http":
            scope["app"] = self
            await self._outermost(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._direct.get((scope["method"], scope["path"]))
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        response = await _answer(endpoint, HttpRequest(scope, receive, send))
        await response(scope, receive, send)


async def _answer(endpoint: Endpoint, http: HttpRequest) -> HttpResponse:
    try:
        return await endpoint(http)
    except SageLLMError as error:
        return error_answer(error)
    except Exception:
        logger.exception("%s %s failed", http.method, http.url.path)
        return error_answer(unexpected_error())


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, Gateway)
    async with app.manager:
        yield


def create_app(manager: ControlPlaneManager, *, default_model: str | None = None) -> Gateway:
    """A gateway in front of `manager`; see `Gateway`."""
    return Gateway(manager, default_model=default_model)
