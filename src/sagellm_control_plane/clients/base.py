"""What the control plane asks of an engine, wherever it runs.

`EngineClient` is the interface; `LLMEngine` has it as it is. What only some engines can do stands in protocols of its
own, so that `isinstance` asks for it: `Killable`, `Detachable`, `Witnessed` and `PrefixTransfer`. `EngineLostError`
says that the engine is gone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sagellm_protocol import ModelDescription, Request, Response, StreamEvent, TokenizeRequest, UnavailableError

if TYPE_CHECKING:
    from sagellm_core.config import LLMEngineConfig
    from sagellm_core.engine_core.report import EngineReport, EngineStats
    from sagellm_core.kv_format import PrefixBlocks
    from sagellm_kv_cache import EventBatch

__all__ = [
    "Detachable",
    "EngineClient",
    "EngineLostError",
    "EngineRecord",
    "Killable",
    "Pingable",
    "PrefixTransfer",
    "Witnessed",
]


class EngineLostError(UnavailableError):
    """The engine died or its connection broke while a call was under way; the request may go to another engine.

    Retryable. The context holds `engine_id` and, where they are known, `pid` and `returncode` (negative: the signal).
    """


class EngineClient(Protocol):
    """An engine that answers requests; see `LLMEngine` for what each member promises.

    `start` does nothing where the engine runs already, and brings back one that stopped or was lost; `stop` does
    nothing where it doesn't run. Every call that is under way when the engine is lost raises `EngineLostError` at once;
    calls before `start` and after `stop` raise `UnavailableError`.
    """

    @property
    def engine_id(self) -> str: ...
    @property
    def config(self) -> LLMEngineConfig: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def drain(self) -> None: ...
    def resume(self) -> None: ...
    async def execute(self, request: Request, /) -> Response: ...
    def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]: ...
    def abort(self, request_id: str) -> None: ...
    async def health_check(self) -> bool: ...
    async def stats(self) -> EngineStats: ...
    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]: ...
    async def cache_snapshot(self) -> EventBatch: ...
    def get_info(self) -> dict[str, Any]: ...
    async def reset_prefix_cache(self) -> bool: ...
    async def describe_model(self) -> ModelDescription: ...
    async def tokenize(self, request: TokenizeRequest, /) -> list[int]: ...
    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str: ...
    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]: ...


@runtime_checkable
class Killable(Protocol):
    """An engine that can be ended without its help, and whose loss is told without being asked."""

    on_lost: Callable[[EngineLostError], None] | None
    """Called once when the engine died or its connection broke, not where `stop`, `kill` or `detach` was the reason."""

    @property
    def pid(self) -> int | None:
        """The engine's process on its machine; None while there is none."""
        ...

    async def kill(self) -> None:
        """End the engine by force; returns when it is gone. What is in flight raises `EngineLostError`."""
        ...


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """Enough to find a running engine again; plain values, to be stored. `config` holds the fields that were given."""

    engine_id: str
    pid: int
    started_at: float  # of the process, on the machine's own clock: tells it from a later one with the same pid
    endpoint: str  # of its socket
    epoch: str  # fresh for each process
    config: dict[str, Any]


@runtime_checkable
class Detachable(Killable, Protocol):
    """An engine that outlives its manager and can be found again by its record."""

    def record(self) -> EngineRecord:
        """What `adopt` needs; raises `UnavailableError` where the engine doesn't run."""
        ...

    async def detach(self) -> None:
        """Let go of the engine and leave it running; it ends by itself unless somebody adopts it in time."""
        ...


@runtime_checkable
class Pingable(Protocol):
    """An engine in a process of its own, which answers while its step loop is in the midst of a long step."""

    async def ping(self) -> None:
        """Return when the process answers; raises `EngineLostError` where it is gone."""
        ...


@runtime_checkable
class Witnessed(Protocol):
    """An engine of which it is seen how it ended."""

    @property
    def is_struck(self) -> bool:
        """Of one that was lost: whether a signal from outside ended or stopped it, so that no request is to blame."""
        ...


@runtime_checkable
class PrefixTransfer(Protocol):
    """An engine whose cached prefixes can be carried to another one; see `LLMEngine`."""

    async def export_prefix(
        self, token_ids: Sequence[int], *, cache_salt: str | None = None, lora_id: str | None = None
    ) -> PrefixBlocks | None: ...
    async def import_prefix(self, blocks: PrefixBlocks) -> int: ...
