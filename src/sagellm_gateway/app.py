"""The gateway: the OpenAI API and its neighbours over a `ControlPlaneManager`.

FastAPI holds the routes, their documents and what is rarely called. Calls whose path has no variables don't go through
its routing and dependency machinery: they are looked up in a table and answered directly, which halves the cost of a
call. Every failure is an error body with the status of its code; a client that goes away aborts its request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from sagellm_control_plane import ControlPlaneManager
from sagellm_core.answers import Observer
from sagellm_core.engine_metrics import EngineCollector
from sagellm_core.http import install_error_handlers, unexpected_error
from sagellm_core.version import __version__
from sagellm_gateway.chat import ChatService
from sagellm_gateway.documents import openapi_document
from sagellm_gateway.errors import error_answer_for, error_body_for, what_instead
from sagellm_gateway.explanation import explanation_attributes
from sagellm_gateway.ledger import Ledger
from sagellm_gateway.live_stats import LiveStats
from sagellm_gateway.middleware import chain
from sagellm_gateway.middleware.log import AccessLog
from sagellm_gateway.middleware.metrics import HttpFigures
from sagellm_gateway.responses.store import ResponseStore
from sagellm_gateway.routes import ROUTERS
from sagellm_gateway.sessions import Sessions
from sagellm_gateway.settings import GatewaySettings
from sagellm_gateway.tracing import Tracing
from sagellm_protocol import InvalidArgumentError, SageLLMError

logger = logging.getLogger(__name__)

Endpoint = Callable[[HttpRequest], Awaitable[HttpResponse]]


class Gateway(FastAPI):
    """The application; starts the manager's engines with the server and stops them at the end.

    `default_model` answers requests that name no model or the model `default`; without it any engine does.
    `keeps_engines`: the end leaves child processes to the next manager with the same state.
    """

    def __init__(
        self,
        manager: ControlPlaneManager,
        *,
        default_model: str | None = None,
        settings: GatewaySettings | None = None,
        keeps_engines: bool = False,
    ) -> None:
        super().__init__(
            title="sageLLM gateway", version=__version__, lifespan=_lifespan, docs_url=None, redoc_url=None
        )
        self.manager = manager
        self.keeps_engines = keeps_engines
        self.settings = settings or GatewaySettings()
        self.default_model = default_model or "default"
        self.created = int(time.time())
        self.collector = EngineCollector(manager.model_of)
        self.live_stats = LiveStats(manager)
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)
        self.http_figures = HttpFigures()
        self.registry.register(self.http_figures)
        log = self.settings.log
        self.access_log = None if log.access == "off" else AccessLog(is_json=log.access == "json")
        observers: list[Observer] = [self.collector.observe, self.live_stats.observe]
        tracing = self.settings.tracing
        explain = partial(explanation_attributes, manager)
        self.tracing = None if tracing.endpoint is None else Tracing(tracing, explain)
        if self.tracing is not None:
            observers.append(self.tracing.observe)
        self.answers = Ledger(manager, *observers, keep_prompts=log.prompts)
        self.sessions = Sessions(self.settings.sessions)
        self.chat = ChatService(self)
        self.responses = ResponseStore()
        install_error_handlers(self, error_body_for, lambda path: what_instead(path, self._paths))
        for router in ROUTERS:
            self.include_router(router)
        self._routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
        self._paths = sorted({route.path for route in self._routes if not route.param_convertors}, key=len)
        self._direct: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for route in self._routes
            if not route.param_convertors
            for method in route.methods or ()
        }
        self.is_leaving = False  # it will take no new work soon, see `drain`
        self.is_draining = False  # it takes none
        self.tasks: set[asyncio.Task[None]] = set()
        self._outermost = chain(self._dispatch, self)

    def route_of(self, scope: Scope) -> str:
        """The path, with its variables unfilled, of the route that served a call; `other` where there was none."""
        route = scope.get("route")
        if route is not None:
            return str(route.path)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        return scope["path"] if (method, scope["path"]) in self._direct else "other"

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if not self.openapi_schema:
            self.openapi_schema = openapi_document(self, ROUTERS)
        return self.openapi_schema

    def drain(self, after_s: float = 0.0) -> None:
        """Take no new work after so many seconds; `/ready` says so at once, and what is in work ends as it would."""
        self.is_leaving = True
        if after_s > 0:
            asyncio.get_running_loop().call_later(after_s, self.drain)
        else:
            self.is_draining = True

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work` run beside the calls, until the server stops."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._end_of_background)

    def _end_of_background(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("work beside the calls failed", exc_info=task.exception())

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
            if scope["method"] == "HEAD":
                await self._head(scope, receive, send)
                return
            allowed = self._methods_of(scope["path"])
            if not allowed or scope["method"] in allowed:
                await super().__call__(scope, receive, send)
                return
            response = _wrong_method(scope, allowed)
        else:
            http = HttpRequest(scope, receive, send)
            try:
                response = await endpoint(http)
            except SageLLMError as error:
                response = error_answer_for(scope["path"], error)
            except Exception:
                logger.exception("%s %s failed", http.method, http.url.path)
                response = error_answer_for(scope["path"], unexpected_error())
        await response(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as to GET, without the body: the answer is over when it has begun."""

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        get = {**scope, "method": "GET"}
        try:
            await self._dispatch(get, receive, send_head)
        finally:
            if "route" in get:  # for `route_of`
                scope["route"] = get["route"]

    def _methods_of(self, path: str) -> list[str]:
        """The methods of all routes for a path (routers know the first's alone); a name goes before a variable."""
        matching = [route for route in self._routes if route.path_regex.match(path)]
        named = [route for route in matching if not route.param_convertors]
        methods = {method for route in named or matching for method in route.methods or ()}
        return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _wrong_method(scope: Scope, allowed: Sequence[str]) -> HttpResponse:
    methods = ", ".join(allowed)
    error = InvalidArgumentError(f"{scope['path']} takes {methods}, not {scope['method']}; correct the method")
    response = error_answer_for(scope["path"], error, 405)
    response.headers["Allow"] = methods
    return response


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, Gateway)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(app.manager.stop, leave_children=app.keeps_engines)
        await app.manager.start()
        app.background(app.live_stats.run())
        app.background(app.sessions.run())
        try:
            yield
        finally:
            for task in app.tasks:
                task.cancel()
            await app.sessions.close()
            if app.tracing is not None:
                await app.tracing.close()
            if app.access_log is not None:
                app.access_log.flush()


def create_app(
    manager: ControlPlaneManager, *, default_model: str | None = None, settings: GatewaySettings | None = None
) -> Gateway:
    """A gateway in front of `manager`; see `Gateway`."""
    return Gateway(manager, default_model=default_model, settings=settings)
