"""Admission: who may join the queue, and who must leave because time is up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from sagellm_control_plane.clock import Clock
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.deadlines import Deadlines
from sagellm_control_plane.dispatch import Dispatcher
from sagellm_control_plane.explain import RequestTrace, TraceRing
from sagellm_control_plane.policies import SchedulingPolicy
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.prompts import (
    block_hashes,
    estimate_prompt_tokens,
    num_outputs,
    output_limit,
    text_of,
    with_tokens,
)
from sagellm_control_plane.quotas import QuotaConfig, Quotas
from sagellm_control_plane.routing import RoutedRequest, RoutingPolicy
from sagellm_control_plane.ticket import Ticket
from sagellm_control_plane.types import RequestType
from sagellm_protocol import NotFoundError, Request, ResourceExhaustedError, SageLLMError, UnavailableError

if TYPE_CHECKING:
    from sagellm_core.config import LLMEngineConfig

_FAR_S = 120.0  # deadlines further away are not worth a prediction
_NEVER = float("inf")


class Admission:
    """The door of the control plane. Belongs to one event loop."""

    def __init__(
        self,
        pool: EnginePool,
        dispatcher: Dispatcher,
        policy: SchedulingPolicy,
        router: RoutingPolicy,
        traces: TraceRing,
        config: ControlPlaneConfig,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._policy = policy
        self._router = router
        self._traces = traces
        self._config = config
        self._clock = clock
        self._quotas = None if config.quotas == QuotaConfig() else Quotas(config.quotas)
        self._deadlines: Deadlines[Ticket] = Deadlines(clock, self._expire)
        self._wants_tokens = router.wants_tokens or (config.pd is not None and config.pd.enabled)
        self._numbers = itertools.count()

    async def submit(self, request: Request) -> Ticket:
        """Let a request wait for its place; whoever calls this ends it with `close`.

        Raises `NotFoundError` for a model that no engine serves, `UnavailableError` where none takes requests, and
        `ResourceExhaustedError` (429) where the queue is full, its tenant's quota is used up, or its deadline would
        pass before its first token; with `retry_after_s` in the context, where that can be said.
        """
        serving = self._pool.serving(request.model, RequestType.of(request))
        for engine in serving.asleep:
            self._pool.supervisor.wake(engine)
        is_routed = self._wants_tokens and len(serving.engines) > 1
        if is_routed:
            request = await with_tokens(request, serving.engines)
        ticket = self._new_ticket(request, serving.engines[0].client.config, is_routed=is_routed)
        self._traces.add(ticket.trace)
        meter = self._pool.loads.of(serving.engines[0])
        if meter is not None:
            meter.arrived(ticket.arrival_time)
        try:
            self._check(ticket)
            self._dispatcher.join(ticket, ticket.arrival_time)
        except SageLLMError as error:
            self._turn_away(ticket, error)
            raise
        if ticket.deadline < _NEVER:
            self._deadlines.add(ticket.deadline, ticket)
        if ticket.stay is None and self._dispatcher.queue.is_overfull:
            full = self._dispatcher.queue.full_error(self._retry_after_s(ticket))
            self.close(ticket)
            self._turn_away(ticket, full)
            raise full
        return ticket

    def close(self, ticket: Ticket, failure: SageLLMError | None = None) -> None:
        """The request is over, wherever it stands; its stay, if it has one, ends by its caller's will or `failure`."""
        if ticket.stay is not None:
            self._dispatcher.leave(ticket, failure)
        elif self._dispatcher.num_waiting:
            self._dispatcher.forget(ticket)
        ticket.is_closed = True
        if ticket.deadline < _NEVER:
            self._deadlines.close()
        now = self._clock.now()
        if ticket.reservation is not None and self._quotas is not None:
            served = ticket.num_prompt_tokens - ticket.num_unserved_tokens if ticket.num_grants else 0
            self._quotas.settle(ticket.reservation, served + ticket.num_delivered, now)
        if ticket.num_grants:
            self._policy.on_ended(ticket, now, num_unserved_tokens=ticket.num_unserved_tokens)
        ticket.trace.ended_at = now

    # ---- steps of the above ---------------------------------------------------------------------------

    def _new_ticket(self, request: Request, config: LLMEngineConfig, *, is_routed: bool) -> Ticket:
        now, request_id, model, tenant = self._clock.now(), request.request_id, request.model, request.tenant
        num_prompt_tokens, count = estimate_prompt_tokens(request), num_outputs(request)
        limit = output_limit(request) or config.max_new_tokens
        num_output_tokens = self._pool.predictor.output_tokens(tenant or "", model, limit) * count
        hashes: Sequence[bytes] = ()
        text: str | None = None
        if is_routed:
            hashes = block_hashes(request, config.block_size)
            text = None if hashes else text_of(request)
        routed = RoutedRequest(
            request_id,
            model,
            num_prompt_tokens,
            num_output_tokens,
            hashes,
            text,
            request.session_id,
            tenant,
            request.slo,
            config.block_size,
        )
        trace = RequestTrace(
            request_id,
            model,
            tenant,
            int(request.priority),
            self._policy.name,
            self._router.name,
            now,
            num_prompt_tokens,
            self._dispatcher.num_waiting,
        )
        return Ticket(
            request,
            now,
            num_prompt_tokens,
            num_output_tokens,
            next(self._numbers),
            tenant or "",
            routed=routed,
            trace=trace,
            num_outputs=count,
        )

    def _turn_away(self, ticket: Ticket, error: SageLLMError) -> None:
        trace = ticket.trace
        trace.outcome, trace.error, trace.ended_at = error.code.value, error.message, self._clock.now()
        if ticket.reservation is not None and self._quotas is not None:
            self._quotas.settle(ticket.reservation, 0, trace.ended_at)

    def _check(self, ticket: Ticket) -> None:
        """Raise where the request had better not wait."""
        error = self._pool.hopeless(ticket.destination)
        if error is not None:
            raise error
        if ticket.deadline < ticket.arrival_time + _FAR_S and self._config.refuse_hopeless:
            self._refuse_hopeless(ticket)
        if self._quotas is not None:
            num_tokens = ticket.num_prompt_tokens + ticket.num_output_tokens
            ticket.reservation = self._quotas.reserve(ticket.tenant, num_tokens, ticket.arrival_time)

    def _refuse_hopeless(self, ticket: Ticket) -> None:
        """Work that would come too late is not begun: whoever sent it can still try elsewhere."""
        predictor = self._pool.predictor
        rows = self._pool.open_rows(ticket.destination)
        if not len(rows) or not predictor.has_seen(ticket.request.model):
            return  # guesses refuse nobody
        wait_s = 0.0 if len(self._pool.free_rows(ticket.destination)) else self._wait_s(ticket)
        ttft_s = wait_s + float(predictor.ttft_s(rows, ticket.num_prompt_tokens).min())
        left_s = ticket.deadline - ticket.arrival_time
        if ttft_s > left_s:
            raise ResourceExhaustedError(
                f"its first token is expected in {ttft_s:.1f} s, later than its deadline of {left_s:g} s; "
                f"try again in {max(1.0, wait_s):.0f} s, or allow more time",
                field="slo",
                retry_after_s=max(1.0, wait_s),
            )

    def _retry_after_s(self, ticket: Ticket) -> float | None:
        return self._wait_s(ticket) if self._pool.predictor.has_seen(ticket.request.model) else None

    def _wait_s(self, ticket: Ticket) -> float:
        rows = self._pool.open_rows(ticket.destination)
        num_ahead = self._dispatcher.queue.num_by_destination.get(ticket.destination, 0)
        num_places = max(1, int(self._pool.fleet.capacity[rows].sum()))
        return self._pool.predictor.queue_wait_s(
            ticket.request.model, num_ahead, num_places, ticket.num_prompt_tokens, ticket.num_output_tokens
        )

    def _expire(self, ticket: Ticket) -> None:
        """Its deadline has passed: it is refused, or aborted; an engine that does not answer is left behind."""
        ticket.is_late = True
        stay = ticket.stay
        if stay is None:
            self._dispatcher.refuse(ticket, ticket.deadline_error())
            return
        with suppress(NotFoundError, UnavailableError):  # it has ended just now, or not begun: then the flag tells
            stay.engine.client.abort(ticket.request.request_id)
        if stay.hand_over is not None:
            stay.hand_over.source.pull.interrupt(ticket.deadline_error())
        self._clock.call_later(self._config.abort_grace_s, self._cut, ticket)

    def _cut(self, ticket: Ticket) -> None:
        if ticket.stay is not None:
            ticket.stay.pull.interrupt(ticket.deadline_error())
