"""Sends requests when they are due and notes what came back, and when.

Open loop: a request is sent at its time whether or not earlier ones have been answered; at most `max_concurrency` are
on their way, those that are due beyond it wait their turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sagellm_benchmark.serve.dialects import Dialect, EventReader, error_of
from sagellm_benchmark.serve.http import Answer, BrokenAnswerError, HttpClient
from sagellm_benchmark.serve.prompts import LoadRequest


@dataclass(slots=True)
class Outcome:
    """What became of one request. Moments in seconds since the run began."""

    due_at: float
    sent_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each message with a part of the answer
    ended_at: float = 0.0
    num_prompt_tokens: int = 0  # as the server counts
    num_output_tokens: int = 0
    error: str | None = None  # the kind of failure
    message: str = ""  # in the server's words

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first part of the answer."""
        return self.arrivals[0] - self.sent_at if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None where there is none."""
        if self.num_output_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_output_tokens - 1)

    @property
    def latency_s(self) -> float:
        """From sending to the end of the answer."""
        return self.ended_at - self.sent_at

    def fail(self, kind: str, message: str) -> None:
        """Note why there is no (whole) answer."""
        self.error, self.message = kind, message


@dataclass(frozen=True, slots=True)
class Run:
    """All that was measured."""

    outcomes: list[Outcome]
    duration_s: float  # from the first sending to the last end
    peak_concurrency: int


async def drive(
    client: HttpClient,
    dialect: Dialect,
    requests: Sequence[LoadRequest],
    times: Sequence[float],
    *,
    max_concurrency: int | None = None,
    timeout_s: float = 600.0,
    on_end: Callable[[Outcome], None] = lambda _: None,
) -> Run:
    """Send each request at its time, in seconds from now, ascending; `on_end` hears of each that ends.

    What goes wrong is in the outcomes; nothing is raised for a request, and none is sent twice.
    """
    bodies = [dialect.body(request) for request in requests]
    places = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    began = time.perf_counter()
    driver = _Driver(client, dialect.path, began, timeout_s)

    async def ask(outcome: Outcome, body: bytes) -> None:
        try:
            await driver.ask(outcome, body)
            on_end(outcome)
        finally:
            if places is not None:
                places.release()

    outcomes: list[Outcome] = []
    turn_at = 0.0  # when the last request got its turn that had to wait for one
    async with _Tasks() as tasks:
        for body, due_at in zip(bodies, times, strict=True):
            if (ahead := began + due_at - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            if places is not None:
                must_wait = places.locked()
                await places.acquire()
                if must_wait:
                    turn_at = time.perf_counter() - began
            outcome = Outcome(max(due_at, turn_at))
            outcomes.append(outcome)
            tasks.start(ask(outcome, body))
    first = min((outcome.sent_at for outcome in outcomes), default=0.0)
    last = max((outcome.ended_at for outcome in outcomes), default=0.0)
    return Run(outcomes, last - first, driver.peak)


class _Tasks:
    """Tasks that are waited for at the end, or cancelled where the body fails."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    async def __aenter__(self) -> _Tasks:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None and self._error is not None:
            raise self._error


class _Driver:
    """Asks one server, and counts how many requests are on their way."""

    def __init__(self, client: HttpClient, path: str, began: float, timeout_s: float) -> None:
        self._client = client
        self._path = path
        self._began = began
        self._timeout_s = timeout_s
        self._num_open = 0
        self.peak = 0

    async def ask(self, outcome: Outcome, body: bytes) -> None:
        self._num_open += 1
        self.peak = max(self.peak, self._num_open)
        outcome.sent_at = time.perf_counter() - self._began
        try:
            await asyncio.wait_for(self._ask(outcome, body), self._timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            outcome.fail("timeout", f"no end within {self._timeout_s:g} s")
        except BrokenAnswerError as error:
            outcome.fail("broken connection", str(error))
        except OSError as error:
            outcome.fail("no connection", str(error))
        finally:
            self._num_open -= 1
            outcome.ended_at = time.perf_counter() - self._began

    async def _ask(self, outcome: Outcome, body: bytes) -> None:
        async with self._client.call("POST", self._path, body) as answer:
            if answer.status != 200:
                code, message = error_of(await answer.read())
                outcome.fail(f"status {answer.status}{f' {code}' if code else ''}", message)
            elif not answer.headers.get("content-type", "").startswith("text/event-stream"):
                outcome.fail("no stream", f"the server sent {answer.headers.get('content-type')}, no event stream")
            else:
                await self._read(outcome, answer)

    async def _read(self, outcome: Outcome, answer: Answer) -> None:
        reader, num_messages = EventReader(), 0
        async for moment, piece in answer:
            try:
                for event in reader.feed(piece):
                    if event.error is not None:
                        code, message = error_of(msgspec.json.encode({"error": event.error}))
                        outcome.fail(f"error in the stream{f': {code}' if code else ''}", message)
                    if event.has_text:
                        outcome.arrivals.append(moment - self._began)
                        num_messages += 1
                    if event.usage is not None:
                        outcome.num_prompt_tokens = event.usage.prompt_tokens
                        outcome.num_output_tokens = event.usage.completion_tokens
            except ValueError as error:  # msgspec's are such, too
                outcome.fail("no events", str(error))
                return
        # A server that doesn't count sends a message a token, as most do.
        outcome.num_output_tokens = outcome.num_output_tokens or num_messages
        if not reader.is_done and outcome.error is None:
            outcome.fail("cut off", "the stream ended without [DONE]")
