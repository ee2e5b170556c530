"""The control plane over engines without models: life, queue, ledger, figures."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

import virtual_loop
from fake_engine import FakeEngine
from sagellm_control_plane import (
    ControlPlaneManager,
    EngineConfig,
    EngineState,
    ExecutionInstance,
    ExecutionInstanceType,
    PDSeparationConfig,
)
from sagellm_control_plane.clock import LoopClock
from sagellm_protocol import (
    SLO,
    DeadlineExceededError,
    ErrorCode,
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Request,
    RequestPriority,
    ResourceExhaustedError,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnavailableError,
)
from waiting import until


def make_manager(*engines: FakeEngine, **options: Any) -> ControlPlaneManager:
    manager = ControlPlaneManager(**options)
    for number, engine in enumerate(engines):
        manager.register_engine(engine, engine_id=f"e{number}", model="m")
    return manager


class ShiftedClock(LoopClock):
    """Stands still where it is put; timers run on the loop's time."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds


def assert_idle(manager: ControlPlaneManager) -> None:
    for info in manager.list_engines():
        assert (info.num_requests, info.num_tokens) == (0, 0), info
    assert manager.get_status()["num_waiting"] == 0


# ---- life ---------------------------------------------------------------------------------------------


async def test_engines_start_with_the_manager_and_stop_with_it() -> None:
    engine = FakeEngine()
    manager = make_manager(engine)
    assert manager.get_engine("e0").state is EngineState.STOPPED
    async with manager:
        assert manager.get_engine("e0").state is EngineState.READY
        assert await manager.health_check()
        response = await manager.execute_request(prompt="hello", max_tokens=3)
        assert response.output_text == "w0 w1 w2 "
        assert_idle(manager)
    assert not engine.is_running
    assert not await manager.health_check()
    with pytest.raises(UnavailableError, match=r"call start\(\) first"):
        await manager.execute_request(prompt="hello")
    async with manager:
        assert engine.num_starts == 2


async def test_engines_start_with_the_first_request() -> None:
    first, second = FakeEngine(), FakeEngine()
    second.start_gate.clear()
    manager = make_manager(first, second)
    responses = await asyncio.gather(*(manager.execute_request(prompt="hi", max_tokens=1) for _ in range(4)))
    assert [response.output_text for response in responses] == ["w0 "] * 4
    assert first.num_starts == 1
    assert manager.get_engine("e1").state is EngineState.STARTING, "nobody waits for the second engine"
    second.start_gate.set()
    await until(lambda: manager.get_engine("e1").state is EngineState.READY)
    await manager.stop()


async def test_an_engine_that_becomes_ready_takes_over_waiting_requests() -> None:
    first, second = FakeEngine(max_batch_size=1), FakeEngine(max_batch_size=1)
    second.start_gate.clear()
    manager = make_manager(first, second)
    held = asyncio.ensure_future(manager.execute_request(prompt="wait", max_tokens=1))
    other = asyncio.ensure_future(manager.execute_request(prompt="hi", max_tokens=1))
    await until(lambda: manager.get_status()["num_waiting"] == 1 and first.requests)
    second.start_gate.set()
    await other
    assert len(second.requests) == 1
    first.gate.set()
    await held
    await manager.stop()


async def test_one_engine_that_fails_leaves_the_others_in_service() -> None:
    manager = make_manager(FakeEngine(fail_start=True), FakeEngine())
    async with manager:
        assert manager.get_engine("e0").state is EngineState.ERROR
        assert "told not to" in (manager.get_engine("e0").error or "")
        assert (await manager.execute_request(prompt="hi", max_tokens=1)).finish_reason is FinishReason.LENGTH


async def test_a_start_without_any_engine_says_why() -> None:
    broken = FakeEngine(fail_start=True)
    manager = make_manager(broken)
    with pytest.raises(UnavailableError, match="told not to start"):
        await manager.start()
    with pytest.raises(UnavailableError, match="no engine can take the request: the fake was told"):
        await manager.execute_request(prompt="hi")
    broken.fail_start = False
    await manager.start()
    assert (await manager.execute_request(prompt="hi", max_tokens=1)).output_text == "w0 "
    with pytest.raises(InvalidArgumentError, match="no engine is registered"):
        await ControlPlaneManager().start()


