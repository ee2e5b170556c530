"""What a routing policy is: it chooses one engine among those that have a place.

To add one: a module with a subclass of `RoutingPolicy`, and its name in `ROUTERS` (`routing/__init__.py`) or, from
another distribution, under the entry-point group `sagellm.routing_policies`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.text_index import TextIndex, text_keys

if TYPE_CHECKING:
    from sagellm_control_plane.fleet import Fleet
    from sagellm_protocol import SLO

Rows = NDArray[np.intp]


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """What a choice may rest on.

    `block_hashes` name the full blocks of the prompt as the engines' caches do; they may be made only when asked for.
    """

    request_id: str
    model: str
    num_prompt_tokens: int
    num_output_tokens: int  # expected
    block_hashes: Sequence[bytes] = ()
    text: str | None = None  # of the prompt, for engines that tell nothing of their cache
    session_id: str | None = None
    tenant: str | None = None
    slo: SLO | None = None
    block_size: int = 16  # tokens of one block


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine chosen, and why. `scores` have one figure a candidate, in the order of the rows given."""

    row: int
    num_cached_tokens: int = 0  # of the prompt, expected in the engine's cache
    predicted_ttft_s: float | None = None
    rule: str = ""
    scores: Mapping[str, NDArray[Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """What routing policies are made with.

    Whoever owns it feeds `prefixes` with the engines' events; `location` is where the control plane itself runs, in the
    form of the fleet's groups.
    """

    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    texts: TextIndex = field(default_factory=TextIndex)
    seed: int = 0
    location: str = ""


class RoutingPolicy(ABC):
    """Chooses engines. One object for one control plane, called on one event loop; a subclass sets `name`."""

    name: ClassVar[str]
    wants_tokens: ClassVar[bool] = False  # whether `block_hashes` make a difference to it

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    @abstractmethod
    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """One of `rows`, which are never empty and all have a place. Changes nothing: the choice may be dropped.

        `now` is seconds of the control plane's clock.
        """

    def would_wait(self, request: RoutedRequest, free: Rows, rows: Rows, fleet: Fleet) -> bool:
        """Whether it is worth waiting for one of `rows` rather than taking one of `free`, those of them with a place.

        Asked where more requests wait than places are free. Nobody waits long for it: see `WaitQueue.pop`.
        """
        return False

    def on_granted(self, request: RoutedRequest, row: int) -> None:  # noqa: B027 - most policies have no memory
        """The request goes to `row`."""

    def on_ended(self, request: RoutedRequest, row: int) -> None:  # noqa: B027
        """The request has left `row`, whatever the reason."""

    def on_engine_removed(self, row: int) -> None:  # noqa: B027
        """The engine of `row` is gone; the row may become another's."""


class CachePolicy(RoutingPolicy):
    """A policy that asks which engine has how much of the prompt cached.

    Engines that tell of their cache are known exactly; of the others it remembers what it sent them.
    """

    wants_tokens = True

    def cached_tokens(self, request: RoutedRequest, rows: Rows, fleet: Fleet) -> NDArray[np.int64]:
        """Tokens of the prompt that each of `rows` has cached; never all of them, since the last must be computed."""
        return self.cached_by_row(request, fleet).take(rows)

    def cached_by_row(self, request: RoutedRequest, fleet: Fleet) -> NDArray[np.int64]:
        """The same of every row of the fleet."""
        cached = self.context.prefixes.match(request.block_hashes, fleet.size)
        cached *= request.block_size
        if len(self.context.texts):
            keys = _keys(request)
            known = self.context.texts.match(keys, fleet.size)
            np.maximum(cached, known * request.num_prompt_tokens // max(len(keys), 1), out=cached)
        return np.minimum(cached, max(request.num_prompt_tokens - 1, 0), out=cached)

    def on_granted(self, request: RoutedRequest, row: int) -> None:
        """Remember the prompt where the engine will not tell."""
        if not (request.block_hashes or request.text):
            return
        if not self.context.prefixes.follows(row):
            self.context.texts.record(row, _keys(request))

    def on_engine_removed(self, row: int) -> None:
        """Forget what it had cached."""
        self.context.texts.reset(row)


def _keys(request: RoutedRequest) -> Sequence[bytes]:
    """The prompt's blocks, by tokens where those are known, else by text."""
    return request.block_hashes or text_keys(request.text or "")


def lowest(rows: Rows, scores: NDArray[Any], fleet: Fleet) -> int:
    """Where in `rows` the lowest score stands; equals take turns."""
    best = int(scores.argmin())
    ties = (scores == scores.item(best)).nonzero()[0]
    if len(ties) > 1:
        best = int(ties[fleet.last_grant[rows[ties]].argmin()])
    return best


def below_load_bound(rows: Rows, fleet: Fleet) -> NDArray[np.bool_]:
    """Which of `rows` may take one more request without standing out; at least one.

    The bound is 1.25 times the mean, counting the request: the consistent hashing with bounded loads of Mirrokni,
    Thorup and Zadimoghaddam (SODA 2018), where a factor of 1.25 moves few keys and keeps the peak near the mean.
    """
    num_requests = fleet.num_requests[rows]
    is_below: NDArray[np.bool_] = num_requests < np.ceil(1.25 * (num_requests.sum() + 1) / len(rows))
    return is_below
