"""One server span a call: child of the caller's `traceparent`, parent of what the engine is told.

Its trace becomes the caller's, so that logs, requests and traces agree on it even where none was sent. Probes
(`/health`, `/ready`, `/metrics`) are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from sagellm_gateway.context import CALLER, Caller
from sagellm_gateway.tracing import CallTrace, current_trace, end_trace

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from sagellm_gateway.app import Gateway

_PROBES = frozenset({"/health", "/ready", "/metrics"})
_TRACE_HEADERS = (b"traceparent", b"tracestate")


class Traces:
    """See the module; only where the gateway has `tracing`."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert gateway.tracing is not None, "without tracing this stands in no chain"
        self._app = app
        self._gateway = gateway
        self._tracer = gateway.tracing.tracer
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        caller: Caller = scope[CALLER]
        span = self._start(scope["method"], caller)
        trace = CallTrace(span)
        current_trace.set(trace)
        try:
            await self._app(scope, receive, send)
        finally:
            if span.is_recording():
                self._describe(span, scope, caller.status)
                end_trace(trace)
            span.end()

    def _start(self, method: str, caller: Caller) -> Span:
        headers = caller.headers
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _TRACE_HEADERS if name in headers}
        span: Span = self._tracer.start_span(method, context=self._propagator.extract(carrier), kind=self._kind)
        caller.trace_id = f"{span.get_span_context().trace_id:032x}"
        return span

    def _describe(self, span: Span, scope: Scope, status: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        route, client = self._gateway.route_of(scope), scope.get("client")
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
            "http.response.status_code": status,
        }
        if client:
            attributes["client.address"] = client[0]
        if status >= 500:
            attributes["error.type"] = str(status)
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes(attributes)
        span.update_name(f"{scope['method']} {route}")
