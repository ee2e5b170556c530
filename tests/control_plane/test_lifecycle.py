"""The supervisor over engines that only live and die, on virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

import virtual_loop
from fake_child import FakeChild, FakeThread
from sagellm_control_plane.breaker import BreakerState
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lifecycle_config import BreakerConfig, LifecycleConfig
from sagellm_control_plane.lives import LifecycleHooks
from sagellm_control_plane.replacement import replace_model
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError

CONFIG = LifecycleConfig(
    hang_timeout_s=4,
    stall_timeout_s=20,
    probe_interval_s=1,
    probe_timeout_s=1,
    restart_backoff_s=1,
    max_restarts=3,
    start_timeout_s=60,
    stop_timeout_s=5,
    breaker=BreakerConfig(failures_to_open=2, open_s=5),
)
S = EngineState


def on_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        virtual_loop.run(lambda: test(**fixtures))

    return run


class House:
    """A supervisor and what it said."""

    def __init__(self, config: LifecycleConfig = CONFIG, **options: Any) -> None:
        self.states: list[tuple[str, EngineState]] = []
        self.lost: list[str] = []
        self.removed: list[str] = []
        self.num_reports = 0
        hooks = LifecycleHooks(
            on_state=self._state,
            on_lost=self._lost,
            on_removed=lambda engine: self.removed.append(engine.engine_id),
            on_report=self._report,
        )
        self.supervisor = Supervisor(config, hooks=hooks, **options)

    def add(self, child: FakeThread, *, model: str = "m", memory: int | None = None) -> ManagedEngine:
        instance = ExecutionInstance(instance_id=child.engine_id, model_name=model, memory_bytes=memory)
        return self.supervisor.add(instance, child)

    async def ready(self, child: FakeThread, **options: Any) -> ManagedEngine:
        engine = self.add(child, **options)
        await self.supervisor.start(engine.engine_id)
        return engine

    def _state(self, engine: ManagedEngine, old: EngineState, new: EngineState, reason: str) -> None:
        assert reason
        assert old is not new
        self.states.append((engine.engine_id, new))

    def _lost(self, engine: ManagedEngine, error: Exception) -> None:
        assert engine.state is S.ERROR, "no request may be sent there again while its requests are moved"
        self.lost.append(str(error))
        while engine.num_requests:
            engine.leave()

    def _report(self, engine: ManagedEngine, report: Any) -> None:
        self.num_reports += 1


async def until(condition: Callable[[], bool], *, within: float = 1000.0) -> float:
    """Seconds until it came true."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    while not condition():
        assert loop.time() < began_at + within, "it never came true"
        await asyncio.sleep(0.05)
    return loop.time() - began_at


# ---- starting and stopping ----------------------------------------------------------------------------


@on_virtual_time
async def test_from_start_to_stop() -> None:
    house, child = House(), FakeChild("a")
    engine = house.add(child)
    assert (engine.state, engine.takes_requests, engine.may_take_requests) == (S.STOPPED, False, False)
    started = house.supervisor.start("a")
    assert engine.state is S.STARTING, "at once"
    assert engine.may_take_requests
    await started
    assert engine.takes_requests
    assert engine.description is not None
    assert engine.description.model == "m", "as it is asked for"
    assert (engine.info().pid, engine.info().state) == (1, S.READY)
    await house.supervisor.start("a")
    assert child.num_starts == 1
    await house.supervisor.stop("a")
    assert not child.is_running
    assert [state for _, state in house.states] == [S.STARTING, S.READY, S.DRAINING, S.STOPPED]
    house.supervisor.wake(engine)
    await asyncio.sleep(100)
    assert engine.state is S.STOPPED, "no request brings back what an operator stopped"
    await house.supervisor.start("a")
    assert child.num_starts == 2


@on_virtual_time
async def test_a_request_wakes_what_is_unloaded() -> None:
    house = House()
    engine = house.add(FakeChild("a"))
    house.supervisor.wake(engine)
    house.supervisor.wake(engine)
    await until(lambda: engine.takes_requests)


