"""What a scheduling policy is: the order in which waiting requests get a place on an engine.

A policy is one class with a `key`; the rest has defaults. `WaitQueue` asks it in three ways, from the cheapest:

- `is_static` (the default): a request's key never changes, and the queue keeps a heap.
- lanes: requests of one `lane` keep their `order` among themselves, and only the first of each are compared by `key` at
  a pop. Tenants are lanes of `fair`. Where keys mostly grow and `lowered` tells of the rest, the queue keeps a heap of
  lanes, too.
- neither: every waiting request's key is computed at every pop.

The hooks tell a policy what becomes of requests. All belong to one event loop, and none may block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from sagellm_control_plane.types import RequestType
from sagellm_protocol import Request
from sagellm_protocol.model import EdgeModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sagellm_control_plane.fleet import Fleet
    from sagellm_control_plane.predictor import Predictor

Key = tuple[float, ...]
Destination = tuple[str, RequestType]  # the model that is asked for, and what of it

_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class WaitingRequest:
    """A request in the queue, and what is expected of it. Times are seconds of the control plane's clock."""

    request: Request
    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int  # expected, of all choices together
    sequence_number: int
    tenant: str = ""
    destination: Destination = field(init=False)
    first_token_due: float = field(init=False)  # by its objectives; infinite where it has none
    deadline: float = field(init=False)  # when its answer is worth nothing any more; else infinite

    def __post_init__(self) -> None:
        request, slo = self.request, self.request.slo
        self.destination = request.model, RequestType.of(request)
        self.first_token_due = self.deadline = _NEVER
        if slo is None:
            return
        if slo.ttft_ms is not None:
            self.first_token_due = self.arrival_time + slo.ttft_ms / 1e3
        if slo.deadline_ms is not None:
            self.deadline = self.arrival_time + slo.deadline_ms / 1e3

    @property
    def has_objective(self) -> bool:
        """Whether a time is set for its first or its last token."""
        return min(self.first_token_due, self.deadline) < _NEVER


class PolicyOptions(EdgeModel):
    """What an operator may set of the policies; each reads what it knows."""

    ageing_s: float = Field(
        default=30.0, gt=0, description="`priority`: waiting so long lifts a request by one priority."
    )
    best_effort_share: float = Field(
        default=0.1, gt=0, lt=1, description="`slo_aware`: share of places for requests without a reachable objective."
    )
    tenant_weights: dict[str, float] = Field(
        default_factory=dict, description="`fair`: a tenant's share against others, which have 1."
    )
    budget_per_hour: float | None = Field(
        default=None, gt=0, description="`cost_optimized`: what the busy engines shall cost together."
    )


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is made with. `on_switch(old, new, reason)` hears of each change of an adaptive policy's mind."""

    predictor: Predictor
    fleet: Fleet
    options: PolicyOptions = field(default_factory=PolicyOptions)
    on_switch: Callable[[str, str, str], None] = lambda old, new, reason: None

    def weight(self, tenant: str) -> float:
        """A tenant's share against that of others."""
        weights: Mapping[str, float] = self.options.tenant_weights
        return weights.get(tenant, 1.0)


class SchedulingPolicy(ABC):
    """Orders waiting requests; the module says how. A subclass needs a `name` and a `key`."""

    name: ClassVar[str]
    is_static: ClassVar[bool] = True
    generation: int = 0  # counted up when lanes and orders of all waiting requests have to be made anew

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    @abstractmethod
    def key(self, waiting: WaitingRequest, now: float) -> Key:
        """The lowest goes first; equal ones in the order of arrival."""

    def lane(self, waiting: WaitingRequest, now: float) -> Hashable:
        """The lane that a request joins."""
        return None if self.is_static else waiting

    def order(self, waiting: WaitingRequest, now: float) -> Key:
        """A request's place in the lane that it joins now; must hold while it stays there."""
        return self.key(waiting, now)

    def changes_at(self, waiting: WaitingRequest, now: float) -> float:
        """When a request must be given a lane and an order anew, if it still waits then."""
        return float("inf")

    def lowered(self) -> set[Hashable] | None:
        """The lanes whose keys have become less while the queue did not look, for it to clear; all others only grow.

        None: keys may change in any way, and those of all lanes are compared at every pop.
        """
        return None

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        """Whether `other`, which is behind `first` in its lane, may go before it if that saves work."""
        return False

    def narrow(self, waiting: WaitingRequest, rows: NDArray[np.intp], fleet: Fleet, now: float) -> NDArray[np.intp]:
        """Those of the engines with a free place that the router may choose from; at least one."""
        return rows

    def on_arrival(self, waiting: WaitingRequest, now: float) -> None:  # noqa: B027 - most policies have no memory
        """It has joined the queue."""

    def on_left(self, waiting: WaitingRequest, now: float) -> None:  # noqa: B027
        """It has left the queue: granted (which `on_granted` follows), cancelled or expired."""

    def on_granted(self, waiting: WaitingRequest, num_cached_tokens: int, now: float) -> None:  # noqa: B027
        """It has a place on an engine that has cached so many of its prompt's tokens; told once, wherever it moves."""

    def on_tokens(self, waiting: WaitingRequest, num_tokens: int, now: float) -> None:  # noqa: B027
        """So many further tokens were made for it."""

    def on_ended(self, waiting: WaitingRequest, now: float, *, num_unserved_tokens: int = 0) -> None:  # noqa: B027
        """A request that was granted is over; so many tokens of its prompt were never computed."""
