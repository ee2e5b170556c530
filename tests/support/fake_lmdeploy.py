"""LMDeploy without a GPU: the parts that its client uses, with the signatures of LMDeploy 0.18 and its habits.

Its habits are what a client has to know: requests wait for a handle where `abort` doesn't find them, a cancelled wait
ends a stream quietly and is not passed on, the token that ended an answer comes only with `include_stop_str_in_output`.
`install` puts it where `import lmdeploy` finds it. The answer to every prompt is `AsyncEngine.script`, again and again.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

STEP_S = 0.001


@dataclass
class GenerationConfig:
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    include_stop_str_in_output: bool = False


@dataclass
class TurbomindEngineConfig:
    dtype: str = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    enable_prefix_caching: bool = False
    max_prefill_token_num: int = 8192


@dataclass
class PytorchEngineConfig(TurbomindEngineConfig):
    logprobs_mode: str | None = None


class ErrorCode(str, enum.Enum):
    INVALID_REQUEST = "invalid_request"
    REQUEST_CONFLICT = "request_conflict"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNSUPPORTED_FEATURE = "unsupported_feature"
    PREPROCESS_FAILED = "preprocess_failed"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    INTERNAL_ERROR = "internal_error"


class RequestError(RuntimeError):
    def __init__(self, code: ErrorCode, message: str | None = None) -> None:
        self.code = code
        super().__init__(message or code.value)


class SafeRunError(Exception):
    """What a cancelled wait becomes, until the handle is given back."""


@dataclass
class GenOut:
    response: str
    input_token_len: int
    generate_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] | None = None
    cached_tokens: int = 0


@dataclass
class ScheduleMetrics:
    active_seqs: int = 0
    waiting_seqs: int = 0
    cache_usage: float = 0.0


@dataclass(eq=False)
class Session:
    session_id: int


class SessionManager:
    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self._ids = itertools.count()

    def get(self, session_id: int | None = None, create_if_not_exists: bool = True, **kwargs: Any) -> Session:
        session = Session(next(self._ids))
        self.sessions[session.session_id] = session
        return session

    def remove(self, session: Session) -> None:
        self.sessions.pop(session.session_id, None)


@dataclass
class PreprocessedRequest:
    session: Session
    inputs: dict[str, Any]
    input_token_len: int
    gen_config: GenerationConfig
    adapter_name: str | None


class AsyncEngine:
    script: ClassVar[list[int]] = []
    eos_token_id: ClassVar[int] = 0
    broken: ClassVar[str] = ""  # what its construction raises

    def __init__(
        self,
        model_path: str,
        model_name: str | None = None,
        backend: str = "turbomind",
        backend_config: Any = None,
        chat_template_config: Any = None,
        max_log_len: int | None = None,
        trust_remote_code: bool = False,
        speculative_config: Any = None,
        allowed_media_domains: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.broken:
            raise RuntimeError(self.broken)
        self.backend, self.backend_config = backend, backend_config
        self.session_len = backend_config.session_len or 1024
        self.session_mgr = SessionManager()
        self.tokenizer = SimpleNamespace(eos_token_id=self.eos_token_id)
        self.hf_gen_cfg: dict[str, Any] = {"eos_token_id": [self.eos_token_id]}
        self.stop_words: list[int] | None = None
        self.arch = "LlamaForCausalLM"
        text_config = SimpleNamespace(vocab_size=4096, hidden_size=64)
        self.hf_cfg = SimpleNamespace(get_text_config=lambda: text_config, quantization_config={"quant_method": "awq"})
        self.loop: asyncio.AbstractEventLoop | None = None
        self.health = {"status": "healthy", "message": ""}
        self.fails_with: ErrorCode | None = None
        self.configs: list[GenerationConfig] = []
        self.adapters: list[str | None] = []
        self.num_running = 0
        self.num_cancelled = 0
        self.is_closed = False
        self._handles = asyncio.Semaphore(backend_config.max_batch_size)

    def start_loop(self, loop: asyncio.AbstractEventLoop, use_async_api: bool = False) -> bool:
        assert loop is asyncio.get_running_loop()
        assert use_async_api
        self.loop = loop
        return True

    def close(self) -> None:
        self.is_closed = True

    async def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics(active_seqs=self.num_running, cache_usage=0.25)

    async def health_probe(self, scheduler_stall_timeout: float) -> dict[str, str]:
        return self.health

    async def preprocess(
        self,
        messages: Any,
        session_id: int | Session,
        gen_config: GenerationConfig | None = None,
        tools: list[object] | None = None,
        reasoning_effort: str | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        input_ids: list[int] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        media_io_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> PreprocessedRequest:
        assert messages is None
        assert input_ids is not None
        assert gen_config is not None
        assert isinstance(session_id, Session)
        if self.fails_with is not None:
            raise RequestError(self.fails_with)
        self.configs.append(gen_config)
        self.adapters.append(adapter_name)
        return PreprocessedRequest(session_id, {"input_ids": input_ids}, len(input_ids), gen_config, adapter_name)

    async def generate(self, request: PreprocessedRequest, stream_response: bool = True) -> AsyncIterator[GenOut]:
        config, num_input, num_output = request.gen_config, request.input_token_len, 0
        stop_ids = [] if config.ignore_eos else [*(config.stop_token_ids or []), self.eos_token_id]
        await self._handles.acquire()  # and the session stays behind where the wait is cancelled
        try:
            async with self._safe_run():
                for token_id in itertools.islice(itertools.cycle(self.script), config.max_new_tokens):
                    await asyncio.sleep(STEP_S)
                    if self.fails_with is not None:
                        raise RequestError(self.fails_with)
                    logprobs = self._logprobs(token_id, config)
                    if token_id in stop_ids:
                        ids = [token_id] if config.include_stop_str_in_output else []
                        yield GenOut("", num_input, num_output, "stop", ids, logprobs and logprobs[: len(ids)])
                        break
                    num_output += 1
                    yield GenOut("?", num_input, num_output, None, [token_id], logprobs, cached_tokens=16)
                else:
                    yield GenOut("", num_input, num_output, "length", [])
        except SafeRunError:
            pass
        finally:
            self._handles.release()
        self.session_mgr.remove(request.session)

    @asynccontextmanager
    async def _safe_run(self) -> AsyncIterator[None]:
        self.num_running += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit) as error:
            self.num_cancelled += 1
            raise SafeRunError from error
        finally:
            self.num_running -= 1

    def _logprobs(self, token_id: int, config: GenerationConfig) -> list[dict[int, float]] | None:
        if config.logprobs is None:
            return None
        best = {token_id + 1 + rank: -1.0 - rank for rank in range(config.logprobs)}
        return [{**best, token_id: -9.0}]


@dataclass
class _Package:
    modules: dict[str, ModuleType] = field(default_factory=dict)

    def add(self, name: str, **members: Any) -> None:
        module = self.modules[name] = ModuleType(name)
        module.__dict__.update(members)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import lmdeploy` find this for the length of a test."""
    package = _Package()
    for name in ("lmdeploy", "lmdeploy.serve", "lmdeploy.serve.core"):
        package.add(name)
    package.add(
        "lmdeploy.messages",
        GenerationConfig=GenerationConfig,
        PytorchEngineConfig=PytorchEngineConfig,
        TurbomindEngineConfig=TurbomindEngineConfig,
    )
    package.add("lmdeploy.serve.core.exceptions", RequestError=RequestError)
    package.add("lmdeploy.serve.core.async_engine", AsyncEngine=AsyncEngine)
    for name, module in package.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
