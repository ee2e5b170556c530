"""What every HTTP face needs: JSON bodies, server-sent events, errors in the OpenAI API's form, metrics pages.

Promises: a wrong request gets a status and an `ErrorResponse`, never a broken stream; a client that goes away cancels
the work it asked for; nothing here knows what is served.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sagellm_core.json_limits import check_depth, check_structure
from sagellm_protocol import (
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    RequestCancelledError,
    SageLLMError,
)
from sagellm_protocol.openai import ErrorResponse

# Where a scope holds the limits of its body.
BODY_LIMITS = "sagellm.body_limits"

# An answer that takes no longer is not worth watching the connection for.
_PATIENCE_S = 0.01

# The message that ends a stream of the OpenAI API.
DONE = b"[DONE]"

_T = TypeVar("_T")

# The body for an error on the way to a path: not every API has the same form of errors.
ErrorForm = Callable[[str, SageLLMError], dict[str, Any]]

# Not ours to send, but what routing itself answers: unknown path, wrong method.
_CODE_OF_STATUS = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.INVALID_ARGUMENT}


# ---- requests -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BodyLimits:
    """What a body may be; those of a server lie in its requests' scope under `BODY_LIMITS`."""

    max_bytes: int = 8 * 2**20
    max_depth: int = 64  # objects and lists within each other


class BodyTooLargeError(InvalidArgumentError):
    """A body that exceeds its limit: status 413."""

    @property
    def http_status(self) -> int:
        """The status for this error."""
        return 413


_DEFAULT_BODY_LIMITS = BodyLimits()


async def read_json_object(http: HttpRequest) -> dict[str, Any]:
    """The JSON object in the body; `InvalidArgumentError` for anything else and for what exceeds `BodyLimits`."""
    limits = http.scope.get(BODY_LIMITS, _DEFAULT_BODY_LIMITS)
    body = await _read_body(http, limits)
    check_structure(body)
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "; escapes of surrogates come in pairs" if b"\\ud" in body.lower() else ""
        encoding = http.headers.get("content-encoding")
        if encoding is not None:
            hint = f"; it says that it is encoded as {encoding[:64]}, which is not read"
        raise InvalidArgumentError(f"the body is not valid JSON: {error}{hint}; send a JSON object") from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"the body must be a JSON object, got {type(data).__name__}")
    check_depth(data, body, limits.max_depth)
    return data


async def _read_body(http: HttpRequest, limits: BodyLimits) -> bytes:
    announced = dict(http.scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limits.max_bytes):
        raise _body_too_large(limits)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the connection was closed before the request was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limits.max_bytes:
            raise _body_too_large(limits)
        if not message.get("more_body", False):
            return b"".join((*parts, part)) if parts else part
        parts.append(part)


def _body_too_large(limits: BodyLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limits.max_bytes} bytes; send less")


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client goes away first (then `RequestCancelledError`).

    To be called when the body has been read.
    """
    watch = _watches().add(http.receive)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.has_left:
            raise RequestCancelledError("the client closed the connection before its answer was ready") from None
        raise
    finally:
        await watch.end()


class _Watch:
    """Cancels a task when its client goes away, once it has been started."""

    def __init__(self, watches: _Watches, task: asyncio.Task[Any], receive: Receive) -> None:
        self.has_left = False
        self._watches = watches
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watching = asyncio.ensure_future(self._run())

    async def end(self) -> None:
        if self._watching is None:
            self._watches.drop(self)
        else:
            await _cancelled(self._watching)

    async def _run(self) -> None:
        await _disconnected(self._receive)
        self.has_left = True
        self._task.cancel()


class _Watches:
    """The watches of an event loop that haven't started.

    An answer that is there at once needs none: a watch costs more than many an answer. So they start when they have
    waited one to two times `_PATIENCE_S`, by one timer for all of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._new: set[_Watch] = set()
        self._old: set[_Watch] = set()
        self._is_ticking = False

    def add(self, receive: Receive) -> _Watch:
        """The watch of the running task."""
        task = asyncio.current_task(self.loop)
        assert task is not None, "requests are served in tasks"
        watch = _Watch(self, task, receive)
        self._new.add(watch)
        if not self._is_ticking:
            self._is_ticking = True
            self.loop.call_later(_PATIENCE_S, self._tick)
        return watch

    def drop(self, watch: _Watch) -> None:
        """Forget a watch that isn't needed any more."""
        self._new.discard(watch)
        self._old.discard(watch)

    def _tick(self) -> None:
        for watch in self._old:
            watch.start()
        self._new, self._old = set(), self._new
        self._is_ticking = bool(self._old)
        if self._is_ticking:
            self.loop.call_later(_PATIENCE_S, self._tick)


