"""`/v1/completions` for every HTTP face, over anything that executes and streams the protocol's requests.

Holds `Answers` (requests on their way to an engine, counted for `/metrics`) and the rendering of completion bodies.
What a request may ask for but no engine does yet is refused here: nothing a client sends is silently ignored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from sagellm_core.engine_metrics import EngineCollector
from sagellm_core.http import DONE
from sagellm_protocol import (
    InvalidArgumentError,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    UnsupportedError,
    new_request_id,
)
from sagellm_protocol.openai import Completion, CompletionRequest
from sagellm_protocol.openai.render import (
    AnswerHead,
    completion,
    completion_chunk,
    completion_echo,
    completion_end,
    completion_usage,
    to_json,
)

_NOT_BUILT = {
    "tools": "tools are not supported: answers are not searched for tool calls",
    "lora": "LoRA adapters are not supported",
    "session_id": "sessions are not supported: send the whole conversation",
    "phase": "prefill-decode hand-over is not supported",
    "kv_transfer": "KV transfer is not supported",
}


class Answers:
    """Executes and streams requests and counts each one that ends.

    `execute` and `stream` are those of an engine, or of a control plane with its engines.
    """

    def __init__(
        self,
        execute: Callable[[Request], Awaitable[Response]],
        stream: Callable[[Request], AsyncGenerator[StreamEvent, None]],
        collector: EngineCollector,
    ) -> None:
        self._execute = execute
        self._stream = stream
        self._collector = collector

    async def execute(self, request: Request) -> Response:
        """The response, also one that carries an error; raises for a request that is wrong or asks too much."""
        _refuse_unbuilt(request)
        response = await self._execute(request)
        self._collector.observe(response)
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
        async with aclosing(self._stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamEventEnd):
                    self._collector.observe(event)
                yield event


def _refuse_unbuilt(request: Request) -> None:
    for field, problem in _NOT_BUILT.items():
        if getattr(request, field) is not None:
            raise UnsupportedError(f"{problem}; leave {field} out", field=field)


def new_head(prefix: str, model: str) -> AnswerHead:
    """The head of a new answer; its id begins with `prefix`."""
    return AnswerHead(f"{prefix}-{new_request_id().removeprefix('req-')}", int(time.time()), model)


# ---- /v1/completions ----------------------------------------------------------------------------------


def read_prompts(call: CompletionRequest, decode: Callable[[list[int]], str] | None = None) -> list[str] | None:
    """The texts to put in front of the answers if the body says `echo`; prompts of token ids need `decode`."""
    if not call.echo:
        return None
    texts = []
    for prompt in call.prompts:
        if isinstance(prompt, str):
            texts.append(prompt)
        elif decode is not None:
            texts.append(decode(prompt))
        else:
            raise InvalidArgumentError("echo needs the prompt as text here; send text or leave echo out", field="echo")
    return texts


async def answer_completion(answers: Answers, call: CompletionRequest, prompts: Sequence[str] | None) -> Completion:
    """The whole answer to a completion body; `prompts` are those to echo."""
    responses = await answers.execute_all(call.to_requests())
    return completion(new_head("cmpl", call.model), responses, prompts=prompts)


async def stream_completion(
    answers: Answers, call: CompletionRequest, prompts: Sequence[str] | None
) -> AsyncGenerator[bytes, None]:
    """The messages of a streamed answer; several prompts are answered one after the other."""
    if prompts is not None and call.logprobs is not None:
        raise InvalidArgumentError("echo with logprobs cannot be streamed; set stream to false", field="echo")
    head, num_choices = new_head("cmpl", call.model), call.n or 1
    ends: list[StreamEventEnd] = []
    for number, request in enumerate(call.to_requests()):
        first_index = number * num_choices
        lengths = [0] * num_choices
        async with aclosing(answers.stream(request)) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    index, offset = first_index + event.index, lengths[event.index]
                    yield to_json(completion_chunk(head, event, index=index, offset=offset))
                    lengths[event.index] += len(event.chunk)
                elif isinstance(event, StreamEventEnd):
                    ends.append(event)
                elif prompts is not None:
                    indices = range(first_index, first_index + num_choices)
                    yield to_json(completion_echo(head, prompts[number], indices=indices))
        yield to_json(completion_end(head, _without_error(ends[-1]), first_index=first_index))
    if call.stream_options is not None and call.stream_options.include_usage:
        yield to_json(completion_usage(head, ends))
    yield DONE


def _without_error(end: StreamEventEnd) -> StreamEventEnd:
    """The end of a stream, or the error it carries as an exception."""
    if end.error is not None:
        raise end.error.to_exception()
    return end
