"""Whether a request that lost its engine goes on elsewhere.

Of the requests that an engine takes with it one may be the reason. All of them are suspects until they have made a
token elsewhere, and an engine takes one suspect at a time (`Dispatcher` sees to it). A loss counts against a request
that had made no token on that engine; a token clears it. At the second such loss in a row it is refused as poison if no
other request stood as it did, at the third in any case. So a request that kills whatever computes its prompt takes two
engines with it, one that kills at a later token three, and those in its company go on.
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


def refusal(ticket: Ticket, error: UnavailableError, config: FailoverConfig) -> SageLLMError | None:
    """Why the request ends here; None where it may move. Counts the loss; call it once for each."""
    stay = ticket.stay
    assert stay is not None, "only a stay can end with its engine"
    is_poison = False
    if isinstance(error, EngineLostError):
        ticket.is_suspect = True
        ticket.num_losses = 0 if stay.trace.num_output_tokens else ticket.num_losses + 1
        num_excess = ticket.num_losses - config.max_losses
        is_poison = num_excess > 0 or (num_excess == 0 and not stay.had_company)
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
