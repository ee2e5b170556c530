"""`chat --url` and `run --url`: a server answers, ours or any other with OpenAI's API.

Nothing of an engine is imported, nor what only errors need: the prompt is there in a fraction of a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from sagellm.cli.conversation import Messages, converse, report_error, report_stop, without_oldest_turn
from sagellm.cli.server_client import ServerClient, error_of, make_error
from sagellm.cli.session import metrics_line, read_question, show_text
from sagellm_core.command import print_quietly

if TYPE_CHECKING:
    from sagellm.cli.options import RemoteFlags, SamplingFlags
    from sagellm_core.options import EngineFlags
    from sagellm_protocol import SageLLMError


class Piece(NamedTuple):
    """A part of an answer, or of the reasoning in front of it, which is no part of the conversation."""

    text: str
    is_reasoning: bool = False


@dataclass
class Figures:
    """What the line under an answer says, as far as it is known; times on a monotonic clock, in seconds."""

    started_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float = field(default_factory=time.monotonic)
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0

    def line(self) -> str:
        """The quiet line under the answer."""
        first_at = self.first_at or self.last_at
        ttft_s, decode_s = first_at - self.started_at, self.last_at - first_at
        tpot_s = decode_s / (self.num_output - 1) if self.num_output > 1 else 0.0
        return metrics_line(self.num_prompt, self.num_output, self.num_cached, ttft_s * 1e3, tpot_s * 1e3)


class RemoteModel:
    """One model of a server. Raises `SageLLMError`, see `ServerClient`."""

    def __init__(self, url: str, api_key: str | None, name: str | None) -> None:
        self._client = ServerClient(url, api_key=api_key)
        self.url = self._client.url
        self.name = name or self._first_name()

    def _first_name(self) -> str:
        models = self._client.get("/v1/models").get("data") or []
        if not models:
            raise make_error("not_found", f"{self.url} has no model ready; name one with --model")
        return str(models[0]["id"])

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer, as the API gives it."""
        return self._client.post(path, {"model": self.name, **body})

    def stream(self, path: str, body: dict[str, Any], figures: Figures) -> Iterator[Piece]:
        """An answer as it comes. Closing it ends the request; `figures` are complete at the end."""
        body = {"model": self.name, **body, "stream": True, "stream_options": {"include_usage": True}}
        with closing(self._client.stream(path, body)) as chunks:
            for chunk in chunks:
                for piece in _read_chunk(chunk, figures):
                    figures.last_at = time.monotonic()
                    figures.first_at = figures.first_at or figures.last_at
                    yield piece


def _read_chunk(chunk: dict[str, Any], figures: Figures) -> Iterator[Piece]:
    """The text of a streamed chunk; what it says of tokens goes into `figures`."""
    if chunk.get("error"):
        raise error_of(chunk["error"])
    usage = chunk.get("usage")
    if usage:
        figures.num_prompt, figures.num_output = usage["prompt_tokens"], usage["completion_tokens"]
        figures.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk.get("choices") or []:
        if choice.get("index", 0) == 0:
            delta = choice.get("delta") or {}
            if reasoning := delta.get("reasoning_content"):
                yield Piece(str(reasoning), is_reasoning=True)
            if text := delta.get("content") or choice.get("text"):
                yield Piece(str(text))


# ---- the commands -------------------------------------------------------------------------------------


def chat_with_server(remote: RemoteFlags, engine: EngineFlags, sampling: SamplingFlags, *, system: str | None) -> None:
    """Read, answer, repeat; see `sage-llm chat --help`."""
    model = _open(remote, engine)
    body = sampling.body()
    converse(f"{model.name} at {model.url}", lambda messages: _answer_until_interrupt(model, messages, body), system)


def _answer_until_interrupt(model: RemoteModel, messages: Messages, body: dict[str, Any]) -> str:
    """Print one answer and return what was said of it: until its end, an error or Ctrl-C."""
    said: list[str] = []
    figures = Figures()
    try:
        for text in _shown(model.stream("/v1/chat/completions", {**body, "messages": messages}, figures)):
            said.append(text)
        print_quietly(figures.line())
    except KeyboardInterrupt:
        report_stop()
    except Exception as error:
        from sagellm_protocol import SageLLMError

        if not isinstance(error, SageLLMError):
            raise
        shorter = without_oldest_turn(messages) if not said and _is_too_long(error) else None
        if shorter is not None:
            return _answer_until_interrupt(model, shorter, body)
        report_error(error.code, error.message)
    return "".join(said)


def _shown(pieces: Iterator[Piece]) -> Iterator[str]:
    """Print the pieces and the line's end as they come; yields those of the answer."""
    was_reasoning = False
    for text, is_reasoning in pieces:
        if is_reasoning:
            typer.secho(text, nl=False, dim=True)
        else:
            show_text("\n\n" + text.lstrip("\n") if was_reasoning else text)
            yield text
        was_reasoning = is_reasoning
    print(flush=True)


def _is_too_long(error: SageLLMError) -> bool:
    """Whether a conversation was refused for its length; there is no code for it that all servers share."""
    return error.code == "invalid_argument" and any(word in error.message for word in ("max_model_len", "context"))


def run_on_server(
    prompt: str | None,
    remote: RemoteFlags,
    engine: EngineFlags,
    sampling: SamplingFlags,
    *,
    raw: bool,
    system: str | None,
    as_json: bool,
) -> None:
    """One prompt, one answer of a server; see `sage-llm run --help`."""
    text, messages = read_question(prompt, raw=raw, system=system)
    model = _open(remote, engine)
    path = "/v1/completions" if raw else "/v1/chat/completions"
    body = {**sampling.body(), **({"prompt": text} if raw else {"messages": messages})}
    if as_json:
        print(json.dumps(model.complete(path, body), ensure_ascii=False, indent=2))
        return
    figures = Figures()
    for _ in _shown(model.stream(path, body, figures)):
        pass
    print_quietly(figures.line())


def _open(remote: RemoteFlags, engine: EngineFlags) -> RemoteModel:
    assert remote.url is not None
    given = ["backend"] if engine.backend is not None else list(engine.options())
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise make_error("invalid_argument", f"{flag} is for an engine of this process, not for the server of --url")
    return RemoteModel(remote.url, remote.api_key, engine.model)
