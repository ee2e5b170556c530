"""LMDeploy's engine in this process, as one of ours (extra `lmdeploy`; it needs a GPU).

Holds `LMDeployEngineClient`. LMDeploy gets token ids and gives token ids; texts, stop strings and figures are made
here as for our own engines. What it cannot do as they do is refused, see `lmdeploy_params`.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from sagellm_control_plane.clients.foreign import ForeignEngine
from sagellm_control_plane.clients.lmdeploy_params import MAX_SEED, to_lmdeploy
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.pull import Pull
from sagellm_core.chat_template import PLAIN_CHAT_STOP
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineStats
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_core.models import resolve_model
from sagellm_core.output_processor import OutputProcessor
from sagellm_core.sampling.logprobs import Candidate, TokenLogprobs
from sagellm_core.tokenizer import load_tokenizer
from sagellm_protocol import (
    FinishReason,
    InternalError,
    InvalidArgumentError,
    ModelDescription,
    Request,
    SageLLMError,
    SamplingParams,
    StreamEvent,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
)

Backend = Literal["pytorch", "turbomind"]

_DTYPES = {"auto": "auto", "fp16": "float16", "bf16": "bfloat16"}
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}
_OF_THE_REQUEST = ("invalid_request", "context_length_exceeded", "request_conflict", "preprocess_failed")
_STALL_S = 30.0  # without a step, while requests run, until LMDeploy calls itself unhealthy


class _AbortedError(Exception):
    """A request is to end."""


@dataclass(slots=True, eq=False)
class _Running:
    """What is known of a request in the engine."""

    pull: Pull
    core: EngineCoreRequest
    output: OutputProcessor


class LMDeployEngineClient(ForeignEngine[_Running]):
    """An `AsyncEngine` of LMDeploy.

    Args:
        config: model, sizes and dtype, in our words.
        backend: LMDeploy's `pytorch`, whose random numbers depend on seed and position alone, or `turbomind`.
        engine_args: further fields of `PytorchEngineConfig` or `TurbomindEngineConfig`, such as `tp`; they win over
            those of `config`.
    """

    project = "LMDeploy"

    def __init__(
        self,
        config: LLMEngineConfig,
        *,
        backend: Backend = "pytorch",
        engine_args: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(config, clock)
        self._backend: Backend = backend
        self._engine_args = dict(engine_args or {})
        self._has_died = False
        self._end_token_ids: frozenset[int] = frozenset()

    # ---- life -----------------------------------------------------------------------------------------

    async def _load(self) -> None:
        try:
            from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig
            from lmdeploy.serve.core.async_engine import AsyncEngine
        except ImportError as error:
            raise UnsupportedError("engines of LMDeploy need the extra: pip install 'isagellm[lmdeploy]'") from error
        fields = {**_engine_args(self._config, self._backend), **self._engine_args}
        path = await asyncio.to_thread(resolve_model, self._config.model_path, revision=self._config.revision)
        self._tokenizer = await asyncio.to_thread(load_tokenizer, path)
        try:
            options = (PytorchEngineConfig if self._backend == "pytorch" else TurbomindEngineConfig)(**fields)
            self._engine = await self._made(
                partial(
                    AsyncEngine,
                    str(path),
                    backend=self._backend,
                    backend_config=options,
                    trust_remote_code=self._config.trust_remote_code,
                )
            )
            self._engine.start_loop(asyncio.get_running_loop(), use_async_api=True)
        except Exception as error:
            await self._shut_down()
            raise UnavailableError(f"LMDeploy could not start {self._config.model_path}: {error}") from error
        self._has_died = False
        self._config = self._config.model_copy(update={"max_model_len": self._engine.session_len})
        self._end_token_ids = _end_token_ids(self._engine) | frozenset(self._tokenizer.eos_token_ids)

    async def _close(self, engine: Any) -> None:
        engine.close()  # here: its tasks are this loop's

    def _is_alive(self) -> bool:
        return self._engine is not None and not self._has_died

    # ---- requests -------------------------------------------------------------------------------------

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request."""
        from lmdeploy.serve.core.exceptions import RequestError

        engine = self._loaded()
        with self._gate.pass_through():
            token_ids = await self._prompt_tokens(request)
            core = self._core_request(request, token_ids)
            wanted = to_lmdeploy(
                request,
                core.sampling,
                core.seed,
                self._end_token_ids,
                shares_prefixes=engine.backend_config.enable_prefix_caching,
            )
            output = OutputProcessor(request, core, self._tokenizer, engine_id=self.engine_id, clock=self._clock.now)
            running = _Running(Pull(asyncio.get_running_loop()), core, output)
            with self._runs(request.request_id, running, len(token_ids)):
                session = engine.session_mgr.get()
                try:
                    prepared = await engine.preprocess(
                        None, session, wanted, input_ids=token_ids, adapter_name=request.lora
                    )
                    yield output.start()
                    async with aclosing(engine.generate(prepared)) as parts:
                        while not output.finished:
                            for event in await self._next(parts, running):
                                yield event
                except RequestError as error:
                    raise self._translated(error) from error
                finally:
                    engine.session_mgr.remove(session)  # where it has not done so itself

    def _abort(self, request_id: str, answer: _Running) -> None:
        # Ending the wait ends the request in LMDeploy, wherever it is there; its own abort knows only running ones.
        answer.pull.interrupt(_AbortedError())

    async def _next(self, parts: AsyncGenerator[Any, None], running: _Running) -> list[Any]:
        """The events of LMDeploy's next output, or of an abort."""
        try:
            with running.pull:
                part = await parts.__anext__()
        except _AbortedError:
            return list(running.output.abort())
        except StopAsyncIteration:
            if _is_cancelling():  # LMDeploy takes a cancellation for the request's end, and doesn't pass it on
                raise asyncio.CancelledError from None
            raise InternalError("LMDeploy ended a stream without its end; its log says why") from None
        self._num_output_tokens += len(part.token_ids or ())
        return list(running.output.add(_core_output(running.core, part)))

    def _core_request(self, request: Request, token_ids: list[int]) -> EngineCoreRequest:
        sampling = self._sampling(request, len(token_ids))
        if request.messages is not None and not self._tokenizer.has_chat_template:
            sampling = sampling.replace(stop=tuple(dict.fromkeys((*sampling.stop, *PLAIN_CHAT_STOP))))
        return EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            eos_token_ids=self._end_token_ids,
            arrival_time=self._clock.now(),
            seed=secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed,
        )

    def _translated(self, error: Any) -> SageLLMError:
        """A `RequestError` of LMDeploy's in the protocol's words."""
        code = str(error.code.value)
        if code == "engine_unavailable":
            self._has_died = True
            return self._loss()
        if code == "unsupported_feature":
            return UnsupportedError(f"LMDeploy refused the request: {error}")
        if code in _OF_THE_REQUEST:
            return InvalidArgumentError(f"LMDeploy refused the request: {error}")
        return InternalError(f"LMDeploy failed on the request: {error}; its log says why")

    # ---- what the engine tells ------------------------------------------------------------------------

    async def health_check(self) -> bool:
        """Whether LMDeploy's loops run and its steps advance. One that doesn't is lost: `start` makes another."""
        if not self._is_alive():
            return False
        found = await self._engine.health_probe(_STALL_S)
        self._has_died = found["status"] == "unhealthy"
        return bool(found["status"] == "healthy")

    async def stats(self) -> EngineStats:
        """Requests, tokens and the share of the cache in use; LMDeploy keeps its other figures to itself."""
        found = await self._loaded().get_schedule_metrics()
        counted = await super().stats()
        num_waiting = max(found.waiting_seqs, counted.num_running - found.active_seqs)
        return replace(
            counted, num_running=found.active_seqs, num_waiting=num_waiting, kv_usage=float(found.cache_usage)
        )

    async def reset_prefix_cache(self) -> bool:
        """Whether there is nothing to forget: LMDeploy keeps what it caches while it runs."""
        return not bool(self._loaded().backend_config.enable_prefix_caching)

    async def describe_model(self) -> ModelDescription:
        """What the model is, once the engine has started."""
        engine = self._loaded()
        config = engine.hf_cfg.get_text_config()
        quantization = getattr(engine.hf_cfg, "quantization_config", None) or {}
        templates = self._tokenizer.chat_templates
        return ModelDescription(
            model=self._config.model_path,
            architecture=engine.arch,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            max_model_len=engine.session_len,
            dtype=str(engine.backend_config.dtype),
            quantization=str(quantization.get("quant_method", "none")),
            chat_template=templates.choose(with_tools=True).source if templates else None,
            special_tokens=dict(self._tokenizer.special_tokens),
        )

    def _tokenize(self, request: TokenizeRequest) -> list[int]:
        if request.messages is None:
            return list(self._tokenizer.encode(request.prompt or "", request.add_special_tokens))
        tools = None if request.tools is None else [tool.model_dump(exclude_none=True) for tool in request.tools]
        return list(
            self._tokenizer.encode_chat(
                [message.to_template() for message in request.messages],
                tools=tools,
                add_generation_prompt=request.add_generation_prompt,
                **(request.chat_template_kwargs or {}),
            )
        )


