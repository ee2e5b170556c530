"""The engine core in a thread of its own, with asyncio in front.

The loop thread loads the model and steps it; kernels release the GIL, so event loops go on meanwhile. Messages
go in through one queue; the outputs of a step go back with one call per event loop, made by a courier thread: waking an
event loop lets go of the GIL, and the loop thread would stand in line behind the event loop's work instead of starting
the next step. So the courier's turn comes when the next step's kernels run.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sagellm_core.engine_core.engine_core import EngineCore, EngineStats, as_protocol_error
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_protocol import FinishReason, InvalidArgumentError, SageLLMError, UnavailableError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineCoreRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Call:
    """Run a function on the core, between two steps."""

    function: Callable[[EngineCore], Any]
    future: Future[Any]


class _Stop:
    """Leave the loop."""


@dataclass(frozen=True, slots=True)
class _Consumer:
    """Where a request's outputs go: a queue that lives in one event loop."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[EngineCoreOutput]


class EngineCoreClient:
    """Serves `submit` from any event loop; one instance owns one engine core and its thread."""

    def __init__(self, build: Callable[[], EngineCore], name: str) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Call | _Stop] = queue.SimpleQueue()
        self._consumers: dict[str, _Consumer] = {}
        self._started: Future[None] = Future()
        self._failure: SageLLMError | None = None
        self._stopping = False
        self._outbox: queue.SimpleQueue[list[EngineCoreOutput] | None] = queue.SimpleQueue()
        self._courier = threading.Thread(target=self._carry, name=f"engine-outputs-{name}", daemon=True)
        self._thread = threading.Thread(target=self._run, name=f"engine-core-{name}", daemon=True)

    # ---- asyncio side ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model in the loop's thread; raises what loading raised."""
        self._thread.start()
        await asyncio.wrap_future(self._started)

    async def stop(self) -> None:
        """End all requests with `abort` and join the thread."""
        self._stopping = True
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    async def submit(self, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """Run a request; leaving the generator before the end aborts it (see `CoreClient`)."""
        consumer = _Consumer(asyncio.get_running_loop(), asyncio.Queue())
        if self._consumers.setdefault(request.request_id, consumer) is not consumer:
            raise InvalidArgumentError(f"request_id {request.request_id!r} is already running; use a fresh id")
        finished = False
        try:
            # Registered first: a loop that ends from here on tells this consumer.
            self.check_alive()
            self._inbox.put(_Add(request))
            while not finished:
                output = await consumer.outputs.get()
                finished = output.finished
                yield output
        finally:
            self._consumers.pop(request.request_id, None)
            if not finished:
                self._inbox.put(_Abort(request.request_id))

    def abort(self, request_id: str) -> None:
        """End a request from outside its consumer, who then receives the finish reason `abort`."""
        self._inbox.put(_Abort(request_id))

    async def stats(self) -> EngineStats:
        """The core's counters, taken between two steps."""
        return await self._call(EngineCore.stats)

    async def describe(self) -> dict[str, object]:
        """What the executor says of its device, dtypes and kernels."""
        return await self._call(lambda core: core.executor.describe())

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while blocks are in use."""
        return await self._call(lambda core: core.kv_cache.reset_prefix_cache())

    async def check_integrity(self) -> None:
        """Assert the block pool's invariants (tests and diagnosis)."""
        await self._call(lambda core: core.kv_cache.check_integrity())

    def check_alive(self) -> None:
        """Raise where the loop does not run."""
        if self._failure is not None:
            raise UnavailableError(f"the engine stopped after an error: {self._failure}; restart it")
        if self._stopping or not self._thread.is_alive():
            raise UnavailableError("the engine is not running; call start() first")

    async def _call(self, function: Callable[[EngineCore], _T]) -> _T:
        self.check_alive()
        future: Future[_T] = Future()
        self._inbox.put(_Call(function, future))
        self.check_alive()  # again: the loop may have ended in between, and then nobody reads the call
        return await asyncio.wrap_future(future)

    # ---- the loop's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._started.set_running_or_notify_cancel():
            return  # given up before it began
        try:
            core = self._build()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        self._courier.start()
        try:
            self._loop(core)
        except Exception as error:
            logger.exception("the engine loop failed")
            self._failure = as_protocol_error(error)
        finally:
            self._end_all(core)

    def _loop(self, core: EngineCore) -> None:
        while True:
            while not self._inbox.empty() or not core.has_work:
                message = self._inbox.get()
                if isinstance(message, _Stop):
                    return
                outputs = self._handle(core, message)
                if outputs:
                    self._outbox.put(outputs)
            self._outbox.put(core.step())

    def _handle(self, core: EngineCore, message: _Add | _Abort | _Call) -> list[EngineCoreOutput]:
        if isinstance(message, _Add):
            try:
                core.add_request(message.request)
            except SageLLMError as error:
                return [_refused(message.request.request_id, error)]
        elif isinstance(message, _Abort):
            output = core.abort_request(message.request_id)
            return [] if output is None else [output]
        elif message.future.set_running_or_notify_cancel():
            try:
                message.future.set_result(message.function(core))
            except Exception as error:
                message.future.set_exception(error)
        return []

    def _carry(self) -> None:
        """The courier: hand over what the loop thread puts down, in order, until it puts down None."""
        while (outputs := self._outbox.get()) is not None:
            self._deliver(outputs)

    def _deliver(self, outputs: list[EngineCoreOutput]) -> None:
        """One wake-up per event loop and step, however many requests it serves."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Consumer, EngineCoreOutput]]] = {}
        for output in outputs:
            consumer = self._consumers.get(output.request_id)
            if consumer is not None:
                batches.setdefault(consumer.loop, []).append((consumer, output))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop was closed under its requests: nobody is left to read them
                for _, output in batch:
                    self._consumers.pop(output.request_id, None)
                    self._inbox.put(_Abort(output.request_id))

    def _end_all(self, core: EngineCore) -> None:
        """Nobody may wait for an output that never comes: end every request, refuse what is still queued."""
        error = self._failure or UnavailableError("the engine was stopped")
        reason = FinishReason.ABORT if self._failure is None else FinishReason.ERROR
        self._outbox.put(
            [
                EngineCoreOutput(request_id, finish_reason=reason, error=error.to_error())
                for request_id in list(self._consumers)
            ]
        )
        self._outbox.put(None)
        self._courier.join()
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Call) and message.future.set_running_or_notify_cancel():
                message.future.set_exception(error)
        core.shutdown()


def _put_all(batch: list[tuple[_Consumer, EngineCoreOutput]]) -> None:
    for consumer, output in batch:
        consumer.outputs.put_nowait(output)


def _refused(request_id: str, error: SageLLMError) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, finish_reason=FinishReason.ERROR, error=error.to_error())
