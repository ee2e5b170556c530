"""The scheduler: one token budget a step, no prefill phase and no decode phase.

Each request owes `num_tokens - num_computed_tokens` tokens. A step first serves running requests, then admits
waiting ones while budget, batch places and KV blocks last. Chunked prefill, prefix hits and preemption by
recompute all follow from that one number (the idea of vLLM's V1 scheduler; Kwon et al., SOSP 2023, and
Agrawal et al., "Sarathi-Serve", OSDI 2024, for chunked prefill).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.engine_core.policy import SchedulingPolicy
from sagellm_core.engine_core.request import EngineRequest, RequestStatus
from sagellm_core.engine_core.step_input import build_scheduler_output
from sagellm_core.engine_core.stop import check_stop
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_core.pooled import join_pooled
from sagellm_core.sampling.logprobs import TokenLogprobs
from sagellm_kv_cache import Block, BlockTables, KVCacheManager
from sagellm_protocol import Error, FinishReason, InvalidArgumentError, ResourceExhaustedError, SageLLMError

if TYPE_CHECKING:
    import torch

    from sagellm_core.structured import GrammarMatcher


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The scheduler's budgets. `prefill_chunk_size` is None when prompts must be computed in one piece."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefill_chunk_size: int | None
    max_num_waiting: int = 4096
    kv_bytes_per_token: int = 0


@dataclass(slots=True)
class _Step:
    """What one call of `schedule` has decided so far."""

    budget: int
    scheduled: list[tuple[EngineRequest, int]] = field(default_factory=list)
    preempted: bool = False

    def take(self, request: EngineRequest, num_tokens: int) -> None:
        self.scheduled.append((request, num_tokens))
        self.budget -= num_tokens


class Scheduler:
    """Decides what every step computes, and keeps the state of all requests of one engine.

    Not thread-safe: the step loop is its only caller. `clock` gives seconds of a monotonic clock.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        policy: SchedulingPolicy,
        limits: SchedulerLimits,
        clock: Callable[[], float],
    ) -> None:
        self.kv_cache = kv_cache
        self.policy = policy
        self.limits = limits
        self.clock = clock
        self.requests: dict[str, EngineRequest] = {}
        self.waiting: list[EngineRequest] = []
        self.running: list[EngineRequest] = []
        self.num_preemptions = 0
        blocks_per_request = -(-limits.max_model_len // kv_cache.block_size)
        self._tables = BlockTables(limits.max_num_seqs, blocks_per_request, kv_cache.block_size)
        self._step_id = 0
        self._sequence_number = 0
        self._in_flight: list[tuple[EngineRequest, int]] = []

    # ---- requests come and go -------------------------------------------------------------------------

    def add_request(self, core: EngineCoreRequest) -> EngineCoreOutput | None:
        """Queue a request; raises where it could never run, and leaves everything else as it is.

        A request that its resumed tokens have ended is not queued: its only output is returned.
        """
        if core.request_id in self.requests:
            raise InvalidArgumentError(f"request_id {core.request_id!r} is already running; use a fresh id")
        num_prompt_tokens = len(core.prompt_token_ids)
        # Where something is generated, it needs at least one place.
        most = self.limits.max_model_len - (core.pooling is None)
        if not 0 < num_prompt_tokens <= most:
            raise InvalidArgumentError(
                f"the prompt has {num_prompt_tokens} tokens; the engine takes 1 to {most}; shorten it or raise "
                "max_model_len",
                field="prompt",
            )
        if len(self.waiting) >= self.limits.max_num_waiting:
            raise ResourceExhaustedError(
                f"{len(self.waiting)} requests are waiting (max_num_waiting); retry later", retryable=True
            )
        self._sequence_number += 1
        request = EngineRequest.from_core(core, self._sequence_number, self.clock())
        if core.resumed_token_ids:
            reason, stop_token = check_stop(request, self.limits.max_model_len)
            if reason is not None:
                return _NewTokens().build(request, reason, stop_token)
        self.requests[core.request_id] = request
        self.waiting.append(request)
        return None

    def finish_request(
        self, request_id: str, reason: FinishReason, error: Error | None = None
    ) -> EngineCoreOutput | None:
        """End a request from outside a step (abort, failure); None if it is already gone."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        (self.waiting if request in self.waiting else self.running).remove(request)
        return self._finish(request, _NewTokens(), reason, None, error)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # ---- one step -------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Choose the tokens of the next step; None where nothing can run."""
        step = _Step(budget=self.limits.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        if not step.scheduled:
            return None
        # Stable: single tokens first, otherwise in the policy's order.
        step.scheduled.sort(key=lambda item: item[1] != 1)
        self._in_flight = step.scheduled
        self._step_id += 1
        return build_scheduler_output(self._step_id, step.scheduled, self._tables)

    def _schedule_running(self, step: _Step) -> None:
        now = self.clock()
        self.running.sort(key=lambda request: self.policy.key(request, now))
        decodes_to_come = sum(_owed(request) == 1 for request in self.running)
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING:
                continue  # gave way to one before it
            owed = _owed(request)
            if owed == 1:
                decodes_to_come -= 1
            # A decode costs one token and must not wait behind somebody's long prompt.
            num_tokens = self._cap(owed, step.budget - (decodes_to_come if owed > 1 else 0))
            if num_tokens > 0 and self._allocate_or_preempt(request, num_tokens, step):
                step.take(request, num_tokens)

    def _allocate_or_preempt(self, request: EngineRequest, num_tokens: int, step: _Step) -> bool:
        """Find blocks for a running request, taking them from those behind it; False if it gave way itself."""
        while not self._allocate(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            step.preempted = True
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, step: _Step) -> None:
        now = self.clock()
        self.waiting.sort(key=lambda request: self.policy.key(request, now))
        while self.waiting and step.budget > 0 and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting[0]
            cached_blocks, num_cached = self._find_cached_prefix(request)
            num_tokens = self._cap(request.num_tokens - num_cached, step.budget)
            if num_tokens == 0 or not self._fits(request, cached_blocks):
                break  # no skipping past a large request: it would never get its turn
            if not self._allocate(request, num_tokens, cached_blocks):
                break
            self._admit(self.waiting.pop(0), num_cached, now)
            step.take(request, num_tokens)

    def _find_cached_prefix(self, request: EngineRequest) -> tuple[list[Block], int]:
        if request.core.want_hidden_states and request.status is RequestStatus.PREEMPTED:
            return [], 0  # its hidden states were dropped with its blocks and must be computed again
        return self.kv_cache.find_cached_prefix(request)

    def _cap(self, owed: int, budget: int) -> int:
        """Tokens of `owed` that this step may compute; 0 where none."""
        chunk = self.limits.prefill_chunk_size
        if chunk is None:
            return owed if owed <= budget else 0
        return max(0, min(owed, budget, chunk))

    def _fits(self, request: EngineRequest, cached_blocks: list[Block]) -> bool:
        """Whether all tokens known now fit, not only the first chunk: else prompts would preempt each other."""
        if not self.running:
            return True
        needed = -(-request.num_tokens // self.kv_cache.block_size) - len(cached_blocks)
        idle_hits = sum(block.ref_count == 0 for block in cached_blocks)
        return needed <= self.kv_cache.num_free_blocks - idle_hits

    def _allocate(self, request: EngineRequest, num_tokens: int, cached_blocks: Sequence[Block] = ()) -> bool:
        cache = self.kv_cache
        evict_count, evict_ms = cache.evict_count, cache.evict_ms
        if not cache.allocate_slots(request, num_tokens, cached_blocks):
            return False
        if request.table_row < 0:
            request.table_row = self._tables.add_row()
        self._tables.extend_to(request.table_row, request.blocks)
        request.timings.evict_count += cache.evict_count - evict_count
        request.timings.evict_ms += cache.evict_ms - evict_ms
        return True

    def _admit(self, request: EngineRequest, num_cached: int, now: float) -> None:
        request.num_computed_tokens = num_cached
        if request.status is RequestStatus.WAITING:
            request.timings.scheduled_at = now
            request.timings.num_cached_tokens = num_cached
        elif request.core.want_hidden_states:
            request.timings.num_cached_tokens = 0
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _preempt(self, request: EngineRequest) -> None:
        """Give the blocks back; the request recomputes prompt and output when its turn comes again."""
        self.running.remove(request)
        self._measure(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.hidden_states.clear()
        request.pooled = None
        request.prompt_logprobs.clear()
        request.status = RequestStatus.PREEMPTED
        request.timings.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.append(request)

    def _release(self, request: EngineRequest) -> None:
        self.kv_cache.free(request)
        if request.table_row >= 0:
            self._tables.free_row(request.table_row)
            request.table_row = -1

    # ---- after the step -------------------------------------------------------------------------------

    def update_from_output(self, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Take in what the step produced: advance, append tokens, register full blocks, end what is done."""
        now = self.clock()
        outputs: list[EngineCoreOutput] = []
        sampled = enumerate(zip(result.sampled_token_ids, result.logprobs, strict=True))
        for request, num_tokens in self._in_flight:
            request.num_computed_tokens += num_tokens
            self.kv_cache.cache_full_blocks(request)
            if request.request_id in result.hidden_states:
                request.hidden_states.append(result.hidden_states[request.request_id])
            request.prompt_logprobs += result.prompt_logprobs.get(request.request_id, [])
            pooling = request.core.pooling
            if pooling is not None:
                request.pooled = join_pooled(pooling, request.pooled, result.pooled[request.request_id])
                if request.num_computed_tokens == request.num_tokens:
                    self.running.remove(request)
                    outputs.append(self._finish(request, _NewTokens(), FinishReason.STOP, None, None))
            elif request.num_computed_tokens == request.num_tokens:
                place, (token_id, logprobs) = next(sampled)
                if request.matcher is None:
                    outputs.append(self._append_token(request, token_id, logprobs, now))
                else:
                    fallback = result.fallback_logprobs.get(place)
                    outputs.append(self._append_accepted(request, request.matcher, token_id, logprobs, fallback, now))
        self._in_flight = []
        return outputs

    def fail_step(self, error: Error) -> list[EngineCoreOutput]:
        """End the requests of a step that could not be executed; all others go on."""
        failed = [request.request_id for request, _ in self._in_flight]
        self._in_flight = []
        outputs = [self.finish_request(request_id, FinishReason.ERROR, error) for request_id in failed]
        return [output for output in outputs if output is not None]

    def _append_accepted(
        self,
        request: EngineRequest,
        matcher: GrammarMatcher,
        token_id: int,
        logprobs: TokenLogprobs | None,
        fallback: TokenLogprobs | None,
        now: float,
    ) -> EngineCoreOutput:
        """Append the token if the request's grammar takes it, else the one that it puts in its place."""
        room = min(
            request.core.sampling.max_tokens - request.num_output_tokens, self.limits.max_model_len - request.num_tokens
        )
        try:
            accepted = matcher.accept(token_id, room - 1)
        except SageLLMError as error:
            self.running.remove(request)
            return self._finish(request, _NewTokens(), FinishReason.ERROR, None, error.to_error())
        return self._append_token(request, accepted, logprobs if accepted == token_id else fallback, now)

    def _append_token(
        self, request: EngineRequest, token_id: int, logprobs: TokenLogprobs | None, now: float
    ) -> EngineCoreOutput:
        request.token_ids.append(token_id)
        timings = request.timings
        if timings.first_token_at is None:
            timings.first_token_at = now
        timings.last_token_at = now
        parts = _NewTokens([token_id], None if logprobs is None else [logprobs])
        self._measure(request)
        reason, stop_token = check_stop(request, self.limits.max_model_len)
        if reason is None:
            return parts.build(request)
        self.running.remove(request)
        return self._finish(request, parts, reason, stop_token, None)

    def _finish(
        self,
        request: EngineRequest,
        parts: _NewTokens,
        reason: FinishReason,
        stop_token: int | None,
        error: Error | None,
    ) -> EngineCoreOutput:
        self._measure(request)
        output = parts.build(request, reason, stop_token, error)
        self._release(request)
        request.status = RequestStatus.FINISHED
        del self.requests[request.request_id]
        return output

    def _measure(self, request: EngineRequest) -> None:
        timings = request.timings
        num_bytes = len(request.blocks) * self.kv_cache.block_size * self.limits.kv_bytes_per_token
        # The most it held: a preempted request holds nothing when it is aborted.
        timings.kv_used_tokens = max(timings.kv_used_tokens, request.num_computed_tokens)
        timings.kv_used_bytes = max(timings.kv_used_bytes, num_bytes)
        if timings.first_token_at is not None and timings.scheduled_at is not None:
            timings.prefill_ms = (timings.first_token_at - timings.scheduled_at) * 1e3
            timings.decode_ms = ((timings.last_token_at or timings.first_token_at) - timings.first_token_at) * 1e3


@dataclass(frozen=True, slots=True)
class _NewTokens:
    """The tokens that a step adds to a request, before the request's own state completes the output."""

    new_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None

    def build(
        self,
        request: EngineRequest,
        reason: FinishReason | None = None,
        stop_reason: int | None = None,
        error: Error | None = None,
    ) -> EngineCoreOutput:
        is_first = request.num_output_tokens <= len(request.core.resumed_token_ids) + 1
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=self.new_token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=self.logprobs,
            hidden_states=_concatenate(request) if reason is not None else None,
            pooled=request.pooled if reason is not None else None,
            num_cached_tokens=request.timings.num_cached_tokens,
            kv_used_tokens=request.num_computed_tokens,
            prompt_logprobs=[None, *request.prompt_logprobs] if is_first and request.prompt_logprobs else None,
            metrics=request.timings,
            error=error,
            submission=request.core.submission,
        )


def _owed(request: EngineRequest) -> int:
    return request.num_tokens - request.num_computed_tokens


def _concatenate(request: EngineRequest) -> torch.Tensor | None:
    if not request.hidden_states:
        return None
    import torch

    return torch.cat(request.hidden_states)
