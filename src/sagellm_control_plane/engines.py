"""An engine under the control plane: its life, and the ledger of what it has in flight.

`Engine` is what the control plane needs of an engine (`LLMEngine` has it); `ManagedEngine` is one with its state. Both
belong to one event loop; only its thread touches them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sagellm_control_plane.types import (
    EngineInfo,
    EngineState,
    ExecutionInstance,
    ExecutionInstanceType,
    RequestType,
)
from sagellm_protocol import ModelDescription, Request, Response, StreamEvent, TokenizeRequest

if TYPE_CHECKING:
    from sagellm_core.config import LLMEngineConfig
    from sagellm_core.engine_core.engine_core import EngineStats


_EVERYTHING = tuple(RequestType)
_TEXT = (RequestType.LLM_GENERATE, RequestType.LLM_CHAT)
# The kinds of requests that instances are meant for; the others take all.
_MEANT_FOR = {
    ExecutionInstanceType.PREFILLING: _TEXT,
    ExecutionInstanceType.DECODING: _TEXT,
    ExecutionInstanceType.EMBEDDING: (RequestType.EMBEDDING,),
}


class Engine(Protocol):
    """What the control plane asks of an engine; see `LLMEngine` for what each promises."""

    @property
    def engine_id(self) -> str: ...
    @property
    def config(self) -> LLMEngineConfig: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def execute(self, request: Request, /) -> Response: ...
    def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]: ...
    def abort(self, request_id: str) -> None: ...
    async def health_check(self) -> bool: ...
    async def stats(self) -> EngineStats: ...
    def get_info(self) -> dict[str, Any]: ...
    async def reset_prefix_cache(self) -> bool: ...
    async def describe_model(self) -> ModelDescription: ...
    async def tokenize(self, request: TokenizeRequest, /) -> list[int]: ...
    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str: ...
    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]: ...


@dataclass(slots=True, eq=False)
class ManagedEngine:
    """An engine, its state, and how many requests and tokens it was given and has not finished."""

    instance: ExecutionInstance
    engine: Engine
    state: EngineState = EngineState.STOPPED
    num_requests: int = 0
    num_tokens: int = 0
    last_grant: int = -1  # number of the last request it was given
    error: str | None = None
    description: ModelDescription | None = None  # of its model, once it has started
    is_held: bool = False  # the operator took it out: only the operator brings it back
    _starting: asyncio.Task[None] | None = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def engine_id(self) -> str:
        return self.instance.instance_id

    @property
    def instance_type(self) -> ExecutionInstanceType:
        return self.instance.instance_type

    @property
    def has_place(self) -> bool:
        """Whether it can take one more request now."""
        return self.state is EngineState.READY and self.num_requests < self.instance.max_concurrent_requests

    @property
    def is_loaded(self) -> bool:
        """Whether its model is in memory."""
        return self.state in (EngineState.READY, EngineState.DRAINING)

    @property
    def may_have_place(self) -> bool:
        """Whether waiting for it makes sense."""
        return self.state in (EngineState.STARTING, EngineState.READY)

    def serves(self, model: str, kind: RequestType | None = None) -> bool:
        """Whether requests for `model` may come here; `default` is any model, None any kind of request."""
        if model not in ("default", self.instance.model_name) or self.is_out:
            return False
        if kind is None:
            return True
        # Who names no model gets one that can answer; who names this one is told by the engine why it can't.
        is_hopeless = model == "default" and kind is not RequestType.EMBEDDING and self.makes_no_text
        return kind in _MEANT_FOR.get(self.instance_type, _EVERYTHING) and not is_hopeless

    @property
    def makes_no_text(self) -> bool:
        """Whether it is known that its model makes vectors only."""
        return self.description is not None and self.description.is_embedding

    @property
    def is_out(self) -> bool:
        """Whether it takes no more requests, whatever they ask for."""
        return self.is_held or self.state is EngineState.DRAINING

    def info(self) -> EngineInfo:
        """The engine at this moment."""
        return EngineInfo(
            engine_id=self.engine_id,
            model=self.instance.model_name,
            instance_type=self.instance_type,
            state=self.state,
            num_requests=self.num_requests,
            num_tokens=self.num_tokens,
            max_model_len=self.engine.config.max_model_len,
            error=self.error,
        )

    # ---- the ledger -----------------------------------------------------------------------------------

    def enter(self, num_tokens: int, number: int) -> None:
        """Book a request in; `leave` books it out."""
        self.num_requests += 1
        self.num_tokens += num_tokens
        self.last_grant = number

    def leave(self, num_tokens: int) -> None:
        """Book a request out."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        if self.num_requests == 0:
            self._idle.set()

    # ---- life -----------------------------------------------------------------------------------------

    def start(self, on_end: Callable[[], None]) -> asyncio.Task[None]:
        """Begin to start unless that has begun already; `on_end` is called when it has started or failed."""
        if self._starting is None:
            self.state, self.error = EngineState.STARTING, None
            self._starting = asyncio.ensure_future(self._start())
            self._starting.add_done_callback(lambda task: _end_of_start(task, on_end))
        return self._starting

    async def _start(self) -> None:
        try:
            await self.engine.start()
        except Exception as error:
            self.state, self.error = EngineState.ERROR, str(error)
            raise
        description = await self.engine.describe_model()
        self.description = description.model_copy(update={"model": self.instance.model_name})
        if self.state is EngineState.STARTING:
            self.state = EngineState.DRAINING if self.is_held else EngineState.READY

    def forget_failure(self) -> None:
        """Let the next `start` try again."""
        if self.state is EngineState.ERROR:
            self._starting = None

    def hold(self) -> None:
        """Take no more requests until `resume`; a loaded model stays loaded."""
        self.is_held = True
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING

    def resume(self) -> None:
        """Take requests again; what is not loaded loads with the next `start`."""
        self.is_held = False
        if self.state is EngineState.DRAINING:
            self.state = EngineState.READY

    async def drain(self) -> None:
        """Wait until the requests in flight have ended, then stop; whoever calls this has set DRAINING."""
        while self.num_requests:
            self._idle.clear()
            await self._idle.wait()
        await self.stop()

    async def stop(self) -> None:
        """Stop; requests in flight end with `abort`. An engine that is just loading is stopped when it has loaded."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
            self._starting = None
        await self.engine.stop()
        if self._starting is None:  # else it was started again meanwhile
            self.state = EngineState.STOPPED


def _end_of_start(task: asyncio.Task[None], on_end: Callable[[], None]) -> None:
    if not task.cancelled():
        task.exception()  # read here, because nobody may be waiting for it
    on_end()