_here = threading.local()


def _watches() -> _Watches:
    """Those of the running loop."""
    watches: _Watches | None = getattr(_here, "watches", None)
    # Of a thread's loops one runs. To ask for it is a system call, to ask it is not.
    if watches is None or not watches.loop.is_running():
        watches = _here.watches = _Watches(asyncio.get_running_loop())
    return watches


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- answers ------------------------------------------------------------------------------------------


class JsonText(HttpResponse):
    """A JSON text as it is, with status 200."""

    def __init__(self, text: bytes) -> None:
        # What its base does for answers of every kind.
        self.status_code = 200
        self.background = None
        self.body = text
        self.raw_headers = [(b"content-length", b"%d" % len(text)), (b"content-type", b"application/json")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the ASGI interface."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


class EventStream(HttpResponse):
    """Server-sent events: one `data:` message for each JSON text of `first` and then of `messages`.

    The generator is closed in every case, also when the client goes away while it waits for its next message. An
    error inside it becomes a last message with an error body. Subclasses stream in other frames.
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

    @staticmethod
    def frame(message: bytes) -> bytes:
        """A message as it stands in the body."""
        return b"data: %s\n\n" % message

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for message in self._first:
                await self._send_message(send, message)
            async for message in self._messages:
                await self._send_message(send, message)
        except SageLLMError as error:
            await self._send_message(send, ErrorResponse.of(error).model_dump_json().encode())
        except Exception:
            await self._send_message(send, ErrorResponse.of(unexpected_error()).model_dump_json().encode())
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_message(self, send: Send, message: bytes) -> None:
        await send({"type": "http.response.body", "body": self.frame(message), "more_body": True})


async def start_event_stream(
    http: HttpRequest, messages: AsyncGenerator[bytes, None], kind: type[EventStream] = EventStream
) -> EventStream:
    """A stream whose first message is there already, so that a bad request is a status and not a broken stream."""

    async def next_messages() -> list[bytes]:
        async for message in messages:
            return [message]
        return []

    return kind(messages, await while_connected(http, next_messages()))


def metrics_page(registry: CollectorRegistry) -> HttpResponse:
    """A registry in Prometheus' text format."""
    return HttpResponse(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


# ---- errors -------------------------------------------------------------------------------------------


def openai_error_body(_path: str, error: SageLLMError) -> dict[str, Any]:
    """The OpenAI API's form of an error, whatever was called."""
    return ErrorResponse.of(error).model_dump(mode="json")


def no_such_path(_path: str) -> str:
    """What is told to who called a path that there is not."""
    return "there is no such path; check it"


def install_error_handlers(
    app: FastAPI, body_of: ErrorForm = openai_error_body, missing: Callable[[str], str] = no_such_path
) -> None:
    """Answer every failure of `app` with the status of its code and the body that `body_of(path, error)` makes.

    `missing(path)` says what to do about a path that there is not.
    """

    async def on_protocol_error(http: HttpRequest, error: Exception) -> HttpResponse:
        assert isinstance(error, SageLLMError)
        return error_answer(error, body=body_of(http.url.path, error))

    async def on_http_error(http: HttpRequest, error: Exception) -> HttpResponse:
        assert isinstance(error, HTTPException)
        code = _CODE_OF_STATUS.get(error.status_code, ErrorCode.INTERNAL)
        detail = missing(http.url.path) if error.status_code == 404 else error.detail
        failure = SageLLMError(f"{http.method} {http.url.path}: {detail}", code=code)
        answer = error_answer(failure, error.status_code, body=body_of(http.url.path, failure))
        answer.headers.update(error.headers or {})  # such as Allow, beside 405
        return answer

    async def on_unexpected_error(http: HttpRequest, _: Exception) -> HttpResponse:
        # The server logs the traceback: the framework raises the exception again behind this answer.
        failure = unexpected_error()
        return error_answer(failure, body=body_of(http.url.path, failure))

    app.add_exception_handler(SageLLMError, on_protocol_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected_error)


def error_answer(
    error: SageLLMError, http_status: int | None = None, *, body: dict[str, Any] | None = None
) -> HttpResponse:
    """The error in the OpenAI API's form or as `body`; clients read from its headers whether to try again."""
    headers = {"X-Should-Retry": "true" if error.retryable else "false"}
    if error.retryable:
        headers["Retry-After"] = str(max(1, math.ceil(error.context.get("retry_after_s", 1))))
    return JSONResponse(
        body or openai_error_body("", error), status_code=http_status or error.http_status, headers=headers
    )


def unexpected_error() -> InternalError:
    """What a client is told of a fault of ours."""
    return InternalError("the server failed on this request; its log says why")
