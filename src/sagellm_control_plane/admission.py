"""Admission: requests wait in a queue until the policy and the router give each a place on an engine."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from sagellm_control_plane.config import PDSeparationConfig
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.policies import Policy, WaitingRequest, next_request
from sagellm_control_plane.router import Router, prefer_by_phase
from sagellm_control_plane.types import RequestType
from sagellm_protocol import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    Request,
    ResourceExhaustedError,
    SageLLMError,
    UnavailableError,
)

_BYTES_PER_TOKEN = 4  # of UTF-8 text, the usual estimate


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the control plane: `granted` will hold its engine."""

    waiting: WaitingRequest
    num_prompt_tokens: int
    granted: asyncio.Future[ManagedEngine] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_late: bool = False  # its deadline has passed
    destination: tuple[str, RequestType] = field(init=False)  # the model it asks for, and what of it

    def __post_init__(self) -> None:
        self.destination = self.request.model, RequestType.of(self.request)

    @property
    def request(self) -> Request:
        return self.waiting.request

    @property
    def engine(self) -> ManagedEngine:
        """Where it runs."""
        return self.granted.result()

    def deadline_error(self) -> DeadlineExceededError:
        """What is said of a request that is late."""
        limit = self.request.slo.deadline_ms if self.request.slo is not None else None
        return DeadlineExceededError(f"the request's deadline of {limit:g} ms has passed; allow more time", field="slo")


