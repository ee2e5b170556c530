"""The sampler: logits of a step in, one token for each row out.

Order of processing: logit bias -> banned and allowed tokens -> repetition, presence and frequency penalties -> mask ->
temperature -> top-k -> top-p -> min-p -> inverse CDF with one uniform of (seed, position). Greedy rows stop after the
penalties. From the temperature on it is one op of the backend, `sagellm_backend.reference.sample_tokens`. A row's path
depends on its own parameters and logits alone, hence so does its token, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sagellm_backend import reference
from sagellm_core.sampling.logprobs import TokenLogprobs, gather_logprobs
from sagellm_core.sampling.metadata import SamplingMetadata
from sagellm_core.sampling.penalties import process_logits


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token for each row, and log-probabilities for the rows that asked; by row, those of their fallback tokens."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    fallback_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)


class Sampler:
    """Callable, without a state: the same logits and metadata always give the same tokens.

    Args:
        sample_tokens: the backend's op of this name (`OpTable.sample_tokens`).
    """

    def __init__(self, sample_tokens: Callable[[Tensor, Tensor], Tensor] = reference.sample_tokens) -> None:
        self._sample_tokens = sample_tokens

    def __call__(self, logits: Tensor, meta: SamplingMetadata) -> SamplerOutput:
        """Choose a token for each row of `logits` [R, V] float32, which are overwritten.

        Log-probabilities are those of the model itself (log_softmax of the logits as they came, like the OpenAI API and
        vLLM's default), except for rows with `processed_logprobs`: bias, masks and penalties applied, no temperature.
        A row of NaN or of -inf alone gets some token of the vocabulary and harms no other row.
        """
        reported = _logits_to_report(logits, meta)
        if meta.edits_logits:
            process_logits(logits, meta)
            _add_processed(reported, logits, meta)
        token_ids: list[int] = self._sample_tokens(logits, torch.from_numpy(meta.wanted)).tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if meta.reports:
            found = gather_logprobs(
                reported,
                [token_ids[report.row] for report in meta.reports],
                [report.num_top for report in meta.reports],
            )
            for report, entry in zip(meta.reports, found, strict=True):
                logprobs[report.row] = entry
        return SamplerOutput(token_ids, logprobs, _fallback_logprobs(reported, meta) if meta.fallbacks else {})


def _logits_to_report(logits: Tensor, meta: SamplingMetadata) -> Tensor:
    """The rows of `logits` whose log-probabilities are wanted, safe from edits that are still to come."""
    if not meta.reports:
        return logits[:0]
    picked = _rows_of(logits, [report.row for report in meta.reports])
    return picked.clone() if picked is logits and meta.edits_logits else picked


def _add_processed(reported: Tensor, logits: Tensor, meta: SamplingMetadata) -> None:
    """Put the edited logits in the place of the model's own where a row wants to see those."""
    for i, report in enumerate(meta.reports):
        if report.processed:
            reported[i] = logits[report.row]


def _fallback_logprobs(reported: Tensor, meta: SamplingMetadata) -> dict[int, TokenLogprobs]:
    """What the rows with a second token to report say of it; `reported` are the rows of `meta.reports`."""
    picked = [(i, report) for i, report in enumerate(meta.reports) if report.row in meta.fallbacks]
    found = gather_logprobs(
        reported[[i for i, _ in picked]],
        [meta.fallbacks[report.row] for _, report in picked],
        [report.num_top for _, report in picked],
    )
    return {report.row: entry for (_, report), entry in zip(picked, found, strict=True)}


def _rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """`logits` at `rows` (rising): itself if those are all, else a copy."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
