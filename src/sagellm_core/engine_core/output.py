"""What travels between scheduler and model runner: `SchedulerOutput` down, `ModelRunnerOutput` up.

`SchedulerOutput` is the whole input of a step: a worker keeps nothing between steps but weights and KV
tensors. Arrays are numpy, so that the object is cheap to build and to send to another process.
R = scheduled requests, T = scheduled tokens, S = tokens to sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sagellm_core.sampling.logprobs import TokenLogprobs
from sagellm_core.sampling.metadata import SamplingRow
from sagellm_protocol import BatchType

if TYPE_CHECKING:
    import torch

    from sagellm_core.models.pooling import Pooling


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step.

    `sampling_row` is None while the prompt is still incomplete: such a chunk computes KV and samples nothing.
    """

    request_id: str
    num_scheduled_tokens: int
    sampling_row: SamplingRow | None
    want_hidden_states: bool = False
    pooling: Pooling | None = None
    prompt_logprob_targets: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. Requests with a single token come first, which is what attention kernels like."""

    step_id: int
    batch_type: BatchType
    scheduled: tuple[ScheduledRequest, ...]
    input_ids: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    query_start_loc: NDArray[np.int32]  # [R + 1]
    context_lens: NDArray[np.int32]  # [R] tokens visible after this step
    block_tables: NDArray[np.int32]  # [R, most blocks of a request]
    slot_mapping: NDArray[np.int64]  # [T] where each token's K and V go
    logits_indices: NDArray[np.int64]  # [S] rows of T whose logits are sampled
    num_decodes: int  # requests with one token, at the front
    max_query_len: int
    max_context_len: int

    @property
    def num_scheduled_tokens(self) -> int:
        return len(self.input_ids)

    def with_starts(self) -> list[tuple[ScheduledRequest, int]]:
        """Each scheduled request with the row of its first token."""
        return list(zip(self.scheduled, self.query_start_loc[:-1].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """What a step produced; lists are parallel to the scheduled requests that sample, in order."""

    step_id: int
    sampled_token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)  # request -> [its tokens, H]
    pooled: dict[str, torch.Tensor] = field(default_factory=dict)  # request -> [H] float64, of its tokens in this step
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    fallback_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # place in the lists -> see SamplingRow
