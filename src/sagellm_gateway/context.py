"""What every route may ask of the call it serves: the gateway it belongs to, and who calls."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request as HttpRequest

from sagellm_protocol import SLO, RequestPriority, new_request_id, new_trace_id

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway
    from sagellm_gateway.keys import RateLimits
    from sagellm_gateway.rates import Meter, Window

CALLER = "sagellm.caller"  # in an ASGI scope


@dataclass(slots=True)
class Caller:
    """Who calls, what for, and what its headers ask; filled by the middlewares, outermost first."""

    request_id: str  # sent back as `x-request-id`
    trace_id: str  # of the W3C trace context, or a fresh one
    key_name: str | None = None  # the API key's name: the tenant
    is_admin: bool = False  # whether the key may use /admin
    priority: RequestPriority | None = None  # x-priority
    slo: SLO | None = None  # x-slo-ttft-ms, x-slo-tpot-ms, x-slo-deadline-ms
    traceparent: str | None = None  # the W3C header that `trace_id` is of
    answer_headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # what the middlewares add to the answer
    limits: RateLimits | None = None  # the key's own, instead of those that all keys have
    windows: tuple[Window | None, Window | None] = (None, None)  # of requests and of tokens, for the answer's headers
    meters: tuple[Meter, ...] = ()  # those that count this caller's tokens
    num_prompt_tokens: int = 0  # of all engine requests that this call has caused so far
    num_output_tokens: int = 0
    prompts: list[str] = field(default_factory=list)  # for the access log, where it may hold them


# The call that the running task serves, for what stands between the routes and the control plane.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


def gateway_of(http: HttpRequest) -> Gateway:
    """The application that serves this call."""
    gateway: Gateway = http.scope["app"]
    return gateway


def caller_of(http: HttpRequest) -> Caller:
    """Who makes this call; where no middleware ran, nobody in particular."""
    caller = http.scope.get(CALLER)
    if not isinstance(caller, Caller):
        caller = http.scope[CALLER] = Caller(new_request_id(), new_trace_id())
    return caller
