"""What every route may ask of the call it serves: the gateway it belongs to, and who calls."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request as HttpRequest

from sagellm_protocol import SLO, RequestPriority, new_request_id, new_trace_id
from sagellm_protocol.ids import random_hex

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway
    from sagellm_gateway.keys import RateLimits
    from sagellm_gateway.rates import Meter, Window

CALLER = "sagellm.caller"  # in an ASGI scope

_ANTHROPIC_VERSION = b"anthropic-version"  # the header that Anthropic's clients send

# The status that is noted for a call whose client left before an answer began.
CLIENT_LEFT = 499


class Caller(msgspec.Struct):
    """Who calls, what for, what its headers ask and how it went; filled by the middlewares, outermost first."""

    request_id: str  # sent back as `x-request-id`
    trace_id: str  # of the W3C trace context, or a fresh one
    key_name: str | None = None  # the API key's name: the tenant
    is_admin: bool = False  # whether the key may use /admin
    headers: Mapping[bytes, bytes] = {}  # of the call; of a name sent twice the last
    priority: RequestPriority | None = None  # x-priority
    slo: SLO | None = None  # x-slo-ttft-ms, x-slo-tpot-ms, x-slo-deadline-ms
    answer_headers: list[tuple[bytes, bytes]] = []  # what the middlewares add to the answer
    limits: RateLimits | None = None  # the key's own, instead of those that all keys have
    windows: tuple[Window | None, Window | None] = (None, None)  # of requests and of tokens, for the answer's headers
    meters: tuple[Meter, ...] = ()  # those that count this caller's tokens
    num_prompt_tokens: int = 0  # of all engine requests that this call has caused so far
    num_output_tokens: int = 0
    prompts: tuple[str, ...] = ()  # for the access log, where it may hold them
    started_at: float = 0.0  # of the clock `time.perf_counter`
    answered_at: float | None = None  # when its answer began
    status: int = CLIENT_LEFT  # of its answer

    @property
    def speaks_anthropic(self) -> bool:
        """Whether a client of Anthropic's API calls, some of whose paths are OpenAI's, too."""
        return _ANTHROPIC_VERSION in self.headers

    def request_fields(self) -> dict[str, Any]:
        """What this call says of a request that it causes; what the body itself asks for goes before.

        The id begins with the call's, so that logs can be joined. A client may send the same `x-request-id` twice, two
        running requests may not have the same id.
        """
        fields: dict[str, Any] = {
            "request_id": f"{self.request_id}-{random_hex()[:8]}",
            "trace_id": self.trace_id,
            "tenant": self.key_name,
            "slo": self.slo,
        }
        if self.priority is not None:
            fields["priority"] = self.priority
        return fields


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
