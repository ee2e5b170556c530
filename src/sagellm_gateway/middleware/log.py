"""The access log: one line a call, when it is over, to standard error.

A line says when, who, what, how it ended, how long it took and how many tokens it used; never what was said, unless
`log.prompts` is set. Values that a client chose are escaped, so that nobody writes lines of their own.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TextIO

from starlette.types import Scope

from sagellm_gateway.context import Caller
from sagellm_gateway.dates import utc_now
from sagellm_gateway.writing import encode

_WORD = re.compile(r"[a-zA-Z0-9_.:-]+")

# Lines go out together, as writing is what costs most; none waits longer, and no more wait than this.
_PATIENCE_S = 0.05
_MAX_WAITING = 1000


class AccessLog:
    """Writes lines to `stream`, once it has one."""

    def __init__(self, *, is_json: bool) -> None:
        self.stream: TextIO | None = None
        self._line = _json if is_json else _text
        self._lines: list[str] = []

    def write(self, scope: Scope, caller: Caller, seconds: float) -> None:
        """Write the line of a call that is over and took so long."""
        if self.stream is None:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(_PATIENCE_S, self.flush)
        self._lines.append(self._line(scope, caller, seconds))
        if len(self._lines) >= _MAX_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        lines, self._lines = self._lines, []
        if lines and self.stream is not None:
            self.stream.write("".join(lines))
            self.stream.flush()


def _text(scope: Scope, caller: Caller, seconds: float) -> str:
    begin_ms = _begin_ms(caller)
    begin = "None" if begin_ms is None else f"{begin_ms:.3f}"
    line = (
        f"{utc_now(3)}+00:00 {scope['method']} {_path(scope)} {caller.status} {seconds * 1e3:.1f} ms "
        f"request_id={_word(caller.request_id)} client={_client(scope)} first_byte_ms={begin} "
        f"prompt_tokens={caller.num_prompt_tokens} output_tokens={caller.num_output_tokens}"
    )
    if caller.key_name is not None:
        line += f" key={_word(caller.key_name)}"
    if caller.prompts:
        line += f" prompts={encode(caller.prompts).decode()}"
    return f"{line}\n"


def _json(scope: Scope, caller: Caller, seconds: float) -> str:
    begin_ms = _begin_ms(caller)
    fields: dict[str, Any] = {
        "time": f"{utc_now(3)}+00:00",
        "request_id": caller.request_id,
        "trace_id": caller.trace_id,
        "key": caller.key_name,
        "client": _client(scope),
        "method": scope["method"],
        "path": _path(scope),
        "status": caller.status,
        "first_byte_ms": None if begin_ms is None else round(begin_ms, 3),
        "duration_ms": round(seconds * 1e3, 3),
        "prompt_tokens": caller.num_prompt_tokens,
        "output_tokens": caller.num_output_tokens,
    }
    if caller.prompts:
        fields["prompts"] = caller.prompts
    return f"{encode(fields).decode()}\n"


def _path(scope: Scope) -> str:
    """As it came: still escaped, without the query, which may hold what is nobody's business."""
    path: bytes = scope["raw_path"]
    return path.decode("ascii", "backslashreplace")


def _begin_ms(caller: Caller) -> float | None:
    return None if caller.answered_at is None else (caller.answered_at - caller.started_at) * 1e3


def _client(scope: Scope) -> str | None:
    client = scope.get("client")
    return client[0] if client else None


def _word(text: str) -> str:
    """As it is if it is a plain word, else as JSON."""
    return text if _WORD.fullmatch(text) else encode(text).decode()
