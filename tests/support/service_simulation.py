"""A pool of engines on virtual time under a `WaitQueue`: what a scheduling policy makes of a workload.

Engines batch continuously: a step computes whole prompts within a budget and one token for each that decodes.
Book-keeping and hooks are those of the control plane; no coroutine runs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.policies import (
    Key,
    PolicyContext,
    PolicyOptions,
    SchedulingPolicy,
    WaitingRequest,
    get_policy,
)
from sagellm_control_plane.policies.fair import OUTPUT_PRICE, PROMPT_PRICE
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.queue import WaitQueue
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_protocol import SLO, Request

ENGINE = StepCoefficients(c0=10e-3, a=50e-6, q=0.0, k=20e-9, b=50e-6)
TOKENS_PER_STEP = 2048


@dataclass(eq=False)
class Job:
    """One request of a workload, and what became of it."""

    waiting: WaitingRequest
    num_output: int
    granted_at: float = inf
    first_token_at: float = inf
    ended_at: float = inf
    num_made: int = 0
    booking: Booking | None = None

    @property
    def is_good(self) -> bool:
        """Whether its first token came in time."""
        return self.first_token_at <= self.waiting.first_token_due

    @property
    def waited_s(self) -> float:
        return self.granted_at - self.waiting.arrival_time


def job(number: int, arrival: float, num_prompt: int, num_output: int, *, tenant: str = "", **fields: Any) -> Job:
    request = Request(prompt="x", **fields)
    return Job(WaitingRequest(request, arrival, num_prompt, num_output, number, tenant), num_output)


@dataclass
class Engine:
    row: int
    is_free_at: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    prefilling: list[Job] = field(default_factory=list)  # in the step that ends at `is_free_at`
    decoding: list[Job] = field(default_factory=list)


class EarliestDeadline(SchedulingPolicy):
    """What `slo_aware` is measured against."""

    name = "earliest_deadline"

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return (waiting.first_token_due,)


class Service:
    """`num_engines` engines of `places` places; `run` plays a workload to its end."""

    def __init__(
        self,
        policy: Callable[[PolicyContext], SchedulingPolicy],
        *,
        num_engines: int = 1,
        places: int = 8,
        **options: Any,
    ) -> None:
        self.fleet = Fleet()
        self.predictor = Predictor(self.fleet)
        self.engines = []
        for number in range(num_engines):
            row = self.fleet.add(f"engine-{number}", capacity=places, max_num_batched_tokens=TOKENS_PER_STEP)
            self.predictor.add_engine(row, ENGINE)
            self.engines.append(Engine(row))
        self.switches: list[tuple[float, str, str]] = []
        self.now = 0.0
        context = PolicyContext(
            self.predictor,
            self.fleet,
            PolicyOptions(**options),
            on_switch=lambda old, new, reason: self.switches.append((self.now, old, new)),
        )
        self.policy = policy(context)
        self.queue = WaitQueue(self.policy, 1_000_000)
        self.service: dict[str, float] = defaultdict(float)  # of each tenant, by VTC's prices
        self.observe: Callable[[Service], None] = lambda service: None  # called after each event

    def run(self, jobs: Iterable[Job], until: float = inf) -> list[Job]:
        """Play the workload; all jobs end unless `until` comes first."""
        todo = sorted(jobs, key=lambda job: job.waiting.arrival_time)
        by_request = {job.waiting: job for job in todo}
        position = 0
        while self.now < until:
            times = [engine.is_free_at for engine in self.engines if engine.jobs]
            if position < len(todo):
                times.append(todo[position].waiting.arrival_time)
            if not times:
                break
            self.now = min(times)
            while position < len(todo) and todo[position].waiting.arrival_time <= self.now:
                self.queue.push(todo[position].waiting, self.now)
                position += 1
            for engine in self.engines:
                if engine.jobs and engine.is_free_at <= self.now:
                    self._end_step(engine)
            self._grant(by_request)
            for engine in self.engines:
                if engine.jobs and engine.is_free_at <= self.now:
                    self._begin_step(engine)
            self.observe(self)
        return todo

    def _grant(self, by_request: dict[WaitingRequest, Job]) -> None:
        while True:
            rows = np.array(
                [e.row for e in self.engines if self.fleet.num_requests[e.row] < self.fleet.capacity[e.row]], np.intp
            )
            if not len(rows) or (waiting := self.queue.first(self.now)) is None:
                return
            rows = self.policy.narrow(waiting, rows, self.fleet, self.now)
            if not len(rows):
                return
            self.queue.remove(waiting, self.now)
            row = int(rows[self.fleet.num_requests[rows].argmin()])
            job = by_request[waiting]
            job.granted_at, job.booking = self.now, Booking(waiting.num_prompt_tokens)
            self.fleet.grant(row, job.booking)
            self.policy.on_granted(waiting, 0, self.now)
            self.service[waiting.tenant] += PROMPT_PRICE * waiting.num_prompt_tokens
            engine = next(engine for engine in self.engines if engine.row == row)
            if not engine.jobs:
                engine.is_free_at = self.now
            engine.jobs.append(job)

    def _begin_step(self, engine: Engine) -> None:
        budget, engine.prefilling = TOKENS_PER_STEP, []
        engine.decoding = [job for job in engine.jobs if job.num_made]
        for job in engine.jobs:
            if job.num_made:
                continue
            if engine.prefilling and job.waiting.num_prompt_tokens > budget:
                break
            budget -= job.waiting.num_prompt_tokens
            engine.prefilling.append(job)
        prefill = sum(job.waiting.num_prompt_tokens for job in engine.prefilling)
        kv_tokens = sum(job.waiting.num_prompt_tokens + job.num_made for job in engine.decoding)
        engine.is_free_at = self.now + ENGINE.step_s(prefill, 0, kv_tokens, len(engine.decoding))

    def _end_step(self, engine: Engine) -> None:
        for job in engine.prefilling:
            job.first_token_at = self.now
        for job in engine.prefilling + engine.decoding:
            assert job.booking is not None
            job.num_made += 1
            self.fleet.advance(job.booking, 1)
            self.policy.on_tokens(job.waiting, 1, self.now)
            self.service[job.waiting.tenant] += OUTPUT_PRICE
            if job.num_made == job.num_output:
                job.ended_at = self.now
                engine.jobs.remove(job)
                self.fleet.end(job.booking)
                self.policy.on_ended(job.waiting, self.now)
        engine.prefilling, engine.decoding = [], []


def mixed_jobs(num: int, rate: float, seed: int, ttfts_ms: Sequence[float | None] = (500, 2000, 8000)) -> list[Job]:
    """A Poisson stream of chats: prompts of some hundred tokens, answers of some dozens, tiers of objectives."""
    rng, arrival, jobs = random.Random(seed), 0.0, []
    for number in range(num):
        arrival += rng.expovariate(rate) if rate < inf else 0.0
        num_prompt = min(2000, int(rng.lognormvariate(6, 0.7)))
        num_output = 1 + min(300, int(rng.expovariate(1 / 60)))
        ttft_ms = rng.choice(list(ttfts_ms))
        slo = None if ttft_ms is None else SLO(ttft_ms=ttft_ms)
        jobs.append(job(number, arrival, num_prompt, num_output, slo=slo))
    return jobs


def saturation_rate(num: int = 600, **service: Any) -> float:
    """Requests of `mixed_jobs` a second that a pool finishes when there is always one waiting."""
    pool = Service(get_policy("fifo"), **service)
    return num / max(job.ended_at for job in pool.run(mixed_jobs(num, inf, seed=0)))


def goodput(policy: type[SchedulingPolicy], load: float, seed: int, num: int = 1500) -> float:
    """Share of requests whose first token comes in time, at a share of the saturation rate."""
    jobs = Service(policy).run(mixed_jobs(num, load * saturation_rate(), seed))
    return sum(item.is_good for item in jobs) / len(jobs)


def main() -> None:
    """Print the goodput of policies at several loads, for three seeds."""
    policies = [get_policy("fifo"), EarliestDeadline, get_policy("slo_aware"), get_policy("adaptive")]
    print("| load |", " | ".join(policy.name for policy in policies), "|")
    for load in (0.8, 1.0, 1.2, 1.5):
        cells = [" ".join(f"{goodput(policy, load, seed):.2f}" for seed in (1, 2, 3)) for policy in policies]
        print(f"| {load} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
