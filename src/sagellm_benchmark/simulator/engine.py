"""An engine without a model: continuous batching, chunked prefill and a prefix cache, with computed step times.

Each step takes every decoding sequence and fills the token budget with prompts, first come first served; its duration
is `StepCoefficients.step_s`. A request reserves the blocks of its whole prompt and answer when it starts, so nothing is
ever preempted. Blocks of prompts stay cached after their request, the least recently used are evicted for new ones,
ends of prompts before their beginnings.

Steps that only decode are alike but for the growth of the contexts, so a run of them is one event: a trace of hours
takes seconds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, floor, sqrt

from sagellm_control_plane.fleet import Booking
from sagellm_control_plane.step_time import DEFAULT_PRIOR, StepCoefficients
from sagellm_core.engine_core.report import StepSample
from sagellm_kv_cache.events import BlockRemoved, BlockStored, EventBatch, EventQueue

_ROOT = bytes(32)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One simulated engine. The default times are those of a large accelerator, assumed, of no named one."""

    coefficients: StepCoefficients = DEFAULT_PRIOR
    num_blocks: int = 2048
    block_size: int = 512  # tokens
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256


@dataclass(slots=True, eq=False)
class Run:
    """One stay of a request on an engine. Times are seconds of the simulation."""

    number: int
    num_prompt_tokens: int
    num_output_tokens: int
    hashes: tuple[bytes, ...]  # of the prompt's blocks, the last of which may be part full
    booking: Booking
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0  # of the prompt
    num_reported_tokens: int = 0  # of the output, to the ledger
    first_tick: int = 0  # of the engine's decode ticks, when its first token came
    pinned: list[bytes] = field(default_factory=list)
    num_private_blocks: int = 0
    first_token_at: float = -1.0
    ended_at: float = -1.0


@dataclass(frozen=True, slots=True)
class _Step:
    """What runs now: `num_steps` steps in a row, more than one only where all of them just decode."""

    started_at: float
    num_steps: int
    chunks: tuple[tuple[Run, int], ...]
    attention: float
    ends_at: float

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk for _, chunk in self.chunks)


class SimulatedEngine:
    """One row of a simulated fleet. Whoever drives it calls `finish_step` at `next_event`, and `submit` in between."""

    def __init__(self, row: int, spec: EngineSpec) -> None:
        self.row = row
        self.spec = spec
        self.cache = BlockCache(spec.num_blocks)
        self.samples: list[StepSample] = []  # steps since they were last taken
        self.busy_s = 0.0
        self._waiting: deque[Run] = deque()
        self._prefilling: deque[Run] = deque()
        self._decoding: list[tuple[int, int, Run]] = []  # heap by the tick of the last token
        self._running: dict[Run, None] = {}
        self._kv_tokens = 0
        self._tick = 0
        self._step: _Step | None = None

    @property
    def next_event(self) -> float:
        """When the present step ends; infinite for an idle engine."""
        return self._step.ends_at if self._step is not None else float("inf")

    def submit(self, run: Run, now: float) -> None:
        """A request has come."""
        assert self.num_blocks_needed(run) <= self.spec.num_blocks, f"{run.number} can never start"
        self._waiting.append(run)
        if self._step is None:
            self._begin_step(now)
        elif self._step.num_steps > 1:
            self.catch_up(now)
            self._resume(num_steps=1)

    def num_blocks_needed(self, run: Run) -> int:
        """Blocks of the prompt and the whole answer."""
        return ceil((run.num_prompt_tokens + run.num_output_tokens) / self.spec.block_size)

    def catch_up(self, now: float) -> None:
        """Account for those steps of a row of them that have ended by `now`."""
        step = self._step
        if step is None or step.num_steps == 1:
            return
        done = min(self._steps_within(now - step.started_at), step.num_steps - 1)
        if done > 0:
            started_at = step.started_at + self._decode_s(done)
            self._decode(done, started_at - step.started_at)
            self._step = _Step(started_at, step.num_steps - done, (), 0.0, step.ends_at)

    def finish_step(self) -> tuple[list[Run], list[Run]]:
        """End the present step and begin the next: requests that got their first token, and those that ended."""
        step = self._step
        assert step is not None, "an idle engine has no step"
        now, started, ended = step.ends_at, [], []
        self._decode(step.num_steps, now - step.started_at, step)
        for run, chunk in step.chunks:
            run.num_computed_tokens += chunk
            self._cache_computed(run)
            if run.num_computed_tokens == run.num_prompt_tokens:
                self._prefilling.popleft()
                run.first_token_at, run.first_tick = now, self._tick
                started.append(run)
                self._kv_tokens += run.num_prompt_tokens + 1
                heappush(self._decoding, (self._tick + run.num_output_tokens - 1, run.number, run))
                self._running[run] = None
        while self._decoding and self._decoding[0][0] <= self._tick:
            run = heappop(self._decoding)[2]
            del self._running[run]
            self._kv_tokens -= run.num_prompt_tokens + run.num_output_tokens
            run.ended_at = now
            self.cache.release(run)
            ended.append(run)
        self._step = None
        self._begin_step(now)
        return started, ended

    def new_tokens(self) -> Iterator[tuple[Run, int]]:
        """Output tokens of the running requests since this was last asked."""
        for run in self._running:
            num_tokens = self._tick - run.first_tick + 1
            if num_tokens > run.num_reported_tokens:
                yield run, num_tokens - run.num_reported_tokens
                run.num_reported_tokens = num_tokens

    # ---- steps of the above ---------------------------------------------------------------------------

    def _begin_step(self, now: float) -> None:
        self._admit()
        chunks, attention = self._fill_budget()
        if chunks:
            coefficients = self.spec.coefficients
            num_tokens = sum(chunk for _, chunk in chunks)
            duration = coefficients.step_s(num_tokens, attention, self._kv_tokens, len(self._decoding))
            self._step = _Step(now, 1, tuple(chunks), attention, now + duration)
        elif self._decoding:
            num_steps = self._decoding[0][0] - self._tick
            self._step = _Step(now, num_steps, (), 0.0, now + self._decode_s(num_steps))

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self.spec.max_num_seqs:
            run = self._waiting[0]
            if sum(other.num_prompt_tokens - other.num_computed_tokens for other in self._prefilling) >= (
                self.spec.max_num_batched_tokens
            ):
                return  # the budget of the next step is spoken for: hits are counted as late as they can be
            hits = self.cache.acquire(run, self.num_blocks_needed(run))
            if hits is None:
                return
            self._waiting.popleft()
            run.num_cached_tokens = min(hits * self.spec.block_size, run.num_prompt_tokens - 1)
            run.num_computed_tokens = run.num_cached_tokens
            self._prefilling.append(run)

    def _fill_budget(self) -> tuple[list[tuple[Run, int]], float]:
        budget = self.spec.max_num_batched_tokens - len(self._decoding)
        chunks, attention = [], 0.0
        for run in self._prefilling:
            if budget <= 0:
                break
            chunk = min(budget, run.num_prompt_tokens - run.num_computed_tokens)
            attention += chunk * (run.num_computed_tokens + chunk / 2)
            chunks.append((run, chunk))
            budget -= chunk
        return chunks, attention

    def _resume(self, num_steps: int) -> None:
        """Shorten a row of decoding steps."""
        step = self._step
        assert step is not None
        assert not step.chunks, "only steps that decode come in rows"
        self._step = _Step(step.started_at, num_steps, (), 0.0, step.started_at + self._decode_s(num_steps))

    def _decode(self, num_steps: int, duration_s: float, step: _Step | None = None) -> None:
        """Give every decoding sequence a token a step."""
        num = len(self._decoding)
        mean_kv = self._kv_tokens + num * (num_steps - 1) // 2
        prefill, attention = (step.prefill_tokens, step.attention) if step is not None else (0, 0.0)
        self.samples.append(StepSample(prefill, attention, mean_kv, num, duration_s / num_steps))
        self.busy_s += duration_s
        self._tick += num_steps
        self._kv_tokens += num * num_steps

    def _decode_s(self, num_steps: int) -> float:
        """How long so many steps take that only decode."""
        first, growth = self._decode_terms()
        return num_steps * first + growth * num_steps * (num_steps - 1) / 2

    def _steps_within(self, duration_s: float) -> int:
        """The inverse of `_decode_s`, rounded down."""
        first, growth = self._decode_terms()
        if growth == 0:
            return floor(duration_s / first)
        half = first / growth - 0.5
        return floor(sqrt(half * half + 2 * duration_s / growth) - half + 1e-9)

    def _decode_terms(self) -> tuple[float, float]:
        coefficients, num = self.spec.coefficients, len(self._decoding)
        return coefficients.decode_s(self._kv_tokens, num), coefficients.k * num

    def _cache_computed(self, run: Run) -> None:
        done = run.num_computed_tokens == run.num_prompt_tokens
        num_full = len(run.hashes) if done else run.num_computed_tokens // self.spec.block_size
        self.cache.store(run, num_full)


