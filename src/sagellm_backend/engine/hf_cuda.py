"""Any transformers model through `generate`, for architectures that our own models don't cover.

`HFCudaEngine` speaks the protocol (Request in, Response or StreamEvents out) and leaves the computing to
transformers, which the extra `hf` installs and which is imported at `start`. It runs on a CUDA device. Two
additions for machines without one: `mock_mode=True` answers without a model (it repeats the prompt's words), and
`device="cpu"` runs the model on the processor.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from sagellm_backend.engine.hf_answer import HFAnswer
from sagellm_backend.engine.hf_generate import EchoGenerator, Generator, HFGenerator, check_supported
from sagellm_backend.provider import BackendProvider, parse_device
from sagellm_backend.providers.mock import MockBackendProvider
from sagellm_backend.registry import get_provider
from sagellm_protocol import (
    DType,
    EdgeModel,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    Request,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnavailableError,
    UnsupportedError,
)

_TORCH_DTYPES = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}
_Event = StreamEventStart | StreamEventDelta | StreamEventEnd


class HFCudaEngineConfig(EdgeModel):
    """What to load and where. What decides about memory and speed has no default: it must be said.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    engine_id: str = Field(min_length=1)
    model_path: str = Field(min_length=1, description="A local folder or a hub id.")
    device: str = Field(description='"cuda:0", ...; "cpu" is allowed too.')
    dtype: DType = Field(description="fp32, fp16 or bf16.")
    max_new_tokens: int = Field(ge=1, description="Tokens of an answer at most; the default where a request says none.")
    max_batch_size: int = Field(ge=1, description="Requests that generate at the same time; others wait.")
    device_map: str | None = Field(default=None, description='transformers\' own placement, e.g. "auto".')
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    mock_mode: bool = Field(default=False, description="Answer without a model or a device.")

    @field_validator("dtype", mode="before")
    @classmethod
    def _parse_dtype(cls, value: object) -> DType:
        dtype = DType.parse(str(value))
        if dtype not in _TORCH_DTYPES:
            raise InvalidArgumentError(f"dtype must be fp32, fp16 or bf16, got {value}; see load_in_8bit, load_in_4bit")
        return dtype

    @model_validator(mode="after")
    def _check(self) -> HFCudaEngineConfig:
        if self.load_in_8bit and self.load_in_4bit:
            raise InvalidArgumentError("load_in_8bit and load_in_4bit exclude each other", field="load_in_4bit")
        if parse_device(self.device).type not in ("cuda", "cpu"):
            raise InvalidArgumentError(f"device must be cuda:N or cpu, got {self.device!r}", field="device")
        return self


