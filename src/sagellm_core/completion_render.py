"""The forms of `/v1/completions`: whole answers as a body, events as server-sent messages.

Bytes are made without a model object a token: a stream's chunks differ in little, so what they share is encoded once.
The texts of a stream's chunks, joined by index, are the texts of the whole answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sagellm_core.version import __version__
from sagellm_protocol import (
    CompletionOutput,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    TokenLogprob,
    new_request_id,
)

_encode = msgspec.json.Encoder().encode


def completion_body(model: str, responses: Sequence[Response], prompts: Sequence[str] | None = None) -> bytes:
    """The answer to a completion request: one response a prompt. With `prompts` each text begins with its prompt."""
    choices: list[dict[str, Any]] = []
    for number, response in enumerate(responses):
        for output in response.outputs:
            prompt = None if prompts is None else prompts[number]
            choices.append(_choice(output, response.prompt_logprobs, index=len(choices), prompt=prompt))
    return _encode({**_head(model), "choices": choices, "usage": _total_usage(responses)})


def tail_with_usage(num_prompt_tokens: int, num_output_tokens: int) -> bytes:
    """What follows the choices of a chunk that tells the usage so far."""
    num_total = num_prompt_tokens + num_output_tokens
    return b'],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}' % (
        num_prompt_tokens,
        num_output_tokens,
        num_total,
    )


class CompletionWriter:
    """The messages of one streamed answer.

    With `include_usage` every message has a `usage`, and one without choices at the end has the figures. The others'
    is null, or what was told last by `tell_usage`.
    """

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._head = _encode(_head(model))[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"

    def tell_usage(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Say in the next messages how many tokens there are so far."""
        self._tail = tail_with_usage(num_prompt_tokens, num_output_tokens)

    def delta(self, event: StreamEventDelta, *, index: int, offset: int) -> bytes:
        """A piece of a text; `offset` counts the characters of the text before it, for the logprobs."""
        logprobs = b"null" if event.logprobs is None else _encode(_logprobs(event.logprobs, offset=offset))
        text = _encode(event.chunk)
        choice = b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":null}' % (index, text, logprobs)
        return self._head + choice + self._tail

    def echo(self, prompt: str, *, indices: Sequence[int]) -> bytes:
        """The message that begins the texts of a prompt with the prompt itself."""
        return self._message([_text_choice(index, prompt) for index in indices])

    def end(self, event: StreamEventEnd, *, first_index: int) -> bytes:
        """The message that says why the texts of one prompt ended."""
        return self._message([{**_text_choice(first_index + o.index, ""), **_reasons(o)} for o in event.outputs])

    def usage(self, ends: Sequence[StreamEventEnd]) -> bytes:
        """The last message of a stream with `include_usage`."""
        return self._head + b'],"usage":' + _encode(_total_usage(ends)) + b"}"

    def _message(self, choices: list[dict[str, Any]]) -> bytes:
        return self._head + _encode(choices)[1:-1] + self._tail


def _head(model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{new_request_id().removeprefix('req-')}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"sagellm-{__version__}",
    }


def _choice(
    output: CompletionOutput,
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
    *,
    index: int,
    prompt: str | None,
) -> dict[str, Any]:
    choice = _text_choice(index, (prompt or "") + output.text)
    if output.logprobs is not None and prompt is None:
        choice["logprobs"] = _logprobs(output.logprobs)
    elif output.logprobs is not None:
        # The first token of a prompt follows nothing, so it has no logprob: a prompt of one token has none at all.
        rows = [*(prompt_logprobs or [None]), *output.logprobs]
        choice["logprobs"] = _logprobs(rows, first_token=_first_token(prompt or "", prompt_logprobs or ()))
    return {**choice, **_reasons(output)}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _reasons(output: CompletionOutput) -> dict[str, Any]:
    reasons: dict[str, Any] = {"finish_reason": output.finish_reason.value}
    if output.stop_reason is not None:
        reasons["stop_reason"] = output.stop_reason
    return reasons


def _total_usage(answers: Sequence[Response | StreamEventEnd]) -> dict[str, Any]:
    usages = [answer.usage for answer in answers]
    num_prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    num_output_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def _logprobs(rows: Sequence[TokenLogprob | None], *, first_token: str = "", offset: int = 0) -> dict[str, Any]:
    """Logprobs in the API's parallel lists; a row of None is an echoed prompt's first token, which has the text given.

    `offset` counts the characters of the text before the first row.
    """
    tokens = [first_token if row is None else row.token or "" for row in rows]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if row is None else row.logprob for row in rows],
        "top_logprobs": [
            None if row is None else {entry.token or str(entry.token_id): entry.logprob for entry in row.top}
            for row in rows
        ],
        "text_offset": offsets,
    }


def _first_token(prompt: str, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
    """The text of the prompt's first token: what the others leave of it."""
    num_known = sum(len(row.token or "") for row in prompt_logprobs if row is not None)
    return prompt[: max(0, len(prompt) - num_known)]
