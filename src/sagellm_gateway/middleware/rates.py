"""How much: requests a minute and requests in work, of each key and of all; and what answers say of the limits.

Counts what makes work: every POST but those of `/admin`. Tokens are counted by `Ledger`, which has the request. Answers
carry OpenAI's `x-ratelimit-limit-*`, `-remaining-*` and `-reset-*` for requests and tokens, of the key's own limits or,
where it has none, of those of all together. A refusal says in `Retry-After` when the next try can succeed. A server
that shuts down takes no new work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.types import Scope

from sagellm_gateway.context import Caller
from sagellm_gateway.rates import Meter, Window
from sagellm_protocol import UnavailableError

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway


@dataclass(frozen=True, slots=True)
class _Allowance:
    """What counts one key's requests; nothing where nothing is limited."""

    meters: tuple[Meter, ...]
    of_tokens: tuple[Meter, ...]
    windows: tuple[Window | None, Window | None]  # that answers tell of


class RateCheck:
    """See the module."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        limits = gateway.settings.limits
        self._per_key = limits.per_key
        self._total = Meter(limits.total, "all callers together", is_total=True)
        self._allowances: dict[str | None, _Allowance] = {}  # of each key that has called

    def enter(self, scope: Scope, caller: Caller) -> tuple[Meter, ...]:
        """The meters that have counted a call in, to be left when it is over; raises where one of them is full."""
        if scope["method"] != "POST" or scope["path"].startswith("/admin/"):
            return ()
        allowance = self._allowances.get(caller.key_name) or self._new_allowance(caller)
        caller.meters, caller.windows = allowance.of_tokens, allowance.windows
        if self._gateway.is_leaving:
            caller.answer_headers.append((b"connection", b"close"))
        if self._gateway.is_draining:
            raise UnavailableError("this server is shutting down; send the request again, to another one")
        meters = allowance.meters
        for meter in meters:
            meter.check()
        for meter in meters:
            meter.enter()
        return meters

    def _new_allowance(self, caller: Caller) -> _Allowance:
        who = "a caller" if caller.key_name is None else f"the key {caller.key_name!r}"
        own, total = Meter(caller.limits or self._per_key, who), self._total
        allowance = self._allowances[caller.key_name] = _Allowance(
            meters=tuple(meter for meter in (own, total) if meter.has_limits),
            of_tokens=tuple(meter for meter in (own, total) if meter.tokens is not None),
            windows=(own.requests or total.requests, own.tokens or total.tokens),
        )
        return allowance
