"""One server span a call: child of the caller's `traceparent`, parent of what the engine is told.

The span's own context replaces `traceparent` among the headers, so that logs, requests and traces agree on the trace
even where the caller sent none. Probes (`/health`, `/ready`, `/metrics`) are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm_gateway.tracing import CallTrace, current_trace, end_trace

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from sagellm_gateway.app import Gateway

_PROBES = frozenset({"/health", "/ready", "/metrics"})
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_CLIENT_LEFT = 499  # before an answer began


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
        status = _CLIENT_LEFT

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        span = self._start(scope)
        trace = CallTrace(span)
        current_trace.set(trace)
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            if span.is_recording():
                self._describe(span, scope, status)
                end_trace(trace)
            span.end()

    def _start(self, scope: Scope) -> Span:
        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS}
        parent = self._propagator.extract(carrier)
        span: Span = self._tracer.start_span(scope["method"], context=parent, kind=self._kind)
        context = span.get_span_context()
        traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        headers = [(name, value) for name, value in scope["headers"] if name != b"traceparent"]
        scope["headers"] = [*headers, (b"traceparent", traceparent.encode())]
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
