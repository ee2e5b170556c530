"""`random`: any engine, each as likely as the others."""

from __future__ import annotations

from random import Random

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingContext, RoutingPolicy, Rows


class RandomChoice(RoutingPolicy):
    """Uniform; the same seed and calls give the same choices."""

    name = "random"

    def __init__(self, context: RoutingContext) -> None:
        super().__init__(context)
        self._random = Random(context.seed)

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        return Choice(int(rows[self._random.randrange(len(rows))]), rule="at random")
