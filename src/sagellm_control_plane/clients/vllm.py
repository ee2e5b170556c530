"""vLLM's engine in this process, as one of ours (extra `vllm`).

Holds `VLLMEngineClient`. It takes the protocol's requests, and vLLM's own `SamplingParams` in their place where a
caller has them. What vLLM cannot do as our engines do is refused, see `vllm_params`; its cache is not told of, so
routers guess what it holds from what they sent it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clients.vllm_output import VLLMAnswer
from sagellm_control_plane.clients.vllm_params import as_deltas, to_vllm
from sagellm_control_plane.clock import Clock, LoopClock
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport, EngineStats
from sagellm_core.gate import RequestGate
from sagellm_kv_cache import AllBlocksCleared, CacheDigest, EventBatch
from sagellm_protocol import (
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    StreamEvent,
    StreamEventEnd,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
    new_request_id,
)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class VLLMEngineClient:
    """An `AsyncLLM` of vLLM.

    Args:
        config: model, sizes, dtype and parallel sizes, in our words.
        engine_args: further fields of vLLM's `AsyncEngineArgs`; they win over those of `config`.
    """

    def __init__(
        self, config: LLMEngineConfig, *, engine_args: Mapping[str, Any] | None = None, clock: Clock | None = None
    ) -> None:
        self.engine_id = config.engine_id or f"vllm-{new_request_id().removeprefix('req-')[:8]}"
        self._config = config.model_copy(update={"engine_id": self.engine_id})
        self._engine_args = dict(engine_args or {})
        self._clock = clock or LoopClock()
        self._life = asyncio.Lock()
        self._gate = RequestGate()
        self._engine: Any = None  # AsyncLLM
        self._tokenizer: Any = None
        self._epoch = ""
        self._num_reports = 0
        self._running: dict[str, VLLMAnswer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    @property
    def config(self) -> LLMEngineConfig:
        """As it was given; once the engine has started, with the length that vLLM takes."""
        return self._config

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model; raises `UnsupportedError` where vLLM is missing, `UnavailableError` where it fails."""
        async with self._life:
            if self._engine is not None and not self._engine.errored:
                return
            await self._shut_down()
            try:
                from vllm import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM
            except ImportError as error:
                raise UnsupportedError("engines of vLLM need the extra: pip install 'isagellm[vllm]'") from error
            arguments = AsyncEngineArgs(**{**_engine_args(self._config), **self._engine_args})
            try:
                # Beside the event loop: it takes a minute.
                self._engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
            except Exception as error:
                raise UnavailableError(f"vLLM could not start {self._config.model_path}: {error}") from error
            self._tokenizer = self._engine.get_tokenizer()
            self._epoch, self._num_reports = secrets.token_hex(8), 0
            length = self._engine.model_config.max_model_len
            self._config = self._config.model_copy(update={"max_model_len": length})

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and free the model."""
        async with self._life:
            if self._engine is not None and not self._engine.errored:
                for request_id in list(self._running):
                    self.abort(request_id)
                while self._running and not self._engine.errored:
                    await self._clock.sleep(0.005)
            await self._shut_down()

    async def drain(self) -> None:
        """As `LLMEngine.drain`."""
        await self._gate.drain()

    def resume(self) -> None:
        """Take requests again after `drain`."""
        self._gate.open()

    async def _shut_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /, *, sampling_params: Any = None) -> Response:
        """The whole answer; `sampling_params` as in `stream`."""
        async with aclosing(self.stream(request, sampling_params=sampling_params)) as events:
            async for event in events:
                if isinstance(event, StreamEventEnd):
                    return event.to_response().model_copy(update={"model": request.model})
        raise AssertionError("streams end with an end")

    async def stream(self, request: Request, /, *, sampling_params: Any = None) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made. `sampling_params` of vLLM's own class take the place of the request's."""
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, request_id = self._loaded(), request.request_id
        with self._gate.pass_through():
            if request_id in self._running:
                raise InvalidArgumentError(f"request_id {request_id!r} is already running; use a fresh id")
            token_ids = await self._prompt_tokens(request)
            params = self._params(request, len(token_ids), sampling_params)
            answer = VLLMAnswer(request, self.engine_id, token_ids, params.n, self._clock, self._tokenizer)
            self._running[request_id] = answer
            self._num_prompt_tokens += len(token_ids)
            outputs = engine.generate(
                TokensPrompt(prompt_token_ids=token_ids), params, request_id, priority=int(request.priority)
            )
            try:
                yield answer.start(params.seed)
                async with aclosing(outputs):
                    async for output in outputs:
                        if answer.is_aborted:  # perhaps before vLLM knew of the request
                            await engine.abort(request_id)
                        for delta in answer.add(output):
                            self._num_output_tokens += len(delta.chunk_tokens)
                            yield delta
                yield answer.end()
            except EngineDeadError as error:
                raise EngineLostError(f"vLLM's engine {self.engine_id} died", engine_id=self.engine_id) from error
            except ValueError as error:  # what vLLM refuses
                raise InvalidArgumentError(f"vLLM refused the request: {error}") from error
            finally:
                del self._running[request_id]

    def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets the finish reason `abort`."""
        answer = self._running.get(request_id)
        if answer is None:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        answer.is_aborted = True
        self._do(self._loaded().abort(request_id))

    def _params(self, request: Request, num_prompt_tokens: int, given: Any) -> Any:
        room = self._config.max_model_len - num_prompt_tokens
        if room < 1:
            raise InvalidArgumentError(
                f"the prompt has {num_prompt_tokens} tokens, but max_model_len is {self._config.max_model_len} for "
                "prompt and output together; shorten the prompt",
                field="prompt" if request.messages is None else "messages",
            )
        if given is not None:
            return as_deltas(given)
        sampling = request.resolved_sampling(self._config.sampling_defaults)
        is_given = "max_tokens" in sampling.model_fields_set
        wanted = sampling.max_tokens if is_given else self._config.max_new_tokens
        if sampling.seed is None and request.resume_from is not None:
            sampling = sampling.replace(seed=request.resume_from.seed)
        return to_vllm(request, sampling, min(wanted, room))

    # ---- what the engine tells ------------------------------------------------------------------------

    async def health_check(self) -> bool:
        """Whether vLLM's engine lives."""
        return self._engine is not None and not self._engine.errored

    async def stats(self) -> EngineStats:
        """What can be counted from outside: requests and tokens; vLLM keeps its cache's figures to itself."""
        self._loaded()
        return self._stats()

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        """Call `callback` every `interval_s` while vLLM's engine lives; the reports know no steps and no cache."""
        self._loaded()
        task = self._do(self._report(callback, interval_s))

        def end() -> None:
            task.cancel()

        return end

    async def cache_snapshot(self) -> EventBatch:
        """Nothing: vLLM's cache is not told of."""
        return _NOTHING_CACHED

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return bool(await self._loaded().reset_prefix_cache())

    def get_info(self) -> dict[str, Any]:
        """Model and limits, as plain JSON values."""
        return {
            "engine_id": self.engine_id,
            "model": self._config.model_path,
            "backend": "vllm",
            "running": self._engine is not None,
            "max_model_len": self._config.max_model_len,
            "max_batch_size": self._config.max_batch_size,
        }

    async def describe_model(self) -> ModelDescription:
        """What the model is, once the engine has started."""
        model = self._loaded().model_config
        return ModelDescription(
            model=self._config.model_path,
            architecture=next(iter(model.architectures), ""),
            vocab_size=model.get_vocab_size(),
            hidden_size=model.get_hidden_size(),
            max_model_len=model.max_model_len,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=model.quantization or "none",
            chat_template=getattr(self._tokenizer, "chat_template", None),
        )

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        """The token ids of a text or a conversation, by vLLM's tokenizer."""
        self._loaded()
        return await asyncio.to_thread(self._tokenize, request)

    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        self._loaded()
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]:
        """The text of each token by itself."""
        self._loaded()
        return [str(self._tokenizer.decode([token_id])) for token_id in token_ids]

    # ---- steps of the above ---------------------------------------------------------------------------

    def _loaded(self) -> Any:
        if self._engine is None:
            raise UnavailableError("the engine is not running; call start() first")
        if self._engine.errored:
            raise EngineLostError(f"vLLM's engine {self.engine_id} died", engine_id=self.engine_id)
        return self._engine

    async def _prompt_tokens(self, request: Request) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.prompt is not None and not isinstance(request.prompt, str):
            return list(request.prompt)
        wanted = TokenizeRequest(
            prompt=request.prompt,
            messages=request.messages,
            tools=request.tools,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        return await self.tokenize(wanted)

    def _tokenize(self, request: TokenizeRequest) -> list[int]:
        if request.messages is None:
            encoded = self._tokenizer.encode(request.prompt or "", add_special_tokens=request.add_special_tokens)
            return [int(token_id) for token_id in encoded]
        tools = None if request.tools is None else [tool.model_dump(exclude_none=True) for tool in request.tools]
        text = self._tokenizer.apply_chat_template(
            [message.to_template() for message in request.messages],
            tools=tools,
            add_generation_prompt=request.add_generation_prompt,
            tokenize=False,
            **(request.chat_template_kwargs or {}),
        )
        return [int(token_id) for token_id in self._tokenizer.encode(text, add_special_tokens=False)]

    async def _report(self, callback: Callable[[EngineReport], None], interval_s: float) -> None:
        while self._engine is not None and not self._engine.errored:
            report = EngineReport(self._epoch, self._num_reports, self._stats(), (), _NOTHING_CACHED, CacheDigest())
            self._num_reports += 1
            callback(report)
            await self._clock.sleep(interval_s)

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=0,
            num_blocks=0,
            num_free_blocks=0,
            kv_usage=0.0,
            num_steps=0,
            num_preemptions=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            evict_count=0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def _do(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_NOTHING_CACHED = EventBatch(0, (AllBlocksCleared(),))


def _engine_args(config: LLMEngineConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": config.model_path,
        "revision": config.revision,
        "dtype": _DTYPES.get(config.dtype, config.dtype),
        "max_num_seqs": config.max_batch_size,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_batch_size),
        "enable_prefix_caching": config.enable_prefix_caching,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "scheduling_policy": "priority",
        "enable_log_requests": False,
    }
    if "max_model_len" in config.model_fields_set:
        fields["max_model_len"] = config.max_model_len
    return fields
