"""Identifiers: how requests, traces, engines and sessions are named.

An id is an opaque string. Fresh ids are a readable prefix plus random bits, so they need no coordination between
processes; a trace id is bare hex because that is what the W3C ``traceparent`` header carries. Ids that come from
outside are taken as they are, within the bounds of :data:`sagellm_protocol.fields.Identifier`.
"""

from __future__ import annotations

import os
from collections import deque
from secrets import token_hex

_NUM_FETCHED = 256
_fresh: deque[str] = deque()  # what `random_hex` gives out next; taken and added to in one step each, by any thread
if hasattr(os, "register_at_fork"):  # or parent and child would give out the same
    os.register_at_fork(after_in_child=_fresh.clear)


def random_hex() -> str:
    """Return 32 hex digits that nobody can guess.

    They are asked of the system for many ids at once: a call of it costs more than all else that an id takes.
    """
    while True:
        try:
            return _fresh.pop()
        except IndexError:
            digits = token_hex(16 * _NUM_FETCHED)
            _fresh.extend(digits[start : start + 32] for start in range(0, len(digits), 32))


def new_request_id() -> str:
    """Return a fresh request id, ``req-`` and 32 hex digits."""
    return f"req-{random_hex()}"


def new_trace_id() -> str:
    """Return a fresh trace id: 32 hex digits, usable in a ``traceparent`` header."""
    return random_hex()


def new_transfer_id() -> str:
    """Return a fresh id of a KV transfer, ``kvt-`` and 32 hex digits."""
    return f"kvt-{random_hex()}"


def new_engine_id() -> str:
    """Return a fresh engine id, ``engine-`` and 12 hex digits (short: people read it in logs)."""
    return f"engine-{token_hex(6)}"


def new_session_id() -> str:
    """Return a fresh session id, ``session-`` and 32 hex digits (not guessable)."""
    return f"session-{random_hex()}"
