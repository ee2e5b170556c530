"""Lets a call in, or says in the form of its API why not.

Asks in turn: what its headers wish (`x-priority`; `x-slo-ttft-ms`, `x-slo-tpot-ms`, `x-slo-deadline-ms`), which must be
readable; whether it may call (`auth`); whether that is not too much now (`rates`). A header of ours with a bad value is
a 400 that names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from sagellm_gateway.context import CALLER, Caller
from sagellm_gateway.errors import error_answer_for
from sagellm_gateway.middleware.auth import KeyCheck, OriginCheck
from sagellm_gateway.middleware.rates import RateCheck
from sagellm_protocol import SLO, InvalidArgumentError, RequestPriority, SageLLMError

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_SLO_FIELDS = {b"x-slo-ttft-ms": "ttft_ms", b"x-slo-tpot-ms": "tpot_ms", b"x-slo-deadline-ms": "deadline_ms"}
_WISHES = frozenset({b"x-request-id", b"x-priority", *_SLO_FIELDS})
_PRIORITIES = {priority.name.lower().encode(): priority for priority in RequestPriority}
_MAX_MS = 86_400_000  # a day


class Door:
    """See the module."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        settings = gateway.settings
        self._timeout_ms = settings.limits.request_timeout_s * 1e3
        self._default_slo = SLO(deadline_ms=self._timeout_ms)
        self._check = KeyCheck(settings.auth) if settings.auth.keys else OriginCheck(settings)
        self._rates = RateCheck(gateway)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        caller: Caller = scope[CALLER]
        try:
            self._read_wishes(caller)
            self._check(scope["path"], caller)
            meters = self._rates.enter(scope, caller)
            try:
                await self._app(scope, receive, send)
            finally:
                for meter in meters:
                    meter.leave()
        except SageLLMError as error:
            if caller.answered_at is not None:
                raise
            await error_answer_for(scope["path"], error)(scope, receive, send)

    def _read_wishes(self, caller: Caller) -> None:
        headers = caller.headers
        caller.slo = self._default_slo
        if headers.keys().isdisjoint(_WISHES):
            return
        if b"x-request-id" in headers and headers[b"x-request-id"] != caller.request_id.encode():
            raise _bad_header("x-request-id", "1 to 128 visible ASCII characters")
        priority = headers.get(b"x-priority")
        if priority is not None:
            caller.priority = _PRIORITIES.get(priority.strip().lower())
            if caller.priority is None:
                raise _bad_header("x-priority", f"one of {', '.join(name.decode() for name in _PRIORITIES)}")
        wishes = {field: _milliseconds(name, headers[name]) for name, field in _SLO_FIELDS.items() if name in headers}
        if wishes:  # nobody waits longer than the gateway's own limit
            deadline_ms = min(wishes.get("deadline_ms", self._timeout_ms), self._timeout_ms)
            caller.slo = SLO(**{**wishes, "deadline_ms": deadline_ms})


def _milliseconds(name: bytes, value: bytes) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= _MAX_MS:
        raise _bad_header(name.decode(), f"a number of milliseconds above 0 and up to {_MAX_MS}")
    return number


def _bad_header(name: str, wanted: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the header {name} must be {wanted}; correct it or leave it out", field=name)
