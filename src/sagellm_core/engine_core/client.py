"""The engine core in a thread of its own, with asyncio in front.

The loop thread loads the model and steps it; kernels release the GIL, so event loops go on meanwhile. Messages
go in through one queue; the outputs of a step go back with one call per event loop, made by a courier thread: waking an
event loop lets go of the GIL, and the loop thread would stand in line behind the event loop's work instead of starting
the next step. So the courier's turn comes when the next step's kernels run.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from sagellm_core.engine_core.engine_core import EngineCore, as_protocol_error
from sagellm_core.engine_core.report import EngineReport, EngineStats, Reporter
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_kv_cache import EventBatch
from sagellm_protocol import FinishReason, InvalidArgumentError, SageLLMError, UnavailableError

logger = logging.getLogger(__name__)
_MAX_INTERVAL_S = 3600.0  # between two reports
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


@dataclass(slots=True, eq=False)
class _Watcher:
    """Who is told of the engine, in which event loop and how often at least."""

    loop: asyncio.AbstractEventLoop
    callback: Callable[[EngineReport], None]
    interval_s: float
    is_ended: bool = False

    def tell(self, report: EngineReport) -> None:
        if not self.is_ended:
            self.callback(report)


@dataclass(frozen=True, slots=True)
class _Watch:
    """Begin to tell a watcher, or end it where it wants no more."""

    watcher: _Watcher


class _Stop:
    """Leave the loop."""


_Message: TypeAlias = _Add | _Abort | _Call | _Watch


@dataclass(frozen=True, slots=True)
class _Consumer:
    """Where the outputs of a submission go: a queue that lives in one event loop."""

    submission: int
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[EngineCoreOutput]


class EngineCoreClient:
    """Serves `submit` from any event loop; one instance owns one engine core and its thread."""

    def __init__(self, build: Callable[[], EngineCore], name: str) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[_Message | _Stop] = queue.SimpleQueue()
        self._consumers: dict[str, _Consumer] = {}
        self._numbers = itertools.count()
        self._started: Future[None] = Future()
        self._failure: SageLLMError | None = None
        self._stopping = False
        self._outbox: queue.SimpleQueue[list[EngineCoreOutput] | EngineReport | None] = queue.SimpleQueue()
        self._watchers: tuple[_Watcher, ...] = ()  # replaced, never changed: the courier reads it
        self._reporter: Reporter  # made with the core, in the loop's thread
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
        # Numbered: outputs of one who left early may still be on their way when its id comes again.
        request = replace(request, submission=next(self._numbers))
        consumer = _Consumer(request.submission, asyncio.get_running_loop(), asyncio.Queue())
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
        return await self.call(EngineCore.stats)

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float) -> Callable[[], None]:
        """Call `callback` in this event loop with reports, at least every `interval_s`; returns what ends that.

        Raises:
            InvalidArgumentError: the interval is not within what makes sense.
        """
        if not 0.0 < interval_s <= _MAX_INTERVAL_S:
            raise InvalidArgumentError(
                f"interval_s must be above 0 and at most {_MAX_INTERVAL_S:g} seconds, got {interval_s}",
                field="interval_s",
            )
        self.check_alive()
        watcher = _Watcher(asyncio.get_running_loop(), callback, interval_s)
        self._inbox.put(_Watch(watcher))

        def end() -> None:
            watcher.is_ended = True
            self._inbox.put(_Watch(watcher))

        return end

    async def cache_snapshot(self) -> EventBatch:
        """All that is cached, as events; the watchers are told the same."""
        return await self.call(self._snapshot)

    async def describe(self) -> dict[str, object]:
        """What the executor says of its device, dtypes and kernels."""
        return await self.call(lambda core: core.executor.describe())

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while blocks are in use."""
        return await self.call(lambda core: core.kv_cache.reset_prefix_cache())

    async def check_integrity(self) -> None:
        """Assert the block pool's invariants (tests and diagnosis)."""
        await self.call(lambda core: core.kv_cache.check_integrity())

    def check_alive(self) -> None:
        """Raise where the loop does not run."""
        if self._failure is not None:
            raise UnavailableError(f"the engine stopped after an error: {self._failure}; restart it")
        if self._stopping or not self._thread.is_alive():
            raise UnavailableError("the engine is not running; call start() first")

    async def call(self, function: Callable[[EngineCore], _T]) -> _T:
        """Run a function on the core, between two steps; what it returns or raises."""
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
        self._reporter = Reporter(core, time.monotonic)
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
                self._report_if_due()
                try:
                    message = self._inbox.get(timeout=self._reporter.seconds_left())
                except queue.Empty:
                    continue
                if isinstance(message, _Stop):
                    return
                outputs = self._handle(core, message)
                if outputs:
                    self._outbox.put(outputs)
            self._outbox.put(core.step())
            self._report_if_due()

    def _handle(self, core: EngineCore, message: _Message) -> list[EngineCoreOutput]:
        if isinstance(message, _Add):
            try:
                output = core.add_request(message.request)
            except SageLLMError as error:
                return [_refused(message.request, error)]
            return [] if output is None else [output]
        elif isinstance(message, _Abort):
            output = core.abort_request(message.request_id)
            return [] if output is None else [output]
        elif isinstance(message, _Watch):
            self._change_watchers(message.watcher)
        elif message.future.set_running_or_notify_cancel():
            try:
                message.future.set_result(message.function(core))
            except Exception as error:
                message.future.set_exception(error)
        return []

    def _change_watchers(self, changed: _Watcher) -> None:
        others = tuple(watcher for watcher in self._watchers if watcher is not changed)
        self._watchers = others if changed.is_ended else (*others, changed)
        self._reporter.watch(min((watcher.interval_s for watcher in self._watchers), default=None))
        if not changed.is_ended:
            self._outbox.put(self._reporter.report(everything=True))

    def _report_if_due(self) -> None:
        if self._reporter.seconds_left() == 0.0:
            self._outbox.put(self._reporter.report())

    def _snapshot(self, core: EngineCore) -> EventBatch:
        report = self._reporter.report(everything=True)
        self._outbox.put(report)
        return report.cache

    def _carry(self) -> None:
        """The courier: hand over what the loop thread puts down, in order, until it puts down None."""
        while (item := self._outbox.get()) is not None:
            if isinstance(item, EngineReport):
                self._tell(item)
            else:
                self._deliver(item)

    def _tell(self, report: EngineReport) -> None:
        for watcher in self._watchers:
            try:
                watcher.loop.call_soon_threadsafe(watcher.tell, report)
            except RuntimeError:  # the loop was closed under the watch: nobody is left to be told
                watcher.is_ended = True
                self._inbox.put(_Watch(watcher))

    def _deliver(self, outputs: list[EngineCoreOutput]) -> None:
        """One wake-up per event loop and step, however many requests it serves."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Consumer, EngineCoreOutput]]] = {}
        for output in outputs:
            consumer = self._consumers.get(output.request_id)
            if consumer is not None and consumer.submission == output.submission:
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
                EngineCoreOutput(
                    request_id, finish_reason=reason, error=error.to_error(), submission=consumer.submission
                )
                for request_id, consumer in list(self._consumers.items())
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


def _refused(request: EngineCoreRequest, error: SageLLMError) -> EngineCoreOutput:
    return EngineCoreOutput(
        request.request_id,
        finish_reason=FinishReason.ERROR,
        error=error.to_error(),
        submission=request.submission,
    )