@on_virtual_time
async def test_a_first_start_that_fails_is_told_and_not_repeated() -> None:
    house, child = House(), FakeChild("a")
    child.start_errors = [UnavailableError("no memory")]
    engine = house.add(child)
    with pytest.raises(UnavailableError, match="no memory"):
        await house.supervisor.start("a")
    assert (engine.state, engine.error, engine.may_take_requests) == (S.ERROR, "no memory", False)
    await asyncio.sleep(1000)
    house.supervisor.wake(engine)
    assert engine.state is S.ERROR
    await house.supervisor.start("a")
    assert (engine.state, engine.error) == (S.READY, None)


@on_virtual_time
async def test_a_start_that_takes_too_long_is_ended() -> None:
    house, child = House(), FakeChild("a", load_s=61)
    house.add(child)
    with pytest.raises(UnavailableError, match="not ready within start_timeout_s"):
        await house.supervisor.start("a")
    assert child.log == ["start", "stop"]


@on_virtual_time
async def test_a_stop_ends_a_start() -> None:
    house, child = House(), FakeChild("a", load_s=50)
    engine = house.add(child)
    started = house.supervisor.start("a")
    await asyncio.sleep(1)
    await house.supervisor.stop("a")
    assert asyncio.get_running_loop().time() < 5
    assert engine.state is S.STOPPED
    with pytest.raises(UnavailableError, match="a was to be stopped before it was ready"):
        await started
    house.supervisor.start("a")
    await asyncio.sleep(1)
    house.supervisor.stop("a")
    again = house.supervisor.start("a")
    await again
    assert engine.state is S.READY
    assert child.num_starts == 1


@on_virtual_time
async def test_names_that_are_not_there_or_there_already() -> None:
    house = House()
    house.add(FakeChild("a"))
    with pytest.raises(InvalidArgumentError, match="an engine 'a' is registered already; choose another id"):
        house.add(FakeChild("a"))
    with pytest.raises(NotFoundError, match="no engine 'b'; registered: a"):
        house.supervisor.start("b")


# ---- draining -----------------------------------------------------------------------------------------


@on_virtual_time
async def test_hold_lets_requests_end_and_keeps_the_model() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    engine.enter()
    held = house.supervisor.hold("a")
    assert engine.state is S.DRAINING, "at once"
    assert not engine.serves("m")
    await asyncio.sleep(10)
    assert not held.done()
    engine.leave(True)
    await held
    assert child.is_running
    assert engine.state is S.DRAINING
    await house.supervisor.start("a")
    assert engine.takes_requests
    assert child.num_starts == 1


@on_virtual_time
async def test_hold_while_it_starts() -> None:
    house = House()
    engine = house.add(FakeChild("a"))
    started = house.supervisor.start("a")
    await asyncio.sleep(0.1)
    await house.supervisor.hold("a")
    await started
    assert engine.state is S.DRAINING
    assert (engine.engine_id, S.READY) not in house.states


@on_virtual_time
async def test_remove_waits_for_requests_and_forgets() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    engine.enter()
    removed = house.supervisor.remove("a")
    assert engine.state is S.DRAINING
    with pytest.raises(UnavailableError, match="a is being taken away; register a new engine"):
        house.supervisor.start("a")
    await asyncio.sleep(100)
    assert child.is_running
    engine.leave(True)
    await removed
    assert not child.is_running
    assert house.supervisor.engines == {}
    assert house.removed == ["a"]


@on_virtual_time
async def test_stopping_everything_waits_for_nobody() -> None:
    house = House()
    first, second, third = FakeChild("a"), FakeChild("b"), FakeChild("c", load_s=50)
    for child in (first, second):
        (await house.ready(child)).enter()
    house.add(third)
    house.supervisor.start("c")
    removed = house.supervisor.remove("b")
    await asyncio.sleep(1)
    await house.supervisor.stop_all()
    assert asyncio.get_running_loop().time() < 10
    assert not any(child.is_running for child in (first, second, third))
    await removed
    assert list(house.supervisor.engines) == ["a", "c"]
    assert await house.supervisor.start_all() == [None, None]
    assert first.is_running


