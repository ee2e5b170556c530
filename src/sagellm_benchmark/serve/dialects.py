"""The two endpoints that are measured: bodies to send, and what their events say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from sagellm_benchmark.serve.prompts import LoadRequest
from sagellm_protocol import InvalidArgumentError

EndpointName = Literal["chat", "completions"]
PATHS: dict[EndpointName, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_MAX_EVENT_BYTES = 2**24
_NUM_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class Dialect:
    """How requests are put to one endpoint for one model; `extra` are further fields of every body."""

    endpoint: EndpointName
    model: str
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Of the endpoint."""
        return PATHS[self.endpoint]

    @property
    def takes_tokens(self) -> bool:
        """Whether prompts may be token ids."""
        return self.endpoint == "completions"

    def body(self, request: LoadRequest) -> bytes:
        """The body of a streamed request; raises `InvalidArgumentError` where the endpoint takes no such prompt."""
        fields: dict[str, Any] = {
            "model": self.model,
            **self._prompt(request),
            "max_tokens": request.output_len,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode({**fields, **self.extra})

    def _prompt(self, request: LoadRequest) -> dict[str, Any]:
        prompt = request.prompt
        is_conversation = isinstance(prompt, list) and isinstance(prompt[0], dict)
        if self.endpoint == "completions":
            if is_conversation:
                raise InvalidArgumentError("messages are for the endpoint chat; choose it", field="endpoint")
            return {"prompt": prompt}
        if is_conversation:
            return {"messages": prompt}
        if not isinstance(prompt, str):
            raise InvalidArgumentError("token ids are for the endpoint completions; choose it", field="endpoint")
        return {"messages": [{"role": "user", "content": prompt}]}


# ---- answers ------------------------------------------------------------------------------------------


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(
            self.text
            or (delta is not None and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls))
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Event(msgspec.Struct):
    """One message of a streamed answer."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None

    @property
    def has_text(self) -> bool:
        """Whether it brings a part of the answer."""
        return any(choice.has_text for choice in self.choices)


class EventReader:
    """Takes an answer's pieces and gives its events; `is_done` once the last has come."""

    def __init__(self) -> None:
        self.is_done = False
        self._rest = b""
        self._decoder = msgspec.json.Decoder(Event)

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes; raises `ValueError` for what is none."""
        self._rest += piece
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ValueError(f"an event is longer than {_MAX_EVENT_BYTES} bytes")
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.is_done = True
                else:
                    yield self._decoder.decode(data)


def error_of(body: bytes) -> tuple[str, str]:
    """Code and message of an error body; an empty code where it has none."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        value = body.decode(errors="replace")
    if isinstance(value, dict) and "error" in value:
        value = value["error"]
    if isinstance(value, dict):
        return str(value.get("code") or value.get("type") or ""), _short(str(value.get("message") or value))
    return "", _short(str(value))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _NUM_MESSAGE_CHARS else text[:_NUM_MESSAGE_CHARS] + "…"
