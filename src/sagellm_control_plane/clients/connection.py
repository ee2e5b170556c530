"""The manager's line to one engine process: calls out, events in, and one loss for all that wait.

Holds `EngineConnection` and `Call`. Nothing waits for ever: when the line is lost, every call gets what came before and
then the error that the line was lost with.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import zmq

from sagellm_control_plane.clients import wire
from sagellm_control_plane.clients.channel import Channel, ServerKey
from sagellm_core.engine_core.report import EngineReport
from sagellm_core.kv_format import PrefixBlocks
from sagellm_core.report_codec import unpack_report
from sagellm_protocol import (
    Error,
    Request,
    Response,
    SageLLMError,
    StreamEvent,
    StreamEventDelta,
    UnavailableError,
    parse_stream_event,
)

logger = logging.getLogger(__name__)

Item: TypeAlias = StreamEvent | Response | PrefixBlocks | bytes | None


class Call:
    """What comes back for one call, in order; leave it with `close`, which tells the engine where it isn't over."""

    __slots__ = ("_items", "_line", "_waiter", "engine_id", "is_over", "number", "request")

    def __init__(self, line: EngineConnection, number: int, request: Request | None, engine_id: str) -> None:
        self.number = number
        self.request = request
        self.engine_id = engine_id
        self.is_over = False  # the engine has said its last word on it
        self._line = line
        self._items: deque[Item | SageLLMError] = deque()  # no more than the request's tokens
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> Item:
        """The next that came; raises what the engine raised, or what the line was lost with."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if isinstance(item, SageLLMError):
            raise item
        return item

    @property
    def is_at_end(self) -> bool:
        """Whether nothing more will come."""
        return self.is_over and not self._items

    def put(self, item: Item | SageLLMError, *, is_last: bool) -> None:
        """Hand over what came."""
        self.is_over = self.is_over or is_last
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Wait for no more of it."""
        self._line.forget(self)