class Admission:
    """The queue in front of the engines. `engines` is the manager's own registry, read at every decision."""

    def __init__(
        self,
        engines: Mapping[str, ManagedEngine],
        policy: Policy,
        router: Router,
        *,
        pd_config: PDSeparationConfig | None,
        max_num_waiting: int,
        clock: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._policy = policy
        self._router = router
        self._pd_config = pd_config
        self._max_num_waiting = max_num_waiting
        self._clock = clock
        self._tickets: list[Ticket] = []
        self._numbers = itertools.count()
        self._grants = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Requests without a place."""
        return len(self._tickets)

    def num_waiting_by_model(self) -> dict[str, int]:
        """The same, by the model that is asked for."""
        return Counter(ticket.request.model for ticket in self._tickets)

    def serving(self, model: str, kind: RequestType | None = None) -> list[ManagedEngine]:
        """The engines that requests of a kind for `model` may go to; `NotFoundError` where there is none."""
        serving = [engine for engine in self._engines.values() if engine.serves(model, kind)]
        if not serving:
            if any(engine.serves(model) for engine in self._engines.values()):
                makes, lacks = ("text", "vectors") if kind is RequestType.EMBEDDING else ("vectors", "text")
                raise InvalidArgumentError(
                    f"the engines of the model {model!r} make {makes}, no {lacks}; name another model", field="model"
                )
            if any(model in ("default", engine.instance.model_name) for engine in self._engines.values()):
                raise UnavailableError(f"the engines of the model {model!r} take no requests now; try again later")
            known = ", ".join(sorted({engine.instance.model_name for engine in self._engines.values()})) or "none"
            raise NotFoundError(f"no engine serves the model {model!r}; there is {known}", field="model")
        return serving

    @asynccontextmanager
    async def place(self, request: Request) -> AsyncGenerator[Ticket, None]:
        """A place on an engine for the time of the body; the ledger is exact on every way out.

        Engines that have not been started are started; the first that is ready will do.
        """
        serving = self.serving(request.model, RequestType.of(request))
        for engine in serving:
            engine.start(self.dispatch)
        ticket = self._enqueue(request, serving[0])
        timer = self._arm_deadline(ticket)
        try:
            engine = await self._granted(ticket)
            try:
                if ticket.is_late:
                    raise ticket.deadline_error()
                yield ticket
            finally:
                self._leave(engine, ticket)
        finally:
            if timer is not None:
                timer.cancel()

    def dispatch(self) -> None:
        """Grant places to waiting requests, by policy, until none fits; a model without a place blocks no other."""
        blocked: set[tuple[str, RequestType]] = set()
        while True:
            open_tickets = [ticket for ticket in self._tickets if ticket.destination not in blocked]
            if not open_tickets:
                return
            ticket = _first(open_tickets, self._policy)
            model, kind = ticket.destination
            serving = [engine for engine in self._engines.values() if engine.serves(model, kind)]
            free = [engine for engine in serving if engine.has_place]
            if free:
                self._tickets.remove(ticket)
                self._grant(ticket, free)
            elif any(engine.may_have_place for engine in serving):
                blocked.add((model, kind))
            else:
                self._refuse(ticket, _no_engine(serving))

    def refuse_all(self, error: SageLLMError) -> None:
        """Let every waiting request fail with `error`."""
        for ticket in list(self._tickets):
            self._refuse(ticket, error)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _enqueue(self, request: Request, engine: ManagedEngine) -> Ticket:
        num_prompt_tokens = estimate_prompt_tokens(request)
        sampling = request.resolved_sampling()
        is_given = "max_tokens" in sampling.model_fields_set
        num_output_tokens = sampling.max_tokens if is_given else engine.engine.config.max_new_tokens
        num_tokens = num_prompt_tokens + num_output_tokens * sampling.n
        ticket = Ticket(WaitingRequest(request, self._clock(), num_tokens, next(self._numbers)), num_prompt_tokens)
        self._tickets.append(ticket)
        self.dispatch()
        if ticket in self._tickets and self.num_waiting > self._max_num_waiting:
            self._tickets.remove(ticket)
            raise ResourceExhaustedError(f"{self.num_waiting} requests are waiting already; try again later")
        return ticket

    async def _granted(self, ticket: Ticket) -> ManagedEngine:
        try:
            return await ticket.granted
        except asyncio.CancelledError:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            elif not ticket.granted.cancelled() and ticket.granted.exception() is None:
                self._leave(ticket.engine, ticket)  # granted and cancelled in the same moment
            raise

    def _grant(self, ticket: Ticket, free: Sequence[ManagedEngine]) -> None:
        if ticket.granted.done():  # cancelled, and its task has not run yet
            return
        if self._pd_config is not None and self._pd_config.enabled:
            free = prefer_by_phase(free, ticket.num_prompt_tokens, self._pd_config)
        engine = self._router(free)
        engine.enter(ticket.waiting.num_expected_tokens, next(self._grants))
        ticket.granted.set_result(engine)

    def _refuse(self, ticket: Ticket, error: SageLLMError) -> None:
        self._tickets.remove(ticket)
        if not ticket.granted.done():
            ticket.granted.set_exception(error)

    def _leave(self, engine: ManagedEngine, ticket: Ticket) -> None:
        engine.leave(ticket.waiting.num_expected_tokens)
        self.dispatch()

    def _arm_deadline(self, ticket: Ticket) -> asyncio.TimerHandle | None:
        slo = ticket.request.slo
        if slo is None or slo.deadline_ms is None:
            return None
        return asyncio.get_running_loop().call_later(slo.deadline_ms / 1e3, self._expire, ticket)

    def _expire(self, ticket: Ticket) -> None:
        ticket.is_late = True
        if ticket in self._tickets:
            self._refuse(ticket, ticket.deadline_error())
        elif ticket.granted.done() and not ticket.granted.cancelled() and ticket.granted.exception() is None:
            with suppress(NotFoundError):  # it has ended just now, or not begun: then the flag tells
                ticket.engine.engine.abort(ticket.request.request_id)


def _no_engine(serving: Sequence[ManagedEngine]) -> UnavailableError:
    reasons = "; ".join(engine.error or f"{engine.engine_id} is {engine.state.value}" for engine in serving)
    return UnavailableError(f"no engine can take the request: {reasons or 'the last one was taken away'}")


def _first(tickets: Sequence[Ticket], policy: Policy) -> Ticket:
    chosen = next_request(policy, [ticket.waiting for ticket in tickets])
    return next(ticket for ticket in tickets if ticket.waiting is chosen)


def estimate_prompt_tokens(request: Request) -> int:
    """Prompt tokens for ledger and routing: exact for token ids, estimated by the length of its UTF-8 for text."""
    if isinstance(request.prompt, list):
        return len(request.prompt)
    text = request.prompt or "".join(str(message.content) for message in request.messages or ())
    return max(1, len(text.encode("utf-8", errors="replace")) // _BYTES_PER_TOKEN)