async def test_registration() -> None:
    made: list[FakeEngine] = []

    def make_engine(config: Any) -> FakeEngine:
        made.append(FakeEngine(config))
        return made[-1]

    manager = ControlPlaneManager(engine_configs=[EngineConfig(model="m")], make_engine=make_engine)
    manager.register_instance(ExecutionInstance(instance_id="i1", model_name="m", max_concurrent_requests=3))
    assert [info.engine_id for info in manager.list_engines()] == ["engine-0", "i1"]
    assert made[1].config.max_batch_size == 3
    with pytest.raises(InvalidArgumentError, match="'i1' is registered already"):
        manager.register_instance(ExecutionInstance(instance_id="i1", model_name="m"))
    assert len(made) == 2
    with pytest.raises(NotFoundError, match="no engine 'x'; registered: engine-0, i1"):
        manager.get_engine("x")
    with pytest.raises(NotFoundError, match="no engine serves the model 'other'; there is m"):
        await manager.execute_request(prompt="hi", model="other")


async def test_unregistering_lets_requests_in_flight_end() -> None:
    first, second = FakeEngine(), FakeEngine()
    async with make_manager(first, second, routing_policy="round_robin") as manager:
        running = asyncio.ensure_future(manager.execute_request(prompt="wait", max_tokens=2))
        await until(lambda: first.requests)
        leaving = asyncio.ensure_future(manager.unregister_engine("e0"))
        await until(lambda: manager.get_engine("e0").state is EngineState.DRAINING)
        others = [await manager.execute_request(prompt="hi", max_tokens=1) for _ in range(3)]
        assert {response.engine_id for response in others} == {second.engine_id}
        assert len(second.requests) == 3
        assert not leaving.done()
        first.gate.set()
        assert (await running).finish_reason is FinishReason.LENGTH
        await leaving
        assert not first.is_running
        assert [info.engine_id for info in manager.list_engines()] == ["e1"]


async def test_requests_that_wait_for_an_engine_that_leaves_are_refused() -> None:
    engine = FakeEngine(max_batch_size=1)
    async with make_manager(engine) as manager:
        running = asyncio.ensure_future(manager.execute_request(prompt="wait"))
        waiting = asyncio.ensure_future(manager.execute_request(prompt="hi"))
        await until(lambda: manager.get_status()["num_waiting"] == 1)
        leaving = asyncio.ensure_future(manager.unregister_engine("e0"))
        with pytest.raises(UnavailableError, match="taken away"):
            await waiting
        engine.gate.set()
        await asyncio.gather(running, leaving)


async def test_stopping_ends_running_requests_and_refuses_waiting_ones() -> None:
    engine = FakeEngine(max_batch_size=1)
    manager = make_manager(engine)
    await manager.start()
    running = asyncio.ensure_future(manager.execute_request(prompt="wait"))
    waiting = asyncio.ensure_future(manager.execute_request(prompt="hi"))
    await until(lambda: manager.get_status()["num_waiting"] == 1)
    await manager.stop()
    assert (await running).finish_reason is FinishReason.ABORT
    with pytest.raises(UnavailableError, match="was stopped"):
        await waiting
    assert_idle(manager)


# ---- queue and ledger ---------------------------------------------------------------------------------


async def test_the_policy_decides_who_goes_next() -> None:
    engine = FakeEngine(max_batch_size=1)
    async with make_manager(engine, scheduling_policy="priority") as manager:
        held = asyncio.ensure_future(manager.execute_request(prompt="wait"))
        await until(lambda: engine.requests)
        others = [
            asyncio.ensure_future(manager.execute_request(prompt=name, priority=priority, max_tokens=1))
            for name, priority in (("low", RequestPriority.LOW), ("high", RequestPriority.HIGH), ("normal", 0))
        ]
        await until(lambda: manager.get_status()["num_waiting"] == 3)
        engine.gate.set()
        await asyncio.gather(held, *others)
        assert [request.prompt for request in engine.requests] == ["wait", "high", "normal", "low"]


async def test_a_model_without_a_place_blocks_no_other() -> None:
    busy, free = FakeEngine(max_batch_size=1), FakeEngine()
    manager = ControlPlaneManager()
    manager.register_engine(busy, engine_id="busy", model="big")
    manager.register_engine(free, engine_id="free", model="small")
    async with manager:
        held = [asyncio.ensure_future(manager.execute_request(prompt="wait", model="big")) for _ in range(2)]
        await until(lambda: manager.get_status()["num_waiting"] == 1)
        assert (await manager.execute_request(prompt="hi", model="small", max_tokens=1)).output_text == "w0 "
        busy.gate.set()
        await asyncio.gather(*held)


async def test_a_full_queue_refuses_and_a_free_place_needs_no_queue() -> None:
    engine = FakeEngine(max_batch_size=1)
    async with make_manager(engine, max_num_waiting=1) as manager:
        held = [asyncio.ensure_future(manager.execute_request(prompt="wait")) for _ in range(2)]
        await until(lambda: manager.get_status()["num_waiting"] == 1)
        with pytest.raises(ResourceExhaustedError, match="1 requests are waiting already") as caught:
            await manager.execute_request(prompt="hi")
        assert caught.value.retryable
        engine.gate.set()
        await asyncio.gather(*held)
        assert_idle(manager)
    async with make_manager(FakeEngine(), max_num_waiting=0) as manager:
        assert (await manager.execute_request(prompt="hi", max_tokens=1)).output_text == "w0 "


