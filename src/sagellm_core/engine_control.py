"""What a control plane asks of an engine behind HTTP, beside answers: reports, counters, tokens, drain and abort.

Holds `add_control_routes`. Reports and cache events have the form of `report_codec`, as JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from pydantic import Field

from sagellm_core.engine_core.report import EngineReport
from sagellm_core.http import read_json_object, start_event_stream
from sagellm_core.llm_engine import LLMEngine
from sagellm_core.report_codec import pack_cache, pack_report
from sagellm_protocol import ResourceExhaustedError, TokenizeRequest, UnavailableError, parse
from sagellm_protocol.model import EdgeModel

# Reports that wait for a reader who does not read: a minute of them. Then the stream ends, and a new one begins with
# all that is cached.
_MAX_REPORTS = 256


class AbortRequest(EdgeModel):
    """Which request is to end."""

    request_id: str


class TokenIdsRequest(EdgeModel):
    """Tokens whose text is asked for: together, or each by itself."""

    token_ids: list[int]
    skip_special_tokens: bool = False
    is_each: bool = False


class ReportsRequest(EdgeModel):
    """How often reports come at least, in seconds."""

    interval_s: Annotated[float, Field(gt=0, le=60)] = 0.25


def add_control_routes(app: FastAPI) -> None:
    """Add the routes to an application whose `state.engine` is an `LLMEngine`."""
    for method, path, route in (
        ("GET", "/model", model),
        ("GET", "/stats", stats),
        ("GET", "/cache", cache),
        ("GET", "/reports", reports),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("POST", "/abort", abort),
        ("POST", "/drain", drain),
        ("POST", "/resume", resume),
        ("POST", "/reset_prefix_cache", reset_prefix_cache),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)


async def model(http: HttpRequest) -> HttpResponse:
    """The model's description."""
    description = await _engine(http).describe_model()
    return HttpResponse(description.model_dump_json(), media_type="application/json")


async def stats(http: HttpRequest) -> HttpResponse:
    """The engine's counters."""
    return _json(await _engine(http).stats())


async def cache(http: HttpRequest) -> HttpResponse:
    """All that the prefix cache holds, as events."""
    return _json(pack_cache(await _engine(http).cache_snapshot()))


async def reports(http: HttpRequest) -> HttpResponse:
    """Reports as server-sent events, until the client goes away or doesn't keep up."""
    wanted = parse(ReportsRequest, dict(http.query_params), what="reports request")
    return await start_event_stream(http, _reports(_engine(http), wanted.interval_s))


async def tokenize(http: HttpRequest) -> HttpResponse:
    """The token ids of a text or a conversation."""
    wanted = parse(TokenizeRequest, await read_json_object(http), what="tokenize request")
    return _json(await _engine(http).tokenize(wanted))


async def detokenize(http: HttpRequest) -> HttpResponse:
    """The text of tokens, or the texts of each."""
    wanted = parse(TokenIdsRequest, await read_json_object(http), what="detokenize request")
    engine = _engine(http)
    if wanted.is_each:
        return _json(await engine.token_texts(wanted.token_ids))
    return _json(await engine.detokenize(wanted.token_ids, skip_special_tokens=wanted.skip_special_tokens))


async def abort(http: HttpRequest) -> HttpResponse:
    """End a request; 404 where none with this id runs."""
    _engine(http).abort(parse(AbortRequest, await read_json_object(http), what="abort request").request_id)
    return _json(None)


async def drain(http: HttpRequest) -> HttpResponse:
    """Take no new requests; answered when those that run have ended."""
    await _engine(http).drain()
    return _json(None)


async def resume(http: HttpRequest) -> HttpResponse:
    """Take requests again."""
    _engine(http).resume()
    return _json(None)


async def reset_prefix_cache(http: HttpRequest) -> HttpResponse:
    """Forget all cached prefixes; answers false while requests hold blocks."""
    return _json(await _engine(http).reset_prefix_cache())


# ---- steps of the above -------------------------------------------------------------------------------


def _engine(http: HttpRequest) -> LLMEngine:
    engine: LLMEngine = http.app.state.engine
    return engine


def _json(value: Any) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), media_type="application/json")


async def _reports(engine: LLMEngine, interval_s: float) -> AsyncGenerator[bytes, None]:
    waiting: asyncio.Queue[EngineReport] = asyncio.Queue(_MAX_REPORTS)
    is_late = False

    def put(report: EngineReport) -> None:
        nonlocal is_late
        try:
            waiting.put_nowait(report)
        except asyncio.QueueFull:
            is_late = True

    end = engine.watch(put, interval_s=interval_s)
    try:
        while not is_late:
            try:
                # Silence is the reader's to judge; an engine that stopped is told.
                report = await asyncio.wait_for(waiting.get(), timeout=max(1.0, interval_s))
            except asyncio.TimeoutError:
                if not await engine.health_check():
                    raise UnavailableError("the engine stopped") from None
            else:
                yield msgspec.json.encode(pack_report(report))
        raise ResourceExhaustedError("the reports were not read fast enough; ask again for all that is cached")
    finally:
        end()
