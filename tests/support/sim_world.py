"""A whole control plane over simulated engines, to which a history happens; and what has to hold whatever happened."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sagellm_control_plane import ControlPlaneManager, EngineConfig, ExecutionInstanceType
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.config import ControlPlaneConfig, FailoverConfig, PDSeparationConfig
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle_config import BreakerConfig, LifecycleConfig
from sagellm_control_plane.prompts import num_outputs
from sagellm_control_plane.quotas import QuotaConfig, TenantQuota
from sagellm_control_plane.replacement import replace_model
from sagellm_control_plane.ticket import FURTHER_TOKENS
from sagellm_control_plane.types import EngineState
from sagellm_protocol import (
    SLO,
    ErrorCode,
    FinishReason,
    Request,
    Response,
    SageLLMError,
    SamplingParams,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnavailableError,
)
from sim_engine import SimEngine, answer_of

LIFECYCLE = LifecycleConfig(
    hang_timeout_s=4,
    stall_timeout_s=20,
    probe_interval_s=1,
    probe_timeout_s=1,
    start_timeout_s=60,
    stop_timeout_s=5,
    restart_backoff_s=0.5,
    max_restart_backoff_s=4,
    max_restarts=100_000,  # no engine is given up, so that no request may end for want of one
    breaker=BreakerConfig(failures_to_open=3, open_s=2, max_open_s=8),
)
_SETTLED_S = 600.0  # after the last fault everything has ended; a request needs some seconds
_PD_KINDS = (ExecutionInstanceType.DECODING, ExecutionInstanceType.PREFILLING)


@dataclass(eq=False)
class Call:
    """One request, as its caller sees it."""

    request: Request
    is_stream: bool
    task: asyncio.Task[None] | None = None
    events: list[StreamEvent] = field(default_factory=list)
    response: Response | None = None
    error: SageLLMError | None = None
    was_cancelled: bool = False

    async def run(self, manager: ControlPlaneManager) -> None:
        try:
            if self.is_stream:
                async for event in manager.stream_request(self.request):
                    assert not (self.events and isinstance(self.events[-1], StreamEventEnd)), "nothing follows an end"
                    self.events.append(event)
            else:
                self.response = await manager.execute_request(self.request)
        except SageLLMError as error:
            self.error = error

    @property
    def outcome(self) -> ErrorCode | FinishReason | None:
        """How it ended; None: it did not."""
        end = self.response or next((event for event in self.events[-1:] if isinstance(event, StreamEventEnd)), None)
        if self.error is not None:
            return self.error.code
        if end is None:
            return None
        return end.finish_reason if end.error is None else end.error.code


class World:
    """A manager and its engines.

    No operator touches engine 0, or those that come in its place, so that there is always one to wait for. `is_flaky`:
    some engines that replace others, or are added by the autoscaler, do not start.
    """

    def __init__(
        self,
        *,
        policy: str,
        router: str,
        num_engines: int,
        seed: int,
        is_separated: bool = False,
        is_flaky: bool = False,
        **options: Any,
    ) -> None:
        self.seed = seed
        self.is_flaky = is_flaky
        self._rng = random.Random(seed)
        self.is_separated = is_separated
        config = ControlPlaneConfig(
            scheduling_policy=policy,
            routing_policy=router,
            lifecycle=LIFECYCLE,
            seed=seed,
            pd=PDSeparationConfig(prefilling_threshold_input_tokens=8) if is_separated else None,
            **{"max_num_waiting": 1000, "failover": FailoverConfig(max_moves=100_000), **options},
        )
        self.manager = ControlPlaneManager(config=config, make_engine=self._make)
        self.calls: list[Call] = []
        self.operations: list[asyncio.Future[Any]] = []
        self.has_crashed = False  # an engine, of itself: a request that was alone there looks like the reason
        self.replacements: list[asyncio.Task[None]] = []
        self.faults_seen: list[str] = []  # of those who promise something for every moment
        self._num_engines = 0
        self._watch(config.autoscaling.get("sim"))
        for _ in range(num_engines):
            self.add_engine()

    # ---- what can happen ------------------------------------------------------------------------------

    def _make(self, config: Any) -> SimEngine:
        name, _, given = str(config.engine_id).partition("-")
        number = int(given.split(".")[0])
        kind = {"places": 1 + (number + self.seed) % 3, "load_s": float(number % 3), "reports": number % 4 != 3}
        kind["is_deaf"] = (number + self.seed) % 2 == 0
        kind["is_late"] = (number + self.seed) % 5 < 2
        client = SimEngine(config.engine_id, seed=self.seed, **kind)
        if self.is_flaky and (name != "e" or "." in given) and self._rng.random() < 0.25:
            client.start_errors.append(UnavailableError("told to"))
        return client

    def add_engine(self) -> None:
        kind = _PD_KINDS[self._num_engines % 2] if self.is_separated else ExecutionInstanceType.GENERAL
        config = EngineConfig(model="sim", engine_id=f"e-{self._num_engines}")
        places = 1 + (self._num_engines + self.seed) % 3
        self.manager.register_config(config, instance_type=kind, max_concurrent_requests=places)
        self._num_engines += 1

    def submit(self, request: Request, *, is_stream: bool = True) -> Call:
        call = Call(request, is_stream)
        call.task = asyncio.ensure_future(call.run(self.manager))
        self.calls.append(call)
        return call

    def cancel(self, number: int) -> None:
        if self.calls:
            call = self.calls[number % len(self.calls)]
            assert call.task is not None
            call.was_cancelled = call.task.cancel() or call.was_cancelled

    def fault(self, what: str, number: int) -> None:
        engine = self.engines[number % len(self.engines)]
        client = engine.client
        if not engine.is_proven:  # one that fails before it was ever ready is given up, as it should be
            return
        assert isinstance(client, SimEngine)
        if what == "die":
            client.die()
        elif what == "die unseen":
            client.die(is_seen=False)
        elif what == "crash":
            client.crash()
            self.has_crashed = True
        elif what == "hang":
            client.is_hanging = client.is_running
        else:
            client.is_hanging = False

    def operate(self, what: str, number: int) -> None:
        """The operator does something to any engine but the first, or what came in its place."""
        engines = [engine for engine in self.engines if engine.engine_id.split(".")[0] != "e-0"]
        if what == "add" and len(engines) < 5:
            self.add_engine()
            self._note(self.manager.start_engine(self.engines[-1].engine_id))
        elif engines:
            engine = engines[number % len(engines)]
            call = {
                "start": self.manager.start_engine,
                "hold": self.manager.drain_engine,
                "stop": self.manager.stop_engine,
                "remove": self.manager.unregister_engine,
                "add": lambda _: asyncio.sleep(0),
            }[what]
            try:
                self._note(asyncio.ensure_future(call(engine.engine_id)))
            except UnavailableError:
                assert engine.wanted is Wanted.REMOVED

    def replace(self) -> None:
        """New engines in the place of all; other replacements may be under way."""
        self.replacements.append(asyncio.ensure_future(self._replace()))

    async def _replace(self) -> None:
        def make(old: ManagedEngine, engine_id: str) -> SimEngine:
            return self._make(old.given.model_copy(update={"engine_id": engine_id}))

        olds = [engine for engine in self.engines if engine.wanted is not Wanted.REMOVED]
        try:
            await replace_model(self.manager._pool.supervisor, "sim", make)
        except SageLLMError:  # a new one did not start, or an operator wanted something else of it
            return
        assert all(old.wanted is Wanted.REMOVED for old in olds)

    @property
    def engines(self) -> list[ManagedEngine]:
        return self.manager._pool.engines

    def _note(self, operation: asyncio.Future[Any]) -> None:
        self.operations.append(operation)

    # ---- what has to hold -----------------------------------------------------------------------------

    has_faults = True  # engines die, or operators take them out: there may be moments without a ready one

    def _watch(self, scaling: AutoscalerConfig | None) -> None:
        """Look at the engines whenever something is told of one."""
        publish, was_ready = self.manager.events.publish, False

        def look(*event: Any, **details: Any) -> None:
            nonlocal was_ready
            publish(*event, **details)
            engines = self.engines
            is_ready = any(engine.takes_requests for engine in engines)
            if was_ready and not is_ready and not self.has_faults:
                self.faults_seen.append(f"no engine is ready: {event}")
            was_ready = was_ready or is_ready
            num_replicas = sum(engine.wanted is Wanted.READY and not engine.is_given_up for engine in engines)
            num_surplus = sum(not task.done() for task in self.replacements)  # each has one more for a while
            most = 0 if scaling is None else max(scaling.max_replicas, self._num_engines)
            if scaling is not None and num_replicas > most + num_surplus:
                self.faults_seen.append(f"{num_replicas} replicas, {most} are allowed: {event}")

        self.manager.events.publish = look  # type: ignore[method-assign]

    async def settle(self) -> None:
        """No more faults: everything that was begun comes to its end."""
        for engine in self.engines:
            assert isinstance(engine.client, SimEngine)
            engine.client.is_hanging = False
            if engine.wanted not in (Wanted.REMOVED, Wanted.READY):
                self._note(self.manager.start_engine(engine.engine_id))
        tasks = [call.task for call in self.calls if call.task is not None]
        if began := [*tasks, *self.operations, *self.replacements]:
            _, pending = await asyncio.wait(began, timeout=_SETTLED_S)
            assert not pending, f"still under way: {pending}"
        for error in await asyncio.gather(*self.operations, return_exceptions=True):
            assert not isinstance(error, Exception) or isinstance(error, SageLLMError)  # overtaken by the next wish
        await asyncio.gather(*self.replacements)
        for call in self.calls:
            assert call.task is not None
            if not call.task.cancelled():
                call.task.result()

    def check(self) -> None:
        """After `settle`: nobody was forgotten, nobody got a wrong answer, and nothing is left behind."""
        assert not self.faults_seen, self.faults_seen[:3]
        killers = Counter(killer for engine in self.engines for killer in engine.client.killers)  # type: ignore[attr-defined]
        assert all(number <= 3 for number in killers.values()), f"engines that requests have killed: {killers}"
        for call in self.calls:
            self._check_call(call)
        if not self.has_crashed:
            condemned = [call.request for call in self.calls if call.outcome is ErrorCode.INTERNAL]
            innocent = [request for request in condemned if not str(request.prompt).startswith("poison")]
            # Who was aboard of two engines that two requests killed, each for the first time, looks like a third.
            assert len(innocent) <= max(0, len(killers) - 1), f"condemned without cause: {innocent}, by {killers}"
        self._check_books()

    def _check_call(self, call: Call) -> None:
        if call.was_cancelled:
            self._check_beginning(call)
            return
        outcome, trace = call.outcome, self.manager.explain(call.request.request_id)
        name = f"{call.request.request_id} ({call.request.prompt!r}): {outcome} {trace.to_dict()}"
        assert outcome is not None, f"never ended: {name}"
        if isinstance(outcome, FinishReason) and outcome is not FinishReason.ABORT:
            self._check_answer(call)
        elif outcome is FinishReason.ABORT:
            assert any(isinstance(op, asyncio.Future) for op in self.operations), f"nobody aborted it: {name}"
        elif outcome is ErrorCode.INTERNAL:
            lost = [stay for stay in trace.stays if stay.left_because]
            most = FURTHER_TOKENS * num_outputs(call.request)
            assert len(lost) >= 2, f"condemned without cause: {name}"
            assert lost[-1].num_output_tokens <= most, f"condemned although it got further: {name}"
        elif outcome is ErrorCode.DEADLINE_EXCEEDED:
            assert call.request.slo is not None, name
        else:
            assert outcome is ErrorCode.RESOURCE_EXHAUSTED, name
        self._check_beginning(call)
        assert trace.outcome == outcome.value, name

    def _check_answer(self, call: Call) -> None:
        if call.is_stream:
            start, end = call.events[0], call.events[-1]
            assert isinstance(start, StreamEventStart)
            assert isinstance(end, StreamEventEnd)
            assert start.seed is not None
            seeds = [start.seed]
            outputs = end.outputs
        else:
            assert call.response is not None
            seeds, outputs = [call.request.resolved_sampling().seed or 0], call.response.outputs
            if call.request.resolved_sampling().seed is None:
                return  # an answer of its own; nobody knows the seed
        expected = answer_of(call.request, seeds[0])
        assert [(output.token_ids, output.finish_reason) for output in outputs] == expected

    def _check_beginning(self, call: Call) -> None:
        """What a stream delivered is one start, and every token once from the first on."""
        if not call.events:
            return
        start = call.events[0]
        assert isinstance(start, StreamEventStart)
        assert start.seed is not None
        assert sum(isinstance(event, StreamEventStart) for event in call.events) == 1
        num_ends = sum(isinstance(event, StreamEventEnd) for event in call.events)
        assert num_ends == 1 or (call.was_cancelled and not num_ends)
        got: dict[int, list[int]] = {}
        for event in call.events:
            if isinstance(event, StreamEventDelta):
                got.setdefault(event.index, []).extend(event.chunk_tokens)
        for index, (tokens, _) in enumerate(answer_of(call.request, start.seed)):
            assert got.get(index, []) == tokens[: len(got.get(index, []))]

    def _check_books(self) -> None:
        manager, pool = self.manager, self.manager._pool
        dispatcher, fleet = manager._dispatcher, pool.fleet
        assert manager.num_waiting == 0
        assert not dispatcher._tickets
        assert not dispatcher._moved
        assert not dispatcher._isolated
        assert not any(engine.is_reserved for engine in self.engines)
        assert len(dispatcher.queue) == 0
        for name in ("num_requests", "queued_tokens", "queued_attention", "num_decoding", "kv_tokens", "held_tokens"):
            assert not getattr(fleet, name).any(), f"the ledger keeps {name}: {getattr(fleet, name)}"
        for engine in self.engines:
            info = pool.info(engine)
            assert (info.num_requests, info.num_tokens) == (0, 0), info
            assert not pool._stays[engine]
            assert isinstance(engine.client, SimEngine)
            assert not engine.client.requests, "an engine still works for nobody"
        for name, value in vars(dispatcher._policy).items():
            if name in ("_granted", "_charged", "_due", "_places", "_num_waiting", "_num_running", "_tenants"):
                assert not value or not any(value), f"the policy keeps {name}: {value}"
        admission = manager._runner._admission
        assert len(admission._deadlines) == 0
        if admission._quotas is not None:
            assert not any(admission._quotas.num_active(tenant) for tenant in ("", "a", "b"))

    def states(self) -> list[EngineState]:
        return [engine.state for engine in self.engines]


def make_request(number: int | str, **fields: Any) -> Request:
    """A request with an id that tells which it was."""
    deadline_s, seed, n = fields.pop("deadline_s", None), fields.pop("seed", None), fields.pop("n", 1)
    slo = None if deadline_s is None else SLO(deadline_ms=1e3 * deadline_s)
    sampling = SamplingParams(temperature=1.0, n=n, seed=seed, max_tokens=fields.pop("max_tokens", 20))
    return Request(request_id=f"r{number}", slo=slo, sampling_params=sampling, **fields)


QUOTAS = QuotaConfig(default=TenantQuota(max_concurrent=50))
