"""Whether a request that lost its engine goes on elsewhere.

Of the requests that an engine takes with it one may be the reason, unless it is seen that a signal from outside was.
All of them are suspects until they have got further elsewhere. An engine takes one suspect at a time, and one that is
empty takes nobody else meanwhile (`Dispatcher` sees to it). Who loses a second engine without having got any further is
refused as poison if nobody else there had lost one before: it alone was aboard of both. Otherwise, and where the engine
had not begun it or others died lately that never saw it, it is isolated: it runs on alone, and the next engine
that it loses condemns it. So a request that kills at whatever token takes two engines with it, or a third one that
harms nobody else. Nobody is condemned for what somebody did with a signal, nor for what one other request did: that one
was aboard of both, too.
"""

from __future__ import annotations

from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.config import FailoverConfig
from sagellm_control_plane.ticket import Ticket
from sagellm_protocol import ErrorCode, InternalError, SageLLMError, UnavailableError

_ENGINE_FAULTS = (
    ErrorCode.INTERNAL,
    ErrorCode.UNAVAILABLE,
    ErrorCode.DISTRIBUTED_RUNTIME_ERROR,
    ErrorCode.COMM_TIMEOUT,
    ErrorCode.KV_TRANSFER_FAILED,
)

UNREST_S = 60.0
"""How long a lost engine is a reason to think that the next one was lost for the same."""


def refusal(
    ticket: Ticket, error: UnavailableError, config: FailoverConfig, num_lost_lately: int
) -> SageLLMError | None:
    """Why the request ends here; None where it may move. Counts the loss; call it once for each.

    `num_lost_lately` are the engines that died of themselves within `UNREST_S`, with this one.
    """
    stay = ticket.stay
    assert stay is not None, "only a stay can end with its engine"
    is_poison = False
    ticket.num_losses = stay.num_losses_before
    if isinstance(error, EngineLostError) and stay.num_suspects:
        ticket.num_losses += 1
        has_begun = stay.has_begun or ticket.journal is None  # of answers made whole nothing is told
        is_bad_luck = not has_begun or num_lost_lately > ticket.num_losses
        is_poison = stay.num_suspects == 1 and ticket.num_losses >= config.max_losses + is_bad_luck
        ticket.is_suspect, ticket.is_isolated = True, ticket.num_losses >= config.max_losses
    ticket.num_moves += 1
    if ticket.is_late:
        return ticket.deadline_error()
    if not config.enabled:
        return error
    if is_poison:
        return InternalError(
            f"{ticket.num_losses} engines in a row died while they ran this request ({error.message}); it is not tried "
            "again: change the request, and look into the engines' logs",
            retryable=False,
            request_id=ticket.request.request_id,
        )
    if ticket.num_moves > config.max_moves:
        return UnavailableError(
            f"the request was moved {config.max_moves} times in a row without a token made (failover.max_moves); the "
            f"last reason: {error.message}",
            request_id=ticket.request.request_id,
        )
    return None


def is_engine_ok(error: SageLLMError) -> bool | None:
    """Whether an error speaks against the engine that gave it (False), or says nothing of it (None)."""
    return False if error.code in _ENGINE_FAULTS else None
