"""Sampling written down naively, one row at a time in float64: what the vectorised sampler must agree with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sagellm_core.sampling import rng
from sagellm_core.sampling.metadata import SamplingMetadata, SamplingRow
from sagellm_core.sampling.sampler import Sampler, SamplerOutput
from sagellm_protocol import SamplingParams

Row = NDArray[np.float64]


def softmax(logits: Row) -> Row:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def process(logits: NDArray[np.float32], row: SamplingRow) -> Row:
    """Bias, masks and penalties by their formulas."""
    out = logits.astype(np.float64)
    for token_id, amount in (row.sampling.logit_bias or {}).items():
        if token_id < len(out):
            out[token_id] += amount
    for token_id in row.banned_token_ids:
        out[token_id] = -np.inf
    if row.allowed_token_ids is not None:
        for token_id in set(range(len(out))) - set(row.allowed_token_ids):
            out[token_id] = -np.inf
    for token_id in {*row.prompt_token_ids, *row.output_token_ids}:
        penalty = row.sampling.repetition_penalty
        out[token_id] = out[token_id] / penalty if out[token_id] > 0 else out[token_id] * penalty
    for token_id in set(row.output_token_ids):
        count = list(row.output_token_ids).count(token_id)
        out[token_id] -= row.sampling.frequency_penalty * count + row.sampling.presence_penalty
    if row.mask is not None:
        for token_id in range(len(out)):
            if not row.mask[token_id // 32] >> token_id % 32 & 1:
                out[token_id] = -np.inf
    return out


def order_of(logits: Row) -> NDArray[np.int64]:
    """Token ids by falling logit, equals by rising id."""
    return np.lexsort((np.arange(len(logits)), -logits))


def kept_tokens(logits: Row, params: SamplingParams) -> set[int]:
    """The tokens that temperature, top-k, top-p and min-p leave, each filter renormalising what the one before left."""
    scaled = logits / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-params.top_k], -np.inf, scaled)
    if params.top_p < 1:
        order = order_of(scaled)
        before = np.cumsum(softmax(scaled)[order]) - softmax(scaled)[order]
        scaled[order[1:][before[1:] >= params.top_p]] = -np.inf
    probabilities = softmax(scaled)
    scaled[probabilities < params.min_p * probabilities.max()] = -np.inf
    return set(np.flatnonzero(scaled > -np.inf).tolist())


def draw(logits: NDArray[np.float32], row: SamplingRow) -> tuple[int, float]:
    """The token of `row` and how far the uniform was from giving another one."""
    params = row.sampling
    processed = process(logits, row)
    if row.is_greedy:
        return int(processed.argmax()), 1.0
    kept = kept_tokens(processed, params)
    sorts = 0 < params.top_k < len(processed) or params.top_p < 1
    order = [t for t in (order_of(processed).tolist() if sorts else range(len(processed))) if t in kept]
    cumulative = np.cumsum(softmax(processed[order] / params.temperature))
    uniform = rng.uniforms(np.array([row.seed], dtype=np.uint64), np.array([row.position]))[0]
    index = min(int(np.searchsorted(cumulative, uniform, side="right")), len(order) - 1)
    edges = np.concatenate([[0.0], cumulative[:-1]])
    return order[index], float(np.abs(edges - uniform).min())


def sample(logits: NDArray[np.float32], rows: list[SamplingRow]) -> SamplerOutput:
    """The sampler on a copy of `logits` [R, V]."""
    import torch

    return Sampler()(torch.from_numpy(logits.copy()), SamplingMetadata.from_requests(rows))