def _engine_args(config: LLMEngineConfig, backend: Backend) -> dict[str, Any]:
    if config.dtype not in _DTYPES:
        raise UnsupportedError(f"LMDeploy has no dtype {config.dtype}; use auto, fp16 or bf16", field="dtype")
    fields: dict[str, Any] = {
        "dtype": _DTYPES[config.dtype],
        "max_batch_size": config.max_batch_size,
        "max_prefill_token_num": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
    }
    if "max_model_len" in config.model_fields_set:
        fields["session_len"] = config.max_model_len
    if backend == "pytorch":
        fields["logprobs_mode"] = "raw_logprobs"  # before temperature and penalties, as ours
    return fields


def _end_token_ids(engine: Any) -> frozenset[int]:
    """What ends an answer by LMDeploy's reading of the model's files."""
    named = engine.hf_gen_cfg.get("eos_token_id")
    found = [named] if isinstance(named, int) else list(named or ())
    own = engine.tokenizer.eos_token_id
    return frozenset([*found, *([] if own is None else [own]), *(engine.stop_words or ())])


def _core_output(core: EngineCoreRequest, part: Any) -> EngineCoreOutput:
    """What LMDeploy's `GenOut` says, as our engine core would."""
    sampling, token_ids = core.sampling, [int(token_id) for token_id in part.token_ids or ()]
    reason = None if part.finish_reason is None else _REASONS.get(part.finish_reason, FinishReason.ERROR)
    is_stop_token = reason is FinishReason.STOP and token_ids and token_ids[-1] in sampling.stop_token_ids
    error = None
    if reason is FinishReason.ERROR:
        error = InternalError("LMDeploy failed on this request; its log says why").to_error()
    return EngineCoreOutput(
        core.request_id,
        token_ids,
        finish_reason=reason,
        stop_reason=token_ids[-1] if is_stop_token else None,
        logprobs=_logprobs(sampling, token_ids, part.logprobs),
        num_cached_tokens=part.cached_tokens,
        error=error,
    )


def _logprobs(sampling: SamplingParams, token_ids: list[int], entries: Any) -> list[TokenLogprobs] | None:
    """Of each token; LMDeploy tells of the best ones and of the chosen one, whose rank is unknown among the others."""
    if sampling.logprobs is None or not entries:
        return None
    found = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        best = sorted(entry.items(), key=lambda item: -item[1])
        ranks = {other: rank for rank, (other, _) in enumerate(best[: max(1, sampling.logprobs)], start=1)}
        top = tuple(Candidate(other, value, ranks[other]) for other, value in best[: sampling.logprobs])
        found.append(TokenLogprobs(token_id, entry[token_id], ranks.get(token_id), top))
    return found


def _is_cancelling() -> bool:
    """Whether somebody has cancelled this task; before Python 3.11 a task doesn't know, and this is the likely one."""
    task = asyncio.current_task()
    return sys.version_info < (3, 11) or (task is not None and task.cancelling() > 0)
