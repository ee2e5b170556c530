"""Log-probabilities of chosen tokens and of the most probable ones, for the rows that ask.

Values are log_softmax in float64 over float32 exponentials. Ranks are places in the order (probability descending,
token id ascending), so no two tokens share one and rank 1 is what greedy decoding takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sagellm_backend.reference.distribution import softmax_weights, ties_at, top_candidates


class Candidate(NamedTuple):
    """A token with its log-probability and its rank (1 = most probable)."""

    token_id: int
    logprob: float
    rank: int


class TokenLogprobs(NamedTuple):
    """The chosen token of a position, and the most probable candidates there, best first; rank None: not known."""

    token_id: int
    logprob: float
    rank: int | None
    top: tuple[Candidate, ...] = ()


def gather_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Report one token for each row of `logits` [R, V] float32, with the `num_top[i]` most probable ones of its row.

    Candidates of probability 0 are left out. A row's result doesn't depend on the other rows.
    """
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return []
    normalizers = softmax_weights(logits).log_normalizer
    chosen = torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    chosen_logits = logits.gather(1, chosen[:, None])[:, 0]
    chosen_logprobs = (chosen_logits.double() - normalizers).tolist()
    counts = [min(count, vocab_size) for count in num_top]
    tops = _top_logprobs(logits, normalizers, counts)
    found = []
    for i, (token_id, logprob, top) in enumerate(zip(token_ids, chosen_logprobs, tops, strict=True)):
        rank = next((candidate.rank for candidate in top if candidate.token_id == token_id), None)
        found.append(TokenLogprobs(token_id, logprob, rank or _rank(logits[i], token_id), top))
    return found


def _top_logprobs(logits: Tensor, normalizers: Tensor, counts: list[int]) -> list[tuple[Candidate, ...]]:
    most = max(counts)
    if most == 0:
        return [()] * len(counts)
    # One more than wanted shows whether the choice among equals at the end was arbitrary.
    values, ids = top_candidates(logits, min(most + 1, logits.shape[-1]))
    tied = ties_at(values, torch.tensor(counts, device=logits.device).clamp(min=1)).tolist()
    logprobs, token_ids = (values.double() - normalizers[:, None]).tolist(), ids.tolist()
    tops = []
    for i, count in enumerate(counts):
        row_ids, row_logprobs = token_ids[i][:count], logprobs[i][:count]
        if tied[i]:
            order = torch.sort(logits[i], descending=True, stable=True).indices[:count]
            row_ids, row_logprobs = order.tolist(), (logits[i][order].double() - normalizers[i]).tolist()
        ranked = enumerate(zip(row_ids, row_logprobs, strict=True), start=1)
        tops.append(tuple(Candidate(token, value, rank) for rank, (token, value) in ranked if value > -torch.inf))
    return tops


def _rank(logits: Tensor, token_id: int) -> int:
    """Place of a token in one row [V]: those above it, and equals with lower ids, come first."""
    value = logits[token_id]
    above = torch.count_nonzero(logits > value) + torch.count_nonzero(logits[:token_id] == value)
    return int(above) + 1
