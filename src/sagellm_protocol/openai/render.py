"""From the protocol's answers to the OpenAI API's: whole answers and the messages of streams.

Pure functions between protocol types, shared by the engine server and the gateway. Every message of one answer has the
same `AnswerHead`. The texts of a stream's chunks, joined by index, are the texts of the whole answer; an error in
mid-stream is the caller's to frame.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sagellm_protocol.openai.common import CompletionUsage
from sagellm_protocol.openai.completions import Completion, CompletionChoice, CompletionLogprobs
from sagellm_protocol.response import CompletionOutput, Response, TokenLogprob, Usage
from sagellm_protocol.stream import StreamEventDelta, StreamEventEnd


@dataclass(frozen=True)
class AnswerHead:
    """What every message of one answer says of itself; `created` is in seconds since 1970."""

    id: str
    created: int
    model: str

    def fields(self) -> dict[str, Any]:
        """The head as fields of a message."""
        return {"id": self.id, "created": self.created, "model": self.model}


def to_body(message: Completion) -> dict[str, Any]:
    """The message as JSON values, without the fields that have no value.

    Two are kept as null because clients test them: a choice's `finish_reason` and an answer's `content`.
    """
    body = message.model_dump(mode="json", exclude_none=True)
    for choice in body["choices"]:
        choice.setdefault("finish_reason", None)
        if "message" in choice:
            choice["message"].setdefault("content", None)
    return body


def to_json(message: Completion) -> bytes:
    """`to_body` as one line of JSON, as a stream sends it."""
    return json.dumps(to_body(message), ensure_ascii=False, separators=(",", ":")).encode()


def total_usage(answers: Sequence[Response | StreamEventEnd]) -> CompletionUsage:
    """The tokens of several answers together."""
    usages = [answer.usage for answer in answers]
    return CompletionUsage.of(
        Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        )
    )


# ---- /v1/completions ----------------------------------------------------------------------------------


def completion(head: AnswerHead, responses: Sequence[Response], *, prompts: Sequence[str] | None = None) -> Completion:
    """The answer to a completion request: one response a prompt. With `prompts` each text begins with its prompt."""
    choices: list[CompletionChoice] = []
    for number, response in enumerate(responses):
        for output in response.outputs:
            prompt = None if prompts is None else prompts[number]
            choices.append(_completion_choice(output, response.prompt_logprobs, index=len(choices), prompt=prompt))
    return Completion(choices=choices, usage=total_usage(responses), **head.fields())


def _completion_choice(
    output: CompletionOutput,
    prompt_logprobs: Sequence[TokenLogprob | None] | None,
    *,
    index: int,
    prompt: str | None,
) -> CompletionChoice:
    logprobs = None
    if output.logprobs is not None and prompt is None:
        logprobs = completion_logprobs(output.logprobs)
    elif output.logprobs is not None:
        # The first token of a prompt follows nothing, so it has no logprob: a prompt of one token has none at all.
        rows = [*(prompt_logprobs or [None]), *output.logprobs]
        logprobs = completion_logprobs(rows, first_token=_first_token(prompt or "", prompt_logprobs or ()))
    return CompletionChoice(
        index=index,
        text=(prompt or "") + output.text,
        logprobs=logprobs,
        finish_reason=output.finish_reason.value,
        stop_reason=output.stop_reason,
    )


def completion_chunk(head: AnswerHead, event: StreamEventDelta, *, index: int, offset: int) -> Completion:
    """A streamed piece of a text; `offset` counts the characters of the text before it, for the logprobs."""
    logprobs = None if event.logprobs is None else completion_logprobs(event.logprobs, offset=offset)
    return Completion(choices=[CompletionChoice(index=index, text=event.chunk, logprobs=logprobs)], **head.fields())


def completion_echo(head: AnswerHead, prompt: str, *, indices: Sequence[int]) -> Completion:
    """The chunk that begins the streamed texts of a prompt with the prompt itself."""
    return Completion(choices=[CompletionChoice(index=index, text=prompt) for index in indices], **head.fields())


def completion_end(head: AnswerHead, event: StreamEventEnd, *, first_index: int) -> Completion:
    """The chunk that says why the texts of one prompt ended."""
    choices = [
        CompletionChoice(
            index=first_index + output.index, finish_reason=output.finish_reason.value, stop_reason=output.stop_reason
        )
        for output in event.outputs
    ]
    return Completion(choices=choices, **head.fields())


def completion_usage(head: AnswerHead, ends: Sequence[StreamEventEnd]) -> Completion:
    """The last chunk of a stream with `include_usage`."""
    return Completion(usage=total_usage(ends), **head.fields())


def completion_logprobs(
    rows: Sequence[TokenLogprob | None], *, first_token: str = "", offset: int = 0
) -> CompletionLogprobs:
    """Logprobs in the API's parallel lists; a row of None is an echoed prompt's first token, which has the text given.

    `offset` counts the characters of the text before the first row.
    """
    tokens = [first_token if row is None else row.token or "" for row in rows]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[None if row is None else row.logprob for row in rows],
        top_logprobs=[
            None if row is None else {entry.token or str(entry.token_id): entry.logprob for entry in row.top}
            for row in rows
        ],
        text_offset=offsets,
    )


def _first_token(prompt: str, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
    """The text of the prompt's first token: what the others leave of it."""
    num_known = sum(len(row.token or "") for row in prompt_logprobs if row is not None)
    return prompt[: max(0, len(prompt) - num_known)]