class EngineConnection:
    """Greets the engine at `endpoint` and talks to it until `close` or `lose`.

    `on_break` is called once if the connection breaks or the engine says what cannot be understood, with the reason;
    whoever gets it decides what was lost and calls `lose`. `on_report` gets the reports.
    """

    def __init__(
        self,
        engine_id: str,
        endpoint: str,
        *,
        on_break: Callable[[str], None],
        on_report: Callable[[EngineReport], None],
        token: str = "",
        heartbeat_s: float = 0.0,
        key: ServerKey | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._engine_id = engine_id
        self._on_break = on_break
        self._on_report = on_report
        # Not from 1: an engine never takes a manager's calls for those of the one before.
        self._numbers = itertools.count(secrets.randbits(62))
        self._calls: dict[int, Call] = {}
        self._by_request: dict[str, Call] = {}
        self._loss: SageLLMError | None = None
        self._is_broken = False
        self._was_connected = False
        self.welcome: asyncio.Future[wire.Welcome] = loop.create_future()
        self.ready: asyncio.Future[wire.Ready] = loop.create_future()
        self._channel = Channel(
            zmq.DEALER, on_frames=self._receive, on_peers=self._count_peers, heartbeat_s=heartbeat_s, key=key
        )
        self._channel.connect(endpoint)
        self._send(wire.Hello(wire.VERSION, token))

    @property
    def is_alive(self) -> bool:
        """Whether calls can be made."""
        return self._loss is None and self.ready.done()

    # ---- calls ----------------------------------------------------------------------------------------

    def submit(self, request: Request, *, is_streamed: bool) -> Call:
        """Send a request; its id must not be under way already, which the caller has seen to."""
        call = self._new_call(request)
        self._by_request[request.request_id] = call
        self._send(wire.Submit(call.number, request.model_dump_json().encode(), is_streamed))
        return call

    async def ask(self, question: wire.Question) -> bytes:
        """The engine's reply, as msgpack."""
        reply = await self._call(lambda call: wire.Ask(call, question))
        assert isinstance(reply, bytes)
        return reply

    async def export_prefix(
        self, token_ids: Sequence[int], cache_salt: str | None, lora_id: str | None
    ) -> PrefixBlocks | None:
        """As `LLMEngine.export_prefix`."""
        blocks = await self._call(lambda call: wire.Export(call, token_ids, cache_salt, lora_id))
        assert blocks is None or isinstance(blocks, PrefixBlocks)
        return blocks

    async def import_prefix(self, blocks: PrefixBlocks) -> bytes:
        """The number of tokens that are cached now, as msgpack."""
        reply = await self._call(lambda call: wire.Import(call, blocks))
        assert isinstance(reply, bytes)
        return reply

    def tell(self, question: wire.Question) -> None:
        """As `ask`, for what needs no reply."""
        self._send(wire.Ask(self._new_number(), question))

    def running(self, request_id: str) -> Call | None:
        """The call of a request that is under way."""
        return self._by_request.get(request_id)

    def abort(self, call: Call) -> None:
        """Let the engine end a request; its last events come as always."""
        self._send(wire.Abort(call.number))

    def watch(self, interval_s: float | None) -> None:
        """Have reports sent, or no more of them."""
        self._send(wire.Watch(interval_s))

    def stop_engine(self) -> None:
        """Let the engine end everything and its process."""
        self._send(wire.Stop())

    def forget(self, call: Call) -> None:
        """See `Call.close`."""
        self._calls.pop(call.number, None)
        if call.request is not None and self._by_request.get(call.request.request_id) is call:
            del self._by_request[call.request.request_id]
        if not call.is_over and self._loss is None:
            self._send(wire.Cancel(call.number))

    # ---- the end --------------------------------------------------------------------------------------

    def lose(self, error: SageLLMError) -> None:
        """Close the line; whoever waits on it raises `error`, and so does whoever calls later."""
        if self._loss is not None:
            return
        self._loss = error
        self._channel.close()
        for future in (self.welcome, self.ready):
            if not future.done():
                future.set_exception(error)
                future.exception()  # read here, because nobody may be waiting for it
        for call in self._calls.values():
            if not call.is_over:
                call.put(error, is_last=True)

    # ---- what comes -----------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        try:
            messages = wire.decode_from_engine(frames[-1])
        except (msgspec.DecodeError, RecursionError) as error:
            self._break(f"it sent what is no message of ours ({error})")
            return
        for message in messages:
            try:
                self._handle(message)
            except SageLLMError as error:  # a message that we understand, around content that we don't
                self._break(f"it sent what is no answer ({error.message})")
                return

    def _handle(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Delta() | wire.Event() | wire.Answer() | wire.Raised() | wire.Reply() | wire.Exported():
                call = self._calls.get(message.call)
                if call is not None:  # else it was given up, and this was on its way
                    _deliver(message, call)
            case wire.Report():
                self._on_report(unpack_report(message.report))
            case wire.Welcome():
                if not self.welcome.done():
                    self.welcome.set_result(message)
            case wire.Ready():
                if not self.ready.done():
                    self.ready.set_result(message)
            case wire.Refused() | wire.Failed():
                self.lose(Error.model_validate_json(message.error).to_exception())

    def _count_peers(self, number: int) -> None:
        if number:
            self._was_connected = True
        elif self._was_connected:
            self._break("the connection broke")

    def _break(self, reason: str) -> None:
        if not self._is_broken and self._loss is None:
            self._is_broken = True
            self._on_break(reason)

    # ---- what goes ------------------------------------------------------------------------------------

    async def _call(self, message_of: Callable[[int], wire.ToEngine]) -> Item:
        call = self._new_call(None)
        self._send(message_of(call.number))
        try:
            return await call.get()
        finally:
            call.close()

    def _new_call(self, request: Request | None) -> Call:
        if self._loss is not None:
            raise self._loss
        call = Call(self, self._new_number(), request, self._engine_id)
        self._calls[call.number] = call
        return call

    def _new_number(self) -> int:
        return next(self._numbers)

    def _send(self, message: wire.ToEngine) -> None:
        if self._loss is not None:
            raise UnavailableError("the engine is not running; call start() first")
        if not self._channel.send([wire.encode([message])]):
            self._break("it reads nothing of what it is sent")


def _deliver(message: wire.Outcome, call: Call) -> None:
    match message:
        case wire.Delta():
            request = call.request
            assert request is not None, "only requests are answered by tokens"
            call.put(
                StreamEventDelta(
                    request_id=request.request_id,
                    trace_id=request.trace_id,
                    engine_id=call.engine_id,
                    chunk=message.chunk,
                    chunk_tokens=message.chunk_tokens,
                    index=message.index,
                ),
                is_last=False,
            )
        case wire.Event():
            event = parse_stream_event(message.event)
            call.put(event, is_last=event.event == "end")
        case wire.Answer():
            call.put(Response.model_validate_json(message.response), is_last=True)
        case wire.Raised():
            call.put(Error.model_validate_json(message.error).to_exception(), is_last=True)
        case wire.Reply():
            call.put(message.value, is_last=True)
        case wire.Exported():
            call.put(message.blocks, is_last=True)
