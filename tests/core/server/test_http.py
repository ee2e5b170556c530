"""HTTP helpers: bodies, event streams, clients that go away, errors."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_client import LeavingClient, client_of, events_in
from sagellm_core.http import (
    BODY_LIMITS,
    BodyLimits,
    install_error_handlers,
    read_json_object,
    start_event_stream,
    while_connected,
)
from sagellm_protocol import NotFoundError, ResourceExhaustedError
from waiting import until


class Work:
    """What the application below does; `is_closed` says that it was cleaned up."""

    def __init__(self) -> None:
        self.is_closed = False
        self.go_on = asyncio.Event()

    async def compute(self) -> str:
        try:
            await self.go_on.wait()
            return "done"
        finally:
            self.is_closed = True

    async def messages(self, kind: str) -> AsyncGenerator[bytes, None]:
        try:
            if kind == "wrong":
                raise NotFoundError("no such thing", field="kind")
            if kind == "nothing":
                return
            yield b"1"
            if kind == "breaks":
                raise ResourceExhaustedError("no memory")
            if kind == "bug":
                raise ZeroDivisionError
            if kind == "waits":
                await self.go_on.wait()
            yield b"2"
        finally:
            self.is_closed = True


def make_app(work: Work) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/echo")
    async def echo(http: HttpRequest) -> JSONResponse:
        return JSONResponse(await read_json_object(http))

    @app.post("/compute")
    async def compute(http: HttpRequest) -> JSONResponse:
        await read_json_object(http)
        return JSONResponse(await while_connected(http, work.compute()))

    @app.post("/stream", response_model=None)
    async def stream(http: HttpRequest) -> HttpResponse:
        body = await read_json_object(http)
        return await start_event_stream(http, work.messages(body["kind"]))

    @app.get("/bug")
    async def bug() -> JSONResponse:
        raise ZeroDivisionError("secret")

    return app


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": "\\uD800"}', "surrogates come in pairs"),
        (b"[1]", "must be a JSON object, got list"),
        (b"[" * 10_000, "not valid JSON"),
    ],
)
async def test_a_bad_body_is_the_callers_error(content: bytes, message: str) -> None:
    async with client_of(make_app(Work())) as client:
        answer = await client.post("/echo", content=content)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert message in error["message"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_argument")
        packed = await client.post("/echo", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
        assert packed.status_code == 400
        assert "encoded as gzip, which is not read" in packed.json()["error"]["message"]


class Limited:
    """Puts limits into the scope of every request."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, BODY_LIMITS: self._limits}, receive, send)


def limited(app: FastAPI, limits: BodyLimits) -> FastAPI:
    app.add_middleware(Limited, limits=limits)
    return app


async def pieces_of(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10):
        yield body[start : start + 10]


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused(is_chunked: bool) -> None:
    async with client_of(limited(make_app(Work()), BodyLimits(max_bytes=100))) as client:
        assert (await client.post("/echo", json={"a": "b"})).json() == {"a": "b"}
        body = json.dumps({"a": "b" * 100}).encode()
        answer = await client.post("/echo", content=pieces_of(body) if is_chunked else body)
        assert answer.status_code == 413
        assert "larger than 100 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("depth", "status"), [(4, 200), (5, 400)])
@pytest.mark.parametrize("is_wide", [False, True])
async def test_a_body_that_is_too_deep_is_refused(depth: int, status: int, is_wide: bool) -> None:
    body = b'{"a":' * depth + b"1" + b"}" * depth
    if is_wide:
        body = body[:-1] + b',"b":[' + b"[]," * 100 + b"{}]}"
    async with client_of(limited(make_app(Work()), BodyLimits(max_depth=4))) as client:
        answer = await client.post("/echo", content=body)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert "nested deeper than 4" in answer.json()["error"]["message"]


async def test_errors_have_bodies_and_say_whether_to_try_again() -> None:
    async with client_of(make_app(Work())) as client:
        missing = await client.get("/nowhere")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"
        assert missing.headers["x-should-retry"] == "false"
        wrong_method = await client.get("/echo")
        assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
        bug = await client.get("/bug")
        assert bug.status_code == 500
        assert bug.json()["error"]["code"] == "internal"
        assert "secret" not in bug.text


@pytest.mark.parametrize(("kind", "events"), [("fine", [1, 2]), ("nothing", [])])
async def test_a_stream(kind: str, events: list[int]) -> None:
    work = Work()
    async with client_of(make_app(work)) as client:
        answer = await client.post("/stream", json={"kind": kind})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert [int(event) for event in events_in(answer.text)] == events
    assert work.is_closed


async def test_an_error_before_the_first_message_is_a_status() -> None:
    async with client_of(make_app(Work())) as client:
        answer = await client.post("/stream", json={"kind": "wrong"})
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": "no such thing",
            "type": "invalid_request_error",
            "param": "kind",
            "code": "not_found",
        }


@pytest.mark.parametrize(("kind", "code"), [("breaks", "resource_exhausted"), ("bug", "internal")])
async def test_an_error_in_mid_stream_is_the_last_message(kind: str, code: str) -> None:
    async with client_of(make_app(Work())) as client:
        answer = await client.post("/stream", json={"kind": kind})
        first, last = events_in(answer.text)
        assert first == "1"
        assert last["error"]["code"] == code


async def run_and_leave(path: str, body: dict[str, Any], work: Work, num_messages: int) -> list[dict[str, Any]]:
    client = LeavingClient(make_app(work), path, body)
    await until(lambda: len(client.sent) >= num_messages)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not work.is_closed
    client.leave()
    await client.done
    assert work.is_closed
    return client.sent


async def test_a_client_that_leaves_cancels_its_computation() -> None:
    sent = await run_and_leave("/compute", {}, Work(), 0)
    assert sent[0]["status"] == 499


async def test_a_client_that_leaves_closes_its_stream_while_it_waits() -> None:
    sent = await run_and_leave("/stream", {"kind": "waits"}, Work(), 2)
    assert sent[1]["body"] == b"data: 1\n\n"
    assert all(message.get("more_body", True) for message in sent)


async def test_a_client_that_leaves_in_the_middle_of_its_request() -> None:
    client = LeavingClient(make_app(Work()), "/echo", {})
    client._requests[0]["more_body"] = True
    client.leave()
    await client.done
    assert client.sent[0]["status"] == 499
    assert json.loads(client.sent[1]["body"])["error"]["code"] == "cancelled"
