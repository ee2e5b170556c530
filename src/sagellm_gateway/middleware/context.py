"""The outermost middleware: says who calls and what for, and tells every refusal in the API's form.

It fills `Caller` from the headers: `x-request-id`; `traceparent` (W3C Trace Context, level 1); `x-priority`;
`x-slo-ttft-ms`, `x-slo-tpot-ms`, `x-slo-deadline-ms`. A header of ours with a bad value is a 400 that names it; a
`traceparent` that cannot be read is ignored, as its standard demands. Every answer carries `x-request-id` and what
the middlewares behind this one add.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm_core.http import BODY_LIMITS, BodyLimits
from sagellm_gateway.context import CALLER, Caller, current_caller
from sagellm_gateway.errors import error_answer_for
from sagellm_protocol import (
    SLO,
    InvalidArgumentError,
    RequestPriority,
    SageLLMError,
    new_request_id,
    new_trace_id,
)

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# version, trace id, parent id, flags; a later version may have more behind it
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_SLO_FIELDS = {b"x-slo-ttft-ms": "ttft_ms", b"x-slo-tpot-ms": "tpot_ms", b"x-slo-deadline-ms": "deadline_ms"}
_WANTED = frozenset({b"x-request-id", b"traceparent", b"x-priority", *_SLO_FIELDS})
_MAX_MS = 86_400_000  # a day
_NO_WINDOWS = (None, None)
_UNITS = (b"requests", b"tokens")


class CallContext:
    """See the module."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        limits = gateway.settings.limits
        self._body_limits = BodyLimits(
            limits.max_body_bytes, limits.max_json_depth, gateway.settings.server.body_timeout_s
        )
        self._timeout_ms = limits.request_timeout_s * 1e3
        self._default_slo = SLO(deadline_ms=self._timeout_ms)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        caller = scope[CALLER] = Caller("", "")
        current_caller.set(caller)
        scope[BODY_LIMITS] = self._body_limits
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *caller.answer_headers]
                if caller.windows != _NO_WINDOWS:
                    message["headers"] += _figures(caller)
            await send(message)

        try:
            found = _read_headers(scope, caller)
            caller.slo = _read_slo(found, self._timeout_ms) if found else self._default_slo
            await self._app(scope, receive, send_with_headers)
        except SageLLMError as error:
            if has_started:
                raise
            answer = error_answer_for(scope["path"], error)
            await answer(scope, receive, send_with_headers)


def _figures(caller: Caller) -> Iterator[tuple[bytes, bytes]]:
    """What is left of the caller's limits, as the OpenAI API says it."""
    for unit, window in zip(_UNITS, caller.windows, strict=True):
        if window is not None:
            yield b"x-ratelimit-limit-" + unit, b"%d" % window.limit
            yield b"x-ratelimit-remaining-" + unit, b"%d" % window.remaining
            yield b"x-ratelimit-reset-" + unit, b"%.0fs" % window.reset_s()


def _read_headers(scope: Scope, caller: Caller) -> dict[bytes, bytes]:
    """Fill `caller`; returns the headers that speak of its SLO."""
    found: dict[bytes, bytes] = {name: value for name, value in scope["headers"] if name in _WANTED}
    request_id = found.pop(b"x-request-id", None)
    is_good = request_id is not None and _REQUEST_ID.fullmatch(request_id) is not None
    caller.request_id = request_id.decode() if request_id is not None and is_good else new_request_id()
    caller.answer_headers.append((b"x-request-id", caller.request_id.encode()))
    _read_trace(found.pop(b"traceparent", None), caller)
    if request_id is not None and not is_good:
        raise _bad_header("x-request-id", "1 to 128 visible ASCII characters")
    priority = found.pop(b"x-priority", None)
    if priority is not None:
        caller.priority = _PRIORITIES.get(priority.strip().lower())
        if caller.priority is None:
            raise _bad_header("x-priority", f"one of {', '.join(name.decode() for name in _PRIORITIES)}")
    return found


def _read_trace(value: bytes | None, caller: Caller) -> None:
    match = None if value is None else _TRACEPARENT.fullmatch(value)
    # Version 00 has exactly four parts.
    if value is None or match is None or (match[2] is not None and value.startswith(b"00")):
        caller.trace_id = new_trace_id()
    else:
        caller.trace_id = match[1].decode()
        caller.traceparent = value.decode("latin-1")


def _read_slo(found: dict[bytes, bytes], timeout_ms: float) -> SLO:
    """What the headers expect; nobody waits longer than the gateway's own limit."""
    wishes = {_SLO_FIELDS[name]: _milliseconds(name, value) for name, value in found.items()}
    return SLO(**{**wishes, "deadline_ms": min(wishes.get("deadline_ms", timeout_ms), timeout_ms)})


_PRIORITIES = {priority.name.lower().encode(): priority for priority in RequestPriority}


def _milliseconds(name: bytes, value: bytes) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= _MAX_MS:
        raise _bad_header(name.decode(), f"a number of milliseconds above 0 and up to {_MAX_MS}")
    return number


def _bad_header(name: str, wanted: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the header {name} must be {wanted}; correct it or leave it out", field=name)
