"""Random histories of operators, requests, deaths, hangs and swaps: whatever happens, the supervisor keeps its word."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import virtual_loop
from fake_child import FakeChild, FakeThread
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lifecycle_config import BreakerConfig, LifecycleConfig
from sagellm_control_plane.lives import LifecycleHooks
from sagellm_control_plane.replacement import replace_model
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import SageLLMError, UnavailableError

S = EngineState
_MAY_FOLLOW = {
    S.STOPPED: {S.STARTING},
    S.STARTING: {S.READY, S.DRAINING, S.STOPPED, S.ERROR},
    S.READY: {S.DRAINING, S.ERROR},
    S.DRAINING: {S.READY, S.STOPPED, S.ERROR},
    S.ERROR: {S.STARTING, S.STOPPED, S.DRAINING},  # DRAINING: a stuck engine that goes on, or is stopped
}
_SIZE = 40  # of each model, where there is a budget
_BUDGET = 100
_MODELS = ("m0", "m1")

_ENGINES = st.integers(0, 3)
_ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["start", "hold", "stop", "remove", "die", "die unseen", "hang", "go on"]), _ENGINES),
    st.tuples(st.sampled_from(["sick", "long step", "fail next start", "fail next start for good", "cut"]), _ENGINES),
    st.tuples(st.sampled_from(["request", "replace", "add"]), st.integers(0, 1)),
    st.tuples(st.sampled_from(["stop all", "start all"]), st.just(0)),
)
_HISTORIES = st.lists(st.tuples(_ACTIONS, st.sampled_from([0.0, 0.0, 0.1, 0.7, 3.0, 30.0])), max_size=40)


class World:
    """A supervisor, its engines and the requests in front of it."""

    def __init__(self, *, seed: int, has_budget: bool, unloads: bool) -> None:
        self.rng = random.Random(seed)
        self.has_budget = has_budget
        config = LifecycleConfig(
            hang_timeout_s=4,
            stall_timeout_s=20,
            probe_interval_s=1,
            probe_timeout_s=1,
            start_timeout_s=20,
            stop_timeout_s=5,
            max_restarts=3,
            swap_patience_s=5,
            idle_unload_s=20 if unloads else None,
            memory_budget_bytes=_BUDGET if has_budget else None,
            breaker=BreakerConfig(failures_to_open=2),
        )
        hooks = LifecycleHooks(
            on_state=self._moved, on_change=self._changed, on_lost=self._lost, on_removed=self._removed
        )
        self.supervisor = Supervisor(config, hooks=hooks, rng=random.Random(seed))
        self.children: dict[ManagedEngine, FakeThread] = {}
        self.running: dict[ManagedEngine, list[asyncio.Future[bool]]] = {}
        self.goals: list[asyncio.Future[Any]] = []
        self.requests: list[asyncio.Task[None]] = []
        self.news: asyncio.Event = asyncio.Event()
        self.num_added = 0

    # ---- what is done -----------------------------------------------------------------------------

    def add(self, model: str) -> ManagedEngine:
        self.num_added += 1
        return self._take(f"e{self.num_added}", model)

    def _take(self, name: str, model: str) -> ManagedEngine:
        instance = ExecutionInstance(
            instance_id=name, model_name=model, memory_bytes=_SIZE if self.has_budget else None
        )
        return self.supervisor.add(instance, self.make(name))

    def make(self, name: str) -> FakeThread:
        kind = FakeChild if self.rng.random() < 0.8 else FakeThread
        return kind(name, load_s=self.rng.choice([0, 1, 5]), reports=self.rng.random() < 0.8)

    async def act(self, what: str, number: int) -> None:
        supervisor = self.supervisor
        if what == "add":
            self.add(_MODELS[number])
        elif what == "request":
            self.requests.append(asyncio.ensure_future(self.request(_MODELS[number])))
        elif what == "replace":
            self.goals.append(asyncio.ensure_future(self.replace(_MODELS[number])))
        elif what == "stop all":
            await supervisor.stop_all()
            assert not any(
                isinstance(engine.client, FakeChild) and engine.client.is_running
                for engine in supervisor.engines.values()
            )
        elif what == "start all":
            self.goals.append(asyncio.ensure_future(supervisor.start_all()))
        elif supervisor.engines:
            engines = list(supervisor.engines.values())
            self.do_to(what, engines[number % len(engines)])

    def do_to(self, what: str, engine: ManagedEngine) -> None:
        client = engine.client
        assert isinstance(client, FakeThread)
        if what in ("start", "hold", "stop", "remove"):
            try:
                self.goals.append(getattr(self.supervisor, what)(engine.engine_id))
            except UnavailableError:
                if engine.wanted is not Wanted.REMOVED:
                    raise
        elif what in ("die", "die unseen"):
            if isinstance(client, FakeChild):
                client.die(is_seen=what == "die")
        elif what == "hang":
            client.is_hanging = client.is_running
        elif what == "go on":
            client.is_hanging = client.is_in_step = False
        elif what == "long step":
            client.is_in_step = client.is_running
        elif what == "sick":
            client.is_sick = True
        elif what == "cut":  # a request finds the connection broken
            self.supervisor.lost(engine, engine.generation, UnavailableError("the connection broke"))
        else:
            kind = SageLLMError if what.endswith("good") else UnavailableError
            client.start_errors.append(kind("told to"))

    async def replace(self, model: str) -> None:
        await replace_model(self.supervisor, model, lambda old, engine_id: self.make(engine_id))

    async def request(self, model: str) -> None:
        """Runs for a while on an engine; begins again where that is lost or fails."""
        while True:
            engine = await self.place(model)
            assert engine.state is S.READY
            generation, ended = engine.enter(), asyncio.get_running_loop().create_future()
            self.running.setdefault(engine, []).append(ended)
            timer = asyncio.get_running_loop().call_later(self.rng.choice([0.1, 2, 8]), _resolve, ended, True)
            is_ok = await ended
            timer.cancel()
            assert engine.generation == generation or not is_ok, "it ran on while its engine was restarted"
            self.running[engine].remove(ended)
            engine.leave(is_ok if self.rng.random() < 0.9 else None)
            self.news.set()
            if is_ok:
                return

    async def place(self, model: str) -> ManagedEngine:
        while True:
            serving = [engine for engine in self.supervisor.engines.values() if engine.serves(model)]
            for engine in serving:
                self.supervisor.wake(engine)
            free = [engine for engine in serving if engine.takes_requests]
            if free:
                return self.rng.choice(free)
            self.news.clear()
            await self.news.wait()

    # ---- what must hold ---------------------------------------------------------------------------

    def _moved(self, engine: ManagedEngine, old: EngineState, new: EngineState, reason: str) -> None:
        assert new in _MAY_FOLLOW[old], f"{old} -> {new}"
        if new is S.STOPPED:
            assert not engine.client.is_running or not isinstance(engine.client, FakeChild)  # type: ignore[attr-defined]
            if engine.wanted is not Wanted.STOPPED and self.running.get(engine) and old is not S.ERROR:
                assert self.is_stopping, "requests were cut off by a drain"
        if new in (S.STOPPED, S.ERROR):
            self._cut(engine)

    def _lost(self, engine: ManagedEngine, error: Exception) -> None:
        assert engine.state is S.ERROR
        assert not engine.takes_requests
        self._cut(engine)

    def _cut(self, engine: ManagedEngine) -> None:
        for ended in self.running.get(engine, []):
            _resolve(ended, False)

    def _changed(self, engine: ManagedEngine) -> None:
        self.news.set()

    def _removed(self, engine: ManagedEngine) -> None:
        assert engine.engine_id not in self.supervisor.engines
        self.news.set()

    is_stopping = False

    def check(self) -> None:
        engines = self.supervisor.engines.values()
        for engine in engines:
            assert engine.num_requests == len(self.running.get(engine, []))
            client = engine.client
            assert isinstance(client, FakeThread)
            client.is_busy = engine.num_requests > 0
        if self.has_budget:
            loaded = [e for e in engines if isinstance(e.client, FakeChild) and e.client.is_running]
            assert len(loaded) * _SIZE <= _BUDGET, [e.engine_id for e in loaded]

    async def settle(self) -> None:
        """Heal everything; then whatever was asked for must come true."""
        for _ in range(200):
            for engine in list(self.supervisor.engines.values()):
                client = engine.client
                assert isinstance(client, FakeThread)
                client.is_hanging = client.is_sick = client.is_in_step = False
                client.start_errors.clear()
                if engine.wanted is not Wanted.REMOVED and (engine.is_given_up or not engine.serves("default")):
                    self.supervisor.start(engine.engine_id)
            await asyncio.sleep(5)
            self.check()
            if all(task.done() for task in (*self.requests, *self.goals)):
                break
        for model in _MODELS:
            if not any(engine.serves(model) for engine in self.supervisor.engines.values()):
                self.add(model)
        self.news.set()
        await asyncio.sleep(300)


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


async def live_through(history: list[Any], **options: Any) -> None:
    world = World(**options)
    for model in (*_MODELS, _MODELS[0]):
        world.add(model)
    for (what, number), pause in history:
        world.is_stopping = what == "stop all"
        await world.act(what, number)
        world.check()
        await _sleep_checking(world, pause)
    world.is_stopping = False
    await world.settle()
    assert all(task.done() for task in world.requests), "a request never ended"
    assert all(goal.done() for goal in world.goals), "a wish was never answered"
    for request in world.requests:
        request.result()
    for goal in world.goals:
        error = goal.exception()
        assert error is None or isinstance(error, SageLLMError), error
    world.is_stopping = True
    await world.supervisor.stop_all()
    assert all(engine.num_requests == 0 for engine in world.supervisor.engines.values())
    assert all(engine.state is S.STOPPED for engine in world.supervisor.engines.values())


async def _sleep_checking(world: World, seconds: float) -> None:
    await asyncio.sleep(0)
    for _ in range(int(seconds / 0.1)):
        await asyncio.sleep(0.1)
        world.check()


_OPTIONS = st.fixed_dictionaries({"seed": st.integers(0, 2**16), "has_budget": st.booleans(), "unloads": st.booleans()})


@settings(max_examples=40, deadline=None)
@given(_HISTORIES, _OPTIONS)
def test_some_histories(history: list[Any], options: dict[str, Any]) -> None:
    virtual_loop.run(lambda: live_through(history, **options))


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=1500, deadline=None)
@given(_HISTORIES, _OPTIONS)
def test_many_histories(history: list[Any], options: dict[str, Any]) -> None:
    virtual_loop.run(lambda: live_through(history, **options))
