"""The engine's side of the socket: holds `EngineServer`, which puts any engine behind an endpoint for one manager.

The manager that greeted last is the only one that is heard. When it leaves, its requests end; when none has come for
`orphan_timeout_s`, the server ends by itself. What cannot be understood is logged and dropped.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

import msgspec
import zmq

from sagellm_control_plane.clients import wire
from sagellm_control_plane.clients.base import EngineClient, PrefixTransfer
from sagellm_control_plane.clients.channel import Channel, ServerKey
from sagellm_control_plane.clock import Clock, LoopClock, TimerHandle
from sagellm_core.engine_core.report import EngineReport
from sagellm_core.report_codec import pack_cache, pack_report
from sagellm_protocol import (
    InternalError,
    NotFoundError,
    Request,
    SageLLMError,
    StreamEventDelta,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)

logger = logging.getLogger(__name__)

# What leaves after the end: the last events of requests, or why the engine did not start.
_LINGER_S = 2.0
_RETRY_S = 0.005


class EngineServer:
    """Starts `engine`, serves it at `endpoint` and stops it again; `run` is the whole life.

    `token` is a secret that managers must know, and `key` encrypts: for sockets that others than their owner reach.
    """

    def __init__(
        self,
        engine: EngineClient,
        endpoint: str,
        *,
        epoch: str,
        token: str = "",
        orphan_timeout_s: float,
        heartbeat_s: float = 0.0,
        key: ServerKey | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._epoch = epoch
        self._token = token
        self._orphan_timeout_s = orphan_timeout_s
        self._heartbeat_s = heartbeat_s
        self._key = key
        self._clock = clock or LoopClock()
        self._manager: bytes | None = None  # the identity of its connection
        self._state: wire.Ready | wire.Failed | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._requests: dict[int, str] = {}
        self._outgoing: list[wire.FromEngine] = []  # no more than the tokens of what runs, and answers
        self._is_flush_planned = False
        self._end_watch: Callable[[], None] | None = None
        self._orphan_timer: TimerHandle | None = None
        self._greeted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._channel: Channel

    async def run(self, on_bound: Callable[[str], None] | None = None) -> bool:
        """Serve until told to stop, or nobody is left; whether the engine could start.

        `on_bound` gets the endpoint, with the port that was chosen, before the model loads.
        """
        self._channel = Channel(
            zmq.ROUTER,
            on_frames=self._receive,
            on_peers=self._count_peers,
            heartbeat_s=self._heartbeat_s,
            key=self._key,
        )
        try:
            endpoint = self._channel.bind(self._endpoint)
            if on_bound is not None:
                on_bound(endpoint)
            self._count_peers(0)
            await self._serve()
        finally:
            self._set_orphan_timer(None)
            self._channel.close(_LINGER_S)
        return not isinstance(self._state, wire.Failed)

    def stop(self) -> None:
        """End all requests with `abort`, the engine, and then `run`."""
        self._stopping.set()

    async def _serve(self) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        starting = asyncio.ensure_future(self._start())
        try:
            await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
            elif isinstance(self._state, wire.Failed):
                # Whoever started us wants to know why.
                greeted = asyncio.ensure_future(self._greeted.wait())
                await asyncio.wait({stopping, greeted}, return_when=asyncio.FIRST_COMPLETED)
                greeted.cancel()
            else:
                await stopping
        finally:
            stopping.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            self._watch(None)
            await self._engine.stop()  # ends the requests, whose last events are sent below
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._flush()

    async def _start(self) -> None:
        try:
            await self._engine.start()
            description = await self._engine.describe_model()
        except Exception as error:
            if not isinstance(error, SageLLMError):
                logger.exception("the engine could not start")
            self._state = wire.Failed(_pack_error(error))
        else:
            self._state = wire.Ready(
                msgspec.json.encode(self._engine.get_info()),
                description.model_dump_json().encode(),
                self._engine.config.model_dump_json(exclude_unset=True).encode(),
            )
        if self._manager is not None:
            self._put(self._state)

    # ---- what comes -----------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        sender, content = frames[0], frames[-1]
        try:
            messages = wire.decode_to_engine(content)
        except (msgspec.DecodeError, RecursionError) as error:
            logger.warning("dropped %d bytes that are no message of ours: %s", len(content), error)
            return
        for message in messages:
            if isinstance(message, wire.Hello):
                self._greet(sender, message)
            elif sender == self._manager:
                self._handle(message)
            else:
                logger.warning("dropped %s of one who is not the manager", type(message).__name__)

    def _greet(self, sender: bytes, hello: wire.Hello) -> None:
        problem: SageLLMError | None = None
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            problem = UnauthenticatedError("the engine's socket wants another token")
        elif hello.version != wire.VERSION:
            problem = UnavailableError(
                f"the engine speaks version {wire.VERSION} of the protocol between manager and engine, not "
                f"{hello.version}; restart it with the manager's version",
                retryable=False,
            )
        if problem is not None:
            with suppress(ConnectionError):  # it did not wait to hear it
                self._channel.send([sender, wire.encode([wire.Refused(_pack_error(problem))])])
            return
        self._end_calls()
        self._manager = sender
        self._set_orphan_timer(None)
        self._put(wire.Welcome(wire.VERSION, self._engine.engine_id, self._epoch, os.getpid()))
        if self._state is not None:
            self._put(self._state)
        self._greeted.set()

    def _handle(self, message: wire.ToEngine) -> None:
        match message:
            case wire.Submit():
                self._begin(message.call, self._answer(message))
            case wire.Ask() | wire.Export() | wire.Import():
                self._begin(message.call, self._reply(message))
            case wire.Abort():
                self._abort(message.call)
            case wire.Cancel():
                if message.call in self._tasks:
                    self._tasks[message.call].cancel()
            case wire.Watch():
                self._watch(message.interval_s)
            case wire.Stop():
                self.stop()

    def _begin(self, call: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[call] = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._tasks.pop(call, None))

    # ---- calls ----------------------------------------------------------------------------------------

    async def _answer(self, message: wire.Submit) -> None:
        call = message.call
        try:
            request = Request.model_validate_json(message.request)
            self._requests[call] = request.request_id
            if message.is_streamed:
                await self._stream(call, request)
            else:
                response = await self._engine.execute(request)
                self._put(wire.Answer(call, response.model_dump_json().encode()))
        except Exception as error:
            self._raise(call, error)
        finally:
            self._requests.pop(call, None)

    async def _stream(self, call: int, request: Request) -> None:
        async with aclosing(self._engine.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta) and event.logprobs is None:
                    self._put(wire.Delta(call, event.index, event.chunk, event.chunk_tokens))
                else:
                    self._put(wire.Event(call, event.model_dump_json().encode()))

    async def _reply(self, message: wire.Ask | wire.Export | wire.Import) -> None:
        try:
            self._put(await self._reply_to(message))
        except Exception as error:
            self._raise(message.call, error)

    async def _reply_to(self, message: wire.Ask | wire.Export | wire.Import) -> wire.Reply | wire.Exported:
        if isinstance(message, wire.Ask):
            return wire.Reply(message.call, msgspec.msgpack.encode(await self._find_out(message.question)))
        engine = self._engine
        if not isinstance(engine, PrefixTransfer):
            raise UnsupportedError(f"engine {engine.engine_id} does not hand over its cache; let the other one compute")
        if isinstance(message, wire.Import):
            return wire.Reply(message.call, msgspec.msgpack.encode(await engine.import_prefix(message.blocks)))
        blocks = await engine.export_prefix(message.token_ids, cache_salt=message.cache_salt, lora_id=message.lora_id)
        return wire.Exported(message.call, blocks)

    async def _find_out(self, question: wire.Question) -> Any:
        match question:
            case "ping":
                return True
            case "health":
                return await self._engine.health_check()
            case "stats":
                return await self._engine.stats()
            case "reset_prefix_cache":
                return await self._engine.reset_prefix_cache()
            case "cache_snapshot":
                return pack_cache(await self._engine.cache_snapshot())
            case "drain":
                return await self._engine.drain()
            case "resume":
                return self._engine.resume()

    def _raise(self, call: int, error: Exception) -> None:
        if not isinstance(error, SageLLMError):
            logger.error("a call failed", exc_info=error)
        self._put(wire.Raised(call, _pack_error(error)))

    def _abort(self, call: int) -> None:
        if call not in self._tasks:
            return  # it has just ended
        try:
            self._engine.abort(self._requests.get(call, ""))
        except NotFoundError:  # it is still being read
            self._clock.call_later(_RETRY_S, self._abort, call)

    def _end_calls(self) -> None:
        """Nobody is left who would read the answers."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        self._outgoing.clear()
        self._watch(None)
        self._engine.resume()

    def _watch(self, interval_s: float | None) -> None:
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None
        if interval_s is not None and isinstance(self._state, wire.Ready):
            self._end_watch = self._engine.watch(self._report, interval_s=interval_s)

    def _report(self, report: EngineReport) -> None:
        if not self._outgoing or self._is_flush_planned:
            self._put(wire.Report(pack_report(report)))
        # else nothing leaves at the moment, and what the manager misses of the cache it will notice by the numbers

    # ---- what goes ------------------------------------------------------------------------------------

    def _put(self, message: wire.FromEngine) -> None:
        """Send with all else that this turn of the event loop has to say."""
        self._outgoing.append(message)
        if not self._is_flush_planned:
            self._is_flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_planned = False
        if self._manager is None or self._channel.is_closed:
            self._outgoing.clear()
        if not self._outgoing:
            return
        assert self._manager is not None
        try:
            is_sent = self._channel.send([self._manager, wire.encode(self._outgoing)])
        except ConnectionError:
            self._forget_manager()
            return
        if is_sent:
            self._outgoing.clear()
        else:
            self._clock.call_later(_RETRY_S, self._flush)

    # ---- managers that come and go --------------------------------------------------------------------

    def _count_peers(self, number: int) -> None:
        if number == 0:
            self._forget_manager()

    def _forget_manager(self) -> None:
        self._manager = None
        self._end_calls()
        self._set_orphan_timer(self._orphan_timeout_s)

    def _set_orphan_timer(self, delay_s: float | None) -> None:
        if self._orphan_timer is not None:
            self._orphan_timer.cancel()
        self._orphan_timer = None if delay_s is None else self._clock.call_later(delay_s, self._give_up)

    def _give_up(self) -> None:
        logger.warning("no manager came for %g seconds: the engine ends", self._orphan_timeout_s)
        self.stop()


def _pack_error(error: Exception) -> bytes:
    if not isinstance(error, SageLLMError):
        error = InternalError(f"{type(error).__name__}: {error or 'no message'}")
    return error.to_error().model_dump_json().encode()