# ---- death and hangs ----------------------------------------------------------------------------------


@on_virtual_time
async def test_a_death_moves_requests_at_once_and_the_engine_comes_back() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    engine.enter()
    child.die()
    assert engine.state is S.ERROR
    assert house.lost == ["a died"]
    assert engine.num_requests == 0
    assert engine.may_take_requests, "requests may wait for it"
    took = await until(lambda: engine.takes_requests)
    assert 1.8 <= took <= 2.3, "a pause of 1 s ± 20 % and the load"
    assert child.num_starts == 2


@on_virtual_time
async def test_news_of_an_older_life_change_nothing() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    generation = engine.enter()
    child.die()
    for _ in range(5):
        engine.enter()
        engine.leave(False)  # of requests that it took with it
    assert engine.breaker.state is BreakerState.CLOSED
    await until(lambda: engine.takes_requests)
    house.supervisor.lost(engine, generation, UnavailableError("late news"))
    assert engine.takes_requests
    house.supervisor.lost(engine, engine.generation, UnavailableError("news"))
    house.supervisor.lost(engine, engine.generation, UnavailableError("twice"))
    assert house.lost == ["a died", "news"]


@on_virtual_time
async def test_a_crash_loop_ends_and_work_forgives() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    for _ in range(10):
        child.die()
        await until(lambda: engine.takes_requests)
        engine.enter()
        engine.leave(True)
    child.num_output_tokens = 1  # without an answer that was complete
    for _ in range(10):
        child.die()
        await until(lambda: engine.takes_requests)
        await asyncio.sleep(0.3)
    child.num_output_tokens = 0
    times = []
    while not engine.is_given_up:
        child.die()
        times.append(await until(lambda: engine.takes_requests or engine.is_given_up))
    assert [round(seconds) for seconds in times[:3]] == pytest.approx([2, 3, 5], abs=1)
    assert len(times) == 4
    assert "given up after 3 restarts in a row: a died" in (engine.error or "")
    assert (engine.state, engine.may_take_requests) == (S.ERROR, False)
    await asyncio.sleep(1000)
    assert engine.state is S.ERROR
    await house.supervisor.start("a")
    assert engine.takes_requests


@on_virtual_time
async def test_a_start_by_hand_does_not_wait_for_the_pause() -> None:
    house, child = House(CONFIG.model_copy(update={"restart_backoff_s": 50.0})), FakeChild("a")
    engine = await house.ready(child)
    child.die()
    await asyncio.sleep(1)
    assert engine.state is S.ERROR
    assert await until(house.supervisor.start("a").done) < 2
    assert engine.takes_requests
    await asyncio.sleep(100)
    assert child.num_starts == 2


@on_virtual_time
async def test_a_restart_that_fails_for_good_is_given_up() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    child.start_errors = [UnavailableError("busy"), NotFoundError("the model is gone")]
    child.die()
    await until(lambda: engine.is_given_up)
    assert engine.error == "the model is gone"
    assert child.log == ["start", "kill", "start", "stop", "start", "stop"]


@on_virtual_time
async def test_a_hang_is_doubted_then_killed_and_restarted() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    await asyncio.sleep(10)
    engine.enter()
    child.is_hanging = True
    assert await until(lambda: not engine.takes_requests) == pytest.approx(2, abs=0.6)
    assert engine.state is S.READY
    assert await until(lambda: engine.state is S.ERROR) == pytest.approx(2, abs=0.8)
    assert "a hangs: it gave no sign of life" in house.lost[0]
    await until(lambda: engine.takes_requests)
    assert child.log == ["start", "kill", "start"]


@on_virtual_time
async def test_a_short_silence_costs_nothing_but_new_requests() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    await asyncio.sleep(10)
    child.is_hanging = True
    await asyncio.sleep(3)
    assert not engine.takes_requests
    child.is_hanging = False
    await until(lambda: engine.takes_requests, within=1)
    await asyncio.sleep(100)
    assert house.lost == []
    assert child.num_starts == 1


