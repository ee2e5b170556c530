"""The access log: one line a request, when it is over, to the logger `sagellm.access`.

A line says when, who, what, how it ended, how long it took and how many tokens it used; never what was said, unless
`log.prompts` is set. Values that a client chose are escaped, so that nobody writes lines of their own.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagellm_gateway.context import CALLER, Caller

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway
    from sagellm_gateway.settings import LogSettings

logger = logging.getLogger("sagellm.access")

_encode = msgspec.json.Encoder().encode
_WORD = re.compile(r"[a-zA-Z0-9_.:-]+")
_CLIENT_LEFT = 499  # before an answer began


class AccessLog:
    """See the module."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._is_json = gateway.settings.log.access == "json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if not logger.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status, answered_at = 0, 0.0

        async def send_and_note(message: Message) -> None:
            nonlocal status, answered_at
            if message["type"] == "http.response.start":
                status, answered_at = message["status"], time.perf_counter()
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            ended_at = time.perf_counter()
            begin_ms = (answered_at - started_at) * 1e3 if answered_at else None
            self._write(scope, status or _CLIENT_LEFT, begin_ms, (ended_at - started_at) * 1e3)

    def _write(self, scope: Scope, status: int, begin_ms: float | None, total_ms: float) -> None:
        caller: Caller = scope[CALLER]
        client = scope.get("client")
        fields: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": caller.request_id,
            "trace_id": caller.trace_id,
            "key": caller.key_name,
            "client": client[0] if client else None,
            "method": scope["method"],
            # As it came: still escaped, without the query, which may hold what is nobody's business.
            "path": scope["raw_path"].decode("ascii", "backslashreplace"),
            "status": status,
            "first_byte_ms": None if begin_ms is None else round(begin_ms, 3),
            "duration_ms": round(total_ms, 3),
            "prompt_tokens": caller.num_prompt_tokens,
            "output_tokens": caller.num_output_tokens,
        }
        if caller.prompts:
            fields["prompts"] = caller.prompts
        logger.info(_encode(fields).decode() if self._is_json else _text(fields))


def _text(fields: dict[str, Any]) -> str:
    line = (
        f"{fields['time']} {fields['method']} {fields['path']} {fields['status']} {fields['duration_ms']:.1f} ms "
        f"request_id={_word(fields['request_id'])} client={fields['client']} first_byte_ms={fields['first_byte_ms']} "
        f"prompt_tokens={fields['prompt_tokens']} output_tokens={fields['output_tokens']}"
    )
    if fields["key"] is not None:
        line += f" key={_word(fields['key'])}"
    return line + f" prompts={_encode(fields['prompts']).decode()}" if "prompts" in fields else line


def _word(text: str) -> str:
    """As it is if it is a plain word, else as JSON."""
    return text if _WORD.fullmatch(text) else _encode(text).decode()


def configure_access_log(settings: LogSettings) -> None:
    """Let the access log write to standard error, one bare line a request."""
    logger.setLevel(logging.WARNING if settings.access == "off" else logging.INFO)
    if settings.access != "off" and not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
