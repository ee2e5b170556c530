"""The engines that requests can go to: each with its row in the fleet, its life, and the requests it has in flight."""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sagellm_control_plane.clients.base import EngineClient, EngineLostError, Witnessed
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.events import EventHub, EventKind
from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lives import LifecycleHooks
from sagellm_control_plane.load_meter import LoadMeters
from sagellm_control_plane.policies import Destination
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.routing import RoutingContext
from sagellm_control_plane.routing.base import Rows
from sagellm_control_plane.store import EngineStore
from sagellm_control_plane.telemetry import Telemetry
from sagellm_control_plane.ticket import Stay
from sagellm_control_plane.types import EngineInfo, EngineState, ExecutionInstance, RequestType
from sagellm_protocol import InvalidArgumentError, NotFoundError, SageLLMError, UnavailableError

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineReport, EngineStats

_NO_ROWS: Rows = np.empty(0, np.intp)

# More than a request can lose: what is asked is whether some died that it has never seen.
_MAX_DEATHS = 64


@dataclass(frozen=True, slots=True)
class Serving:
    """The engines that one kind of requests may go to."""

    engines: list[ManagedEngine]
    asleep: list[ManagedEngine]  # those that are loaded only when one comes


class EnginePool:
    """Engines, their ledger and what is known of their speed and caches. Belongs to one event loop.

    `on_change` is called when an engine may take requests that could not before, or the other way round, and
    `on_removed` with the row of an engine that has left.
    """

    def __init__(
        self,
        config: ControlPlaneConfig,
        clock: Clock,
        events: EventHub,
        *,
        store: EngineStore | None = None,
        on_change: Callable[[], None],
        on_removed: Callable[[int], None],
    ) -> None:
        self.fleet = Fleet()
        self.predictor = Predictor(self.fleet)
        self.routing = RoutingContext(
            prefixes=PrefixIndex(config.max_cached_blocks), seed=config.seed, location=config.location
        )
        hooks = LifecycleHooks(
            on_added=self._added,
            on_state=self._state_changed,
            on_change=self._changed,
            on_lost=self._lost,
            on_report=self._reported,
            on_removed=self._removed,
        )
        self.loads = LoadMeters()
        self.supervisor = Supervisor(
            config.lifecycle, clock=clock, hooks=hooks, store=store, rng=random.Random(config.seed)
        )
        self._clock = clock
        self._events = events
        self._on_change = on_change
        self._on_removed = on_removed
        self._telemetry = Telemetry(self.predictor, self.routing.prefixes)
        self.names: Mapping[int, str] = {}  # of all rows; replaced, never changed
        self._by_row: dict[int, ManagedEngine] = {}
        self._stays: dict[ManagedEngine, set[Stay]] = {}
        self._serving: dict[tuple[str, RequestType | None], Serving] = {}  # until something changes
        self._open_rows: dict[Destination, Rows] = {}  # likewise
        self._max_model_len: int | None = None  # likewise
        self._died_at: deque[float] = deque(maxlen=_MAX_DEATHS)

    # ---- engines --------------------------------------------------------------------------------------

    @property
    def engines(self) -> list[ManagedEngine]:
        """All of them, in the order in which they came."""
        return list(self.supervisor.engines.values())

    def __contains__(self, engine_id: object) -> bool:
        return engine_id in self.supervisor.engines

    def get(self, engine_id: str) -> ManagedEngine:
        """One engine; `NotFoundError` for an unknown id."""
        return self.supervisor.get(engine_id)

    def add(self, instance: ExecutionInstance, client: EngineClient, *, is_configured: bool = False) -> None:
        """Take an engine in; it loads when it is started or woken."""
        self.supervisor.add(instance, client, is_configured=is_configured)

    @property
    def max_model_len(self) -> int:
        """The longest context of all engines, in tokens; 0 without any."""
        if self._max_model_len is None:
            engines = self.supervisor.engines.values()
            self._max_model_len = max((engine.client.config.max_model_len for engine in engines), default=0)
        return self._max_model_len

    def at(self, row: int) -> ManagedEngine:
        """The engine of a row."""
        return self._by_row[row]

    def info(self, engine: ManagedEngine) -> EngineInfo:
        """An engine at this moment."""
        return engine.info(sum(stay.num_expected_tokens for stay in self._stays[engine]))

    async def loaded(self, model: str) -> ManagedEngine:
        """An engine that has a model in memory; one is started where there is none."""
        serving = self.serving(model).engines
        for engine in serving:
            if engine.is_loaded:
                return engine
        await asyncio.shield(self.supervisor.start(serving[0].engine_id))
        return serving[0]

    async def health_check(self) -> bool:
        """Whether at least one engine takes requests and answers."""
        ready = [engine.client for engine in self.engines if engine.state is EngineState.READY]
        return any(await asyncio.gather(*(client.health_check() for client in ready)))

    async def stats(self) -> dict[str, EngineStats]:
        """The counters of each engine that is loaded and answers, by id."""
        loaded = [engine for engine in self.engines if engine.is_loaded]
        stats = await asyncio.gather(*(_stats_of(engine) for engine in loaded))
        return {engine.engine_id: stat for engine, stat in zip(loaded, stats, strict=True) if stat is not None}

    async def reset_prefix_caches(self) -> dict[str, bool]:
        """Forget all cached prefixes of the loaded engines, by id; False where requests hold blocks."""
        loaded = [engine for engine in self.engines if engine.is_loaded]
        done = await asyncio.gather(*(engine.client.reset_prefix_cache() for engine in loaded))
        return {engine.engine_id: is_done for engine, is_done in zip(loaded, done, strict=True)}

    # ---- who can take a request -----------------------------------------------------------------------

    def serving(self, model: str, kind: RequestType | None = None) -> Serving:
        """The engines that requests of a kind for `model` may go to; `NotFoundError` where there is none."""
        serving = self._serving.get((model, kind))
        if serving is None:
            engines = self._find_serving(model, kind)
            asleep = [engine for engine in engines if engine.wanted is Wanted.UNLOADED]
            serving = self._serving[model, kind] = Serving(engines, asleep)
        return serving

    def open_rows(self, destination: Destination) -> Rows:
        """The rows of the engines that take such requests now; whether they have a place is another matter."""
        rows = self._open_rows.get(destination)
        if rows is None:
            model, kind = destination
            found = [
                engine.row
                for engine in self.supervisor.engines.values()
                if engine.row is not None and engine.takes_requests and engine.serves(model, kind)
            ]
            rows = self._open_rows[destination] = np.array(found, np.intp) if found else _NO_ROWS
        return rows

    def free_rows(self, destination: Destination) -> Rows:
        """Those of them that have a place."""
        rows, full = self.open_rows(destination), self.fleet.full
        if not full:
            return rows
        if len(rows) == 1:
            return _NO_ROWS if rows.item() in full else rows
        return rows[self.fleet.num_requests[rows] < self.fleet.capacity[rows]]

    def hopeless(self, destination: Destination, *, avoided: ManagedEngine | None = None) -> UnavailableError | None:
        """Why it makes no sense to wait for such an engine, other than `avoided`; None where it does."""
        if avoided is None and self.open_rows(destination).size:
            return None
        model, kind = destination
        engines = self.supervisor.engines.values()
        serving = [engine for engine in engines if engine is not avoided and engine.serves(model, kind)]
        if any(engine.takes_requests or engine.may_take_requests for engine in serving):
            return None
        reasons = "; ".join(engine.error or f"{engine.engine_id} is {engine.state.value}" for engine in serving)
        return UnavailableError(f"no engine can take the request: {reasons or 'the last one was taken away'}")

    # ---- the ledger -----------------------------------------------------------------------------------

    def enter(self, stay: Stay) -> None:
        """A request begins its stay on an engine."""
        engine = stay.engine
        assert engine.row is not None, "only engines with a row are chosen"
        self.fleet.grant(engine.row, stay.booking)
        self._stays[engine].add(stay)
        engine.enter()
        if not engine.takes_requests:  # half-open breakers let one through
            self._forget_ways()

    def leave(self, stay: Stay, *, is_ok: bool | None) -> None:
        """It has ended there: well, through the engine's fault, or (None) in a way that says nothing of the engine."""
        engine = stay.engine
        self.fleet.end(stay.booking)
        if engine in self._stays:
            self._stays[engine].discard(stay)
        engine.leave(is_ok)
        if not is_ok:
            self._forget_ways()

    def rebook(self, stay: Stay, booking: Booking) -> None:
        """What a stay takes of its engine is something else than was expected."""
        self.fleet.end(stay.booking)
        stay.booking = booking
        if stay.engine.row is not None:
            self.fleet.grant(stay.engine.row, booking)

    def num_died_since(self, at: float) -> int:
        """Engines lost since then, but for those that a signal from outside ended or stopped."""
        return sum(died_at >= at for died_at in self._died_at)

    def has_trial(self, row: int) -> bool:
        """Whether an engine has a request that may have killed another one and has not got any further yet."""
        return any(stay.is_trial for stay in self._stays[self._by_row[row]])

    def has_suspect(self, row: int) -> bool:
        """Whether an engine has a request that has lost another one and got no further yet."""
        return any(stay.num_losses_before for stay in self._stays[self._by_row[row]])

    def reserve(self, engine: ManagedEngine, *, is_reserved: bool) -> None:
        """Let an engine take no request but one, or all again."""
        engine.is_reserved = is_reserved
        self._forget_ways()

    def emptiest(self, destination: Destination, avoided: ManagedEngine | None) -> ManagedEngine | None:
        """The engine with the fewest requests that takes such ones, or will; None where there is none."""
        model, kind = destination
        coming = [
            engine
            for engine in self.supervisor.engines.values()
            if engine.may_take_requests
            and engine.serves(model, kind)
            and engine is not avoided
            and not engine.is_reserved
            and not engine.is_stuck
            and engine.row is not None
        ]
        return min(coming, key=lambda engine: (engine.num_requests, not engine.is_open), default=None)

    # ---- what the supervisor says ---------------------------------------------------------------------

    def _added(self, engine: ManagedEngine) -> None:
        instance, config = engine.instance, engine.client.config
        engine.row = self.fleet.add(
            engine.engine_id,
            capacity=instance.max_concurrent_requests,
            max_num_batched_tokens=config.max_num_batched_tokens,
            price=instance.price_per_hour,
            group=instance.location,
        )
        self.predictor.add_engine(engine.row)
        self._by_row[engine.row] = engine
        self._name_rows()
        self._stays[engine] = set()
        self._forget_ways()
        self._events.publish(EventKind.ENGINE, f"{engine.engine_id} has come", engine_id=engine.engine_id)

    def _state_changed(self, engine: ManagedEngine, old: EngineState, new: EngineState, reason: str) -> None:
        self._events.publish(
            EventKind.ENGINE,
            f"{engine.engine_id}: {old} -> {new} ({reason})",
            engine_id=engine.engine_id,
            old=old.value,
            new=new.value,
        )
        if new in (EngineState.STOPPED, EngineState.ERROR):
            self._telemetry.forget(engine)

    def _changed(self, _: ManagedEngine) -> None:
        self._forget_ways()
        self._on_change()

    def _lost(self, engine: ManagedEngine, error: SageLLMError) -> None:
        """Its requests move, whether or not their streams find out by themselves."""
        self._events.publish(EventKind.LOST, f"{engine.engine_id} is lost: {error.message}", engine_id=engine.engine_id)
        self._forget_ways()
        lost = error if isinstance(error, EngineLostError) else EngineLostError(error.message, context=error.context)
        stays = list(self._stays.get(engine, ()))
        is_struck = isinstance(engine.client, Witnessed) and engine.client.is_struck
        if not is_struck:
            self._died_at.append(self._clock.now())
        num_losses = sorted(stay.num_losses_before for stay in stays)
        for stay in stays:
            stay.num_suspects = 0 if is_struck else len(stays) - bisect_left(num_losses, stay.num_losses_before)
            stay.pull.interrupt(lost)
        self._on_change()

    def _reported(self, engine: ManagedEngine, report: EngineReport) -> None:
        self._telemetry.report(engine, report)

    def _removed(self, engine: ManagedEngine) -> None:
        row = engine.row
        if row is None:
            return
        self._telemetry.forget(engine)
        self.predictor.remove_engine(row)
        self.fleet.remove(row)
        del self._by_row[row], self._stays[engine]
        engine.row = None
        self._name_rows()
        self._events.publish(EventKind.ENGINE, f"{engine.engine_id} has left", engine_id=engine.engine_id)
        self._forget_ways()
        self._on_removed(row)
        self._on_change()

    # ---- steps of the above ---------------------------------------------------------------------------

    def _find_serving(self, model: str, kind: RequestType | None) -> list[ManagedEngine]:
        engines = self.engines
        serving = [engine for engine in engines if engine.serves(model, kind)]
        if serving:
            return serving
        if any(engine.serves(model) for engine in engines):
            makes, lacks = ("text", "vectors") if kind is RequestType.EMBEDDING else ("vectors", "text")
            raise InvalidArgumentError(
                f"the engines of the model {model!r} make {makes}, no {lacks}; name another model", field="model"
            )
        if any(model in ("default", engine.instance.model_name) for engine in engines):
            raise UnavailableError(f"the engines of the model {model!r} take no requests now; try again later")
        known = ", ".join(sorted({engine.instance.model_name for engine in engines})) or "none"
        raise NotFoundError(f"no engine serves the model {model!r}; there is {known}", field="model")

    def _forget_ways(self) -> None:
        """Something has changed: who serves what has to be found anew."""
        self._serving.clear()
        self._open_rows.clear()
        self._max_model_len = None

    def _name_rows(self) -> None:
        self.names = {row: engine.engine_id for row, engine in self._by_row.items()}


async def _stats_of(engine: ManagedEngine) -> EngineStats | None:
    """None for an engine that stops in this moment."""
    try:
        return await engine.client.stats()
    except UnavailableError:
        return None