class BlockCache:
    """Blocks by hash, with their users; those without any are kept until their space is needed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._users: dict[bytes, int] = {}
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._num_private = 0
        self._events = EventQueue(4 * num_blocks + 64)

    @property
    def num_cached(self) -> int:
        """Blocks that lookups find."""
        return len(self._users)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return len(self._users) - len(self._unused) + self._num_private

    def take_events(self) -> EventBatch:
        """What has changed since this was last asked."""
        return self._events.take()

    def acquire(self, run: Run, num_needed: int) -> int | None:
        """Reserve `num_needed` blocks for a request; how many of its first ones are cached, or None without room."""
        hits = []
        for block_hash in run.hashes:
            if block_hash not in self._users:
                break
            hits.append(block_hash)
        num_new = num_needed - len(hits)
        num_revived = sum(self._users[block_hash] == 0 for block_hash in hits)
        if self.num_used + num_revived + num_new > self.num_blocks:
            return None
        for block_hash in hits:
            self._users[block_hash] += 1
            self._unused.pop(block_hash, None)
        run.pinned = hits
        run.num_private_blocks = num_new
        self._num_private += num_new
        removed = []
        while len(self._users) + self._num_private > self.num_blocks:
            block_hash, _ = self._unused.popitem(last=False)
            del self._users[block_hash]
            removed.append(block_hash)
        if removed:
            self._events.put(BlockRemoved(tuple(removed)))
        return len(hits)

    def store(self, run: Run, num_full: int) -> None:
        """The first `num_full` blocks of a prompt are computed. What another has stored meanwhile stays private."""
        stored = []
        for block_hash in run.hashes[len(run.pinned) : num_full]:
            if block_hash in self._users:
                break
            self._users[block_hash] = 1
            run.pinned.append(block_hash)
            run.num_private_blocks -= 1
            self._num_private -= 1
            stored.append(block_hash)
        if stored:
            self._events.put(BlockStored(tuple(stored), _ROOT, (), 0))

    def release(self, run: Run) -> None:
        """The request is over; its prompt stays until the space is needed."""
        self._num_private -= run.num_private_blocks
        for block_hash in reversed(run.pinned):
            self._users[block_hash] -= 1
            if self._users[block_hash] == 0:
                self._unused[block_hash] = None
