"""`/admin/requests` and `/admin/events`: why requests went where they went, and what happens to the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_gateway.admin_access import require_admin
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import EVENTS, described
from sagellm_gateway.explanation import event_entry, trace_entry, traces_of
from sagellm_gateway.streams import FramedEvents
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_control_plane.events import ControlEvent
    from sagellm_gateway.app import Gateway

MAX_LIMIT = 1000

_DEFAULT_LIMIT = 100
# How often a stream looks whether the server is about to end, and how often it says that it is alive.
_LOOK_EVERY_S = 1.0
_PING_EVERY_S = 15.0
_LIMIT = {"limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": _DEFAULT_LIMIT}}

router = APIRouter(prefix="/admin", tags=["Administration"])


@router.get("/requests", response_model=None)
@described(query=_LIMIT)
async def requests(http: HttpRequest) -> HttpResponse:
    """The last requests that came, newest first, each with its way through the control plane."""
    require_admin(http)
    limit = _number(http, "limit", _DEFAULT_LIMIT, at_least=1, at_most=MAX_LIMIT)
    return _json({"requests": [trace_entry(trace) for trace in gateway_of(http).manager.recent_requests(limit)]})


@router.get("/requests/{request_id}", response_model=None)
@described(fails=(404,))
async def request(http: HttpRequest, request_id: str) -> HttpResponse:
    """Why a request went where it went, and when; by its own id or by the `x-request-id` of its call."""
    require_admin(http)
    traces = traces_of(gateway_of(http).manager, request_id)
    return _json({"request_id": request_id, "requests": [trace_entry(trace) for trace in traces]})


@router.get("/events", response_model=None)
@described(media=EVENTS, query={"since": {"type": "integer", "minimum": 0}})
async def events(http: HttpRequest) -> HttpResponse:
    """What happens to engines and policies as server-sent events, from now on.

    `?since=` or the header `Last-Event-ID` begin earlier, as far as events are kept.
    """
    require_admin(http)
    last = http.headers.get("last-event-id", "")
    first = int(last) + 1 if last.isascii() and last.isdigit() and len(last) < 19 else None
    if "since" in http.query_params:
        first = _number(http, "since", 0, at_least=0, at_most=2**62)
    return FramedEvents(_frames(gateway_of(http), first))


async def _frames(gateway: Gateway, first: int | None) -> AsyncGenerator[bytes, None]:
    silent_s = 0.0
    async with aclosing(gateway.manager.events.follow(first)) as following:
        coming = _next(following)
        try:
            await asyncio.sleep(0)  # it follows from here on
            yield b": these are the events of the control plane\n\n"
            while not gateway.is_draining:
                await asyncio.wait({coming}, timeout=_LOOK_EVERY_S)
                silent_s += _LOOK_EVERY_S
                if coming.done():
                    event, num_missed = coming.result()
                    coming, silent_s = _next(following), 0.0
                    yield _frame(event, num_missed)
                elif silent_s >= _PING_EVERY_S:
                    silent_s = 0.0
                    yield b": ping\n\n"
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _next(following: AsyncGenerator[tuple[ControlEvent, int], None]) -> asyncio.Future[tuple[ControlEvent, int]]:
    return asyncio.ensure_future(following.__anext__())


def _frame(event: ControlEvent, num_missed: int) -> bytes:
    body = {**event_entry(event), "num_missed": num_missed}
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.sequence, event.kind.value.encode(), msgspec.json.encode(body))


def _number(http: HttpRequest, name: str, default: int, *, at_least: int, at_most: int) -> int:
    text = http.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and at_least <= int(text) <= at_most):
        raise InvalidArgumentError(f"{name} must be a whole number from {at_least} to {at_most}", field=name)
    return int(text)


def _json(value: Any) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), media_type="application/json")
