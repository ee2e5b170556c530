"""An engine without a model, for tests of what stands above engines: control plane, gateway, servers.

It answers with the words `w0 w1 ...`, one token each, at once. The prompt says when it should do something else:
`wait` holds the request until `gate` is set, `slow` takes 50 ms a word, `fail` ends it with an error, `refuse` raises
as for a wrong request. A resumed request goes on behind the words that were received.

While `awake` is not set it hangs: no word, no report.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import CacheDigest, EngineReport, EngineStats
from sagellm_kv_cache import AllBlocksCleared, EventBatch
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    Metrics,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenizeRequest,
    TokenLogprob,
    TopLogprob,
    UnavailableError,
    Usage,
)


class FakeEngine:
    """See the module. `fail_start` makes `start` raise; `start_gate` holds it."""

    def __init__(self, config: LLMEngineConfig | None = None, *, fail_start: bool = False, **options: Any) -> None:
        self.config = config or LLMEngineConfig.model_validate({"model_path": "fake", **options})
        self.engine_id = self.config.engine_id or "fake"
        self.gate = asyncio.Event()
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.awake = asyncio.Event()
        self.awake.set()
        self.fail_start = fail_start
        self.chat_template: str | None = None
        self.num_starts = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.is_running = False
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.num_reports = 0
        self.is_draining = False
        self._aborted: dict[str, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        await self.start_gate.wait()
        if self.fail_start:
            raise UnavailableError("the fake was told not to start")
        self.num_starts += 1
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False
        for event in self._aborted.values():
            event.set()

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def execute(self, request: Request, /) -> Response:
        async with aclosing(self.stream(request)) as events:
            last = [event async for event in events][-1]
        assert isinstance(last, StreamEventEnd)
        response = last.to_response()
        if request.embed is None or response.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            return response
        usage = response.usage.model_copy(update={"completion_tokens": 0})
        vector = [float(response.usage.prompt_tokens), 0.5, 0.25, 0.125]
        return Response(
            request_id=request.request_id,
            engine_id=self.engine_id,
            finish_reason=FinishReason.STOP,
            embedding=vector[: request.embed.dimensions],
            usage=usage,
        )

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        prompt = _text(request)
        if prompt == "refuse":
            raise InvalidArgumentError("prompt is refused; say something else", field="prompt")
        if not self.is_running:
            raise UnavailableError("the engine is not running; call start() first")
        if self.is_draining:
            raise UnavailableError("the engine is draining")
        self.requests.append(request)
        self.running.add(request.request_id)
        self._idle.clear()
        aborted = self._aborted[request.request_id] = asyncio.Event()
        names = {"request_id": request.request_id, "trace_id": request.trace_id, "engine_id": self.engine_id}
        done = False
        try:
            self.num_prompt_tokens += len(prompt.split())
            yield StreamEventStart(prompt_tokens=len(prompt.split()), **names)
            if prompt == "wait":
                await _first_of(self.gate, aborted)
            sampling = request.resolved_sampling()
            words = [] if prompt == "fail" or aborted.is_set() else [f"w{i} " for i in range(sampling.max_tokens)]
            for i, word in enumerate(words):
                await self.awake.wait()
                for index in range(sampling.n):
                    if i < _num_received(request, index):
                        continue
                    self.num_output_tokens += 1
                    logprobs = None if sampling.logprobs is None else [_logprob(i, word)]
                    yield StreamEventDelta(chunk=word, chunk_tokens=[i], index=index, logprobs=logprobs, **names)
                await asyncio.sleep(0.05 if prompt == "slow" else 0)
            done = True
            yield StreamEventEnd.of(self._response(request, words, prompt, aborted.is_set(), names))
        finally:
            self.running.discard(request.request_id)
            if not self.running:
                self._idle.set()
            self._aborted.pop(request.request_id, None)
            if not done:
                self.cancelled.append(request.request_id)

    def _response(self, request: Request, words: list[str], prompt: str, aborted: bool, names: Any) -> Response:
        reason = FinishReason.LENGTH
        if prompt == "fail":
            reason = FinishReason.ERROR
        elif aborted:
            reason = FinishReason.ABORT
        sampling = request.resolved_sampling()
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(words),
                token_ids=list(range(len(words))),
                finish_reason=reason,
                logprobs=None
                if sampling.logprobs is None
                else [_logprob(i, word) for i, word in enumerate(words) if i >= _num_received(request, index)],
            )
            for index in range(sampling.n)
        ]
        return Response.of(
            outputs,
            model=request.model,
            metrics=Metrics(ttft_ms=2.0, tpot_ms=1.0, error_rate=float(reason is FinishReason.ERROR)),
            usage=Usage(prompt_tokens=len(prompt.split()), completion_tokens=len(words) * sampling.n, cached_tokens=1),
            error=InternalError("the fake broke").to_error() if reason is FinishReason.ERROR else None,
            **names,
        )

    def abort(self, request_id: str) -> None:
        if request_id not in self._aborted:
            raise NotFoundError(f"no request {request_id!r} is running")
        self._aborted[request_id].set()

    async def health_check(self) -> bool:
        return self.is_running

    async def stats(self) -> EngineStats:
        return self._stats()

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            num_blocks=8,
            num_free_blocks=8,
            kv_usage=0.0,
            num_steps=1,
            num_preemptions=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            evict_count=0,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            block_size=16,
        )

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        loop, epoch = asyncio.get_running_loop(), f"epoch-{self.num_starts}"
        is_ended = False

        def tell() -> None:
            if is_ended or not self.is_running:
                return
            if self.awake.is_set():
                callback(self._report(epoch))
            loop.call_later(interval_s, tell)

        def end() -> None:
            nonlocal is_ended
            is_ended = True

        loop.call_soon(tell)
        return end

    def _report(self, epoch: str) -> EngineReport:
        self.num_reports += 1
        cache = EventBatch(0, (AllBlocksCleared(),))
        return EngineReport(epoch, self.num_reports - 1, self._stats(), (), cache, CacheDigest())

    async def cache_snapshot(self) -> EventBatch:
        return EventBatch(0, (AllBlocksCleared(),))

    async def drain(self) -> None:
        self.is_draining = True
        await self._idle.wait()

    def resume(self) -> None:
        self.is_draining = False

    async def reset_prefix_cache(self) -> bool:
        return not self.running

    async def describe_model(self) -> ModelDescription:
        return ModelDescription(
            model=self.config.model_path,
            vocab_size=1000,
            hidden_size=4,
            max_model_len=self.config.max_model_len,
            chat_template=self.chat_template,
        )

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        text = request.prompt or " ".join(message.text for message in request.messages or ())
        return list(range(len(text.split())))

    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        return "".join(await self.token_texts(token_ids))

    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]:
        return [f"w{token_id} " for token_id in token_ids]

    def get_info(self) -> dict[str, Any]:
        return {"engine_id": self.engine_id, "model": self.config.model_path}


def _text(request: Request) -> str:
    if request.messages is not None:
        return str(request.messages[-1].content)
    return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt or ()))


def _num_received(request: Request, index: int) -> int:
    received = () if request.resume_from is None else request.resume_from.output_token_ids
    return len(received[index]) if received else 0


def _logprob(token_id: int, text: str) -> TokenLogprob:
    top = TopLogprob(token_id=token_id, logprob=-0.5, rank=1, token=text)
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, token=text, top=[top])


async def _first_of(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
