"""Changes to single logits before a token is chosen: bias, masks, penalties.

All work in place on logits [R, V] float32 and touch only the entries they name, so a row without edits keeps its bits.
Ids outside the vocabulary are ignored: they have no logit, and must not reach into a neighbour's row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sagellm_core.sampling.metadata import LogitEdits, SamplingMetadata


def process_logits(logits: Tensor, meta: SamplingMetadata) -> None:
    """Apply, in this order: bias, banned and allowed tokens, repetition, presence and frequency penalties, masks."""
    if len(meta.bias):
        apply_bias(logits, meta.bias)
    if len(meta.banned):
        ban_tokens(logits, meta.banned)
    for row, token_ids in meta.allowed.items():
        allow_only(logits[row], token_ids)
    if len(meta.repetition):
        apply_repetition_penalty(logits, meta.repetition)
    if len(meta.additive):
        apply_additive_penalties(logits, meta.additive)
    for row, mask in meta.masks.items():
        apply_mask(logits[row], mask)


def apply_bias(logits: Tensor, bias: LogitEdits) -> None:
    """logit += bias (the `logit_bias` of the OpenAI API)."""
    rows, token_ids, amounts = _inside(logits, bias)
    logits[rows, token_ids] += amounts


def ban_tokens(logits: Tensor, banned: LogitEdits) -> None:
    """Logit = -inf."""
    rows, token_ids, _ = _inside(logits, banned)
    logits[rows, token_ids] = -torch.inf


def allow_only(logits: Tensor, token_ids: NDArray[np.int64]) -> None:
    """Logit = -inf for all others of one row [V]; a set without any id of the vocabulary leaves the row as it is."""
    inside = token_ids[(token_ids >= 0) & (token_ids < logits.shape[-1])]
    if len(inside):
        index = torch.from_numpy(inside).to(logits.device)
        kept = logits[index]
        logits.fill_(-torch.inf)
        logits[index] = kept


def apply_repetition_penalty(logits: Tensor, penalties: LogitEdits) -> None:
    """Logits of tokens seen in prompt or output: positive ones divided by the penalty, negative ones multiplied.

    Keskar et al., "CTRL", arXiv:1909.05858, in the form of transformers' RepetitionPenaltyLogitsProcessor: once for
    each distinct token. Duplicate entries are harmless: each computes the new value from the old logits.
    """
    rows, token_ids, amounts = _inside(logits, penalties)
    old = logits[rows, token_ids]
    logits[rows, token_ids] = torch.where(old > 0, old / amounts, old * amounts)


def apply_additive_penalties(logits: Tensor, penalties: LogitEdits) -> None:
    """logit -= presence * [count > 0] + frequency * count, counts over the output alone (the OpenAI API's formula)."""
    rows, token_ids, amounts = _inside(logits, penalties)
    logits[rows, token_ids] -= amounts


def apply_mask(logits: Tensor, mask: NDArray[np.int32]) -> None:
    """Logit = -inf for tokens of one row [V] whose bit is not set in `mask`, lowest bit first."""
    allowed = np.unpackbits(mask.view(np.uint8), count=logits.shape[-1], bitorder="little").view(np.bool_)
    if logits.device.type != "cpu":
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
        return
    # On one thread, and only the entries of the smaller side: to wake a team would cost more.
    values = logits.numpy()
    if 2 * np.count_nonzero(allowed) < len(allowed):
        places = np.flatnonzero(allowed)
        kept = values[places]
        values.fill(-np.inf)
        values[places] = kept
    else:
        values[np.flatnonzero(~allowed)] = -np.inf


def _inside(logits: Tensor, edits: LogitEdits) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of `edits` within the vocabulary, as tensors on the logits' device."""
    inside = (edits.token_ids >= 0) & (edits.token_ids < logits.shape[-1])
    arrays = (edits.rows[inside], edits.token_ids[inside], edits.amounts[inside])
    rows, token_ids, amounts = (torch.from_numpy(array).to(logits.device) for array in arrays)
    return rows, token_ids, amounts
