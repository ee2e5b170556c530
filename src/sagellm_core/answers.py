"""`/v1/completions` for every HTTP face, over anything that executes and streams the protocol's requests.

Holds `Answers` (requests on their way to an engine, counted for `/metrics`) and the rendering of completion bodies.
What a request may ask for but no engine does yet is refused here: nothing a client sends is silently ignored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from operator import attrgetter

from sagellm_core.completion_render import CompletionWriter, completion_body
from sagellm_core.http import DONE
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnsupportedError,
    Usage,
)
from sagellm_protocol.openai import CompletionRequest

# Told of a request, of how it ended, and how many seconds passed before an engine had it.
Observer = Callable[[Request, Response | StreamEventEnd, float], None]

_NOT_BUILT = {
    "lora": "LoRA adapters are not supported",
    "session_id": "sessions are not supported: send the whole conversation",
    "phase": "prefill-decode hand-over is not supported",
    "kv_transfer": "KV transfer is not supported",
}
_unbuilt_of = attrgetter(*_NOT_BUILT)
_NOTHING_UNBUILT = (None,) * len(_NOT_BUILT)


class Answers:
    """Executes and streams requests and tells each one that ends to its observers.

    `execute` and `stream` are those of an engine, or of a control plane with its engines. A request whose caller gave
    it up ends with the finish reason `abort` and what is known of its tokens. One that is refused is told to nobody.
    """

    def __init__(
        self,
        execute: Callable[[Request], Awaitable[Response]],
        stream: Callable[[Request], AsyncGenerator[StreamEvent, None]],
        *observers: Observer,
    ) -> None:
        self._execute = execute
        self._stream = stream
        self._observers = observers

    async def execute(self, request: Request) -> Response:
        """The response, also one that carries an error; raises for a request that is wrong or asks too much."""
        _refuse_unbuilt(request)
        started_at = time.monotonic()
        try:
            response = await self._execute(request)
        except asyncio.CancelledError:
            self._tell(request, _given_up(request), 0.0)
            raise
        timestamps = response.metrics.timestamps
        duration = timestamps.duration_s if timestamps is not None else None
        self._tell(request, response, 0.0 if duration is None else time.monotonic() - started_at - duration)
        return response

    async def execute_all(self, requests: Sequence[Request]) -> list[Response]:
        """The responses in order, computed together; the first error is raised and ends the others."""
        tasks = [asyncio.ensure_future(self.execute(request)) for request in requests]
        try:
            responses = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [response.raise_for_error() for response in responses]

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """The events of the answer; closing the generator aborts the request."""
        _refuse_unbuilt(request)
        started_at, waited_s = time.monotonic(), 0.0
        start: StreamEventStart | None = None
        end: StreamEventEnd | None = None
        num_output_tokens = 0
        try:
            async with aclosing(self._stream(request)) as events:
                async for event in events:
                    if isinstance(event, StreamEventDelta):
                        num_output_tokens += len(event.chunk_tokens)
                    elif isinstance(event, StreamEventEnd):
                        end = event
                        self._tell(request, end, waited_s)
                    else:
                        start, waited_s = event, time.monotonic() - started_at
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            if end is None:
                self._tell(request, _given_up(request, start, num_output_tokens), waited_s)
            raise

    def _tell(self, request: Request, answer: Response | StreamEventEnd, waited_s: float) -> None:
        for observe in self._observers:
            observe(request, answer, max(0.0, waited_s))


def _given_up(request: Request, start: StreamEventStart | None = None, num_output_tokens: int = 0) -> StreamEventEnd:
    num_prompt_tokens = 0 if start is None else start.prompt_tokens
    return StreamEventEnd(
        request_id=request.request_id,
        trace_id=request.trace_id,
        engine_id="" if start is None else start.engine_id,
        finish_reason=FinishReason.ABORT,
        usage=Usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_output_tokens),
    )


def _refuse_unbuilt(request: Request) -> None:
    asked = _unbuilt_of(request)
    if asked == _NOTHING_UNBUILT:
        return
    for (field, problem), value in zip(_NOT_BUILT.items(), asked, strict=True):
        if value is not None:
            raise UnsupportedError(f"{problem}; leave {field} out", field=field)


# ---- /v1/completions ----------------------------------------------------------------------------------


async def read_prompts(call: CompletionRequest, decode: Callable[[list[int]], Awaitable[str]]) -> list[str] | None:
    """The texts to put in front of the answers if the body says `echo`; `decode` reads prompts of token ids."""
    if not call.echo:
        return None
    return [prompt if isinstance(prompt, str) else await decode(prompt) for prompt in call.prompts]


async def answer_completion(
    answers: Answers, call: CompletionRequest, requests: Sequence[Request], prompts: Sequence[str] | None
) -> bytes:
    """The whole answer to a completion body whose `requests` these are; `prompts` are those to echo."""
    return completion_body(call.model, await answers.execute_all(requests), prompts)


async def stream_completion(
    answers: Answers, call: CompletionRequest, requests: Sequence[Request], prompts: Sequence[str] | None
) -> AsyncGenerator[bytes, None]:
    """The messages of a streamed answer; several prompts are answered one after the other."""
    if prompts is not None and call.logprobs is not None:
        raise InvalidArgumentError("echo with logprobs cannot be streamed; set stream to false", field="echo")
    include_usage = call.stream_options is not None and call.stream_options.include_usage
    writer, num_choices = CompletionWriter(call.model, include_usage=include_usage), call.n or 1
    counts_usage = call.stream_options is not None and call.stream_options.counts_usage
    num_prompt_tokens = num_output_tokens = 0
    ends: list[StreamEventEnd] = []
    for number, request in enumerate(requests):
        first_index = number * num_choices
        lengths = [0] * num_choices
        async with aclosing(answers.stream(request)) as events:
            async for event in events:
                if counts_usage:
                    if isinstance(event, StreamEventDelta):
                        num_output_tokens += len(event.chunk_tokens)
                    elif isinstance(event, StreamEventStart):
                        num_prompt_tokens += event.prompt_tokens
                    writer.tell_usage(num_prompt_tokens, num_output_tokens)
                if isinstance(event, StreamEventDelta):
                    yield writer.delta(event, index=first_index + event.index, offset=lengths[event.index])
                    lengths[event.index] += len(event.chunk)
                elif isinstance(event, StreamEventEnd):
                    ends.append(event)
                elif prompts is not None:
                    yield writer.echo(prompts[number], indices=range(first_index, first_index + num_choices))
        yield writer.end(_without_error(ends[-1]), first_index=first_index)
    if include_usage:
        yield writer.usage(ends)
    yield DONE


def _without_error(end: StreamEventEnd) -> StreamEventEnd:
    """The end of a stream, or the error it carries as an exception."""
    if end.error is not None:
        raise end.error.to_exception()
    return end
