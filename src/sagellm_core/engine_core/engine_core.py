"""The engine core: scheduler and executor joined into a step, one page long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.output import SchedulerOutput
from sagellm_core.engine_core.policy import get_policy
from sagellm_core.engine_core.report import EngineStats
from sagellm_core.engine_core.scheduler import Scheduler, SchedulerLimits
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_core.executor.base import Executor
from sagellm_kv_cache import KVCacheManager
from sagellm_protocol import FinishReason, InternalError, SageLLMError

logger = logging.getLogger(__name__)


class EngineCore:
    """Add requests, step until none is left. Belongs to one thread; `start` loads the model in it."""

    def __init__(
        self, config: LLMEngineConfig, executor: Executor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        capacity = executor.start()
        chunk = config.prefill_chunk_size if config.enable_chunked_prefill else None
        self.executor = executor
        self.kv_cache = KVCacheManager(
            capacity.num_blocks,
            capacity.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            eviction_policy=config.eviction_policy,
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            get_policy(config.scheduling_policy),
            SchedulerLimits(
                max_num_seqs=config.max_batch_size,
                max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_model_len if chunk is None else 1),
                max_model_len=config.max_model_len,
                prefill_chunk_size=chunk,
                max_num_waiting=config.max_num_waiting,
                kv_bytes_per_token=capacity.bytes_per_token,
            ),
            clock,
        )
        self.on_step: Callable[[SchedulerOutput, float], None] | None = None  # told of each step and its seconds
        self._clock = clock
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    def add_request(self, request: EngineCoreRequest) -> EngineCoreOutput | None:
        """Queue a request; its output if it has ended already. Raises `InvalidArgumentError` and others."""
        output = self.scheduler.add_request(request)
        self.num_prompt_tokens += len(request.prompt_token_ids)
        return output

    def abort_request(self, request_id: str) -> EngineCoreOutput | None:
        """End a request now and free its blocks; None where it has ended already."""
        return self.scheduler.finish_request(request_id, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[EngineCoreOutput]:
        """Schedule, execute, update. A step that fails ends its own requests and no others."""
        started_at = self._clock()
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return []
        self.num_steps += 1
        try:
            result = self.executor.execute_model(scheduled)
        except Exception as error:
            logger.exception("step %d failed", scheduled.step_id)
            return self.scheduler.fail_step(as_protocol_error(error).to_error())
        outputs = self.scheduler.update_from_output(result)
        self.num_output_tokens += sum(len(output.new_token_ids) for output in outputs)
        if self.on_step is not None:
            self.on_step(scheduled, self._clock() - started_at)
        return outputs

    def stats(self) -> EngineStats:
        """Counters of scheduler and cache."""
        cache = self.kv_cache.stats()
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks=self.kv_cache.num_blocks,
            num_free_blocks=self.kv_cache.num_free_blocks,
            kv_usage=self.kv_cache.usage,
            num_steps=self.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_query_tokens=cache.prefix_query_tokens,
            prefix_hit_tokens=cache.prefix_hit_tokens,
            evict_count=cache.evict_count,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            block_size=self.kv_cache.block_size,
        )

    def shutdown(self) -> None:
        """Free the model; the object is not used again."""
        self.executor.shutdown()


def as_protocol_error(error: Exception) -> SageLLMError:
    """The error as the protocol names it; what is not ours becomes `internal`, with its own text."""
    if isinstance(error, SageLLMError):
        return error
    return InternalError(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
