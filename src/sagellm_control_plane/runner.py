"""Running requests: on the engine they were given, and on the next one where that is lost."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from sagellm_control_plane.admission import Admission
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.dispatch import Dispatcher
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.events import EventHub, EventKind
from sagellm_control_plane.explain import RequestTrace
from sagellm_control_plane.failover import UNREST_S, refusal
from sagellm_control_plane.hand_over import PrefixCourier
from sagellm_control_plane.journal import Journal
from sagellm_control_plane.pd import PhaseRouter
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.prompts import num_outputs, output_limit, wants_prompt_logprobs
from sagellm_control_plane.ticket import FURTHER_TOKENS, Stay, Ticket
from sagellm_control_plane.types import EngineState, PerformanceTotals
from sagellm_protocol import (
    DeadlineExceededError,
    Error,
    ErrorCode,
    FinishReason,
    InternalError,
    Request,
    Response,
    SageLLMError,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    UnavailableError,
)

_Answer = TypeVar("_Answer", Response, StreamEventEnd)
_BOOK_EVERY = 16  # tokens; the ledger may lag behind by so many, and is exact again at the end
_SHORT_TOKENS = 32  # of an answer that is sooner made again than followed
_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
# Errors that an engine gives to all of its requests when it dies; of others the request is the reason.
_OF_A_DEAD_ENGINE = (ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.DISTRIBUTED_RUNTIME_ERROR)


class Runner:
    """Takes requests through admission and engines to their end. Belongs to one event loop."""

    def __init__(
        self,
        admission: Admission,
        dispatcher: Dispatcher,
        phases: PhaseRouter | None,
        pool: EnginePool,
        totals: PerformanceTotals,
        events: EventHub,
        config: ControlPlaneConfig,
        clock: Clock,
    ) -> None:
        self._admission = admission
        self._dispatcher = dispatcher
        self._pool = pool
        self._totals = totals
        self._events = events
        self._config = config
        self._clock = clock
        self._courier = PrefixCourier(phases, pool, events, clock)

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made, over however many engines: one start, every token once, exactly one end.

        Raises what `Admission.submit` raises, and what the first engine refuses the request with; when the stream has
        begun every error is its end.
        """
        ticket = await self._admission.submit(request)
        journal = ticket.journal = Journal(ticket.request)
        failure: SageLLMError | None = None
        try:
            while True:
                try:
                    stay = ticket.stay
                    if stay is None or stay.hand_over is not None:
                        stay = await self._placed(ticket)
                    pull, fresh = stay.pull, journal.fresh
                    async with aclosing(stay.engine.client.stream(journal.remainder())) as events:
                        try:
                            while True:
                                with pull:
                                    event = await events.__anext__()
                                if isinstance(event, StreamEventDelta):
                                    fresh.append(event)
                                    if len(fresh) >= _BOOK_EVERY or stay.is_watched:
                                        self._book(ticket, stay, journal)
                                    yield event
                                elif isinstance(event, StreamEventEnd):
                                    yield await self._end(ticket, stay, journal, event)
                                    return
                                else:
                                    stay.has_begun = True
                                    if journal.start(event):
                                        yield event
                        finally:
                            self._book(ticket, stay, journal)
                except StopAsyncIteration:
                    engine_id = ticket.trace.stays[-1].engine_id
                    self._move(ticket, EngineLostError(f"{engine_id} ended a stream without its end"))
                except UnavailableError as error:
                    self._move(ticket, await self._diagnosed(ticket, error))
        except SageLLMError as error:
            failure = error
            if not journal.has_started:
                raise
            yield self._broken_end(ticket, journal, error)
        except Exception as error:
            failure = InternalError(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._close(ticket, failure)

    async def execute(self, request: Request) -> Response:
        """The whole answer. A long one is made as a stream, so that a lost engine costs no token; others run again."""
        if _is_worth_a_stream(request):
            return await self._collect(request)
        ticket = await self._admission.submit(request)
        failure: SageLLMError | None = None
        try:
            while True:
                try:
                    stay = ticket.stay
                    if stay is None or stay.hand_over is not None:
                        stay = await self._placed(ticket)
                    with stay.pull:
                        response = await stay.engine.client.execute(ticket.request)
                    if response.error is not None:
                        await self._check_alive(ticket, stay, response.error)
                    return self._finished(ticket, stay, response)
                except UnavailableError as error:
                    self._move(ticket, await self._diagnosed(ticket, error))
        except SageLLMError as error:
            failure = error
            raise
        except Exception as error:
            failure = InternalError(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._close(ticket, failure)

    # ---- events ---------------------------------------------------------------------------------------

    async def _placed(self, ticket: Ticket) -> Stay:
        """The stay that a request has got, with its prompt's KV cache where another engine computes that."""
        stay = await self._dispatcher.granted(ticket)
        if stay.hand_over is not None:
            await self._courier.carry(ticket, stay)
        return stay

    async def _collect(self, request: Request) -> Response:
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                last = event
        assert isinstance(last, StreamEventEnd), "a stream ends with its end"
        # The engine has checked all of it: to build it without a second check saves more than the rest of this takes.
        return Response.model_construct(
            request_id=last.request_id,
            trace_id=last.trace_id,
            engine_id=last.engine_id,
            model=request.model,
            output_text=last.output_text,
            output_tokens=last.output_tokens,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=last.outputs[0].logprobs if last.outputs else None,
            outputs=last.outputs,
            metrics=last.metrics,
            usage=last.usage,
            error=last.error,
        )

    def _book(self, ticket: Ticket, stay: Stay, journal: Journal) -> None:
        """Enter what was delivered since the last time."""
        num_tokens = journal.read()
        if not num_tokens:
            return
        if not stay.trace.num_output_tokens:
            self._dispatcher.first_token(ticket)
        stay.trace.num_output_tokens += num_tokens
        self._dispatcher.tokens(ticket, num_tokens)
        if stay.is_watched:
            self._watch(ticket, stay)

    def _watch(self, ticket: Ticket, stay: Stay) -> None:
        """A trial ends with the second token: the first may have been on its way from the last engine.

        For an isolated request it goes on until none can have been.
        """
        num_tokens = FURTHER_TOKENS if ticket.is_isolated else 1
        if not stay.is_trial:
            stay.is_watched = False
        elif stay.trace.num_output_tokens > num_tokens * ticket.num_outputs:
            stay.is_watched = False
            self._dispatcher.acquit(ticket)

    async def _end(self, ticket: Ticket, stay: Stay, journal: Journal, event: StreamEventEnd) -> StreamEventEnd:
        """The end for the caller; raises `EngineLostError` where it is the end of the engine."""
        self._book(ticket, stay, journal)
        if event.error is not None:
            await self._check_alive(ticket, stay, event.error)
        first = ticket.trace.stays[0]
        ttft_s = None if first.first_token_at is None else first.first_token_at - first.granted_at
        return self._finished(ticket, stay, journal.end(event, ttft_s))

    async def _check_alive(self, ticket: Ticket, stay: Stay, error: Error) -> None:
        """Raise `EngineLostError` where an error is not the request's own."""
        if error.code not in _OF_A_DEAD_ENGINE or ticket.is_late:
            return
        with stay.pull:
            is_alive = await stay.engine.client.health_check()
        if not is_alive:
            raise EngineLostError(f"{stay.engine.engine_id} died: {error.message}", engine_id=stay.engine.engine_id)

    def _finished(self, ticket: Ticket, stay: Stay, response: _Answer) -> _Answer:
        """An engine has answered: count it, learn from it, and book the rest of its tokens."""
        if ticket.is_late and response.error is None and response.finish_reason is FinishReason.ABORT:
            response = response.model_copy(update={"error": ticket.deadline_error().to_error()})
        trace, error, reason = ticket.trace, response.error, response.finish_reason
        service_s = self._clock.now() - trace.stays[0].granted_at
        ttft_ms, is_complete = response.metrics.ttft_ms, reason in _COMPLETE
        if stay.trace.first_token_at is None and ttft_ms:  # it was not followed token by token
            trace.first_token_at = stay.trace.first_token_at = stay.trace.granted_at + ttft_ms / 1e3
        self._totals.add(response, service_s)
        trace.outcome = str(reason if error is None else error.code)
        trace.error = None if error is None else error.message
        if is_complete:
            num_tokens = response.usage.completion_tokens // max(1, len(response.outputs))
            self._pool.predictor.observe_answer(ticket.tenant, trace.model, num_tokens, service_s)
            ticket.num_unserved_tokens = 0
            self._measure(trace, stay.engine, response, service_s)
        self._dispatcher.leave(ticket, None if error is None else error.to_exception(), is_answered=is_complete)
        return response

    def _measure(self, trace: RequestTrace, engine: ManagedEngine, response: _Answer, service_s: float) -> None:
        """Tell the meter of the engine's model of an answer, where there is one."""
        meter = self._pool.loads.of(engine)
        if meter is None:
            return
        # Short answers are not followed token by token: then the engine's own figure, behind the time in the queue.
        queue_s = trace.stays[0].granted_at - trace.queued_at
        ttft_s = queue_s + response.metrics.ttft_ms / 1e3 if trace.ttft_s is None else trace.ttft_s
        meter.ended(response.usage, ttft_s, queue_s + service_s - ttft_s)

    def _broken_end(self, ticket: Ticket, journal: Journal, error: SageLLMError) -> StreamEventEnd:
        reason = FinishReason.ABORT if isinstance(error, DeadlineExceededError) else FinishReason.ERROR
        engine_id = ticket.trace.stays[-1].engine_id if ticket.trace.stays else ""
        end = journal.broken_end(error, reason, engine_id)
        self._totals.add(end, self._clock.now() - ticket.trace.queued_at)
        return end

    def _close(self, ticket: Ticket, failure: SageLLMError | None) -> None:
        trace = ticket.trace
        if failure is not None:
            trace.outcome, trace.error = failure.code.value, failure.message
        elif trace.outcome == "running":
            trace.outcome = "cancelled"
        self._admission.close(ticket, failure)

    # ---- moves ----------------------------------------------------------------------------------------

    async def _diagnosed(self, ticket: Ticket, error: UnavailableError) -> UnavailableError:
        """`error`, or that the engine is lost where it says nothing more than that it does not run."""
        stay = ticket.stay
        if stay is None:
            raise error  # no engine has said it: the request was refused
        if isinstance(error, EngineLostError) or stay.engine.state is not EngineState.READY:
            return error
        with stay.pull:
            is_alive = await stay.engine.client.health_check()
        if is_alive:
            return error
        return EngineLostError(f"{stay.engine.engine_id} died: {error.message}", engine_id=stay.engine.engine_id)

    def _move(self, ticket: Ticket, error: UnavailableError) -> None:
        """Let a request go on elsewhere; raises why not."""
        stay, request_id = ticket.stay, ticket.request.request_id
        assert stay is not None, "only who has an engine can lose it"
        engine_id = stay.engine.engine_id
        if isinstance(error, EngineLostError):
            self._pool.supervisor.lost(stay.engine, stay.generation, error)
        num_lost = self._pool.num_died_since(self._clock.now() - UNREST_S)
        reason = refusal(ticket, error, self._config.failover, num_lost)
        self._dispatcher.leave(ticket, error)
        if reason is not None:
            self._events.publish(
                EventKind.REFUSED, f"{request_id} ends: {reason.message}", engine_id=engine_id, request_id=request_id
            )
            raise reason
        self._events.publish(
            EventKind.MOVED,
            f"{request_id} leaves {engine_id} with {ticket.num_delivered} tokens delivered"
            f"{' and goes on alone' if ticket.is_isolated else ''}: {error.message}",
            engine_id=engine_id,
            request_id=request_id,
            num_tokens=ticket.num_delivered,
        )
        self._dispatcher.readmit(ticket, avoid=None if isinstance(error, EngineLostError) else stay.engine)


def _is_worth_a_stream(request: Request) -> bool:
    """Whether a whole answer is followed token by token. A stream does not tell of the prompt's tokens."""
    limit = output_limit(request)
    if limit is not None and limit * num_outputs(request) <= _SHORT_TOKENS:
        return False
    return request.embed is None and not wants_prompt_logprobs(request)
