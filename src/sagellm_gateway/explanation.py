"""Why a call went where it went: what the control plane knows of the requests that it caused.

Operators read it under `/admin/requests/{id}`; who calls may ask for the essence with the header `x-explain`, and gets
it as headers of the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sagellm_protocol import NotFoundError

if TYPE_CHECKING:
    from sagellm_control_plane import ControlPlaneManager
    from sagellm_control_plane.events import ControlEvent
    from sagellm_control_plane.explain import RequestTrace

EXPLAIN = b"x-explain"  # of a call, with any value


def traces_of(manager: ControlPlaneManager, request_id: str) -> list[RequestTrace]:
    """The traces of a request, or of all that a call of this id caused, in the order they came.

    Raises `NotFoundError` where nothing is known of it, or no more.
    """
    try:
        return [manager.explain(request_id)]
    except NotFoundError:
        beginning = f"{request_id}-"
        recent = manager.recent_requests(manager.config.num_traces)
        found = [trace for trace in recent if trace.request_id.startswith(beginning)]
        if not found:
            raise
        return found[::-1]


def explanation_headers(manager: ControlPlaneManager, call_id: str) -> Iterator[tuple[bytes, bytes]]:
    """Headers for the answer to a call, as far as things are known at its begin; none where it asked no engine."""
    try:
        entries = [trace.to_dict() for trace in traces_of(manager, call_id)]
    except NotFoundError:
        return
    stays = [stay for entry in entries for stay in entry["stays"]]
    if not stays:
        return
    first, stay = entries[0], stays[0]
    yield b"x-explain-engine", ",".join(dict.fromkeys(stay["engine_id"] for stay in stays)).encode()
    yield b"x-explain-policy", first["policy"].encode()
    yield b"x-explain-router", first["router"].encode()
    yield b"x-explain-rule", stay["rule"].encode()
    yield b"x-explain-cached-tokens", b"%d" % stay["num_cached_tokens"]
    for name, seconds in (
        (b"queue", first["queue_s"]),
        (b"predicted-ttft", stay["predicted_ttft_s"]),
        (b"ttft", first["ttft_s"]),
    ):
        if seconds is not None:
            yield b"x-explain-%b-ms" % name, b"%.1f" % (seconds * 1e3)


def explanation_attributes(manager: ControlPlaneManager, request_id: str) -> dict[str, Any]:
    """Attributes for the span of the call that caused a request; none where nothing is known of it."""
    try:
        entry = manager.explain(request_id).to_dict()
    except NotFoundError:
        return {}
    stays = entry["stays"]
    attributes = {
        "sagellm.policy": entry["policy"],
        "sagellm.router": entry["router"],
        "sagellm.engines": [stay["engine_id"] for stay in stays],
        "sagellm.queue_s": entry["queue_s"],
        "sagellm.predicted_ttft_s": stays[0]["predicted_ttft_s"] if stays else None,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def trace_entry(trace: RequestTrace) -> dict[str, Any]:
    """A trace as a JSON object; `time` is when it came, in seconds of the wall clock."""
    return {"time": _wall_clock(trace.queued_at), **trace.to_dict()}


def event_entry(event: ControlEvent) -> dict[str, Any]:
    """An event as a JSON object; `time` is in seconds of the wall clock."""
    return {"time": _wall_clock(event.at), **event.to_dict()}


def _wall_clock(moment: float) -> float:
    """What the wall clock showed; the control plane counts by the event loop's."""
    return time.time() - (asyncio.get_running_loop().time() - moment)
