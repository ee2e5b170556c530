"""Answers of the APIs whose messages have frames and error messages of their own.

A `FramingWriter` turns the pieces of an answer into bytes that are complete, frames included; `written` runs one over a
stream of pieces. What fails before the first byte is raised and becomes a status; after it, the writer tells the error
in its API's way and the stream ends.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, ClassVar

from fastapi import Request as HttpRequest
from starlette.types import Message, Receive, Scope, Send

from sagellm_core.http import EventStream, unexpected_error, while_connected
from sagellm_gateway.pieces import Answer, ChoiceEnd, Piece
from sagellm_gateway.writing import PieceWriter
from sagellm_protocol import SageLLMError, UnavailableError

logger = logging.getLogger(__name__)

_CUT_OFF = ("abort", "error")


class FramingWriter(PieceWriter):
    """Writes messages with their frames."""

    @abstractmethod
    def fail(self, error: SageLLMError) -> bytes:
        """The messages that end the answer with an error."""


class FramedEvents(EventStream):
    """Server-sent events that come framed, with names."""

    @staticmethod
    def frame(message: bytes) -> bytes:
        """The message itself."""
        return message


class PingedEvents(FramedEvents):
    """Framed events, with a `ping` wherever nothing was sent for `interval_s`: no proxy takes the answer for dead."""

    ping: ClassVar[bytes] = b'event: ping\ndata: {"type":"ping"}\n\n'
    interval_s: ClassVar[float] = 15.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the ASGI interface."""
        pulse = _Pulse(send, self.ping, self.interval_s)
        beating = asyncio.ensure_future(pulse.beat())
        try:
            await super().__call__(scope, receive, pulse.send)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


class _Pulse:
    """Sends messages, and pings between them."""

    def __init__(self, send: Send, ping: bytes, interval_s: float) -> None:
        self._send = send
        self._ping: Message = {"type": "http.response.body", "body": ping, "more_body": True}
        self._interval_s = interval_s
        self._num_sent = 0
        self._may_ping = False

    async def send(self, message: Message) -> None:
        # Not before the answer has begun, not while a message is on its way, not after the last one.
        self._may_ping = False
        await self._send(message)
        self._num_sent += 1
        self._may_ping = message.get("more_body", False)

    async def beat(self) -> None:
        while True:
            num_sent = self._num_sent
            await asyncio.sleep(self._interval_s)
            if self._may_ping and self._num_sent == num_sent:
                await self._send(self._ping)


class JsonLines(FramedEvents):
    """JSON objects, one a line."""

    media_type = "application/x-ndjson"


async def written(pieces: AsyncGenerator[Piece, None], writer: FramingWriter) -> AsyncGenerator[bytes, None]:
    """What `writer` writes of `pieces`, which are closed in the end."""
    has_begun = False
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                refuse_cut(piece)
                message = writer.write(piece)
                if message:
                    has_begun = True
                    yield message
    except SageLLMError as error:
        if not has_begun:
            raise
        yield writer.fail(error)
    except Exception:
        if not has_begun:
            raise
        logger.exception("an answer failed in the midst of its stream")
        yield writer.fail(unexpected_error())


async def whole(http: HttpRequest, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer that `work` makes, unless the client goes away first; raises for one that was cut off."""
    answer = await while_connected(http, work)
    if answer.choices[0].finish_reason in _CUT_OFF:
        raise cut_off()
    return answer


def refuse_cut(end: Piece) -> None:
    """Raise for the end of an answer that was cut off: these APIs have no word for it but an error."""
    if isinstance(end, ChoiceEnd) and end.finish_reason in _CUT_OFF:
        raise cut_off()


def cut_off() -> UnavailableError:
    """What the caller of an answer that was cut off is told."""
    return UnavailableError("the answer was cut off because its engine stopped; send the request again")
