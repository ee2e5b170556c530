"""The control plane's own queue, policies and routers over simulated engines, on virtual time.

What decides is the code that serves: `WaitQueue` with a scheduling policy, a routing policy, `Fleet`, `PrefixIndex`
and `Predictor`. Only the engines and the clock are simulated. The ledger hears of tokens at once, as from streams; the
index and the step times hear of an engine's steps by reports, `report_delay_s` late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from sagellm_benchmark.simulator.engine import EngineSpec, Run, SimulatedEngine
from sagellm_benchmark.traces import TraceRequest
from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.policies import PolicyContext, WaitingRequest, get_policy
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.queue import WaitQueue
from sagellm_control_plane.routing import RoutedRequest, RoutingContext, get_router
from sagellm_control_plane.routing.base import Rows
from sagellm_protocol import SLO, InvalidArgumentError, Request

_MODEL = "simulated"
_EPOCH = "simulated"


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """One run. `speed` divides the times between arrivals; `learns` fits step times instead of being told them."""

    num_engines: int = 8
    speed: float = 1.0
    router: str = "marginal_cost"
    policy: str = "fifo"
    engine: EngineSpec = field(default_factory=EngineSpec)
    report_delay_s: float = 0.02
    learns: bool = True
    max_num_waiting: int = 1_000_000
    slo: SLO | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times in seconds, since its arrival."""

    ttft_s: float
    tpot_s: float
    e2e_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_expected_cached_tokens: int  # as the router thought
    predicted_ttft_s: float | None
    row: int


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """All outcomes, in the order of arrival, and how busy the engines were."""

    outcomes: list[Outcome]
    duration_s: float
    utilization: float  # mean share of the time that engines were in a step


def simulate(trace: Sequence[TraceRequest], config: SimulationConfig) -> SimulationResult:
    """Replay a trace. The same trace and configuration give the same result."""
    return Simulation(trace, config).run()


@dataclass(slots=True, eq=False)
class _Job:
    """A request of the trace on its way."""

    waiting: WaitingRequest
    routed: RoutedRequest
    run: Run
    predicted_ttft_s: float | None = None
    row: int = -1


