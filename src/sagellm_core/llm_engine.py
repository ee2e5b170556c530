"""`LLMEngine`: one model on one device, text in and text out, asyncio in front of the step loop."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from sagellm_core.config import LLMEngineConfig
from sagellm_core.decoding import get_strategy
from sagellm_core.embedding import Inputs, embedding_requests, execute_all, execute_embedding
from sagellm_core.engine_core.client import EngineCoreClient
from sagellm_core.engine_core.engine_core import EngineCore, EngineStats, as_protocol_error
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.factory import build_executor
from sagellm_core.input_processor import InputProcessor
from sagellm_core.models import LoadProgress, ModelConfig, read_model_config, resolve_model
from sagellm_core.output_processor import OutputProcessor, combine_outputs
from sagellm_core.tokenizer import Tokenizer, load_tokenizer
from sagellm_protocol import (
    ChatMessage,
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    SageLLMError,
    SamplingParams,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StructuredOutput,
    TokenizeRequest,
    UnavailableError,
    new_request_id,
)

if TYPE_CHECKING:
    from sagellm_core.structured import GrammarCompiler

logger = logging.getLogger(__name__)

_LONG_CHARS = 4096
Prompt = str | Sequence[int]
Messages = Sequence[dict[str, Any]]


class LLMEngine:
    """Loads a model and answers requests; many at a time, each with the tokens it would get alone.

    >>> async with LLMEngine(LLMEngineConfig(model_path="builtin")) as engine:
    ...     response = await engine.generate("What is LLM inference?", max_tokens=64)

    `on_progress(done, total)` is told how far loading has come, from the engine's own thread.

    Bad arguments raise `InvalidArgumentError` before anything runs. A request that fails later ends with the
    finish reason `error` and the error in its response; other requests are not disturbed.
    """

    def __init__(self, config: LLMEngineConfig, *, on_progress: LoadProgress | None = None) -> None:
        self.config = config
        self._on_progress = on_progress
        self._given = config  # as the user wrote it; `config` is fitted to the model
        self.engine_id = config.engine_id or f"engine-{new_request_id().removeprefix('req-')[:8]}"
        self._life = asyncio.Lock()  # one start or stop at a time: a second start finds the engine running
        self._client: EngineCoreClient | None = None
        self._input: InputProcessor | None = None
        self._grammars: GrammarCompiler | None = None
        self._model_config: ModelConfig | None = None
        self._tokenizer: Tokenizer | None = None
        self._description: dict[str, object] = {}
        self._aborts: dict[str, Callable[[], None]] = {}

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find, read and load the model. Raises the protocol's errors; a failed start leaves nothing behind."""
        async with self._life:
            if self._client is None:
                await self._start()

    async def _start(self) -> None:
        path = await asyncio.to_thread(resolve_model, self._given.model_path, revision=self._given.revision)
        model_config = read_model_config(path)
        config = _fit_to_model(self._given, model_config)
        client = EngineCoreClient(
            lambda: EngineCore(config, build_executor(config, model_config, self._on_progress)), self.engine_id
        )
        try:
            _, tokenizer = await asyncio.gather(client.start(), _load_tokenizer(path))
            self._input = InputProcessor(
                tokenizer,
                model_config,
                defaults=config.sampling_defaults,
                default_max_tokens=config.max_new_tokens,
                max_model_len=config.max_model_len,
            )
            self._description = await client.describe()
        except BaseException:  # a cancelled start, too: the loop's thread must not outlive it
            await client.stop()
            raise
        self.config, self._model_config, self._tokenizer = config, model_config, tokenizer
        self._client = client

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and free the model."""
        async with self._life:
            client, self._client = self._client, None
            grammars, self._grammars = self._grammars, None
            if grammars is not None:
                grammars.close()
            if client is not None:
                await client.stop()

    async def __aenter__(self) -> LLMEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ---- requests -------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        sampling_params: SamplingParams | None = None,
        max_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        structured_output: StructuredOutput | None = None,
    ) -> Response:
        """Answer a text, token ids or chat messages; the whole answer at once."""
        request = _to_request(
            prompt,
            messages,
            sampling_params,
            max_tokens=max_tokens,
            request_id=request_id,
            priority=priority,
            structured_output=structured_output,
        )
        return await self.execute(request)

    async def execute(self, request: Request) -> Response:
        """Answer a protocol request; with `n` > 1 its choices run at the same time."""
        if request.embed is not None:
            return await self._embed(request)
        children = await self._prepare(request)
        processors = self._output_processors(request, children)
        async with aclosing(self._events(processors, children)) as events:
            async for _ in events:
                pass
        return combine_outputs([processor.response() for processor in processors])

    async def stream(
        self,
        prompt_or_request: Prompt | Request | None = None,
        *,
        messages: Messages | None = None,
        max_tokens: int | None = None,
        request_id: str | None = None,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        structured_output: StructuredOutput | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request."""
        if isinstance(prompt_or_request, Request):
            request = prompt_or_request
        else:
            request = _to_request(
                prompt_or_request,
                messages,
                sampling_params,
                max_tokens=max_tokens,
                request_id=request_id,
                priority=priority,
                structured_output=structured_output,
                stream=True,
            )
        if request.embed is not None:
            raise InvalidArgumentError("embed makes a vector, which is no stream; use execute", field="embed")
        children = await self._prepare(request)
        async with aclosing(self._events(self._output_processors(request, children), children)) as events:
            async for event in events:
                yield event

    async def embed(self, inputs: Inputs, *, dimensions: int | None = None) -> list[list[float]]:
        """A vector for each text, or list of token ids; `dimensions` cuts them, as for models trained so (Matryoshka).

        Cosines and, where the model normalises them (as by default), dot products say how alike texts are.
        """
        requests = embedding_requests(inputs, dimensions=dimensions)
        responses = await execute_all(self.execute, requests, at_once=self.config.max_batch_size)
        return [response.embedding or [] for response in responses]

    def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets the finish reason `abort`. Call it from that reader's event loop."""
        abort = self._aborts.get(request_id)
        if abort is None:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        abort()

    # ---- information ----------------------------------------------------------------------------------

    async def health_check(self) -> bool:
        """Whether the step loop runs and answers."""
        if self._client is None:
            return False
        try:
            await self._client.stats()
        except UnavailableError:
            return False
        return True

    async def stats(self) -> EngineStats:
        """Running and waiting requests, KV usage and counters at this moment."""
        return await self._running_client().stats()

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return await self._running_client().reset_prefix_cache()

    def get_info(self) -> dict[str, Any]:
        """Model, device, dtypes, kernels and limits, as plain JSON values."""
        info: dict[str, Any] = {
            "engine_id": self.engine_id,
            "model": self.config.model_path,
            "running": self._client is not None,
            "max_model_len": self.config.max_model_len,
            "max_batch_size": self.config.max_batch_size,
        }
        if self._model_config is not None:
            info["architecture"] = self._model_config.architecture
            info["is_embedding"] = self._model_config.is_embedding
        return {**info, **self._description}

    async def describe_model(self) -> ModelDescription:
        """What the model is, once the engine has started."""
        config, info, spec = self.model_config, self._description, self.model_config.spec
        templates = self.tokenizer.chat_templates
        return ModelDescription(
            model=self.config.model_path,
            architecture=config.architecture,
            num_parameters=spec.num_parameters,
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            max_model_len=self.config.max_model_len,
            dtype=str(info["weight_dtype"]),
            quantization=self.config.quantization,
            device=str(info["device_name"]),
            weight_bytes=cast(int, info["weight_bytes"]),
            is_embedding=config.is_embedding,
            chat_template=templates.choose(with_tools=True).source if templates else None,
            special_tokens=dict(self.tokenizer.special_tokens),
        )

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a text or a conversation; long ones are read beside the event loop."""
        if self._input is None:
            raise UnavailableError("the engine is not running; call start() first")
        return await asyncio.to_thread(self._input.tokenize, request)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        return await asyncio.to_thread(self.tokenizer.decode, token_ids, skip_special_tokens)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        text_of = self.tokenizer.token_text
        return await asyncio.to_thread(lambda: [text_of(token_id) for token_id in token_ids])

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; there once the engine has started."""
        if self._tokenizer is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._tokenizer

    @property
    def model_config(self) -> ModelConfig:
        """The model's configuration; there once the engine has started."""
        if self._model_config is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._model_config

    # ---- steps of a request ---------------------------------------------------------------------------

    async def _prepare(self, request: Request) -> list[EngineCoreRequest]:
        self._running_client().check_alive()
        if self._input is None:
            raise UnavailableError("the engine is not running; call start() first")
        arrival_time, wanted = time.monotonic(), request.structured_output
        grammar = None if wanted is None else await self._grammar_compiler(self._input).compile(wanted)
        process = partial(self._input.process, request, arrival_time=arrival_time, grammar=grammar)
        return await asyncio.to_thread(process) if _is_long(request) else process()

    async def _embed(self, request: Request) -> Response:
        """The response to a request for a vector."""
        core = (await self._prepare(request))[0]
        client, request_id = self._running_client(), core.request_id
        if request_id in self._aborts:
            raise InvalidArgumentError(f"request_id {request_id!r} is already running; use a fresh id")
        self._aborts[request_id] = partial(client.abort, request_id)
        try:
            spec = self.model_config.pooling
            return await execute_embedding(
                client, request, core, spec, engine_id=self.engine_id, peak_mem_mb=peak_memory_mb
            )
        finally:
            del self._aborts[request_id]

    def _grammar_compiler(self, processor: InputProcessor) -> GrammarCompiler:
        """Made for the first request that asks for a form, as is the import of the library behind it."""
        if self._grammars is None:
            from sagellm_core.structured import GrammarCompiler

            self._grammars = GrammarCompiler(self.tokenizer, self.model_config.spec.vocab_size, processor.eos_token_ids)
        return self._grammars

    def _output_processors(self, request: Request, children: Sequence[EngineCoreRequest]) -> list[OutputProcessor]:
        return [
            OutputProcessor(request, child, self.tokenizer, engine_id=self.engine_id, peak_mem_mb=peak_memory_mb)
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
            async with aclosing(strategy(self._running_client(), child)) as outputs:
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

    def _running_client(self) -> EngineCoreClient:
        if self._client is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._client


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


async def _load_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer beside the engine's thread, whose kernels go on meanwhile.

    Not in a thread of its own: `tokenizers` keeps the GIL for the whole of it, and the hundreds of thousands of small
    allocations are slower outside of the main thread's heap.
    """
    return load_tokenizer(path)


def peak_memory_mb() -> float:
    """The process's peak resident memory in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _to_request(
    prompt: Prompt | None,
    messages: Messages | None,
    sampling_params: SamplingParams | None,
    *,
    max_tokens: int | None,
    request_id: str | None,
    priority: int,
    structured_output: StructuredOutput | None,
    stream: bool = False,
) -> Request:
    fields: dict[str, Any] = {"prompt": prompt if prompt is None or isinstance(prompt, str) else list(prompt)}
    optional = {
        "messages": None if messages is None else list(messages),
        "sampling_params": sampling_params,
        "max_tokens": max_tokens,
        "request_id": request_id,
        "priority": priority,
        "structured_output": structured_output,
    }
    fields |= {name: value for name, value in optional.items() if value is not None}
    return Request(stream=stream, **fields)


def _is_long(request: Request) -> bool:
    """Whether splitting the prompt into tokens takes so long that other requests would feel it: a millisecond."""
    if request.messages is not None:
        return sum(_num_chars(message) for message in request.messages) > _LONG_CHARS
    return isinstance(request.prompt, str) and len(request.prompt) > _LONG_CHARS


def _num_chars(message: ChatMessage) -> int:
    return len(message.text) + sum(len(call.function.arguments) for call in message.tool_calls or ())


def _fit_to_model(config: LLMEngineConfig, model: ModelConfig) -> LLMEngineConfig:
    """The configuration with `max_model_len` within what the model was made for, and without what it cannot do."""
    changes: dict[str, Any] = {}
    if model.is_embedding:
        # Each token sees the whole text: it is computed at once, and none of it serves another.
        changes = {"enable_chunked_prefill": False, "enable_prefix_caching": False}
    if config.max_model_len > model.max_model_len:
        if "max_model_len" in config.model_fields_set:
            raise InvalidArgumentError(
                f"max_model_len is {config.max_model_len}, the model takes {model.max_model_len}; lower it",
                field="max_model_len",
            )
        changes["max_model_len"] = model.max_model_len
    return config.model_copy(update=changes)
