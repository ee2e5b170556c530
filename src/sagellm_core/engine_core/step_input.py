"""A step as arrays: what the scheduler chose, written down for the model runner.

This runs between any two steps of a decode, with caches that the weights have just swept empty, where a numpy call
costs some microseconds whatever its size. So numbers are collected in lists and each array is made once.
"""

from __future__ import annotations

import numpy as np

from sagellm_core.engine_core.output import ScheduledRequest, SchedulerOutput
from sagellm_core.engine_core.request import EngineRequest
from sagellm_core.sampling.metadata import SamplingRow
from sagellm_kv_cache import BlockTables
from sagellm_protocol import BatchType


def build_scheduler_output(
    step_id: int, scheduled: list[tuple[EngineRequest, int]], tables: BlockTables
) -> SchedulerOutput:
    """The step that computes `num_tokens` tokens of each request, for the (request, num_tokens) in `scheduled`.

    Requests with one token stand first, and each has its blocks in `tables`.
    """
    block_size = tables.block_size
    input_ids: list[int] = []
    positions: list[int] = []
    slot_mapping: list[int] = []
    query_start_loc = [0]
    context_lens: list[int] = []
    logits_indices: list[int] = []
    requests: list[ScheduledRequest] = []
    num_decodes = 0
    for request, num_tokens in scheduled:
        start, token_ids, blocks = request.num_computed_tokens, request.token_ids, request.blocks
        end = start + num_tokens
        if num_tokens == 1:
            num_decodes += 1
            input_ids.append(token_ids[start])
            positions.append(start)
            slot_mapping.append(blocks[start // block_size].block_id * block_size + start % block_size)
        else:
            input_ids += token_ids[start:end]
            positions += range(start, end)
            slot_mapping += (blocks[p // block_size].block_id * block_size + p % block_size for p in range(start, end))
        query_start_loc.append(len(input_ids))
        context_lens.append(end)
        wants_sample = end == len(token_ids) and request.core.pooling is None
        if wants_sample:
            logits_indices.append(len(input_ids) - 1)
        requests.append(_scheduled_request(request, num_tokens, wants_sample=wants_sample))
    max_context_len = max(context_lens)
    return SchedulerOutput(
        step_id=step_id,
        batch_type=_batch_type(num_decodes, len(scheduled)),
        scheduled=tuple(requests),
        input_ids=np.array(input_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        query_start_loc=np.array(query_start_loc, dtype=np.int32),
        context_lens=np.array(context_lens, dtype=np.int32),
        block_tables=tables.rows([request.table_row for request, _ in scheduled], -(-max_context_len // block_size)),
        slot_mapping=np.array(slot_mapping, dtype=np.int64),
        logits_indices=np.array(logits_indices, dtype=np.int64),
        num_decodes=num_decodes,
        max_query_len=max(num_tokens for _, num_tokens in scheduled),
        max_context_len=max_context_len,
    )


def _scheduled_request(request: EngineRequest, num_tokens: int, *, wants_sample: bool) -> ScheduledRequest:
    core = request.core
    targets: tuple[int, ...] = ()
    if core.sampling.prompt_logprobs is not None:
        first = request.num_computed_tokens + 1
        last = min(first + num_tokens, request.num_prompt_tokens)
        targets = tuple(request.token_ids[first:last])
    return ScheduledRequest(
        request_id=core.request_id,
        num_scheduled_tokens=num_tokens,
        sampling_row=SamplingRow.from_request(core, request.token_ids, request.matcher) if wants_sample else None,
        want_hidden_states=core.want_hidden_states,
        pooling=core.pooling,
        prompt_logprob_targets=targets,
        num_prompt_logprobs=core.sampling.prompt_logprobs or 0,
    )


def _batch_type(num_decodes: int, num_requests: int) -> BatchType:
    if num_decodes == num_requests:
        return BatchType.DECODE
    return BatchType.MIXED if num_decodes else BatchType.PREFILL
