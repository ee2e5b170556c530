"""A request inside the engine: one state, `num_computed_tokens` catching up with `num_tokens`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sagellm_core.engine_core.types import EngineCoreRequest, RequestTimings

if TYPE_CHECKING:
    import torch

    from sagellm_core.sampling.logprobs import TokenLogprobs
    from sagellm_core.structured import GrammarMatcher
    from sagellm_kv_cache import Block


class RequestStatus(enum.Enum):
    """Where a request stands. PREEMPTED waits like WAITING, but has tokens of its own to compute again."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class EngineRequest:
    """The engine's own record of a request; only the scheduler writes it.

    `token_ids` is prompt + output. A request owes `num_tokens - num_computed_tokens` tokens of computation:
    a whole prompt at first, one token in decode, prompt and output again after a preemption.
    """

    core: EngineCoreRequest
    sequence_number: int
    token_ids: list[int]
    num_prompt_tokens: int
    timings: RequestTimings
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    table_row: int = -1
    blocks: list[Block] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    pooled: torch.Tensor | None = None  # of the tokens computed so far
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    matcher: GrammarMatcher | None = None  # where the output stands in `core.grammar`

    @classmethod
    def from_core(cls, core: EngineCoreRequest, sequence_number: int, now: float) -> EngineRequest:
        token_ids = [*core.prompt_token_ids, *core.resumed_token_ids]
        timings = RequestTimings(queued_at=now)
        request = cls(core, sequence_number, token_ids, len(core.prompt_token_ids), timings)
        if core.grammar is not None:
            emitted = token_ids[request.num_prompt_tokens - core.sampled_prefix_len :]
            request.matcher = core.grammar.start(core.sampling.max_tokens - request.num_output_tokens, emitted)
        return request

    @property
    def request_id(self) -> str:
        return self.core.request_id

    @property
    def cache_salt(self) -> str | None:
        return self.core.cache_salt

    @property
    def lora_id(self) -> str | None:
        return self.core.lora_id

    @property
    def read_prefix_cache(self) -> bool:
        return self.core.read_prefix_cache

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"EngineRequest({self.request_id!r}, {self.status.value}, computed {self.num_computed_tokens} of "
            f"{self.num_tokens}, {len(self.blocks)} blocks)"
        )
