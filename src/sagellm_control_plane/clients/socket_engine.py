"""An engine at the other end of a socket, as the control plane sees it.

Holds `SocketEngine`: all of `EngineClient` but how the engine comes to life, which its subclasses know (a child
process, an actor on another machine).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, cast

import msgspec

from sagellm_control_plane.clients import wire
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clients.connection import Call, EngineConnection
from sagellm_control_plane.clients.texts import ModelTexts
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport, EngineStats
from sagellm_core.kv_format import PrefixBlocks
from sagellm_core.report_codec import unpack_cache
from sagellm_kv_cache import EventBatch
from sagellm_protocol import (
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    StreamEvent,
    TokenizeRequest,
    UnavailableError,
    new_request_id,
)

_NOT_RUNNING = "the engine is not running; call start() first"


class SocketEngine(ABC):
    """An engine that is reached through an `EngineConnection`; subclasses make it and know when it is gone."""

    def __init__(self, config: LLMEngineConfig) -> None:
        self.engine_id = config.engine_id or f"engine-{new_request_id().removeprefix('req-')[:8]}"
        self.on_lost: Callable[[EngineLostError], None] | None = None
        self._given = config.model_copy(update={"engine_id": self.engine_id})
        self._config = self._given
        self._life = asyncio.Lock()  # one start or end at a time
        self._line: EngineConnection | None = None
        self._info: dict[str, Any] = {}
        self._description: ModelDescription | None = None
        self._texts: ModelTexts | None = None
        self._watchers: dict[Callable[[], None], tuple[Callable[[EngineReport], None], float]] = {}

    @property
    def config(self) -> LLMEngineConfig:
        """As it was given; once the engine has started, as it was fitted to the model."""
        return self._config

    @property
    def pid(self) -> int | None:
        """The engine's process on its machine; None while there is none."""
        return None

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the engine to life and wait until its model is loaded.

        Raises what loading raised, and `UnavailableError` with the end of the engine's log where it died of it. A start
        that fails or is cancelled leaves nothing behind.
        """
        async with self._life:
            if not self.is_running:
                await self._start()

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._line is not None and self._line.is_alive

    @abstractmethod
    async def _start(self) -> None: ...

    async def _use(self, line: EngineConnection, ready: wire.Ready) -> None:
        """Take over what the engine said of itself; from now on requests go to it."""
        fields = msgspec.json.decode(ready.config)
        self._config = LLMEngineConfig(**fields)
        self._info = msgspec.json.decode(ready.info)
        self._description = ModelDescription.model_validate_json(ready.description)
        self._texts = await ModelTexts.of(self._config)
        self._line = line

    def _lose(self, error: EngineLostError) -> None:
        """The engine is gone, and not because we ended it."""
        if self._drop_line(error) and self.on_lost is not None:
            self.on_lost(error)

    def _drop_line(self, error: UnavailableError) -> bool:
        """Whether there was one; what waits on it raises `error`."""
        line, self._line = self._line, None
        self._watchers.clear()
        if line is not None:
            line.lose(error)
        return line is not None

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /) -> Response:
        """The whole answer, or the vector that was asked for."""
        call = self._submit(request, is_streamed=False)
        try:
            return cast(Response, await call.get())
        finally:
            call.close()

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request."""
        call = self._submit(request, is_streamed=True)
        try:
            while not call.is_at_end:
                yield cast(StreamEvent, await call.get())
        finally:
            call.close()

    def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets the finish reason `abort`."""
        call = None if self._line is None else self._line.running(request_id)
        if call is None:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        self._running().abort(call)

    async def drain(self) -> None:
        """As `LLMEngine.drain`."""
        await self._running().ask("drain")

    def resume(self) -> None:
        """Take requests again after `drain`."""
        if self._line is not None:
            self._line.tell("resume")

    def _submit(self, request: Request, *, is_streamed: bool) -> Call:
        line = self._running()
        if line.running(request.request_id) is not None:
            raise InvalidArgumentError(f"request_id {request.request_id!r} is already running; use a fresh id")
        return line.submit(request, is_streamed=is_streamed)

    # ---- what the engine tells ------------------------------------------------------------------------

    async def ping(self) -> None:
        """Return when the process answers, whatever its step loop does; waits as long as a stopped one is stopped."""
        await self._running().ask("ping")

    async def health_check(self) -> bool:
        """Whether the engine runs and its step loop answers; waits as long as a hanging one hangs."""
        if not self.is_running:
            return False
        try:
            return msgspec.msgpack.decode(await self._running().ask("health"), type=bool)
        except UnavailableError:
            return False

    async def stats(self) -> EngineStats:
        """Running and waiting requests, KV usage and counters at this moment."""
        return msgspec.msgpack.decode(await self._running().ask("stats"), type=EngineStats)

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        """Call `callback` with reports, at least every `interval_s`; returns what ends that, as the engine's end does.

        The events of the cache come without token ids.
        """
        line = self._running()

        def end() -> None:
            if self._watchers.pop(end, None) is not None:
                line.watch(self._shortest_interval())

        self._watchers[end] = (callback, interval_s)
        line.watch(self._shortest_interval())  # again for each, because its first report holds all that is cached
        return end

    async def cache_snapshot(self) -> EventBatch:
        """All that is cached, as events without token ids; the watchers are told the same."""
        return unpack_cache(wire.decode_cache_events(await self._running().ask("cache_snapshot")))

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return msgspec.msgpack.decode(await self._running().ask("reset_prefix_cache"), type=bool)

    async def export_prefix(
        self, token_ids: Sequence[int], *, cache_salt: str | None = None, lora_id: str | None = None
    ) -> PrefixBlocks | None:
        """As `LLMEngine.export_prefix`."""
        return await self._running().export_prefix(token_ids, cache_salt, lora_id)

    async def import_prefix(self, blocks: PrefixBlocks) -> int:
        """As `LLMEngine.import_prefix`."""
        return msgspec.msgpack.decode(await self._running().import_prefix(blocks), type=int)

    def _shortest_interval(self) -> float | None:
        return min((interval_s for _, interval_s in self._watchers.values()), default=None)

    def _on_report(self, report: EngineReport) -> None:
        for callback, _ in list(self._watchers.values()):
            callback(report)

    # ---- what is known here ---------------------------------------------------------------------------

    def get_info(self) -> dict[str, Any]:
        """Model, device, dtypes, kernels and limits, as plain JSON values."""
        info = {"engine_id": self.engine_id, "model": self._config.model_path, **self._info}
        return {**info, "running": self.is_running, "pid": self.pid}

    async def describe_model(self) -> ModelDescription:
        """What the model is, once the engine has started."""
        if self._description is None:
            raise UnavailableError(_NOT_RUNNING)
        return self._description

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        """The token ids of a text or a conversation; made in this process."""
        return await self._loaded_texts().tokenize(request)

    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        return await self._loaded_texts().detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]:
        """The text of each token by itself."""
        return await self._loaded_texts().token_texts(token_ids)

    def _loaded_texts(self) -> ModelTexts:
        if self._texts is None:
            raise UnavailableError(_NOT_RUNNING)
        return self._texts

    def _running(self) -> EngineConnection:
        if self._line is None or not self._line.is_alive:
            raise UnavailableError(_NOT_RUNNING)
        return self._line
