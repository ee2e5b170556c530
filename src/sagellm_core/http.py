"""What every HTTP face needs: JSON bodies, server-sent events, errors in the OpenAI API's form, metrics pages.

Promises: a wrong request gets a status and an `ErrorResponse`, never a broken stream; a client that goes away cancels
the work it asked for; nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sagellm_protocol import ErrorCode, InternalError, InvalidArgumentError, RequestCancelledError, SageLLMError
from sagellm_protocol.openai import ErrorResponse

MAX_BODY_BYTES = 8 * 2**20

# An answer that takes no longer is not worth watching the connection for.
_PATIENCE_S = 0.01

# The message that ends a stream of the OpenAI API.
DONE = b"[DONE]"

_T = TypeVar("_T")

# Not ours to send, but what routing itself answers: unknown path, wrong method.
_CODE_OF_STATUS = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.INVALID_ARGUMENT}


# ---- requests -----------------------------------------------------------------------------------------


async def read_json_object(http: HttpRequest) -> dict[str, Any]:
    """The JSON object in the body; `InvalidArgumentError` for anything else and for more than `MAX_BODY_BYTES`."""
    try:
        data = msgspec.json.decode(await _read_body(http))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"the body is not valid JSON: {error}; send a JSON object") from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"the body must be a JSON object, got {type(data).__name__}")
    return data


async def _read_body(http: HttpRequest) -> bytes:
    size = 0
    chunks = []
    try:
        async for chunk in http.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise InvalidArgumentError(f"the body is larger than {MAX_BODY_BYTES} bytes; send less")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise RequestCancelledError("the client closed the connection before its request was complete") from error
    return b"".join(chunks)


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client goes away first (then `RequestCancelledError`).

    To be called when the body has been read.
    """
    watch = _Watch(http.receive, asyncio.current_task())
    # An answer that is there at once needs no watch, which costs more than many an answer.
    timer = asyncio.get_running_loop().call_later(_PATIENCE_S, watch.start)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.has_left:
            raise RequestCancelledError("the client closed the connection before its answer was ready") from None
        raise
    finally:
        timer.cancel()
        await watch.end()


class _Watch:
    """Cancels a task when the client goes away."""

    def __init__(self, receive: Receive, task: asyncio.Task[Any] | None) -> None:
        assert task is not None, "requests are served in tasks"
        self.has_left = False
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watching = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        await _disconnected(self._receive)
        self.has_left = True
        self._task.cancel()

    async def end(self) -> None:
        if self._watching is not None:
            await _cancelled(self._watching)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- answers ------------------------------------------------------------------------------------------


class EventStream(HttpResponse):
    """Server-sent events: one `data:` message for each JSON text of `first` and then of `messages`.

    The generator is closed in every case, also when the client goes away while it waits for its next message. An
    error inside it becomes a last message with an error body.
    """

    media_type = "text/event-stream"

    def __init__(self, messages: AsyncGenerator[bytes, None], first: Sequence[bytes] = ()) -> None:
        self._messages = messages
        self._first = first
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering keeps nginx from holding tokens back.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the ASGI interface."""
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancelled(sending, leaving)
            await self._messages.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for message in self._first:
                await _send_event(send, message)
            async for message in self._messages:
                await _send_event(send, message)
        except SageLLMError as error:
            await _send_event(send, ErrorResponse.of(error).model_dump_json().encode())
        except Exception:
            await _send_event(send, ErrorResponse.of(unexpected_error()).model_dump_json().encode())
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, message: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: %s\n\n" % message, "more_body": True})


async def start_event_stream(http: HttpRequest, messages: AsyncGenerator[bytes, None]) -> EventStream:
    """A stream whose first message is there already, so that a bad request is a status and not a broken stream."""

    async def next_messages() -> list[bytes]:
        async for message in messages:
            return [message]
        return []

    return EventStream(messages, await while_connected(http, next_messages()))


def metrics_page(registry: CollectorRegistry) -> HttpResponse:
    """A registry in Prometheus' text format."""
    return HttpResponse(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


# ---- errors -------------------------------------------------------------------------------------------


def install_error_handlers(app: FastAPI) -> None:
    """Answer every failure of `app` with the OpenAI API's error body and the status of its code."""
    app.add_exception_handler(SageLLMError, _on_protocol_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


def error_answer(error: SageLLMError, http_status: int | None = None) -> HttpResponse:
    """The error body; OpenAI's clients read from its headers whether the same request is worth another try."""
    headers = {"X-Should-Retry": "true" if error.retryable else "false"}
    if error.retryable:
        headers["Retry-After"] = "1"
    body = ErrorResponse.of(error).model_dump(mode="json")
    return JSONResponse(body, status_code=http_status or error.http_status, headers=headers)


async def _on_protocol_error(_: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, SageLLMError)
    return error_answer(error)


async def _on_http_error(http: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, ErrorCode.INTERNAL)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return error_answer(SageLLMError(message, code=code), error.status_code)


async def _on_unexpected_error(_: HttpRequest, __: Exception) -> HttpResponse:
    # The server logs the traceback: the framework raises the exception again behind this answer.
    return error_answer(unexpected_error())


def unexpected_error() -> InternalError:
    """What a client is told of a fault of ours."""
    return InternalError("the server failed on this request; its log says why")
