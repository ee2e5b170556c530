"""The outermost middleware: says who calls, adds what the others have to say to the answer, notes how the call went.

It begins `Caller` with the ids: `x-request-id`, which every answer sends back (as `request-id`, too, to Anthropic's
clients), and `traceparent` (W3C Trace Context, level 1). One that cannot be read is replaced by a fresh one, as the
standard of the second demands; of the first the door tells. A call that is over is counted and, where there is an
access log, written down.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm_core.http import BODY_LIMITS, BodyLimits
from sagellm_gateway.context import CALLER, Caller, current_caller
from sagellm_gateway.explanation import EXPLAIN, explanation_headers
from sagellm_protocol import new_request_id, new_trace_id

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# version, trace id, parent id, flags; a later version may have more behind it
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_NO_WINDOWS = (None, None)
_FIGURES = tuple(
    tuple(b"x-ratelimit-%s-%s" % (figure, unit) for figure in (b"limit", b"remaining", b"reset"))
    for unit in (b"requests", b"tokens")
)


class CallContext:
    """See the module."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        limits = gateway.settings.limits
        self._body_limits = BodyLimits(limits.max_body_bytes, limits.max_json_depth)
        self._manager = gateway.manager
        self._route_of = gateway.route_of
        self._figures = gateway.http_figures
        self._log = gateway.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        caller = scope[CALLER] = _caller_of(scope)
        current_caller.set(caller)
        scope[BODY_LIMITS] = self._body_limits

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                caller.status, caller.answered_at = message["status"], time.perf_counter()
                message["headers"] = [*message.get("headers", ()), *caller.answer_headers]
                if caller.windows != _NO_WINDOWS:
                    message["headers"] += _figures(caller)
                if EXPLAIN in caller.headers:
                    message["headers"] += explanation_headers(self._manager, caller.request_id)
            await send(message)

        self._figures.begin()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - caller.started_at
            self._figures.end(scope["method"], self._route_of(scope), caller.status, seconds)
            if self._log is not None:
                self._log.write(scope, caller, seconds)


def _caller_of(scope: Scope) -> Caller:
    headers = dict(scope["headers"])
    request_id = headers.get(b"x-request-id")
    is_good = request_id is not None and _REQUEST_ID.fullmatch(request_id) is not None
    name = request_id.decode() if request_id is not None and is_good else new_request_id()
    traceparent = headers.get(b"traceparent")
    trace_id = (_trace_id(traceparent) if traceparent is not None else None) or new_trace_id()
    answer_headers = [(b"x-request-id", name.encode())]
    caller = Caller(name, trace_id, headers=headers, answer_headers=answer_headers, started_at=time.perf_counter())
    if caller.speaks_anthropic:
        answer_headers.append((b"request-id", name.encode()))
    return caller


def _trace_id(traceparent: bytes) -> str | None:
    match = _TRACEPARENT.fullmatch(traceparent)
    # Version 00 has exactly four parts.
    if match is None or (match[2] is not None and traceparent.startswith(b"00")):
        return None
    return match[1].decode()


def _figures(caller: Caller) -> list[tuple[bytes, bytes]]:
    """What is left of the caller's limits, as the OpenAI API says it."""
    figures: list[tuple[bytes, bytes]] = []
    for (limit, left, reset), window in zip(_FIGURES, caller.windows, strict=True):
        if window is not None:
            remaining, reset_s = window.figures()
            figures += (limit, b"%d" % window.limit), (left, b"%d" % remaining), (reset, b"%.0fs" % reset_s)
    return figures
