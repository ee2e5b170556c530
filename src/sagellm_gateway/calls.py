"""From what a client calls to what engines are asked: requests carry on what the call's headers say."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

from sagellm_gateway.context import Caller
from sagellm_protocol import Request, RequestPriority


def for_caller(request: Request, caller: Caller, *, named: bool = False) -> Request:
    """The request with the caller's trace, priority and SLO, where the body gave none.

    Its id begins with the caller's, so that logs can be joined; one that the body `named` stays. A client may send the
    same `x-request-id` twice, two running requests may not have the same id.
    """
    changes: dict[str, Any] = {"trace_id": caller.trace_id}
    if not named:
        changes["request_id"] = f"{caller.request_id}-{token_hex(4)}"
    if caller.priority is not None and request.priority is RequestPriority.NORMAL:
        changes["priority"] = caller.priority
    if caller.slo is not None and request.slo is None:
        changes["slo"] = caller.slo
    return request.model_copy(update=changes)
