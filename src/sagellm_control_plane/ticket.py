"""A request on its way through the control plane, and its stays on engines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.explain import RequestTrace, StayTrace
from sagellm_control_plane.fleet import Booking
from sagellm_control_plane.journal import Journal
from sagellm_control_plane.policies import WaitingRequest
from sagellm_control_plane.pull import Pull
from sagellm_control_plane.quotas import Reservation
from sagellm_control_plane.routing import RoutedRequest
from sagellm_protocol import DeadlineExceededError, SageLLMError

if TYPE_CHECKING:
    from sagellm_control_plane.hand_over import HandOver


FURTHER_TOKENS = 16
"""So many tokens of a dead engine may have been on their way still: to make those again is to get no further."""


@dataclass(slots=True, eq=False)
class Stay:
    """The time of one request on one engine, from its grant until it leaves; `generation` is the engine's."""

    engine: ManagedEngine
    booking: Booking
    generation: int
    num_expected_tokens: int
    trace: StayTrace
    pull: Pull
    is_trial: bool = False  # the request may have killed the engine before, and has not got any further here yet
    is_watched: bool = True  # each of its events is booked at once: until the first token, or the end of a trial
    has_begun: bool = False  # the engine has said that it has the request; only streams are told
    num_losses: int = 0  # engines that the request had lost in a row when it came
    num_suspects: int = 0  # requests lost with its engine that had lost as many before; 0: none is to blame
    hand_over: HandOver | None = None  # another engine computes the prompt for this one

    @property
    def num_losses_before(self) -> int:
        """Engines that the request has lost without getting further than on them."""
        return 0 if self.trace.num_output_tokens > FURTHER_TOKENS * self.booking.num_sequences else self.num_losses


@dataclass(slots=True, eq=False)
class Ticket(WaitingRequest):
    """One request, from its arrival to its end. It has a stay, or a refusal, or waits; `granted` ends that wait."""

    routed: RoutedRequest = field(kw_only=True)
    trace: RequestTrace = field(kw_only=True)
    num_outputs: int = field(kw_only=True)  # that it asks for
    journal: Journal | None = None  # of a stream; an answer that is made whole has none
    granted: asyncio.Future[None] | None = None  # there while its task waits
    stay: Stay | None = None
    refusal: SageLLMError | None = None
    reservation: Reservation | None = None  # of its tenant's quota
    num_grants: int = 0
    avoided: ManagedEngine | None = None  # has just turned it away
    is_suspect: bool = False  # it may be what killed the engine that it was on
    is_isolated: bool = False  # likewise, after several: it runs where nobody else is
    reserved: ManagedEngine | None = None  # where it is to be alone, or is
    num_losses: int = 0  # engines lost in a row, without getting further on any but the first
    num_moves: int = 0  # in a row, without a token made in between
    num_unserved_tokens: int = 0  # of the prompt, that no engine has computed
    is_late: bool = False  # its deadline has passed
    is_closed: bool = False

    @property
    def num_delivered(self) -> int:
        """Tokens that its caller has."""
        return 0 if self.journal is None else self.journal.num_tokens

    def acquit(self) -> None:
        """It has got further than where it may have killed: it does not kill."""
        self.is_suspect = self.is_isolated = False

    def new_booking(self, num_cached_tokens: int) -> Booking:
        """What a stay takes of an engine."""
        num_prompt_tokens = self.routed.num_prompt_tokens + self.num_delivered
        if num_cached_tokens >= num_prompt_tokens:  # the last token is always computed
            num_cached_tokens = max(num_prompt_tokens - 1, 0)
        return Booking(num_prompt_tokens, num_cached_tokens, self.num_outputs)

    def routed_now(self) -> RoutedRequest:
        """What a choice rests on: after a move the tokens made so far are part of the prompt."""
        if not self.num_delivered:
            return self.routed
        return replace(self.routed, num_prompt_tokens=self.routed.num_prompt_tokens + self.num_delivered)

    def deadline_error(self) -> DeadlineExceededError:
        """What is said of a request that is late."""
        limit = self.request.slo.deadline_ms if self.request.slo is not None else None
        return DeadlineExceededError(f"the request's deadline of {limit:g} ms has passed; allow more time", field="slo")
