"""Engines of other projects in this process: holds `ForeignEngine`, what the clients of all of them share.

They take the protocol's requests and tell nothing of their caches, so routers guess what these hold from what they sent
them. What such an engine cannot do as ours do is refused with `UnsupportedError`, naming the field.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, ClassVar, Generic, TypeVar

from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clock import Clock, LoopClock
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport, EngineStats
from sagellm_core.gate import RequestGate
from sagellm_kv_cache import AllBlocksCleared, CacheDigest, EventBatch
from sagellm_protocol import (
    DecodingStrategy,
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    SamplingParams,
    StreamEvent,
    StreamEventEnd,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
    new_request_id,
)

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_NOTHING_CACHED = EventBatch(0, (AllBlocksCleared(),))
_POLL_S = 0.005


class ForeignEngine(ABC, Generic[Answer]):
    """All of `EngineClient` but the engine itself. `Answer` is what a subclass knows of a request that runs."""

    project: ClassVar[str]
    """Whose engine it is, as errors name it."""

    def __init__(self, config: LLMEngineConfig, clock: Clock | None) -> None:
        self.engine_id = config.engine_id or f"{self.project.lower()}-{new_request_id().removeprefix('req-')[:8]}"
        self._config = config.model_copy(update={"engine_id": self.engine_id})
        self._clock = clock or LoopClock()
        self._life = asyncio.Lock()  # one start or end at a time
        self._gate = RequestGate()
        self._engine: Any = None
        self._tokenizer: Any = None
        self._epoch = ""
        self._num_reports = 0
        self._running: dict[str, Answer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._left: set[asyncio.Task[None]] = set()  # engines whose start was given up, until they are closed
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    @property
    def config(self) -> LLMEngineConfig:
        """As it was given; once the engine has started, with the length that it takes."""
        return self._config

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model; raises `UnsupportedError` where the package is missing, `UnavailableError` where it fails.

        Cancelled, it leaves nothing behind: an engine that is being made is closed when it is there.
        """
        async with self._life:
            if self._is_alive():
                return
            await self._shut_down()
            if self._left:  # there may be no room for two
                await asyncio.wait(self._left)
            await self._load()
            self._epoch, self._num_reports = secrets.token_hex(8), 0

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and free the model."""
        async with self._life:
            if self._is_alive():
                for request_id in list(self._running):
                    self.abort(request_id)
                while self._running and self._is_alive():
                    await self._clock.sleep(_POLL_S)
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
            await self._close(engine)

    async def _made(self, make: Callable[[], Any]) -> Any:
        """The engine that `make` gives, in a thread beside the event loop: it takes a minute."""
        making = asyncio.ensure_future(asyncio.to_thread(make))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            leaving = asyncio.ensure_future(self._leave(making))
            self._left.add(leaving)
            leaving.add_done_callback(self._left.discard)
            raise

    async def _leave(self, making: asyncio.Future[Any]) -> None:
        try:
            engine = await making
        except Exception as error:
            logger.info("%s's start was given up, and failed: %s", self.engine_id, error)
        else:
            await self._close(engine)

    @abstractmethod
    async def _load(self) -> None:
        """Make `_engine` and `_tokenizer`, and set the length in `_config`."""

    @abstractmethod
    async def _close(self, engine: Any) -> None: ...

    @abstractmethod
    def _is_alive(self) -> bool:
        """Whether there is an engine that has not died."""

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /) -> Response:
        """The whole answer."""
        return await self._whole(request, self.stream(request))

    @abstractmethod
    def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]: ...

    def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets the finish reason `abort`."""
        answer = self._running.get(request_id)
        if answer is None:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        self._abort(request_id, answer)

    @abstractmethod
    def _abort(self, request_id: str, answer: Answer) -> None: ...

    async def _whole(self, request: Request, stream: AsyncGenerator[StreamEvent, None]) -> Response:
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, StreamEventEnd):
                    return event.to_response().model_copy(update={"model": request.model})
        raise AssertionError("streams end with an end")

    @contextmanager
    def _runs(self, request_id: str, answer: Answer, num_prompt_tokens: int) -> Iterator[None]:
        """A request is in the engine for the length of the body."""
        if request_id in self._running:
            raise InvalidArgumentError(f"request_id {request_id!r} is already running; use a fresh id")
        self._running[request_id] = answer
        self._num_prompt_tokens += num_prompt_tokens
        try:
            yield
        finally:
            del self._running[request_id]

    async def _prompt_tokens(self, request: Request) -> list[int]:
        """The tokens of the prompt; raises where they leave no room for an answer."""
        if request.prompt_token_ids is not None:
            token_ids = list(request.prompt_token_ids)
        elif isinstance(request.prompt, list):
            token_ids = list(request.prompt)
        else:
            wanted = TokenizeRequest(
                prompt=request.prompt,
                messages=request.messages,
                tools=request.tools,
                chat_template_kwargs=request.chat_template_kwargs,
            )
            token_ids = await self.tokenize(wanted)
        if len(token_ids) >= self._config.max_model_len:
            raise InvalidArgumentError(
                f"the prompt is too long: this model's maximum context length is {self._config.max_model_len} tokens "
                f"(max_model_len) for prompt and output together, and it has {len(token_ids)}; shorten it",
                field="prompt" if request.messages is None else "messages",
            )
        return token_ids

    def _sampling(self, request: Request, num_prompt_tokens: int) -> SamplingParams:
        """The request's parameters, cut to the room that there is; raises for what no such engine does."""
        sampling = request.resolved_sampling(self._config.sampling_defaults)
        _refuse(self.project, request, sampling)
        is_given = "max_tokens" in sampling.model_fields_set
        wanted = sampling.max_tokens if is_given else self._config.max_new_tokens
        max_tokens = min(wanted, self._config.max_model_len - num_prompt_tokens)
        if sampling.seed is None and request.resume_from is not None:
            sampling = sampling.replace(seed=request.resume_from.seed)
        return sampling.replace(max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))

    # ---- what the engine tells ------------------------------------------------------------------------

    async def health_check(self) -> bool:
        """Whether the engine lives."""
        return self._is_alive()

    async def stats(self) -> EngineStats:
        """What can be counted from outside: requests and tokens."""
        self._loaded()
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

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        """Call `callback` every `interval_s` while the engine lives; the reports know no steps and no cache."""
        self._loaded()
        task = self._do(self._report(callback, interval_s))

        def end() -> None:
            task.cancel()

        return end

    async def cache_snapshot(self) -> EventBatch:
        """Nothing: the cache is not told of."""
        return _NOTHING_CACHED

    def get_info(self) -> dict[str, Any]:
        """Model and limits, as plain JSON values."""
        return {
            "engine_id": self.engine_id,
            "model": self._config.model_path,
            "backend": self.project.lower(),
            "running": self._engine is not None,
            "max_model_len": self._config.max_model_len,
            "max_batch_size": self._config.max_batch_size,
        }

    @abstractmethod
    async def reset_prefix_cache(self) -> bool: ...

    @abstractmethod
    async def describe_model(self) -> ModelDescription: ...

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        """The token ids of a text or a conversation."""
        self._loaded()
        return await asyncio.to_thread(self._tokenize, request)

    @abstractmethod
    def _tokenize(self, request: TokenizeRequest) -> list[int]: ...

    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        self._loaded()
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]:
        """The text of each token by itself."""
        self._loaded()
        return [str(self._tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in token_ids]

    # ---- steps of the above ---------------------------------------------------------------------------

    def _loaded(self) -> Any:
        if self._engine is None:
            raise UnavailableError("the engine is not running; call start() first")
        if not self._is_alive():
            raise self._loss()
        return self._engine

    def _loss(self) -> EngineLostError:
        return EngineLostError(f"{self.project}'s engine {self.engine_id} died", engine_id=self.engine_id)

    async def _report(self, callback: Callable[[EngineReport], None], interval_s: float) -> None:
        while self._is_alive():
            stats = await self.stats()
            report = EngineReport(self._epoch, self._num_reports, stats, (), _NOTHING_CACHED, CacheDigest())
            self._num_reports += 1
            callback(report)
            await self._clock.sleep(interval_s)

    def _do(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _refuse(project: str, request: Request, sampling: SamplingParams) -> None:
    if request.embed is not None:
        raise UnsupportedError(
            f"embed is not supported on {project} here; send it to one of our own engines", field="embed"
        )
    if request.resume_from is not None and any(request.resume_from.output_token_ids):
        raise UnsupportedError(
            f"{project} cannot go on with an answer that another engine began; send the request anew",
            field="resume_from",
        )
    if sampling.strategy not in (DecodingStrategy.GREEDY, DecodingStrategy.SAMPLING):
        raise UnsupportedError(
            f"strategy {sampling.strategy} is not supported on {project} here; use greedy or sampling",
            field="strategy",
        )
