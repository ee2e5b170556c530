"""Carrying the KV cache of a prompt from the engine that computed it to the one that makes the answer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sagellm_control_plane.clients.base import EngineLostError, PrefixTransfer
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.events import EventHub, EventKind
from sagellm_control_plane.failover import is_engine_ok
from sagellm_control_plane.pd import PhaseRouter
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.ticket import Stay, Ticket
from sagellm_protocol import DeadlineExceededError, Request, SageLLMError, SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class HandOver:
    """The prompt of one request is computed on the engine of `source`; the request runs elsewhere."""

    source: Stay
    token_ids: list[int]
    num_tokens: int  # that the other engine is to have in its cache: the full blocks


class PrefixCourier:
    """Lets one engine compute a prompt and another have it. Belongs to one event loop."""

    def __init__(self, phases: PhaseRouter | None, pool: EnginePool, events: EventHub, clock: Clock) -> None:
        self._phases = phases
        self._pool = pool
        self._events = events
        self._clock = clock

    async def carry(self, ticket: Ticket, stay: Stay) -> None:
        """Fill the cache of a stay's engine with the request's prompt. Whatever fails, that engine can compute itself.

        Raises `EngineLostError` where it is the stay's own engine that is lost, `DeadlineExceededError` where time is
        up.
        """
        hand_over, began_at, num_tokens = stay.hand_over, self._clock.now(), 0
        assert hand_over is not None, "nothing to carry"
        try:
            blocks = await self._computed(ticket.request, hand_over)
        except SageLLMError as error:
            if isinstance(error, EngineLostError):
                self._pool.supervisor.lost(hand_over.source.engine, hand_over.source.generation, error)
            self._part(stay, hand_over.source, error)
            if isinstance(error, DeadlineExceededError):
                raise
            self._source_failed(ticket, stay, hand_over.source, error)
        else:
            began_at = self._clock.now()
            self._part(stay, hand_over.source, None)
            if blocks is not None:
                num_tokens = await self._taken(stay, blocks)
        if num_tokens:
            stay.trace.hand_over_s = self._clock.now() - began_at
            if self._phases is not None:
                self._phases.measured(num_tokens, stay.trace.hand_over_s)
        if num_tokens != hand_over.num_tokens:
            self._pool.rebook(stay, ticket.new_booking(num_tokens))

    async def _computed(self, request: Request, hand_over: HandOver) -> Any:
        """The blocks of the prompt, from the engine that computed it; None where it keeps none."""
        source, client = hand_over.source, hand_over.source.engine.client
        assert isinstance(client, PrefixTransfer), "only engines that can hand over are chosen"
        with source.pull:
            response = await client.execute(prefill_request(request))
        response.raise_for_error()
        with source.pull:
            return await client.export_prefix(hand_over.token_ids, cache_salt=request.cache_salt, lora_id=request.lora)

    async def _taken(self, stay: Stay, blocks: Any) -> int:
        """Tokens that the engine has now."""
        client = stay.engine.client
        assert isinstance(client, PrefixTransfer), "only engines that can take over are chosen"
        try:
            with stay.pull:
                return await client.import_prefix(blocks)
        except (EngineLostError, DeadlineExceededError):
            raise
        except SageLLMError as error:
            logger.warning("%s did not take a prompt over and computes it: %s", stay.engine.engine_id, error)
            return 0

    def _part(self, stay: Stay, source: Stay, error: SageLLMError | None) -> None:
        """The prefill engine is free of the request."""
        stay.hand_over = None
        self._pool.leave(source, is_ok=True if error is None else is_engine_ok(error))

    def _source_failed(self, ticket: Ticket, stay: Stay, source: Stay, error: SageLLMError) -> None:
        engine_id, request_id = source.engine.engine_id, ticket.request.request_id
        self._events.publish(
            EventKind.MOVED,
            f"{request_id}: {engine_id} did not compute its prompt, {stay.engine.engine_id} does: {error.message}",
            engine_id=engine_id,
            request_id=request_id,
        )
        if source.num_suspects:  # the engine was lost
            stay.is_trial = ticket.is_suspect = True
            ticket.num_losses = stay.num_losses = source.num_losses + 1


def prefill_request(request: Request) -> Request:
    """The request that leaves the prompt's KV cache behind: one token of it, whichever."""
    return request.model_copy(
        update={
            "request_id": f"{request.request_id}-prefill",
            "phase": "prefill",
            "stream": False,
            "max_tokens": None,
            "temperature": None,
            "top_p": None,
            "sampling_params": SamplingParams(max_tokens=1),
            "structured_output": None,
            "slo": None,
        }
    )
