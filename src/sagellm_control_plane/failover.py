"""Whether a request that lost its engine goes on elsewhere.

Of the requests that an engine takes with it one may be the reason. All of them are suspects until they have made a
token elsewhere, and an engine takes one suspect at a time (`Dispatcher` sees to it). One that loses a second engine
without having got any further there is refused as poison, unless there is another reason to think of; the third engine
in a row condemns it in any case. Other reasons are: another request stood as it did; the engine had not begun it, as
where two engines fail at once; engines were lost lately that never saw it. So where engines don't die by themselves, a
request that kills at whatever token takes two of them with it, and where they do, nobody is condemned for bad luck.
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

    `num_lost_lately` are the engines lost within `UNREST_S`, with this one.
    """
    stay = ticket.stay
    assert stay is not None, "only a stay can end with its engine"
    is_poison = False
    if isinstance(error, EngineLostError):
        ticket.is_suspect = True
        got_further = stay.trace.num_output_tokens > 0
        ticket.num_losses = 1 if got_further else ticket.num_losses + 1
        num_excess = ticket.num_losses - config.max_losses
        has_begun = stay.has_begun or ticket.journal is None  # of answers made whole nothing is told
        is_bad_luck = stay.had_company or not has_begun or num_lost_lately > ticket.num_losses
        is_poison = not got_further and (num_excess > 0 or (num_excess == 0 and not is_bad_luck))
    if ticket.is_late:
        return ticket.deadline_error()
    if not config.enabled:
        return error
    if is_poison:
        return poison_error(ticket, error)
    if ticket.num_grants > config.max_moves:
        return UnavailableError(
            f"the request was moved {config.max_moves} times (failover.max_moves); the last reason: {error.message}",
            request_id=ticket.request.request_id,
        )
    return None


def poison_error(ticket: Ticket, error: SageLLMError) -> InternalError:
    """What is said of a request that kills the engines it runs on."""
    return InternalError(
        f"{ticket.num_losses} engines in a row died while they ran this request ({error.message}); it is not tried "
        "again: change the request, and look into the engines' logs",
        retryable=False,
        request_id=ticket.request.request_id,
    )


def is_engine_ok(error: SageLLMError) -> bool | None:
    """Whether an error speaks against the engine that gave it (False), or says nothing of it (None)."""
    return False if error.code in _ENGINE_FAULTS else None