@on_virtual_time
async def test_work_without_a_step_is_a_hang_and_a_long_step_is_none() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    child.is_busy, child.makes_steps = True, False
    await asyncio.sleep(15)
    assert engine.takes_requests
    child.makes_steps = True
    await asyncio.sleep(30)
    assert engine.takes_requests
    child.makes_steps = False
    assert await until(lambda: bool(house.lost)) == pytest.approx(20, abs=0.6)
    assert "no step for" in house.lost[0]


@on_virtual_time
async def test_a_long_step_is_silent_and_no_hang() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    await asyncio.sleep(5)
    engine.enter()
    child.is_in_step = True
    for _ in range(150):
        await asyncio.sleep(0.1)
        assert engine.takes_requests
    child.is_in_step = False
    await asyncio.sleep(5)
    child.is_in_step = True
    assert await until(lambda: bool(house.lost)) == pytest.approx(20, abs=0.6)
    assert "no step for" in house.lost[0]
    await until(lambda: engine.takes_requests)
    await asyncio.sleep(5)
    child.is_in_step = True
    assert await until(lambda: len(house.lost) == 2) == pytest.approx(20, abs=0.6)
    assert "its step loop has been silent for" in house.lost[1], "no request is needed to find that out"


@on_virtual_time
async def test_an_engine_without_reports_is_asked() -> None:
    house, child = House(), FakeChild("a", reports=False)
    engine = await house.ready(child)
    await asyncio.sleep(100)
    assert engine.takes_requests
    assert 80 <= child.num_probes <= 125
    child.is_sick = True
    await until(lambda: bool(house.lost), within=4)
    assert "its health check says that it does not work" in house.lost[0]


@on_virtual_time
async def test_an_engine_in_a_thread_that_hangs_loses_its_requests_and_may_come_back() -> None:
    house, thread = House(), FakeThread("a")
    engine = await house.ready(thread)
    engine.enter()
    thread.is_hanging = True
    await asyncio.sleep(15)
    assert engine.state is S.READY, "it may be in the midst of a long step"
    await until(lambda: engine.state is S.ERROR, within=10)
    assert len(house.lost) == 1
    await asyncio.sleep(100)
    assert thread.log == ["start"], "a thread cannot be killed"
    assert len(house.lost) == 1
    thread.is_hanging = False
    await until(lambda: engine.takes_requests, within=2)
    assert engine.error is None
    thread.is_hanging = True
    await until(lambda: engine.state is S.ERROR)
    await house.supervisor.stop("a")
    assert engine.state is S.STOPPED, "after stop_timeout_s, whatever the thread does"


@on_virtual_time
async def test_a_manager_that_was_away_itself_blames_nobody() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    await asyncio.sleep(10)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, virtual_loop.VirtualLoop)
    for _ in range(20):
        loop.advance(30)  # a stopped process, a closed laptop
        await asyncio.sleep(0.3)
    assert engine.takes_requests
    assert house.lost == []


@on_virtual_time
async def test_a_stop_that_hangs_ends_in_a_kill() -> None:
    house, child = House(), FakeChild("a", stop_s=100)
    await house.ready(child)
    began_at = asyncio.get_running_loop().time()
    await house.supervisor.stop("a")
    assert asyncio.get_running_loop().time() - began_at == pytest.approx(5)
    assert child.log == ["start", "stop", "kill"]


@on_virtual_time
async def test_a_held_engine_that_dies_stays_away_until_it_is_wanted() -> None:
    house, child = House(), FakeChild("a")
    engine = await house.ready(child)
    await house.supervisor.hold("a")
    child.die()
    await asyncio.sleep(100)
    assert engine.state is S.ERROR
    await house.supervisor.start("a")
    assert engine.takes_requests


# ---- the breaker --------------------------------------------------------------------------------------


@on_virtual_time
async def test_failures_take_an_engine_out_while_there_is_another() -> None:
    house = House()
    sick, well = await house.ready(FakeChild("a")), await house.ready(FakeChild("b"))
    for _ in range(2):
        sick.enter()
        sick.leave(False)
    assert (sick.takes_requests, sick.state) == (False, S.READY)
    for _ in range(2):
        well.enter()
        well.leave(False)
    assert well.takes_requests, "the last engine of a model stays"
    assert await until(lambda: sick.takes_requests) == pytest.approx(5, abs=0.5)