class Simulation:
    """One run. `fleet`, `index` and `engines` may be looked at when it is over."""

    def __init__(self, trace: Sequence[TraceRequest], config: SimulationConfig) -> None:
        self._config = config
        self._trace = trace
        self._now = 0.0
        self._events: list[tuple[float, int, Any]] = []
        self._numbers = count()
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self._predictor = Predictor(self.fleet)
        self.engines: dict[int, SimulatedEngine] = {}
        for number in range(config.num_engines):
            spec = config.engine
            row = self.fleet.add(
                f"engine-{number}", capacity=spec.max_num_seqs, max_num_batched_tokens=spec.max_num_batched_tokens
            )
            self.engines[row] = SimulatedEngine(row, spec)
            self._predictor.add_engine(row)
            if not config.learns:
                self.fleet.set_coefficients(row, spec.coefficients)
        self._rows = self.fleet.rows()
        self._policy = get_policy(config.policy)(PolicyContext(self._predictor, self.fleet))
        self._queue = WaitQueue(self._policy, config.max_num_waiting)
        self._router = get_router(config.router)(RoutingContext(self.index, seed=config.seed))
        self._jobs: dict[WaitingRequest, _Job] = {}
        self._jobs_of_runs: dict[Run, _Job] = {}

    def run(self) -> SimulationResult:
        """See `simulate`."""
        jobs = [self._job(number, entry) for number, entry in enumerate(self._trace)]
        for job in jobs:
            self._plan(job.waiting.arrival_time, job)
        while self._events:
            self._now, _, event = heappop(self._events)
            if isinstance(event, _Job):
                self._arrive(event)
            elif isinstance(event, SimulatedEngine):
                if event.next_event == self._now:  # else it was given something to do and this is overtaken
                    self._step_ended(event)
            else:
                event()
        return self._result(jobs)

    def _arrive(self, job: _Job) -> None:
        self._jobs[job.waiting] = job
        for engine in self.engines.values():
            engine.catch_up(self._now)
            self._book_tokens(engine)
        self._queue.push(job.waiting, self._now)
        self._dispatch()

    def _dispatch(self) -> None:
        while len(self._queue):
            fleet = self.fleet
            rows = self._rows[fleet.num_requests[self._rows] < fleet.capacity[self._rows]]
            if not len(rows):
                return
            waiting = self._queue.pop(self._now, would_wait=partial(self._would_wait, rows))
            assert waiting is not None, "every destination is open"
            job = self._jobs.pop(waiting)
            rows = self._policy.narrow(waiting, rows, fleet, self._now)
            choice = self._router.choose(job.routed, rows, fleet, self._now)
            job.row, job.predicted_ttft_s = choice.row, choice.predicted_ttft_s
            job.run.booking = Booking(job.routed.num_prompt_tokens, choice.num_cached_tokens)
            fleet.grant(choice.row, job.run.booking)
            self._router.on_granted(job.routed, choice.row)
            self._policy.on_granted(waiting, choice.num_cached_tokens, self._now)
            self._jobs_of_runs[job.run] = job
            engine = self.engines[choice.row]
            engine.submit(job.run, self._now)
            self._plan(engine.next_event, engine)

    def _would_wait(self, free: Rows, waiting: WaitingRequest) -> bool:
        return self._router.would_wait(self._jobs[waiting].routed, free, self._rows, self.fleet)

    def _step_ended(self, engine: SimulatedEngine) -> None:
        started, ended = engine.finish_step()
        for run in started:
            self.fleet.advance(run.booking, 1)
            self._policy.on_tokens(self._jobs_of_runs[run].waiting, 1, self._now)
            run.num_reported_tokens = 1
        self._book_tokens(engine)
        for run in ended:
            job = self._jobs_of_runs.pop(run)
            self.fleet.end(run.booking)
            self._router.on_ended(job.routed, engine.row)
            self._policy.on_ended(job.waiting, self._now)
            self._predictor.observe_answer("", _MODEL, run.num_output_tokens, self._now - job.waiting.arrival_time)
        self._report(engine)
        if engine.next_event < float("inf"):
            self._plan(engine.next_event, engine)
        if ended:
            self._dispatch()

    def _book_tokens(self, engine: SimulatedEngine) -> None:
        for run, num_tokens in engine.new_tokens():
            self.fleet.advance(run.booking, num_tokens)
            self._policy.on_tokens(self._jobs_of_runs[run].waiting, num_tokens, self._now)

    def _report(self, engine: SimulatedEngine) -> None:
        batch, samples = engine.cache.take_events(), engine.samples
        engine.samples = []

        def deliver() -> None:
            self.index.apply(engine.row, _EPOCH, batch)
            if self._config.learns:
                self._predictor.observe_steps(engine.row, samples)

        self._plan(self._now + self._config.report_delay_s, deliver)

    def _plan(self, at: float, event: object) -> None:
        heappush(self._events, (at, next(self._numbers), event))

    # ---- what goes in and comes out -------------------------------------------------------------------

    def _job(self, number: int, entry: TraceRequest) -> _Job:
        config = self._config
        if entry.at_s is None:
            raise InvalidArgumentError("the trace has no times of arrival; choose one that has", field="trace")
        needed = -(-(entry.input_len + entry.output_len) // config.engine.block_size)
        if needed > config.engine.num_blocks:
            raise InvalidArgumentError(
                f"request {number} needs {needed} blocks, an engine has {config.engine.num_blocks}; give it more",
                field="num_blocks",
            )
        at = entry.at_s / config.speed
        hashes = tuple(sha256(str(block).encode()).digest() for block in entry.block_ids)
        waiting = WaitingRequest(
            Request(prompt="x", model=_MODEL, slo=config.slo), at, entry.input_len, entry.output_len, number
        )
        routed = RoutedRequest(
            str(number),
            _MODEL,
            entry.input_len,
            entry.output_len,
            hashes,
            block_size=entry.block_tokens,
            slo=config.slo,
        )
        run = Run(number, entry.input_len, entry.output_len, hashes, Booking(entry.input_len))
        return _Job(waiting, routed, run)

    def _result(self, jobs: Sequence[_Job]) -> SimulationResult:
        outcomes = []
        for job in jobs:
            run, arrival = job.run, job.waiting.arrival_time
            spread = max(run.num_output_tokens - 1, 1)
            outcomes.append(
                Outcome(
                    ttft_s=run.first_token_at - arrival,
                    tpot_s=(run.ended_at - run.first_token_at) / spread,
                    e2e_s=run.ended_at - arrival,
                    num_prompt_tokens=run.num_prompt_tokens,
                    num_output_tokens=run.num_output_tokens,
                    num_cached_tokens=run.num_cached_tokens,
                    num_expected_cached_tokens=run.booking.num_cached_tokens,
                    predicted_ttft_s=job.predicted_ttft_s,
                    row=job.row,
                )
            )
        duration = max((job.run.ended_at for job in jobs), default=0.0)
        busy = float(np.mean([engine.busy_s for engine in self.engines.values()]))
        return SimulationResult(outcomes, duration, busy / max(duration, 1e-9))
