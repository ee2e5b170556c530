"""Dispatch: waiting requests get places on engines, by policy and router, and give them back."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from functools import lru_cache

import numpy as np

from sagellm_control_plane.clock import Clock
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.explain import Candidates, StayTrace
from sagellm_control_plane.failover import is_engine_ok
from sagellm_control_plane.hand_over import HandOver
from sagellm_control_plane.pd import PhaseRouter, prompt_token_ids
from sagellm_control_plane.policies import Destination, SchedulingPolicy, WaitingRequest
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.pull import Pull
from sagellm_control_plane.queue import WaitQueue
from sagellm_control_plane.routing import Choice, RoutingPolicy
from sagellm_control_plane.routing.base import Rows
from sagellm_control_plane.ticket import Stay, Ticket
from sagellm_protocol import SageLLMError

_ALONE = "the only one"
_NO_ROWS: Rows = np.empty(0, np.intp)


class Dispatcher:
    """The queue in front of the engines, and the places on them. Belongs to one event loop.

    A request that lost its engine had a place already: it goes before all that wait, and is never refused for want of
    room. While it may be what killed that engine, no other such request goes where it goes, and nobody at all where it
    found nobody. An isolated one waits for that: the engine with the fewest requests takes no others until it is empty.
    """

    def __init__(
        self,
        pool: EnginePool,
        policy: SchedulingPolicy,
        router: RoutingPolicy,
        phases: PhaseRouter | None,
        *,
        max_num_waiting: int,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._router = router
        self._phases = phases
        self._clock = clock
        self.queue = WaitQueue(policy, max_num_waiting)
        self._tickets: set[Ticket] = set()  # those in the queue
        self._moved: deque[Ticket] = deque()  # those that lost their engine and have no other yet
        self._isolated: dict[Destination, Ticket] = {}  # who waits for an engine of its own, or has it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_dispatching = False

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return len(self._tickets) + len(self._moved)

    def num_waiting_by_model(self) -> dict[str, int]:
        """The same, by the model that is asked for."""
        waiting = Counter(ticket.request.model for ticket in self._moved)
        for (model, _), number in self.queue.num_by_destination.items():
            waiting[model] += number
        return waiting

    # ---- the way of a request -------------------------------------------------------------------------

    def join(self, ticket: Ticket, now: float) -> None:
        """A request comes; it may have a stay at once. `ResourceExhaustedError` where the queue has no room for it."""
        if not self._tickets and not self._moved and (rows := self._pool.free_rows(ticket.destination)).size:
            self._policy.on_arrival(ticket, now)  # nobody else waits: there is no order to find
            self._policy.on_left(ticket, now)
            self._grant(ticket, rows, now)
            return
        self.queue.push(ticket, now)
        self._tickets.add(ticket)
        self.dispatch()

    async def granted(self, ticket: Ticket) -> Stay:
        """The stay that a request gets; raises what it was refused with."""
        if ticket.stay is None and ticket.refusal is None:
            ticket.granted = self._running_loop().create_future()
            await ticket.granted
        if ticket.refusal is not None:
            raise ticket.refusal
        assert ticket.stay is not None, "the wait ends with a stay or a refusal"
        if ticket.is_late:
            raise ticket.deadline_error()
        return ticket.stay

    def first_token(self, ticket: Ticket) -> None:
        """Its engine has made its first token there."""
        stay, now = ticket.stay, self._clock.now()
        assert stay is not None, "only who has an engine gets tokens"
        stay.trace.first_token_at = now
        if ticket.trace.first_token_at is None:
            ticket.trace.first_token_at = now
        ticket.num_unserved_tokens = 0
        self._pool.fleet.first_token(stay.booking)
        ticket.num_moves = 0

    def acquit(self, ticket: Ticket) -> None:
        """Its trial is over: it does not kill."""
        assert ticket.stay is not None, "only who has an engine is on trial"
        ticket.stay.is_trial = False
        ticket.acquit()
        self._release(ticket)
        self.dispatch()  # the next suspect may come

    def tokens(self, ticket: Ticket, num_tokens: int) -> None:
        """Its engine has made so many tokens more."""
        assert ticket.stay is not None, "only who has an engine gets tokens"
        self._pool.fleet.advance(ticket.stay.booking, num_tokens)
        self._policy.on_tokens(ticket, num_tokens, self._clock.now())

    def leave(self, ticket: Ticket, error: SageLLMError | None = None, *, is_answered: bool = False) -> None:
        """Its stay is over: answered, by its caller's will, or with `error`. The ledger is exact on every way out."""
        stay, ticket.stay = ticket.stay, None
        assert stay is not None, "only who has an engine can leave it"
        stay.trace.ended_at = self._clock.now()
        stay.trace.left_because = None if error is None else error.message
        if stay.hand_over is not None:  # given up in its midst
            self._pool.leave(stay.hand_over.source, is_ok=None)
        row = stay.engine.row
        self._release(ticket)
        self._pool.leave(stay, is_ok=is_engine_ok(error) if error is not None else is_answered or None)
        if row is not None:
            self._router.on_ended(ticket.routed, row)
        if self._tickets or self._moved:
            self.dispatch()

    def readmit(self, ticket: Ticket, *, avoid: ManagedEngine | None) -> None:
        """Let a request that has lost its engine go on, before all that wait; not on the engine that turned it away."""
        ticket.granted, ticket.avoided = None, avoid
        self._moved.append(ticket)
        self._refuse_or_keep(ticket)
        self.dispatch()

    def forget(self, ticket: Ticket) -> None:
        """It waits no more."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.queue.remove(ticket, self._clock.now())
        elif ticket in self._moved:
            self._moved.remove(ticket)
            if ticket.reserved is not None:
                self._release(ticket)
                self._running_loop().call_soon(self.dispatch)  # and not in the midst of what the caller does

    def refuse(self, ticket: Ticket, error: SageLLMError) -> None:
        """It waits no more, and is told why."""
        self.forget(ticket)
        ticket.refusal = error
        _wake(ticket)

    def refuse_all(self, error: SageLLMError) -> None:
        """Let every waiting request fail with `error`."""
        for ticket in [*self._moved, *self._tickets]:
            self.refuse(ticket, error)

    def engines_changed(self) -> None:
        """Engines have come, gone or changed their state: who waits for none that could come is refused."""
        for ticket in list(self._moved):
            self._refuse_or_keep(ticket)
        for destination in self.queue.num_by_destination:
            error = self._pool.hopeless(destination)
            if error is not None:
                for ticket in list(self._tickets):
                    if ticket.destination == destination:
                        self.refuse(ticket, error)
        self.dispatch()

    def dispatch(self) -> None:
        """Grant places until none fits; a model without a place blocks no other."""
        if self._is_dispatching or not (self._tickets or self._moved):
            return
        self._is_dispatching = True
        try:
            now = self._clock.now()
            for ticket in list(self._moved):
                self._try_moved(ticket, now)
            while (waiting := self.queue.pop(now, self._is_open, self._would_wait)) is not None:
                assert isinstance(waiting, Ticket), "what is popped was pushed"
                self._tickets.remove(waiting)
                self._grant(waiting, self._pool.free_rows(waiting.destination), now)
        finally:
            self._is_dispatching = False

    # ---- steps of the above ---------------------------------------------------------------------------

    def _is_open(self, destination: Destination) -> bool:
        return len(self._pool.free_rows(destination)) > 0

    def _would_wait(self, waiting: WaitingRequest) -> bool:
        assert isinstance(waiting, Ticket), "what waits was pushed"
        if self._phases is not None:  # has its own idea of who computes what
            return False
        free, rows = self._pool.free_rows(waiting.destination), self._pool.open_rows(waiting.destination)
        return self._router.would_wait(waiting.routed_now(), free, rows, self._pool.fleet)

    def _refuse_or_keep(self, ticket: Ticket) -> None:
        error = self._pool.hopeless(ticket.destination, avoided=ticket.avoided)
        if error is not None:
            self.refuse(ticket, error)

    def _try_moved(self, ticket: Ticket, now: float) -> None:
        rows = self._own_row(ticket) if ticket.is_isolated else self._rows_for_moved(ticket)
        if not len(rows):
            return
        self._moved.remove(ticket)
        ticket.avoided = None
        self._grant(ticket, rows, now)
        if ticket.stay is None:
            self._release(ticket)
        elif ticket.is_suspect and ticket.stay.engine.num_requests == 1:
            self._reserve(ticket, ticket.stay.engine)

    def _rows_for_moved(self, ticket: Ticket) -> Rows:
        rows = self._pool.free_rows(ticket.destination)
        if ticket.avoided is not None:
            rows = rows[rows != ticket.avoided.row]
        if not ticket.is_suspect:
            return rows
        rows = np.array([row for row in rows if not self._pool.has_trial(row)], np.intp)
        empty = rows[self._pool.fleet.num_requests[rows] == 0]
        clear = np.array([row for row in rows if not self._pool.has_suspect(row)], np.intp)
        return next((some for some in (empty, clear) if len(some)), rows)

    def _own_row(self, ticket: Ticket) -> Rows:
        """The row of the engine that is reserved for a request, once that is ready and empty; one after the other."""
        if self._isolated.get(ticket.destination, ticket) is not ticket:
            return _NO_ROWS
        self._release(ticket)
        engine = self._pool.emptiest(ticket.destination, ticket.avoided)
        if engine is None:
            return _NO_ROWS
        self._reserve(ticket, engine)
        self._isolated[ticket.destination] = ticket
        return np.array([engine.row], np.intp) if engine.is_open and not engine.num_requests else _NO_ROWS

    def _reserve(self, ticket: Ticket, engine: ManagedEngine) -> None:
        self._pool.reserve(engine, is_reserved=True)
        ticket.reserved = engine

    def _release(self, ticket: Ticket) -> None:
        if ticket.reserved is not None:
            self._pool.reserve(ticket.reserved, is_reserved=False)
            ticket.reserved = None
            if self._isolated.get(ticket.destination) is ticket:
                del self._isolated[ticket.destination]

    def _grant(self, ticket: Ticket, rows: Rows, now: float) -> None:
        if ticket.granted is not None and ticket.granted.cancelled():  # and its task has not run yet
            return
        rows = self._policy.narrow(ticket, rows, self._pool.fleet, now)
        if self._phases is not None:
            rows = self._phases.narrow(ticket, rows)
        choice = self._choose(ticket, rows, now)
        source = None
        if self._phases is not None and not ticket.num_grants:
            source = self._phases.source(ticket, choice.row, choice.num_cached_tokens)
        self._router.on_granted(ticket.routed, choice.row)
        if not ticket.num_grants:
            ticket.num_unserved_tokens = max(0, ticket.routed.num_prompt_tokens - choice.num_cached_tokens)
            self._policy.on_granted(ticket, choice.num_cached_tokens, now)
        ticket.num_grants += 1
        ticket.stay = self._new_stay(ticket, choice, rows, now)
        if source is not None:
            self._begin_hand_over(ticket, ticket.stay, source, now)
        self._pool.enter(ticket.stay)
        if ticket.granted is not None:
            _wake(ticket)

    def _choose(self, ticket: Ticket, rows: Rows, now: float) -> Choice:
        if rows.size == 1 and not ticket.routed.block_hashes:
            return _only(rows.item())
        return self._router.choose(ticket.routed_now(), rows, self._pool.fleet, now)

    def _new_stay(self, ticket: Ticket, choice: Choice, rows: Rows, now: float) -> Stay:
        engine, names, scores = self._pool.at(choice.row), self._pool.names, choice.scores
        candidates = None if scores is None else Candidates(choice, scores, rows, names)
        trace = StayTrace(names[choice.row], now, choice, rows.size, candidates)
        ticket.trace.stays.append(trace)
        num_expected_tokens = ticket.num_prompt_tokens + ticket.num_output_tokens
        booking, pull = ticket.new_booking(choice.num_cached_tokens), Pull(self._running_loop())
        stay = Stay(engine, booking, engine.generation, num_expected_tokens, trace, pull, is_trial=ticket.is_suspect)
        stay.num_losses = ticket.num_losses
        return stay

    def _begin_hand_over(self, ticket: Ticket, stay: Stay, source: tuple[int, int], now: float) -> None:
        """Let another engine compute the prompt for the one that was chosen."""
        row, num_cached_tokens = source
        engine, choice = self._pool.at(row), Choice(row, num_cached_tokens, rule="prefill")
        trace = StayTrace(engine.engine_id, now, choice, num_candidates=1)
        booking, pull = ticket.new_booking(num_cached_tokens), Pull(self._running_loop())
        prefill = Stay(engine, booking, engine.generation, ticket.routed.num_prompt_tokens, trace, pull)
        prefill.num_losses = ticket.num_losses
        self._pool.enter(prefill)
        token_ids = prompt_token_ids(ticket.request)
        assert token_ids is not None, "only prompts with known tokens are handed over"
        num_tokens = len(token_ids) // ticket.routed.block_size * ticket.routed.block_size
        stay.hand_over = HandOver(prefill, token_ids, num_tokens)
        stay.booking = ticket.new_booking(num_tokens)
        stay.trace.prefilled_by = engine.engine_id

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Kept, because asking for it costs a system call."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.get_running_loop()
        return self._loop


@lru_cache
def _only(row: int) -> Choice:
    return Choice(row, rule=_ALONE)


def _wake(ticket: Ticket) -> None:
    if ticket.granted is not None and not ticket.granted.done():
        ticket.granted.set_result(None)
