"""A session: a conversation that the gateway keeps, so that a client sends only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field, model_validator

from sagellm_protocol import EdgeModel, InvalidArgumentError

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


class SessionSettings(EdgeModel):
    """Where sessions are kept, how long, and how much of them."""

    store: Literal["memory", "file", "redis"] = Field(
        default="memory",
        description="memory: gone with the process; file: one SQLite database; redis: for many gateways.",
    )
    path: Path = Field(default=Path("~/.sage-llm/sessions.sqlite"), description="The database of the store `file`.")
    url: str | None = Field(default=None, max_length=2048, description="Of the store `redis`: redis://host:6379/0.")
    expire_after_s: float = Field(
        default=30 * 86_400, gt=0, le=3650 * 86_400, description="How long a session stays after its last change."
    )
    max_sessions: int = Field(default=1000, ge=1, le=2**31, description="Of each key.")
    max_messages: int = Field(default=1000, ge=2, le=4000, description="Of a session.")
    max_bytes: int = Field(default=2**20, ge=1024, le=2**26, description="Of a session's messages as JSON.")
    max_memory_bytes: int = Field(default=2**28, ge=1024, description="Of all sessions together in the store `memory`.")

    @model_validator(mode="after")
    def _check_url(self) -> SessionSettings:
        if (self.store == "redis") != (self.url is not None):
            raise InvalidArgumentError("url belongs to the store redis; give both or neither", field="url")
        return self


@dataclass(frozen=True, slots=True)
class SessionHead:
    """What a list shows of a session. Times are seconds since 1970."""

    id: str
    title: str  # empty until there is a first message of the user
    model: str | None  # the model that its requests go to, where they name none
    created_at: float
    updated_at: float
    num_messages: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """A session with its messages, a list of objects as JSON."""

    head: SessionHead
    body: bytes = b"[]"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages as plain values."""
        return _decode(self.body)

    def with_messages(self, messages: Sequence[dict[str, Any]]) -> Session:
        """The session with these messages instead."""
        body = _encode(messages)
        return Session(replace(self.head, num_messages=len(messages), num_bytes=len(body)), body)

    def changed(self, **fields: Any) -> Session:
        """The session with other values in its head."""
        return Session(replace(self.head, **fields), self.body)