# ---- memory -------------------------------------------------------------------------------------------


@on_virtual_time
async def test_idle_engines_are_unloaded_and_woken() -> None:
    house, child = House(CONFIG.model_copy(update={"idle_unload_s": 60.0})), FakeChild("a")
    engine = await house.ready(child)
    engine.enter()
    await asyncio.sleep(100)
    assert child.is_running, "it has a request"
    engine.leave(True)
    assert await until(lambda: engine.state is S.STOPPED) == pytest.approx(60.5, abs=0.5)
    assert not child.is_running
    assert engine.serves("m"), "requests may ask for it"
    house.supervisor.wake(engine)
    await until(lambda: engine.takes_requests)


BUDGET = CONFIG.model_copy(update={"memory_budget_bytes": 100, "swap_patience_s": 10.0})


@on_virtual_time
async def test_the_longest_unused_makes_room() -> None:
    house = House(BUDGET)
    old, new = await house.ready(FakeChild("old"), memory=50), await house.ready(FakeChild("new"), memory=50)
    await asyncio.sleep(1)
    old.enter()
    old.leave(True)
    third = await house.ready(FakeChild("third"), memory=40)
    assert (old.state, new.state, third.state) == (S.READY, S.STOPPED, S.READY)


@on_virtual_time
async def test_a_busy_model_is_left_alone_for_a_while_and_then_swapped() -> None:
    house = House(BUDGET)
    busy = await house.ready(FakeChild("a"), memory=80)
    other = house.add(FakeChild("b"), memory=80)
    busy.enter()
    house.supervisor.wake(other)
    assert other.may_take_requests
    await asyncio.sleep(9)
    assert busy.takes_requests, "what comes for the loaded model is served meanwhile"
    await asyncio.sleep(2)
    assert busy.state is S.DRAINING
    assert busy.serves("m")
    house.supervisor.wake(busy)  # its next request waits in line
    await asyncio.sleep(5)
    assert busy.num_requests == 1
    busy.leave(True)
    await until(lambda: other.takes_requests, within=5)
    assert busy.state is S.STOPPED
    await until(lambda: busy.takes_requests, within=20)
    assert other.state is S.STOPPED


@on_virtual_time
async def test_all_in_line_load_when_memory_gets_free() -> None:
    house = House(BUDGET)
    big = await house.ready(FakeChild("big"), memory=90)
    big.enter()
    waiting = [house.add(FakeChild(name), memory=45) for name in "ab"]
    for engine in waiting:
        house.supervisor.wake(engine)
    house.supervisor.remove("big")
    big.leave(True)
    await until(lambda: all(engine.takes_requests for engine in waiting), within=10)


@on_virtual_time
async def test_what_never_fits_is_told() -> None:
    house = House(BUDGET)
    house.add(FakeChild("a"), memory=101)
    with pytest.raises(ResourceExhaustedError, match="memory_budget_bytes allows"):
        await house.supervisor.start("a")


@on_virtual_time
async def test_start_all_loads_what_fits() -> None:
    house = House(BUDGET)
    engines = [house.add(FakeChild(name), memory=40) for name in "abc"]
    await house.supervisor.start_all()
    assert [engine.state for engine in engines] == [S.READY, S.READY, S.STOPPED]
    assert engines[2].wanted is Wanted.UNLOADED


# ---- replacement --------------------------------------------------------------------------------------