async def test_the_ledger_books_tokens_while_a_request_runs() -> None:
    engine = FakeEngine()
    async with make_manager(engine) as manager:
        task = asyncio.ensure_future(manager.execute_request(prompt="wait", max_tokens=7))
        await until(lambda: engine.requests)
        assert manager.get_engine("e0").num_tokens == 1 + 7
        assert manager.get_metrics().gpu_utilization == 1 / 32
        engine.gate.set()
        await task
        assert_idle(manager)


@pytest.mark.parametrize("prompt", ["hi", "fail", "refuse"])
async def test_the_ledger_is_exact_after_success_error_and_refusal(prompt: str) -> None:
    async with make_manager(FakeEngine()) as manager:
        results = await asyncio.gather(
            *(manager.execute_request(prompt=prompt, max_tokens=2) for _ in range(5)), return_exceptions=True
        )
        assert len(results) == 5
        assert_idle(manager)
        for _ in range(3):
            async with aclosing(manager.stream_request(prompt="hi", max_tokens=5)) as events:
                async for event in events:
                    if isinstance(event, StreamEventDelta):
                        break
        assert_idle(manager)


async def test_the_ledger_is_exact_however_requests_are_cancelled() -> None:
    engine = FakeEngine(max_batch_size=2)
    async with make_manager(engine) as manager:
        tasks = [asyncio.ensure_future(manager.execute_request(prompt="wait")) for _ in range(6)]
        await until(lambda: manager.get_status()["num_waiting"] == 4)
        tasks[0].cancel()  # running: its place goes to the third, which is cancelled in the moment it gets it
        await asyncio.sleep(0)
        tasks[2].cancel()
        tasks[5].cancel()  # waiting
        await until(lambda: manager.get_status()["num_waiting"] == 1)
        engine.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [
            True,
            False,
            True,
            False,
            False,
            True,
        ]
        assert_idle(manager)


@pytest.mark.parametrize("num_ticks", range(8))
async def test_a_cancellation_at_any_moment_loses_no_place(num_ticks: int) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with make_manager(engine) as manager:
        first = asyncio.ensure_future(manager.execute_request(prompt="hi", max_tokens=2))
        second = asyncio.ensure_future(manager.execute_request(prompt="hi", max_tokens=2))
        for _ in range(num_ticks):
            await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert_idle(manager)
        assert (await manager.execute_request(prompt="hi", max_tokens=1)).output_text == "w0 "


# ---- deadlines ----------------------------------------------------------------------------------------


def test_a_deadline_ends_a_request_that_runs() -> None:
    async def main() -> None:
        async with make_manager(FakeEngine()) as manager:
            response = await manager.execute_request(prompt="wait", slo=SLO(deadline_ms=20))
            assert response.finish_reason is FinishReason.ABORT
            assert response.error is not None
            assert response.error.code is ErrorCode.DEADLINE_EXCEEDED
            request = Request(prompt="wait", slo=SLO(deadline_ms=20), stream=True)
            events = [event async for event in manager.stream_request(request)]
            assert isinstance(events[-1], StreamEventEnd)
            assert events[-1].error == response.error
            assert_idle(manager)
            assert manager.get_metrics().error_rate == 1.0

    virtual_loop.run(main)


def test_a_deadline_ends_a_request_that_waits() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=1)
        async with make_manager(engine) as manager:
            held = asyncio.ensure_future(manager.execute_request(prompt="wait"))
            await until(lambda: engine.requests)
            with pytest.raises(DeadlineExceededError, match="deadline of 20 ms has passed"):
                await manager.execute_request(prompt="hi", slo=SLO(deadline_ms=20))
            engine.gate.set()
            await held
            assert_idle(manager)
            quick = await manager.execute_request(prompt="hi", max_tokens=1, slo=SLO(deadline_ms=60_000))
            assert quick.error is None

    virtual_loop.run(main)


# ---- answers and figures ------------------------------------------------------------------------------


async def test_a_stream_is_one_start_deltas_and_one_end() -> None:
    async with make_manager(FakeEngine()) as manager:
        events = [event async for event in manager.stream_request(prompt="hi", max_tokens=3)]
        assert isinstance(events[0], StreamEventStart)
        assert isinstance(events[-1], StreamEventEnd)
        chunks = [event.chunk for event in events if isinstance(event, StreamEventDelta)]
        assert "".join(chunks) == events[-1].output_text
        assert_idle(manager)


