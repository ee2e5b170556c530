"""`LLMEngine`: one model on one device, text in and text out, asyncio in front of the step loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sagellm_core.config import LLMEngineConfig
from sagellm_core.embedding import Inputs, embedding_requests, execute_all
from sagellm_core.engine_core.client import EngineCoreClient
from sagellm_core.engine_core.engine_core import EngineCore
from sagellm_core.engine_core.prefix_transfer import export_prefix, import_prefix
from sagellm_core.engine_core.report import EngineReport, EngineStats
from sagellm_core.factory import build_executor
from sagellm_core.gate import RequestGate
from sagellm_core.input_processor import InputProcessor
from sagellm_core.kv_format import PrefixBlocks
from sagellm_core.models import LoadProgress, ModelConfig, read_model_config, resolve_model
from sagellm_core.request_runner import RequestRunner
from sagellm_core.tokenizer import Tokenizer, load_tokenizer
from sagellm_kv_cache import EventBatch
from sagellm_protocol import (
    InvalidArgumentError,
    ModelDescription,
    Request,
    Response,
    SamplingParams,
    StreamEvent,
    StructuredOutput,
    TokenizeRequest,
    UnavailableError,
    new_request_id,
)

_MANY_TOKENS = 1024  # whose texts are put together beside the event loop

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
        self._gate = RequestGate()
        self._client: EngineCoreClient | None = None
        self._runner: RequestRunner | None = None
        self._model_config: ModelConfig | None = None
        self._tokenizer: Tokenizer | None = None
        self._description: dict[str, object] = {}

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
            input_processor = InputProcessor(
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
        self._runner = RequestRunner(client, input_processor, tokenizer, model_config, self.engine_id)
        self._client = client

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and free the model."""
        async with self._life:
            client, self._client = self._client, None
            runner, self._runner = self._runner, None
            if runner is not None:
                runner.close()
            if client is not None:
                await client.stop()

    async def drain(self) -> None:
        """Refuse new requests with `UnavailableError` and return when those that run have ended.

        The model stays loaded; `resume` lets requests in again, and whoever still waits here is told so by a
        `RequestCancelledError`.
        """
        await self._gate.drain()

    def resume(self) -> None:
        """Take requests again after `drain`."""
        self._gate.open()

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
        with self._gate.pass_through():
            return await self._running().execute(request)

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
        with self._gate.pass_through():
            async with aclosing(self._running().stream(request)) as events:
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
        self._running().abort(request_id)

    @property
    def is_ready(self) -> bool:
        """Whether it runs and takes requests."""
        return self._client is not None and self._gate.is_open

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

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        """Have `callback` called with an `EngineReport` now and again; returns what ends that.

        It is called in this event loop: at once with all that is cached, soon after the prefix cache changes, and at
        least every `interval_s` while the step loop turns, whose longest step is the longest silence of a sound
        engine. A stop of the engine ends it.
        """
        return self._running_client().watch(callback, interval_s=interval_s)

    async def cache_snapshot(self) -> EventBatch:
        """All that the prefix cache holds, for a reader that missed a report; watchers are told the same."""
        return await self._running_client().cache_snapshot()

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return await self._running_client().reset_prefix_cache()

    async def export_prefix(
        self, token_ids: Sequence[int], *, cache_salt: str | None = None, lora_id: str | None = None
    ) -> PrefixBlocks | None:
        """The full cached KV blocks of the longest cached prefix of these tokens; None where nothing is cached.

        Raises:
            UnsupportedError: the engine has no prefix cache.
        """
        return await export_prefix(self._running_client(), token_ids, cache_salt, lora_id)

    async def import_prefix(self, blocks: PrefixBlocks) -> int:
        """Put another engine's blocks into the prefix cache; returns how many of their tokens are cached now.

        They may be fewer where the blocks in use leave no room, and are given up like any other cached content.

        Raises:
            KVTransferError: model, layout or kernels differ from this engine's, or the bytes were damaged.
            UnsupportedError: the engine has no prefix cache.
        """
        return await import_prefix(self._running_client(), blocks)

    def get_info(self) -> dict[str, Any]:
        """Model, device, dtypes, kernels and limits, as plain JSON values."""
        info: dict[str, Any] = {
            "engine_id": self.engine_id,
            "model": self.config.model_path,
            "running": self._client is not None,
            "draining": not self._gate.is_open,
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
        return await self._running().tokenize(request)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        decode = self.tokenizer.decode
        if len(token_ids) > _MANY_TOKENS:
            return await asyncio.to_thread(decode, token_ids, skip_special_tokens)
        return decode(token_ids, skip_special_tokens)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        text_of = self.tokenizer.token_text
        if len(token_ids) > _MANY_TOKENS:
            return await asyncio.to_thread(lambda: [text_of(token_id) for token_id in token_ids])
        return [text_of(token_id) for token_id in token_ids]

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

    def _running(self) -> RequestRunner:
        if self._runner is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._runner

    def _running_client(self) -> EngineCoreClient:
        if self._client is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._client


async def _load_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer beside the engine's thread, whose kernels go on meanwhile.

    Not in a thread of its own: `tokenizers` keeps the GIL for the whole of it, and the hundreds of thousands of small
    allocations are slower outside of the main thread's heap.
    """
    return load_tokenizer(path)


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