@on_virtual_time
async def test_a_model_is_replaced_without_a_gap() -> None:
    house = House()
    olds = [await house.ready(FakeChild(name)) for name in ("a", "b")]
    olds[0].enter()
    fewest = []
    task = asyncio.ensure_future(
        replace_model(house.supervisor, "m", lambda old, engine_id: FakeChild(engine_id, load_s=20))
    )
    while not task.done():
        fewest.append(sum(engine.takes_requests for engine in house.supervisor.engines.values()))
        await asyncio.sleep(0.5)
        if asyncio.get_running_loop().time() > 60 and olds[0].num_requests:
            assert olds[1].takes_requests, "one after the other"
            olds[0].leave(True)
    assert min(fewest) >= 2
    assert list(house.supervisor.engines) == ["a.2", "b.2"]
    assert [engine.engine_id for engine in task.result()] == ["a.2", "b.2"]
    assert house.lost == []


@on_virtual_time
async def test_a_replacement_that_does_not_start_leaves_the_old_one() -> None:
    house = House()
    old = await house.ready(FakeChild("a"))

    def make(_: ManagedEngine, engine_id: str) -> FakeChild:
        child = FakeChild(engine_id)
        child.start_errors = [InvalidArgumentError("the new weights are wrong")]
        return child

    with pytest.raises(InvalidArgumentError, match="the new weights are wrong"):
        await replace_model(house.supervisor, "m", make)
    await asyncio.sleep(5)
    assert list(house.supervisor.engines) == ["a"]
    assert old.takes_requests
    with pytest.raises(NotFoundError, match="no engine serves the model 'other'"):
        await replace_model(house.supervisor, "other", make)


@on_virtual_time
async def test_a_replacement_needs_room_for_both() -> None:
    house = House(BUDGET)
    old = await house.ready(FakeChild("a"), memory=60)
    with pytest.raises(ResourceExhaustedError, match=r"no room for a\.2 beside a"):
        await replace_model(house.supervisor, "m", lambda old, engine_id: FakeChild(engine_id))
    assert old.takes_requests
    assert list(house.supervisor.engines) == ["a"]


@on_virtual_time
async def test_two_replacements_at_a_time_leave_as_many_engines_as_there_were() -> None:
    house = House()
    for name in ("a", "b"):
        await house.ready(FakeChild(name))
    numbers = itertools.count()

    def make(old: ManagedEngine, engine_id: str) -> FakeChild:
        return FakeChild(engine_id, load_s=1 + next(numbers) % 3)

    both = [asyncio.ensure_future(replace_model(house.supervisor, "m", make)) for _ in range(2)]
    await asyncio.gather(*both)
    await asyncio.sleep(5)
    assert len(house.supervisor.engines) == 2
    assert all(engine.takes_requests for engine in house.supervisor.engines.values())
    assert {"a", "b"} <= set(house.removed)


@on_virtual_time
async def test_an_engine_that_an_operator_takes_away_meanwhile_gets_none_in_its_place() -> None:
    house = House()
    for name in ("a", "b", "c"):
        await house.ready(FakeChild(name))
    made: list[str] = []

    def make(old: ManagedEngine, engine_id: str) -> FakeChild:
        made.append(engine_id)
        return FakeChild(engine_id, load_s=5)

    replacing = asyncio.ensure_future(replace_model(house.supervisor, "m", make))
    await asyncio.sleep(1)
    house.supervisor.remove("a")  # its successor is starting
    house.supervisor.remove("c")
    news = await replacing
    await asyncio.sleep(5)
    assert made == ["a.2", "b.2"]
    assert [engine.engine_id for engine in news] == ["b.2"]
    assert list(house.supervisor.engines) == ["b.2"]


class _ShortLived(FakeChild):
    """It dies in the moment in which it is ready."""

    def watch(self, *arguments: Any, **options: Any) -> Callable[[], None]:
        asyncio.get_running_loop().call_soon(self.die)
        return super().watch(*arguments, **options)


@on_virtual_time
async def test_a_new_engine_that_dies_at_once_takes_nobodys_place() -> None:
    house = House()
    await house.ready(FakeChild("a"))
    with pytest.raises(UnavailableError, match=r"a\.2 was lost"):
        await replace_model(house.supervisor, "m", lambda old, engine_id: _ShortLived(engine_id))
    assert house.supervisor.engines["a"].takes_requests
    await asyncio.sleep(10)
    assert list(house.supervisor.engines) == ["a"]
    assert house.supervisor.engines["a"].takes_requests