class HFCudaEngine:
    """One model, served request by request.

    Args:
        config: what to load.
        provider: the device; by default the provider of `config.device` (the mock in mock mode), made at `start`.
    """

    def __init__(self, config: HFCudaEngineConfig, provider: BackendProvider | None = None) -> None:
        self.config = config
        self.provider = provider
        self._generator: Generator | None = None
        self._places = asyncio.Semaphore(config.max_batch_size)
        self._running: set[threading.Event] = set()

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._generator is not None

    async def start(self) -> None:
        """Find the device and load the model; does nothing if it has been done.

        Raises:
            UnavailableError: no CUDA device (use mock_mode or device="cpu"), or transformers is not installed.
            NotFoundError: no such model.
        """
        if self._generator is not None:
            return
        self.provider = self.provider or self._find_provider()
        if self.config.mock_mode:
            self._generator = EchoGenerator()
        else:
            self._generator = await asyncio.to_thread(_load, self.config, self.provider.device)

    async def stop(self) -> None:
        """Abort what is running and give the memory back."""
        self._generator = None
        for cancelled in self._running:
            cancelled.set()
        while self._running:
            await asyncio.sleep(0.01)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    async def execute(self, request: Request) -> Response:
        """The whole answer; errors of the generation stand in `Response.error`, a bad request raises."""
        async for event in self.stream(request):
            if isinstance(event, StreamEventEnd):
                return event.to_response()
        raise InternalError(f"request {request.request_id} ended without an end event")

    async def stream(self, request: Request) -> AsyncIterator[_Event]:
        """Start, deltas and exactly one end. Closing the iterator ends the generation at its next token.

        Raises:
            InvalidArgumentError, UnsupportedError: before the first event, for what can't be done.
            UnavailableError: the engine is not started.
        """
        generator = self._generator
        if generator is None:
            raise UnavailableError(f"engine {self.config.engine_id} is not started; call start() first")
        params = self._resolve(request)
        prompt: Any = [m.model_dump(exclude_none=True) for m in request.messages or ()] or request.prompt
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools] if request.tools else None
        prompt_ids = generator.encode(prompt, tools)
        if not prompt_ids:
            raise InvalidArgumentError("prompt has no tokens; give at least one", field="prompt")
        answer = HFAnswer(request, self.config.engine_id, params, generator, len(prompt_ids))
        yield StreamEventStart(**answer.names, prompt_tokens=len(prompt_ids))
        async with self._places:
            answer.scheduled_at = time.monotonic()
            async with aclosing(self._generate(generator, prompt_ids, params, answer)) as deltas:
                async for delta in deltas:
                    yield delta
        yield answer.end(self._peak_mem_mb())

    async def _generate(
        self, generator: Generator, prompt_ids: list[int], params: SamplingParams, answer: HFAnswer
    ) -> AsyncGenerator[StreamEventDelta, None]:
        """Run the generation in a thread and yield its deltas; `answer` learns how it ended."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        cancelled = threading.Event()

        def emit(tokens: list[int] | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, tokens)

        def run() -> FinishReason:
            try:
                return generator.generate(prompt_ids, params, emit, cancelled)
            finally:
                emit(None)

        self._running.add(cancelled)
        task = asyncio.create_task(asyncio.to_thread(run))
        try:
            while (tokens := await queue.get()) is not None:
                if answer.is_over():
                    continue
                yield answer.add(tokens)
                if answer.is_over():
                    cancelled.set()
            answer.finish(await task)
            rest = answer.flush()
            if rest is not None:
                yield rest
        except Exception as error:  # whatever transformers or the device raises becomes the answer's error
            answer.fail(error)
        finally:
            cancelled.set()
            await asyncio.wait([task])
            task.exception()  # retrieved, also where the caller went away and nobody reads it
            self._running.discard(cancelled)

    def _find_provider(self) -> BackendProvider:
        if self.config.mock_mode:
            return MockBackendProvider(supported_dtypes=tuple(_TORCH_DTYPES))
        device = parse_device(self.config.device)
        try:
            return get_provider("auto", device=self.config.device)
        except UnavailableError as error:
            raise UnavailableError(
                f"the transformers engine needs a {device.type} device: {error.message}; "
                'or use mock_mode=True or device="cpu"',
                field="device",
            ) from error

    def _resolve(self, request: Request) -> SamplingParams:
        """The request's parameters within the engine's limit."""
        for field in ("lora", "kv_transfer", "phase"):
            if getattr(request, field) is not None:
                raise UnsupportedError(f"the transformers engine does not support {field}; leave it out", field=field)
        limit = self.config.max_new_tokens
        params = request.resolved_sampling(SamplingParams(max_tokens=limit))
        check_supported(params)
        if params.max_tokens <= limit:
            return params
        return params.replace(max_tokens=limit, min_tokens=min(params.min_tokens, limit))

    def _peak_mem_mb(self) -> float:
        """The most memory used so far: of the card, or of this process where there is none."""
        if self.provider is not None and self.provider.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.provider.device)) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _load(config: HFCudaEngineConfig, device: torch.device) -> HFGenerator:
    """Model and tokenizer on the device."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnavailableError("transformers is not installed: run `pip install 'isagellm[hf]'`") from error
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            config.model_path,
            dtype=_TORCH_DTYPES[config.dtype],
            device_map=config.device_map,
            quantization_config=_quantization(config),
            **options,
        )
    except OSError as error:
        raise NotFoundError(f"no model at {config.model_path!r}: {error}", field="model_path") from error
    except ImportError as error:
        raise UnavailableError(f"the model needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"can't load {config.model_path!r}: {error}", field="model_path") from error
    placed = config.device_map is not None or config.load_in_8bit or config.load_in_4bit
    return HFGenerator(model.eval() if placed else model.eval().to(device), tokenizer)


def _quantization(config: HFCudaEngineConfig) -> Any:
    if not (config.load_in_8bit or config.load_in_4bit):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=config.load_in_8bit, load_in_4bit=config.load_in_4bit)
