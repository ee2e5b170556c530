"""The autoscaler: against loads that rise, fall, swing and jump, and over engines that come, fail and go."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

import virtual_loop
from fake_child import FakeChild
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager, EngineConfig
from sagellm_control_plane.autoscaler import Autoscaler, ReplicaFigures, ScalingDecision
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.capacity import Limits, Workload, predict
from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clock import LoopClock
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.events import EventKind
from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.lives import LifecycleHooks
from sagellm_control_plane.load_meter import LoadMeter
from sagellm_control_plane.replicas import SupervisedReplicas
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_control_plane.types import ExecutionInstance
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, UnavailableError, Usage

STEP = StepCoefficients(c0=8e-3, a=60e-6, q=3e-9, k=15e-9, b=60e-6)
LIMITS = Limits(max_num_running=256, num_kv_tokens=400_000)
CONFIG = AutoscalerConfig(max_replicas=32, ttft_ms=600, tpot_ms=50)
WORKLOAD = Workload(1600, 1500, 200, 1500)


USAGE = Usage(prompt_tokens=1600, cached_tokens=100, completion_tokens=200)


class World:
    """Replicas that take `start_s` to come, under a load; what they achieve is what the formulas say."""

    def __init__(self, rate_at: Callable[[float], float], config: AutoscalerConfig = CONFIG, *, start_s: float = 25):
        self.rate_at, self.start_s = rate_at, start_s
        self.num_ready, self.starting = 1, [0.0][:0]
        self.now, self.slowness = 0.0, 1.0
        self.rng = random.Random(5)
        self.decisions: list[ScalingDecision] = []
        self.met: list[bool] = []
        self.numbers: list[int] = []
        self.num_waiting = 0
        self.num_context_tokens = 0
        self.meter = LoadMeter(0.0)
        self.autoscaler = Autoscaler(config, self, self.meter, self, self.decisions.append)  # type: ignore[arg-type]

    def time(self) -> float:
        return self.now

    def figures(self) -> ReplicaFigures:
        return ReplicaFigures(
            self.num_ready,
            len(self.starting),
            self.num_waiting,
            self.num_context_tokens,
            STEP,
            LIMITS,
            self.start_s,
        )

    def grow(self, count: int) -> int:
        self.starting += [self.now + self.start_s] * count
        return count

    def shrink(self, count: int) -> None:
        self.num_ready -= count

    def live(self, seconds: float) -> None:
        interval_s = CONFIG.interval_s
        for _ in range(int(seconds / interval_s)):
            rate = self.rate_at(self.now)
            got = predict(rate / self.num_ready, WORKLOAD, STEP, LIMITS)
            ttft_s, tpot_s = min(got.ttft_s, 30) * self.slowness, min(got.tpot_s, 1) * self.slowness
            self.met.append(ttft_s <= 0.6 and tpot_s <= 0.05)
            at = self.now
            while (at := at + self.rng.expovariate(rate)) < self.now + interval_s:
                self.meter.arrived(at)
                self.meter.ended(USAGE, ttft_s, 199 * tpot_s)
            self.now += interval_s
            self.num_ready += sum(due <= self.now for due in self.starting)
            self.starting = [due for due in self.starting if due > self.now]
            self.autoscaler._clock = _Fixed(self.now)
            self.autoscaler.step()
            self.numbers.append(self.num_ready)

    @property
    def num_turns(self) -> int:
        """How often growth was followed by less, or the other way round."""
        signs = [decision.target > decision.num_replicas for decision in self.decisions]
        return sum(a != b for a, b in pairwise(signs))


class _Fixed(LoopClock):
    def __init__(self, now: float) -> None:
        self._now = now

    def now(self) -> float:
        return self._now


def test_it_grows_to_what_the_load_needs_and_stays_there() -> None:
    world = World(lambda now: 40.0)
    world.live(600)
    settled = world.numbers[-1]
    assert predict(40 / settled, WORKLOAD, STEP, LIMITS).meets(CONFIG.objectives)
    assert settled <= 14
    assert all(world.met[24:])
    assert len(set(world.numbers[40:])) == 1, "noise moves nothing"
    assert world.num_turns <= 1


def test_it_follows_a_day_without_swinging() -> None:
    world = World(lambda now: 20 + 15 * math.sin(2 * math.pi * now / 7200))
    world.live(2 * 7200)
    assert sum(world.met) / len(world.met) > 0.97
    assert world.num_turns <= 5, "two a wave, and at most one by noise"
    instance_s = sum(world.numbers) * CONFIG.interval_s
    assert instance_s < 0.75 * max(world.numbers) * 2 * 7200, "fewer in the valleys"


def test_a_jump_is_answered_at_once_and_a_lull_not() -> None:
    world = World(lambda now: 60.0 if 300 <= now < 900 else 5.0)
    world.live(300)
    low = world.num_ready
    world.live(60)
    assert world.num_ready > 3 * low
    world.live(540)
    high = world.num_ready
    world.live(100)
    assert world.num_ready >= high - 1, "fewer only after down_after_s"
    world.live(3600)
    assert world.num_ready <= low + 1


def test_objectives_that_are_missed_bring_one_more_whatever_the_formulas_say() -> None:
    world = World(lambda now: 3.0)
    world.live(100)
    before = world.num_ready
    world.slowness = 6.0
    world.live(200)
    assert world.num_ready > before
    assert any("missed" in decision.reason or "too many" in decision.reason for decision in world.decisions)


def test_objectives_that_no_replica_can_keep_hold_none_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """A request alone takes 0.1 s to its first token: replicas come with the load all the same, and go with it."""
    config = CONFIG.model_copy(update={"ttft_ms": 60})
    world = World(lambda now: 60.0 if 300 <= now < 900 else 1.0, config)
    with caplog.at_level("WARNING", logger="sagellm_control_plane"):
        world.live(300)
        assert world.num_ready == 1, "no number of them would help"
        world.live(600)
        assert 4 < world.num_ready < config.max_replicas
        world.live(3600)
    assert world.num_ready == 1
    assert sum("out of reach" in record.message for record in caplog.records) == 1


def test_a_margin_that_is_less_than_a_request_alone_needs_holds_none() -> None:
    """0.8 of the objective is less than the 0.1 s that a request needs alone; what is over that counts."""
    world = World(lambda now: 40.0 if now < 600 else 0.2, CONFIG.model_copy(update={"ttft_ms": 135}))
    world.live(600)
    assert world.num_ready > 4
    world.live(2 * 3600)  # by one every two minutes
    assert world.num_ready == 1


@pytest.mark.parametrize("reason", ["waiting", "context"])
def test_no_replica_goes_that_is_needed_for_what_is_there(reason: str) -> None:
    world = World(lambda now: 40.0 if now < 300 else 1.0)
    world.live(300)
    busy = world.num_ready
    world.num_waiting = 3 if reason == "waiting" else 0
    world.num_context_tokens = busy * 390_000 if reason == "context" else 0
    world.live(1000)
    assert world.num_ready == busy
    world.num_waiting = world.num_context_tokens = 0
    world.live(1000)
    assert world.num_ready < busy


def test_bounds() -> None:
    world = World(lambda now: 200.0, CONFIG.model_copy(update={"max_replicas": 6, "min_replicas": 3, "max_step": 2}))
    world.live(5)
    assert world.decisions[0].target == 3
    world.live(300)
    assert world.num_ready == 6
    assert max(d.target - d.num_replicas for d in world.decisions) <= 2
    with pytest.raises(InvalidArgumentError, match=r"min_replicas \(3\) is above max_replicas \(2\)"):
        AutoscalerConfig(min_replicas=3, max_replicas=2)


# ---- over a manager -----------------------------------------------------------------------------------


def test_a_manager_scales_its_models_and_says_so() -> None:
    def make_engine(config: LLMEngineConfig) -> EngineClient:
        return FakeEngine(config)

    async def main() -> None:
        scaling = AutoscalerConfig(min_replicas=2, max_replicas=3, ttft_ms=1e3, tpot_ms=200, interval_s=5)
        manager = ControlPlaneManager(
            engine_configs=[EngineConfig(model="org/m")],
            config=ControlPlaneConfig(autoscaling={"org/m": scaling}),
            make_engine=make_engine,
        )
        await manager.start()
        await asyncio.sleep(6)
        assert [info.engine_id for info in manager.list_engines()] == ["engine-0", "org-m-0"]
        for _ in range(120):  # far more late than what is wanted: each token takes 0.05 s, and the queue is empty
            await manager.execute_request(prompt="slow", max_tokens=40)
        meter = manager._pool.loads._meters["org/m"]
        sample = meter.close(manager._clock.now())
        assert sample.workload is not None
        assert sample.workload.num_output_tokens == 40
        events = [event for event in manager.events.recent() if event.kind is EventKind.SCALE]
        assert events[0].message == "org/m: 1 -> 2 replicas: min_replicas is 2"
        assert events[0].details["target"] == 2
        await manager.stop()
        num_engines = len(manager.list_engines())
        await asyncio.sleep(100)
        assert len(manager.list_engines()) == num_engines, "a manager that was stopped scales nothing"
        wrong = ControlPlaneManager(
            engine_configs=[EngineConfig(model="m")],
            config=ControlPlaneConfig(autoscaling={"other": scaling}),
            make_engine=make_engine,
        )
        with pytest.raises(InvalidArgumentError, match="autoscaling names 'other', which no engine_config has"):
            await wrong.start()

    virtual_loop.run(main)


# ---- over a supervisor --------------------------------------------------------------------------------


class Cluster:
    def __init__(self) -> None:
        self.fleet = Fleet()
        self.clock = LoopClock()
        self.fails = 0
        hooks = LifecycleHooks(on_added=self._added, on_removed=self._removed)
        config = LifecycleConfig(restart_backoff_s=10, probe_interval_s=1)
        self.supervisor = Supervisor(config, clock=self.clock, hooks=hooks)
        self.replicas = SupervisedReplicas(
            "m", self.supervisor, self.fleet, self.make, self.clock, config=config, rng=random.Random(1)
        )

    def _added(self, engine: ManagedEngine) -> None:
        engine.row = self.fleet.add(engine.engine_id)

    def _removed(self, engine: ManagedEngine) -> None:
        assert engine.row is not None
        self.fleet.remove(engine.row)

    def make(self, engine_id: str) -> tuple[ExecutionInstance, EngineClient]:
        child = FakeChild(engine_id, load_s=7)
        if self.fails:
            self.fails -= 1
            child.start_errors = [UnavailableError("no more memory")]
        return ExecutionInstance(instance_id=engine_id, model_name="m"), child  # type: ignore[return-value]


def test_replicas_come_and_go_with_their_requests_unharmed() -> None:
    async def main() -> None:
        cluster = Cluster()
        replicas, supervisor = cluster.replicas, cluster.supervisor
        assert replicas.grow(3) == 3
        assert replicas.figures().num_starting == 3
        await asyncio.sleep(10)
        figures = replicas.figures()
        assert (figures.num_ready, figures.num_starting, figures.start_s) == (3, 0, 7)
        busy, idle, last = supervisor.engines.values()
        for engine, count in ((busy, 2), (idle, 1), (last, 1)):
            for _ in range(count):
                engine.enter()
                assert engine.row is not None
                cluster.fleet.grant(engine.row, Booking(100))
        assert replicas.figures().num_context_tokens == 400
        replicas.shrink(1)
        assert [engine.serves("m") for engine in (busy, idle, last)] == [True, True, False]
        assert replicas.figures().num_replicas == 2
        await asyncio.sleep(100)
        assert last.client.is_running, "its request runs on"  # type: ignore[attr-defined]
        last.leave(True)
        await asyncio.sleep(5)
        assert list(supervisor.engines) == ["m-0", "m-1"]
        assert replicas.grow(1) == 1
        assert list(supervisor.engines) == ["m-0", "m-1", "m-2"]
        supervisor.hold("m-0")
        assert replicas.figures().num_replicas == 2
        await supervisor.stop_all()

    virtual_loop.run(main)


def test_replicas_that_fail_are_taken_away_and_tried_ever_more_rarely() -> None:
    async def main() -> None:
        cluster = Cluster()
        cluster.fails = 3
        tries = []
        for _ in range(200):
            if cluster.replicas.figures().num_replicas == 0 and cluster.replicas.grow(1):
                tries.append(asyncio.get_running_loop().time())
            await asyncio.sleep(1)
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        assert [round(gap / 10) for gap in gaps] == [2, 3, 5], "7 s of loading, then 10, 20, 40 s"
        assert list(cluster.supervisor.engines) == ["m-0"]
        assert cluster.replicas.figures().num_ready == 1
        await cluster.supervisor.stop_all()

    virtual_loop.run(main)


def test_the_loop_decides_at_its_interval() -> None:
    async def main() -> None:
        cluster = Cluster()
        decisions: list[ScalingDecision] = []
        config = AutoscalerConfig(min_replicas=2, interval_s=5)
        meter = LoadMeter(0.0)
        autoscaler = Autoscaler(config, cluster.replicas, meter, cluster.clock, decisions.append)
        task = asyncio.ensure_future(autoscaler.run())
        await asyncio.sleep(4)
        assert cluster.supervisor.engines == {}
        await asyncio.sleep(20)
        assert cluster.replicas.figures().num_ready == 2
        assert [(d.num_replicas, d.target) for d in decisions] == [(0, 2)]
        task.cancel()
        await cluster.supervisor.stop_all()

    virtual_loop.run(main)


def test_the_meter() -> None:
    meter = LoadMeter(0.0, quantile=0.9)
    assert meter.close(5).workload is None
    for i in range(50):
        meter.arrived(5 + i * 0.1)
        meter.ended(USAGE, ttft_s=0.01 * (i + 1), decode_s=199 * 0.02)
    sample = meter.close(10)
    assert sample.rate == pytest.approx(10)
    assert sample.num_ended == 50
    assert sample.ttft_s == pytest.approx(0.45)
    assert sample.tpot_s == pytest.approx(0.02)
    assert sample.workload is not None
    assert sample.workload.arrival_scv == pytest.approx(0, abs=1e-9)
    assert sample.workload.num_output_tokens == 200
    assert sample.workload.num_uncached_tokens == 1500
    empty = meter.close(15)
    assert (empty.rate, empty.num_ended, empty.ttft_s) == (0, 0, None)
    assert empty.workload is not None, "what requests are like is remembered"