async def test_requests_spread_over_engines_and_by_prompt_length() -> None:
    made: dict[str, FakeEngine] = {}

    def make_engine(config: Any) -> FakeEngine:
        return made.setdefault(config.engine_id, FakeEngine(config))

    manager = ControlPlaneManager(
        enable_pd_separation=True,
        pd_config=PDSeparationConfig(routing_policy="round_robin", prefilling_threshold_input_tokens=50),
        make_engine=make_engine,
    )
    for name, kind in (
        ("p1", ExecutionInstanceType.PREFILLING),
        ("d1", ExecutionInstanceType.DECODING),
        ("d2", ExecutionInstanceType.DECODING),
    ):
        manager.register_instance(ExecutionInstance(instance_id=name, model_name="m", instance_type=kind))
    async with manager:
        for _ in range(4):
            await manager.execute_request(prompt="short", max_tokens=1)
        response = await manager.process_request([1] * 60, None, max_tokens=1)
        assert response.engine_id == "p1"
    assert [len(made[name].requests) for name in ("p1", "d1", "d2")] == [1, 2, 2]


async def test_figures_are_measured_and_zero_before_the_first_request() -> None:
    clock = ShiftedClock()
    manager = make_manager(FakeEngine(), clock=clock)
    assert manager.get_metrics().throughput == manager.get_metrics().avg_latency == 0.0
    async with manager:
        await manager.execute_request(prompt="a b c d", max_tokens=10)
        await manager.execute_request(prompt="fail")
        clock.seconds = 5.0
        figures = manager.get_metrics()
        assert figures.num_requests == 2
        assert figures.throughput == 2.0
        assert figures.requests_per_second == 0.4
        assert figures.error_rate == 0.5
        assert figures.cache_hit_rate == 2 / 5
        assert figures.avg_ttft_ms == 2.0
        assert figures.num_waiting == 0
        status = manager.get_status()
        assert status["engines"]["e0"] == {"state": "ready", "model": "m", "num_requests": 0, "error": None}
        assert set(await manager.engine_stats()) == {"e0"}


async def test_a_protocol_request_passes_unchanged() -> None:
    engine = FakeEngine()
    async with make_manager(engine) as manager:
        request = Request(prompt="hi", max_tokens=2, request_id="mine", metadata={"a": 1})
        response: Response = await manager.execute_request(request)
        assert response.request_id == "mine"
        assert engine.requests == [request]


# ---- the operator's hand ------------------------------------------------------------------------------


async def test_names_of_new_engines_are_free_ones() -> None:
    manager = ControlPlaneManager(
        engine_configs=[EngineConfig(model="m"), EngineConfig(model="m")], make_engine=lambda config: FakeEngine(config)
    )
    async with manager:
        await manager.unregister_engine("engine-0")
        assert manager.register_config(manager.allowed_models["m"]) == "engine-0"
        assert manager.register_config(manager.allowed_models["m"]) == "engine-2"
        assert manager.model_of("engine-2") == "m"
        assert manager.model_of("nobody") == ""


async def test_a_drained_engine_leaves_the_work_to_others() -> None:
    first, second = FakeEngine(), FakeEngine()
    async with make_manager(first, second, routing_policy="round_robin") as manager:
        manager.drain_engine("e0")
        for _ in range(3):
            await manager.execute_request(prompt="hi", max_tokens=1)
        assert (len(first.requests), len(second.requests)) == (0, 3)
        assert first.is_running
        await manager.start_engine("e0")
        for _ in range(2):
            await manager.execute_request(prompt="hi", max_tokens=1)
        assert len(first.requests) == 1


async def test_an_engine_that_is_drained_while_it_loads_takes_nothing_when_it_has_loaded() -> None:
    engine = FakeEngine()
    engine.start_gate.clear()
    manager = make_manager(engine)
    loading = manager.start_engine("e0")
    manager.drain_engine("e0")
    with pytest.raises(UnavailableError, match="take no requests now"):
        await manager.execute_request(prompt="hi")
    engine.start_gate.set()
    await loading
    assert manager.get_engine("e0").state is EngineState.DRAINING
    await manager.start_engine("e0")
    assert (await manager.execute_request(prompt="hi", max_tokens=1)).output_text == "w0 "
    await manager.stop()


async def test_a_stopped_engine_runs_again_after_a_start() -> None:
    engine = FakeEngine()
    async with make_manager(engine) as manager:
        held = asyncio.ensure_future(manager.execute_request(prompt="wait"))
        await until(lambda: engine.running)
        await manager.stop_engine("e0")
        assert (await held).finish_reason is FinishReason.ABORT
        assert manager.get_engine("e0").state is EngineState.STOPPED
        await manager.start_engine("e0")
        assert manager.get_engine("e0").state is EngineState.READY
        assert await manager.reset_prefix_cache() == {"e0": True}
