"""The way of a request through a running engine: holds `RequestRunner`.

One is made with each start of an `LLMEngine` and thrown away with its stop. It turns a request into the sequences that
the engine core runs, drives each through its decoding strategy, and joins what they say into one story.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sagellm_core.decoding import get_strategy
from sagellm_core.embedding import execute_embedding
from sagellm_core.engine_core.client import EngineCoreClient
from sagellm_core.engine_core.engine_core import as_protocol_error
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.input_processor import InputProcessor
from sagellm_core.models import ModelConfig
from sagellm_core.output_processor import OutputProcessor, combine_outputs
from sagellm_core.tokenizer import Tokenizer
from sagellm_protocol import (
    ChatMessage,
    InvalidArgumentError,
    NotFoundError,
    Request,
    Response,
    SageLLMError,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    TokenizeRequest,
)

if TYPE_CHECKING:
    from sagellm_core.structured import GrammarCompiler

logger = logging.getLogger(__name__)

_LONG_CHARS = 4096


class RequestRunner:
    """Runs requests over one engine core; serves any event loop."""

    def __init__(
        self,
        client: EngineCoreClient,
        input_processor: InputProcessor,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        engine_id: str,
    ) -> None:
        self._client = client
        self._input = input_processor
        self._tokenizer = tokenizer
        self._model_config = model_config
        self._engine_id = engine_id
        self._grammars: GrammarCompiler | None = None
        self._aborts: dict[str, Callable[[], None]] = {}

    def close(self) -> None:
        """Compile no more grammars; the requests end with the engine core."""
        if self._grammars is not None:
            self._grammars.close()

    async def execute(self, request: Request) -> Response:
        """The whole answer, or the vector that was asked for."""
        if request.embed is not None:
            return await self._embed(request)
        children = await self.prepare(request)
        processors = self._output_processors(request, children)
        async with aclosing(self._events(processors, children)) as events:
            async for _ in events:
                pass
        return combine_outputs([processor.response() for processor in processors])

    async def stream(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        """One start, deltas, exactly one end."""
        if request.embed is not None:
            raise InvalidArgumentError("embed makes a vector, which is no stream; use execute", field="embed")
        children = await self.prepare(request)
        async with aclosing(self._events(self._output_processors(request, children), children)) as events:
            async for event in events:
                yield event

    def abort(self, request_id: str) -> None:
        """End a request from outside; raises NotFoundError if it does not run."""
        abort = self._aborts.get(request_id)
        if abort is None:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        abort()

    async def prepare(self, request: Request) -> list[EngineCoreRequest]:
        """The sequences that the request asks for; raises the protocol's errors for what is wrong with it."""
        self._client.check_alive()
        arrival_time, wanted = time.monotonic(), request.structured_output
        grammar = None if wanted is None else await self._grammar_compiler().compile(wanted)
        process = partial(self._input.process, request, arrival_time=arrival_time, grammar=grammar)
        return await asyncio.to_thread(process) if _is_long(request) else process()

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a text or a conversation; long ones are read beside the event loop."""
        num_chars = len(request.prompt or "") + sum(map(_num_chars, request.messages or ()))
        if num_chars > _LONG_CHARS:
            return await asyncio.to_thread(self._input.tokenize, request)
        return self._input.tokenize(request)

    # ---- steps of a request ---------------------------------------------------------------------------

    async def _embed(self, request: Request) -> Response:
        """The response to a request for a vector."""
        core = (await self.prepare(request))[0]
        request_id = core.request_id
        if request_id in self._aborts:
            raise InvalidArgumentError(f"request_id {request_id!r} is already running; use a fresh id")
        self._aborts[request_id] = partial(self._client.abort, request_id)
        try:
            spec = self._model_config.pooling
            return await execute_embedding(
                self._client, request, core, spec, engine_id=self._engine_id, peak_mem_mb=peak_memory_mb
            )
        finally:
            del self._aborts[request_id]

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made for the first request that asks for a form, as is the import of the library behind it."""
        if self._grammars is None:
            from sagellm_core.structured import GrammarCompiler

            vocab_size = self._model_config.spec.vocab_size
            self._grammars = GrammarCompiler(self._tokenizer, vocab_size, self._input.eos_token_ids)
        return self._grammars

    def _output_processors(self, request: Request, children: Sequence[EngineCoreRequest]) -> list[OutputProcessor]:
        return [
            OutputProcessor(request, child, self._tokenizer, engine_id=self._engine_id, peak_mem_mb=peak_memory_mb)
            for child in children
        ]

    async def _events(
        self, processors: Sequence[OutputProcessor], children: Sequence[EngineCoreRequest]
    ) -> AsyncGenerator[StreamEvent, None]:
        """Run all sequences of a request at once: one start, their deltas as they come, one end for all."""
        request_id = processors[0].start().request_id
        events: asyncio.Queue[StreamEventDelta | StreamEventEnd] = asyncio.Queue()

        def abort() -> None:
            for processor in processors:
                for event in processor.abort():
                    events.put_nowait(event)

        if request_id in self._aborts:
            raise InvalidArgumentError(f"request_id {request_id!r} is already running; use a fresh id")
        self._aborts[request_id] = abort
        try:
            async with _background(self._pump(*pair, events) for pair in zip(processors, children, strict=True)):
                yield processors[0].start()
                while not events.empty() or not all(processor.finished for processor in processors):
                    event = await events.get()
                    if isinstance(event, StreamEventDelta):
                        yield event
        finally:
            del self._aborts[request_id]
        yield StreamEventEnd.of(combine_outputs([processor.response() for processor in processors]))

    async def _pump(
        self,
        processor: OutputProcessor,
        child: EngineCoreRequest,
        events: asyncio.Queue[StreamEventDelta | StreamEventEnd],
    ) -> None:
        """Drive one sequence through its decoding strategy; cancelling this aborts it in the core."""
        strategy = get_strategy(child.sampling.strategy)
        try:
            async with aclosing(strategy(self._client, child)) as outputs:
                async for output in outputs:
                    for event in processor.add(output):
                        events.put_nowait(event)
                    if processor.finished:
                        return
        except Exception as error:
            if not isinstance(error, SageLLMError):
                logger.exception("request %s failed", child.request_id)
            for event in processor.fail(as_protocol_error(error)):
                events.put_nowait(event)


@asynccontextmanager
async def _background(coroutines: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run coroutines beside the body; whatever still runs when it is left is cancelled and awaited."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def peak_memory_mb() -> float:
    """The process's peak resident memory in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _is_long(request: Request) -> bool:
    """Whether splitting the prompt into tokens takes so long that other requests would feel it: a millisecond."""
    if request.prompt_token_ids is not None:
        return False
    if request.messages is not None:
        return sum(map(_num_chars, request.messages)) > _LONG_CHARS
    return isinstance(request.prompt, str) and len(request.prompt) > _LONG_CHARS


def _num_chars(message: ChatMessage) -> int:
    return len(message.text) + sum(len(call.function.arguments) for call in message.tool_calls or ())
