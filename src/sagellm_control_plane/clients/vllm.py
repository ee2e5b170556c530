"""vLLM's engine in this process, as one of ours (extra `vllm`).

Holds `VLLMEngineClient`. It takes the protocol's requests, and vLLM's own `SamplingParams` in their place where a
caller has them. What vLLM cannot do as our engines do is refused, see `vllm_params`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from sagellm_control_plane.clients.foreign import ForeignEngine
from sagellm_control_plane.clients.vllm_output import VLLMAnswer
from sagellm_control_plane.clients.vllm_params import as_deltas, to_vllm
from sagellm_control_plane.clock import Clock
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import (
    InvalidArgumentError,
    ModelDescription,
    Request,
    Response,
    StreamEvent,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class VLLMEngineClient(ForeignEngine[VLLMAnswer]):
    """An `AsyncLLM` of vLLM.

    Args:
        config: model, sizes and dtype, in our words.
        engine_args: further fields of vLLM's `AsyncEngineArgs`, such as `tensor_parallel_size`; they win over those of
            `config`.
    """

    project = "vLLM"

    def __init__(
        self, config: LLMEngineConfig, *, engine_args: Mapping[str, Any] | None = None, clock: Clock | None = None
    ) -> None:
        super().__init__(config, clock)
        self._engine_args = dict(engine_args or {})

    # ---- life -----------------------------------------------------------------------------------------

    async def _load(self) -> None:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise UnsupportedError("engines of vLLM need the extra: pip install 'isagellm[vllm]'") from error
        try:
            arguments = AsyncEngineArgs(**{**_engine_args(self._config), **self._engine_args})
            self._engine = await self._made(partial(AsyncLLM.from_engine_args, arguments))
        except Exception as error:
            raise UnavailableError(f"vLLM could not start {self._config.model_path}: {error}") from error
        self._tokenizer = self._engine.get_tokenizer()
        length = self._engine.model_config.max_model_len
        self._config = self._config.model_copy(update={"max_model_len": length})

    async def _close(self, engine: Any) -> None:
        await asyncio.to_thread(engine.shutdown)

    def _is_alive(self) -> bool:
        return self._engine is not None and not self._engine.errored

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /, *, sampling_params: Any = None) -> Response:
        """The whole answer; `sampling_params` as in `stream`."""
        return await self._whole(request, self.stream(request, sampling_params=sampling_params))

    async def stream(self, request: Request, /, *, sampling_params: Any = None) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made. `sampling_params` of vLLM's own class take the place of the request's."""
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, request_id = self._loaded(), request.request_id
        with self._gate.pass_through():
            token_ids = await self._prompt_tokens(request)
            if sampling_params is None:
                params = to_vllm(request, self._sampling(request, len(token_ids)))
            else:
                params = as_deltas(sampling_params)
            answer = VLLMAnswer(request, self.engine_id, token_ids, params.n, self._clock, self._tokenizer)
            prompt = TokensPrompt(prompt_token_ids=token_ids)
            if request.cache_salt is not None:
                prompt["cache_salt"] = request.cache_salt
            with self._runs(request_id, answer, len(token_ids)):
                outputs = engine.generate(prompt, params, request_id, priority=int(request.priority))
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
                    raise self._loss() from error
                except ValueError as error:  # what vLLM refuses
                    raise InvalidArgumentError(f"vLLM refused the request: {error}") from error

    def _abort(self, request_id: str, answer: VLLMAnswer) -> None:
        answer.is_aborted = True
        self._do(self._loaded().abort(request_id))

    # ---- what the engine tells ------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return bool(await self._loaded().reset_prefix_cache())

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


def _engine_args(config: LLMEngineConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": config.model_path,
        "revision": config.revision,
        "dtype": _DTYPES.get(config.dtype, config.dtype),
        "max_num_seqs": config.max_batch_size,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_batch_size),
        "enable_prefix_caching": config.enable_prefix_caching,
        "scheduling_policy": "priority",
        "enable_log_requests": False,
    }
    if "max_model_len" in config.model_fields_set:
        fields["max_model_len"] = config.max_model_len
    return fields
