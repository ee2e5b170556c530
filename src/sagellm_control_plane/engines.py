"""An engine under the control plane: what it is, what is wanted of it, and where it stands.

The `Supervisor` of `lifecycle.py` moves its state. All of it belongs to one event loop; only its thread touches it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sagellm_control_plane.breaker import CircuitBreaker
from sagellm_control_plane.clients.base import EngineClient, Killable
from sagellm_control_plane.clock import Clock, LoopClock
from sagellm_control_plane.health import HealthWatch
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.restarts import Restarts
from sagellm_control_plane.types import (
    EngineInfo,
    EngineState,
    ExecutionInstance,
    ExecutionInstanceType,
    RequestType,
)
from sagellm_protocol import ModelDescription, SageLLMError
from sagellm_protocol.model import ProtocolEnum

if TYPE_CHECKING:
    from sagellm_core.config import LLMEngineConfig


_EVERYTHING = tuple(RequestType)
_TEXT = (RequestType.LLM_GENERATE, RequestType.LLM_CHAT)
# The kinds of requests that instances are meant for; the others take all.
_MEANT_FOR = {
    ExecutionInstanceType.PREFILLING: _TEXT,
    ExecutionInstanceType.DECODING: _TEXT,
    ExecutionInstanceType.EMBEDDING: (RequestType.EMBEDDING,),
}


class Wanted(ProtocolEnum):
    """What an operator, or the control plane itself, wants of an engine; its state follows."""

    READY = "ready"
    UNLOADED = "unloaded"  # until a request wakes it
    HELD = "held"  # takes no requests; what is loaded stays loaded
    STOPPED = "stopped"  # requests end with `abort`, and none wakes it
    REMOVED = "removed"  # requests in flight end, then it is forgotten


# Kept by themselves, as to look into an enumeration takes longer than all that is asked of an engine by each request.
_READY, _WANTED = EngineState.READY, Wanted.READY
_LOADED = (EngineState.READY, EngineState.DRAINING)
_OUT = (Wanted.HELD, Wanted.STOPPED, Wanted.REMOVED)
_LEAVING = (Wanted.UNLOADED, Wanted.STOPPED, Wanted.REMOVED)


@dataclass(slots=True, eq=False)
class ManagedEngine:
    """An engine, its state, and how many requests it was given and has not finished.

    `state` and what follows it are the `Supervisor`'s; `row` is where the `Fleet` has its ledger.
    """

    instance: ExecutionInstance
    client: EngineClient
    clock: Clock = field(default_factory=LoopClock)
    config: LifecycleConfig = field(default_factory=LifecycleConfig)
    rng: random.Random = field(default_factory=random.Random)
    row: int | None = None
    num_requests: int = 0
    last_used: float = 0.0  # when a request began or ended

    state: EngineState = EngineState.STOPPED
    wanted: Wanted = Wanted.UNLOADED
    kept: Wanted = Wanted.UNLOADED  # what the next manager is to want of it
    given: LLMEngineConfig = field(init=False)  # its configuration as it was given; the client's is fitted to the model
    is_configured: bool = False  # it stands in the configuration, which the next manager reads anew
    stands_for: str | None = None  # the engine of the configuration whose place it took
    error: str | None = None
    description: ModelDescription | None = None  # of its model, once it has started
    generation: int = 0  # counts its starts
    num_kv_tokens: int = 0  # that its KV cache holds; 0: not known
    memory_bytes: int = 0  # that its model takes or will take, as far as known
    is_proven: bool = False  # it was ready once: it is restarted when it dies
    is_given_up: bool = False  # until an operator starts it
    is_yielding: bool = False  # it leaves memory to another model, whatever is wanted of it
    is_stuck: bool = False  # it hangs and could not be killed: still in memory
    is_reserved: bool = False  # for one request, which is to be alone there: it takes no other
    loss: SageLLMError | None = None  # it died, and what is left of it has to be put away
    on_left: Callable[[ManagedEngine], None] | None = None
    breaker: CircuitBreaker = field(init=False)
    health: HealthWatch = field(init=False)
    restarts: Restarts = field(init=False)

    def __post_init__(self) -> None:
        self.given = self.client.config
        self.breaker = CircuitBreaker(self.config.breaker, self.clock)
        self.health = HealthWatch(self.config, self.rng)
        self.restarts = Restarts(self.config, self.rng)

    @property
    def engine_id(self) -> str:
        return self.instance.instance_id

    @property
    def instance_type(self) -> ExecutionInstanceType:
        return self.instance.instance_type

    @property
    def pid(self) -> int | None:
        """The process it runs in, where that is one of its own."""
        return self.client.pid if isinstance(self.client, Killable) else None

    @property
    def takes_requests(self) -> bool:
        """Whether any request may go to it now, as far as its state is concerned; the ledger knows its places."""
        return not self.is_reserved and self.is_open

    @property
    def is_open(self) -> bool:
        """Likewise, for the request that it is reserved for."""
        return self.state is _READY and not self.health.is_doubted and self.breaker.allows

    @property
    def may_take_requests(self) -> bool:
        """Whether waiting for it makes sense: it runs, starts, restarts, or waits for memory."""
        return self.wanted is Wanted.READY and not self.is_given_up

    @property
    def is_leaving(self) -> bool:
        """Whether it is to leave memory."""
        return self.is_yielding or self.wanted in _LEAVING

    @property
    def is_staying(self) -> bool:
        """Whether it is to be in memory and to take requests."""
        return self.wanted is _WANTED and not self.is_yielding

    @property
    def is_loaded(self) -> bool:
        """Whether its model is in memory."""
        return self.state in _LOADED

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
        return self.wanted in _OUT

    def info(self, num_tokens: int = 0) -> EngineInfo:
        """The engine at this moment; `num_tokens` in flight is what the fleet's ledger says."""
        return EngineInfo(
            engine_id=self.engine_id,
            model=self.instance.model_name,
            instance_type=self.instance_type,
            state=self.state,
            num_requests=self.num_requests,
            num_tokens=num_tokens,
            max_model_len=self.client.config.max_model_len,
            error=self.error,
            pid=self.pid,
        )

    # ---- requests -------------------------------------------------------------------------------------

    def enter(self) -> int:
        """A request goes there; `leave` books it out. Returns the engine's generation, see `Supervisor.lost`."""
        self.num_requests += 1
        self.last_used = self.clock.now()
        self.breaker.enter()
        return self.generation

    def leave(self, is_ok: bool | None = None) -> None:
        """A request is over: it went well, failed through the engine's fault, or (None) says nothing of the engine."""
        self.num_requests -= 1
        self.last_used = self.clock.now()
        if not self.is_loaded:
            is_ok = None  # it is lost already, and that says all
        if is_ok is not None:
            self.breaker.record(is_ok)
        if is_ok:
            self.restarts.forget()
        elif is_ok is False:
            self.health.ask(self.last_used)
        if self.on_left is not None:
            self.on_left(self)
