"""Identifiers: how requests, traces, engines and sessions are named.

An id is an opaque string. Fresh ids are a readable prefix plus random bits, so they need no coordination between
processes; a trace id is bare hex because that is what the W3C ``traceparent`` header carries. Ids that come from
outside are taken as they are, within the bounds of :data:`sagellm_protocol.fields.Identifier`.
"""

from __future__ import annotations

from secrets import token_hex


def new_request_id() -> str:
    """Return a fresh request id, ``req-`` and 32 hex digits."""
    return f"req-{token_hex(16)}"


def new_trace_id() -> str:
    """Return a fresh trace id: 32 hex digits, usable in a ``traceparent`` header."""
    return token_hex(16)


def new_transfer_id() -> str:
    """Return a fresh id of a KV transfer, ``kvt-`` and 32 hex digits."""
    return f"kvt-{token_hex(16)}"


def new_engine_id() -> str:
    """Return a fresh engine id, ``engine-`` and 12 hex digits (short: people read it in logs)."""
    return f"engine-{token_hex(6)}"


def new_session_id() -> str:
    """Return a fresh session id, ``session-`` and 32 hex digits (not guessable)."""
    return f"session-{token_hex(16)}"
