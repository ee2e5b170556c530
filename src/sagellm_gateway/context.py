"""What every route may ask of the call it serves: the gateway it belongs to, and who calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request as HttpRequest

from sagellm_protocol import SLO, RequestPriority, new_request_id, new_trace_id

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_CALLER = "sagellm.caller"


@dataclass(slots=True)
class Caller:
    """Who calls, what for, and what its headers ask; filled by the middlewares, outermost first."""

    request_id: str  # sent back as `x-request-id`
    trace_id: str  # of the W3C trace context, or a fresh one
    key_name: str | None = None  # the API key's name: the tenant
    is_admin: bool = False  # whether the key may use /admin
    priority: RequestPriority | None = None  # x-priority
    slo: SLO | None = None  # x-slo-ttft-ms, x-slo-tpot-ms, x-slo-deadline-ms


def gateway_of(http: HttpRequest) -> Gateway:
    """The application that serves this call."""
    gateway: Gateway = http.scope["app"]
    return gateway


def caller_of(http: HttpRequest) -> Caller:
    """Who makes this call; where no middleware ran, nobody in particular."""
    caller = http.scope.get(_CALLER)
    if not isinstance(caller, Caller):
        caller = http.scope[_CALLER] = Caller(new_request_id(), new_trace_id())
    return caller
